"""Exact search: the similarity of a pair and the row of its reference become one integer, the key.

A similarity is a float64 inner product, rounded, so it depends on neither device, tile size nor threads. Keys sort by
similarity, then by lower row. Float32 products only decide which pairs need no float64 product.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from glsd.errors import UserError

NOTHING = -(2**63 - 1)  # below every key
_ROW_BITS = 26
_NUMBERS_HELD = 2**24  # similarities or gathered coordinates held at a time: 128 MiB in float64
_QUERIES = 1024  # queries at a time
_ROWS = 4096  # rows converted at a time


@dataclass(frozen=True, kw_only=True)
class Search:
    """Queries and references as float32 vectors of length <= 1, and how they are compared; see comparable."""

    query: Float32[Tensor, "q d"]
    gallery: Float32[Tensor, "n d"]
    euclidean: bool

    @property
    def steps(self) -> float:
        """Similarities are compared in steps of 1 / steps: closer ones are equal."""
        return 2.0**35 if self.euclidean else 1e9

    @property
    def band(self) -> float:
        """Largest error of a float32 product: every one of its roundings in the same direction."""
        size = 2.0 if self.euclidean else 1.0  # of the sum of the products' absolute values
        return (self.query.shape[1] + 8) * 2**-24 * size + 2 / self.steps

    def left(self, rows: Int64[Tensor, " m"] | slice) -> Float64[Tensor, "m e"]:
        """Return queries such that left @ right.T is the similarity: the cosine, or -(squared distance) / 2."""
        x = self.query[rows].double()
        if not self.euclidean:
            return x
        half = x.square().sum(dim=1, keepdim=True) / 2
        return torch.cat([x, -half, torch.ones_like(half)], dim=1)

    def right(self, rows: Int64[Tensor, " m"] | slice) -> Float64[Tensor, "m e"]:
        """Return references, see left."""
        x = self.gallery[rows].double()
        if not self.euclidean:
            return x
        half = x.square().sum(dim=1, keepdim=True) / 2
        return torch.cat([x, torch.ones_like(half), -half], dim=1)

    def float32_factors(self) -> tuple[Float32[Tensor, "q e"], Float32[Tensor, "n e"]]:
        """Return left and right of all rows in float32; their products are the similarities within band."""
        if not self.euclidean:
            return self.query, self.gallery
        left, right = (
            torch.cat([part(slice(i, i + _ROWS)).float() for i in range(0, length, _ROWS)])
            for part, length in ((self.left, len(self.query)), (self.right, len(self.gallery)))
        )
        return left, right

    def keys(
        self, similarity: Float64[Tensor, "*shape"], row: Int64[Tensor, "..."]
    ) -> Int64[Tensor, "*shape"]:
        """Return one integer per pair: larger = more similar, or as similar and of a lower row."""
        return ((similarity * self.steps).round().long() << _ROW_BITS) + (2**_ROW_BITS - 1 - row)

    def similarity(self, keys: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Return the rounded similarities that keys hold."""
        return (keys >> _ROW_BITS).double() / self.steps


