"""Ranks from float32 products, tile by tile: what they leave open is computed in float64.

A float32 product is off by at most ``Search.band``. So a tile says of most pairs on which side of the query's first
positive they are; the few others are computed again. The tile also leaves behind the largest product of every CHUNK
references: only chunks whose largest reaches the first R can hold what MAP@R needs.
"""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float32, Float64, Int64
from torch import Tensor

from glsd.metrics.ranks import (
    NOTHING,
    QueryRanks,
    Search,
    ahead_of,
    precision_at_r,
    write,
)

CHUNK = 64
_TILE = {"cpu": 2048, "cuda": 8192}
_NUMBERS_HELD = 2**22  # coordinates gathered in float64 at a time: 32 MiB
_PAIRS_HELD = 2**17  # pairs of a query and a chunk at a time: at most 64 MiB of keys
_ROW_COST = 8  # a query without a pair is held as well
_ROWS = 4096


def rank_by_tiles(
    search: Search,
    relevant: Int64[Tensor, " q"],
    positives: Int64[Tensor, "q r"],
    ranks: QueryRanks,
    tile: int | None = None,
    furthest: int | None = None,
) -> Int64[Tensor, " m"]:
    """Write the ranks of the queries that have positives; return those with too many pairs left open.

    A first rank known to be beyond ``furthest`` and R is not counted to its end.
    """
    enough = relevant.clamp(min=len(search.gallery) if furthest is None else furthest)
    sweep = Sweep(search, positives[:, 0], enough, tile or _TILE.get(search.query.device.type, 2048))
    with torch.no_grad(), _full_float32():
        sweep.run()
    known = (positives[:, 0] != NOTHING) & ~sweep.given_up
    rows = known.nonzero()[:, 0]
    write(ranks, rows, sweep.ahead[rows], sweep.pessimistic_ahead[rows])
    rows = (known & (sweep.ahead < relevant)).nonzero()[:, 0]
    if len(rows):
        negatives = first_negatives(search, rows, relevant, positives, sweep.maxima)
        precision = precision_at_r(positives[rows], negatives, relevant[rows])
        write(ranks, rows, sweep.ahead[rows], sweep.pessimistic_ahead[rows], precision)
    return sweep.given_up.nonzero()[:, 0]