def rows_of(keys: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Return the rows of the references that keys hold."""
    return 2**_ROW_BITS - 1 - (keys & (2**_ROW_BITS - 1))


def least_keys(keys: Int64[Tensor, "*shape"]) -> Int64[Tensor, "*shape"]:
    """Return the smallest key of the same similarity as each key."""
    return (keys >> _ROW_BITS) << _ROW_BITS


def comparable(
    query: Float[Tensor, "q d"], gallery: Float[Tensor, "n d"], *, euclidean: bool
) -> tuple[Float32[Tensor, "q d"], Float32[Tensor, "n d"]]:
    """Return vectors for a Search: normalized (cosine), or scaled by one power of two (Euclidean: exact).

    The same tensor given twice is returned twice.
    """
    alone = gallery is query
    query, gallery = query.float(), gallery.float()
    if euclidean:
        peak = max(float(x.abs().max()) for x in (query, gallery)) * query.shape[1] ** 0.5
        scale = 2.0 ** -max(-100, min(126, math.frexp(peak)[1]))
        query = query * scale
        return query, query if alone else gallery * scale
    query = F.normalize(query, dim=1)
    return query, query if alone else F.normalize(gallery, dim=1)


def nearest(search: Search, k: int) -> Int64[Tensor, "q k"]:
    """Return the keys of each query's k nearest references, descending."""
    rows = torch.arange(len(search.query), device=search.query.device)
    with torch.no_grad(), full_float32():
        left, right = search.float32_factors()
        return torch.cat([_nearest(search, block, k, left[block], right) for block in rows.split(_QUERIES)])


def _nearest(
    search: Search,
    rows: Int64[Tensor, " m"],
    k: int,
    left: Float32[Tensor, "m e"],
    right: Float32[Tensor, "n e"],
) -> Int64[Tensor, "m k"]:
    """Find spare candidates in float32 and order them in float64; where they may not suffice, compute every product."""
    num_found = min(len(right), k + max(32, k // 4))
    products, columns = _candidates(left, right, num_found)
    piece = max(1, _NUMBERS_HELD // (num_found * right.shape[1]))
    keys = torch.cat(
        [
            search.keys(
                torch.bmm(search.right(c.flatten()).unflatten(0, c.shape), search.left(r)[:, :, None])[
                    ..., 0
                ],
                c,
            )
            for r, c in zip(rows.split(piece), columns.split(piece), strict=True)
        ]
    )
    best = keys.topk(k, dim=1).values
    # What was left out is at most the last product, within the rounding.
    reach = products[:, -1].double() + search.band
    doubtful = (search.similarity(best[:, -1]) <= reach) & (num_found < len(right))
    if doubtful.any():
        best[doubtful] = _of_all(search, rows[doubtful], k)
    return best


def _candidates(
    left: Float32[Tensor, "m e"], right: Float32[Tensor, "n e"], count: int
) -> tuple[Float32[Tensor, "m c"], Int64[Tensor, "m c"]]:
    """Return the largest products of each row of left, descending, and the rows of right that they are of."""
    products = left.new_empty(len(left), 0)
    columns = torch.empty(len(left), 0, dtype=torch.int64, device=left.device)
    tile = max(count, _NUMBERS_HELD // 4 // max(len(left), 1))
    for start in range(0, len(right), tile):
        of_tile = left @ right[start : start + tile].T
        largest, places = of_tile.topk(min(count, of_tile.shape[1]), dim=1)
        products, order = torch.cat([products, largest], dim=1).topk(
            min(count, products.shape[1] + largest.shape[1]), dim=1
        )
        columns = torch.cat([columns, places + start], dim=1).gather(1, order)
    return products, columns


def _of_all(search: Search, rows: Int64[Tensor, " m"], k: int) -> Int64[Tensor, "m k"]:
    """Compute every product in float64, tile by tile of the gallery."""
    left = search.left(rows)
    best = torch.empty(len(rows), 0, dtype=torch.int64, device=rows.device)
    tile = max(k, _NUMBERS_HELD // max(len(rows), 1))
    for start in range(0, len(search.gallery), tile):
        right = search.right(slice(start, start + tile))
        columns = torch.arange(start, start + len(right), device=rows.device)
        best = torch.cat([best, search.keys(left @ right.T, columns)], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return best


@contextlib.contextmanager
def full_float32() -> Iterator[None]:
    """Multiply in full float32: no TensorFloat-32 or bfloat16 inside of products, and no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def check_labeled(**sets: tuple[Tensor, Tensor]) -> None:
    """Raise UserError unless each set (features, labels) can be measured.

    A set must not be empty. Its features must be finite floating-point numbers, of one width in all sets. Each image
    must have a label (0 or more).
    """
    for name, (features, labels) in sets.items():
        if not features.numel():
            raise UserError(f"the {name} set is empty")
        if not features.is_floating_point():
            raise UserError(f"{name} features are {features.dtype}: expected floating-point numbers")
        if not features.isfinite().all():
            raise UserError(
                f"{name} features are not finite: the network diverged, take an earlier checkpoint"
            )
        unlabeled = int((labels < 0).sum())
        if unlabeled:
            raise UserError(
                f"{unlabeled} of {len(labels)} {name} images have no label: pack a folder that has one "
                "subfolder per class"
            )
    widths = {name: features.shape[1] for name, (features, _) in sets.items()}
    if len(set(widths.values())) > 1:
        raise UserError(f"the sets have features of different widths: {widths}")


def known_labels(
    train_labels: Int64[Tensor, " n"],
    val_labels: Int64[Tensor, " q"],
    *,
    names: tuple[str, str] = ("the train set", "the val set"),
) -> Bool[Tensor, " q"]:
    """Return which val labels some train image has; UserError, with the names of both sets, if none."""
    known = torch.isin(val_labels, train_labels)
    if not known.any():
        raise UserError(
            f"no class of {names[1]} is in {names[0]}, so every answer would be wrong: compare sets of the same classes; sets "
            "without a common class, as glsd pack split makes them, are for retrieval"
        )
    return known