class Sweep:
    """One pass over all products: negatives ahead of each query's first positive, and the chunks' largest."""

    def __init__(
        self, search: Search, first: Int64[Tensor, " q"], enough: Int64[Tensor, " q"], tile: int
    ) -> None:
        self.search, self.first, self.enough = search, first, enough
        self.tile = -(-min(tile, max(len(search.query), len(search.gallery))) // CHUNK) * CHUNK
        self.symmetric = search.query is search.gallery
        q, n, device = len(search.query), len(search.gallery), search.query.device
        self.ahead = torch.zeros(q, dtype=torch.int64, device=device)
        self.pessimistic_ahead = torch.zeros_like(self.ahead)
        self.open = torch.zeros_like(self.ahead)  # pairs left open so far
        self.most_open = max(CHUNK, n // CHUNK)  # beyond, all pairs of a query cost less
        self.given_up = torch.zeros(q, dtype=torch.bool, device=device)
        self.maxima = torch.empty(q, -(-n // CHUNK), device=device)
        middle = search.similarity(first).masked_fill(first == NOTHING, torch.inf)
        self.above, self.below = (middle + search.band).float(), (middle - search.band).float()
        self.marks = torch.empty(self.tile * self.tile, device=device)
        self.left, self.right = float32_factors(search)

    def run(self) -> None:
        q, n, tile = len(self.search.query), len(self.search.gallery), self.tile
        for i in range(0, q, tile):
            rows = slice(i, min(i + tile, q))
            left = _multiplicand(_padded(self.left[rows]))
            for j in range(i if self.symmetric else 0, n, tile):
                columns = slice(j, min(j + tile, n))
                product = _product(left, _padded(self.right[columns]))
                self._leave_out(product, rows, columns)
                high, wide = product.shape
                marks = self.marks[: high * wide].view_as(product)
                self._look(rows, j, *(x.view(high, -1, CHUNK) for x in (product, marks)))
                if self.symmetric and j > i:
                    turned = (x.view(-1, CHUNK, wide).permute(2, 0, 1) for x in (product, marks))
                    self._look(columns, i, *turned)

    def _leave_out(self, product: Float32[Tensor, "h w"], rows: slice, columns: slice) -> None:
        product[rows.stop - rows.start :] = -torch.inf
        product[:, columns.stop - columns.start :] = -torch.inf
        own = self.search.own[rows]
        inside = ((own >= columns.start) & (own < columns.stop)).nonzero()[:, 0]
        product[inside, own[inside] - columns.start] = -torch.inf

    def _look(
        self,
        rows: slice,
        column: int,
        product: Float32[Tensor, "h c m"],
        marks: Float32[Tensor, "h c m"],
    ) -> None:
        """Take in the products of some queries with the references from ``column`` on, chunk by chunk."""
        product, marks = product[: rows.stop - rows.start], marks[: rows.stop - rows.start]
        chunk = column // CHUNK
        maxima = self.maxima[rows, chunk : chunk + product.shape[1]]
        maxima.copy_(_amax(product)[:, : maxima.shape[1]])
        live = self.above[rows].isfinite().nonzero()[:, 0]
        queries = rows.start + live
        if not len(live):
            return
        if 2 * len(live) < len(product):  # leave out those that are settled
            product = product[live]
            marks = torch.empty_like(product)
        else:
            queries = torch.arange(rows.start, rows.stop, device=live.device)
        above, below = self.above[queries, None, None], self.below[queries, None, None]
        sure = _sum(torch.gt(product, above, out=marks))
        left_open = _sum(torch.gt(product, below, out=marks)) - sure
        count = sure.sum(dim=1).long()
        self.ahead[queries] += count
        self.pessimistic_ahead[queries] += count
        self.open[queries] += left_open.sum(dim=1).long()
        too_many = self.open[queries] > self.most_open
        self.given_up[queries] |= too_many
        done = too_many | (self.ahead[queries] >= self.enough[queries])
        row, part = ((left_open > 0) & ~done[:, None]).nonzero(as_tuple=True)
        near = product[row, part]
        near = (near > below[row, 0]) & (near <= above[row, 0])
        which, member = near.nonzero(as_tuple=True)
        self.above[queries[done]] = torch.inf
        self.below[queries[done]] = torch.inf
        self._compute(queries[row[which]], column + part[which] * CHUNK + member)

    def _compute(self, rows: Int64[Tensor, " m"], columns: Int64[Tensor, " m"]) -> None:
        """Decide pairs in float64."""
        search = self.search
        negative = search.query_labels[rows] != search.gallery_labels[columns]
        rows, columns = rows[negative], columns[negative]
        piece = max(1, _NUMBERS_HELD // search.query.shape[1])
        for r, c in zip(rows.split(piece), columns.split(piece), strict=True):
            keys = search.keys((search.left(r) * search.right(c)).sum(dim=1), c)
            ahead, pessimistic = ahead_of(keys, self.first[r])
            self.ahead.index_add_(0, r, ahead.long())
            self.pessimistic_ahead.index_add_(0, r, pessimistic.long())


def float32_factors(search: Search) -> tuple[Float32[Tensor, "q e"], Float32[Tensor, "n e"]]:
    """Return left and right of all queries and references, whose products are the similarities within band."""
    if not search.euclidean:
        return search.query, search.gallery
    left, right = (
        torch.cat([part(slice(i, i + _ROWS)).float() for i in range(0, length, _ROWS)])
        for part, length in ((search.left, len(search.query)), (search.right, len(search.gallery)))
    )
    return left, right


def first_negatives(
    search: Search,
    rows: Int64[Tensor, " m"],
    relevant: Int64[Tensor, " q"],
    positives: Int64[Tensor, "q r"],
    maxima: Float32[Tensor, "q c"],
) -> Int64[Tensor, "m r"]:
    """Return the keys of each query's first negatives, descending: all that can be among its first R.

    R chunks hold a reference each that is at least as similar as the R-th largest chunk, so nothing below it is
    among the first R; nor does anything matter that is below the last positive.
    """
    counts = torch.empty_like(rows)
    floors = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    most = min(positives.shape[1], maxima.shape[1])
    for place in torch.arange(len(rows), device=rows.device).split(_ROWS):
        r, largest = relevant[rows[place]], maxima[rows[place]]
        kth = largest.topk(most, dim=1).values.gather(1, (r - 1).clamp(max=most - 1)[:, None])[:, 0]
        kth = torch.where(r <= most, kth.double(), -torch.inf)
        last = search.similarity(positives[rows[place]].gather(1, r[:, None] - 1)[:, 0])
        floors[place] = torch.maximum(kth - 2 * search.band, last - search.band)
        counts[place] = (largest >= floors[place, None].float()).sum(dim=1)
    negatives = torch.full((len(rows), positives.shape[1]), NOTHING, device=rows.device)
    groups = ((counts + _ROW_COST).cumsum(0) // _PAIRS_HELD).unique_consecutive(return_counts=True)[1]
    for place in torch.arange(len(rows), device=rows.device).split(groups.tolist()):
        near = maxima[rows[place]] >= floors[place, None].float()
        found = _negatives_of(search.subset(rows[place]), near, floors[place])
        negatives[place] = _first_of_each(*found, len(place), positives.shape[1])
    return negatives


def _negatives_of(
    search: Search, near: Bool[Tensor, "m c"], floors: Float64[Tensor, " m"]
) -> tuple[Int64[Tensor, " k"], Int64[Tensor, " k"]]:
    """Return row and key of every negative above its row's floor in the chunks near it, chunk by chunk."""
    chunk, row = near.T.nonzero(as_tuple=True)
    rows, keys = [row[:0]], [row[:0]]
    for c, block in zip(
        chunk.unique().tolist(), row.split(near.sum(dim=0)[near.any(dim=0)].tolist()), strict=True
    ):
        members = slice(c * CHUNK, min((c + 1) * CHUNK, len(search.gallery)))
        similarity = search.left(block) @ search.right(members).T
        negative = search.query_labels[block, None] != search.gallery_labels[members]
        i, j = (negative & (similarity >= floors[block, None])).nonzero(as_tuple=True)
        rows.append(block[i])
        keys.append(search.keys(similarity[i, j], members.start + j))
    return torch.cat(rows), torch.cat(keys)


def _first_of_each(
    rows: Int64[Tensor, " k"], keys: Int64[Tensor, " k"], num_rows: int, width: int
) -> Int64[Tensor, "m r"]:
    """Return the largest keys of every row, descending, filled up with NOTHING."""
    order = keys.argsort(descending=True)
    order = order[rows[order].argsort(stable=True)]
    rows, keys = rows[order], keys[order]
    place = torch.arange(len(rows), device=rows.device) - torch.searchsorted(rows, rows)
    first = torch.full((num_rows, width), NOTHING, device=rows.device)
    kept = place < width
    first[rows[kept], place[kept]] = keys[kept]
    return first


def _sum(x: Float32[Tensor, "h c m"]) -> Float32[Tensor, "h c"]:
    # Over the layout in memory: into a result of another layout it is ten times slower.
    return x.sum(dim=2) if x.stride(2) == 1 else x.permute(1, 2, 0).sum(dim=1).T


def _amax(x: Float32[Tensor, "h c m"]) -> Float32[Tensor, "h c"]:
    return x.amax(dim=2) if x.stride(2) == 1 else x.permute(1, 2, 0).amax(dim=1).T


def _padded(x: Float32[Tensor, "m e"]) -> Float32[Tensor, "k e"]:
    """Fill up with zero rows to whole chunks."""
    return F.pad(x, (0, 0, 0, -len(x) % CHUNK))


def _multiplicand(x: Tensor) -> Tensor:
    # On the CPU, oneDNN multiplies in float32 up to twice as fast as what torch.mm calls.
    return x.to_mkldnn() if x.device.type == "cpu" and torch.backends.mkldnn.is_available() else x


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Return left @ right.T as an ordinary tensor."""
    product = F.linear(left, right)
    return product.to_dense() if product.is_mkldnn else product


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """No TensorFloat-32 or bfloat16 inside of products, whatever the program has allowed, and no autocast."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
