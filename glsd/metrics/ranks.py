"""The exact order of retrieval: one number per pair of images, and what follows from the order for a query.

The similarity of a pair is a rounded float64 inner product (Search.keys), so it depends on neither backend, tile,
nor threads. Packed with the index it becomes one integer, the key: a larger key comes earlier. Float32 products
(rank_tiles, rank_faiss) only decide which pairs need not be looked at.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

NOTHING = -(2**63 - 1)  # below every key
_INDEX_BITS = 26
_NUMBERS_HELD = 2**23  # numbers of a float64 block: 64 MiB
_ROWS = 256


class QueryRanks(NamedTuple):
    """What the order of its references says about every query (a query without a positive is *lone*).

    ``pessimistic`` puts the negatives first among references of equal similarity; else the lower index is first.
    """

    num_relevant: Int64[Tensor, " q"]  # R: references of the query's class, itself not counted
    first_rank: Int64[Tensor, " q"]  # place of the first positive, counted from 1; -1 = lone
    map_at_r: Float64[Tensor, " q"]  # NaN = lone
    r_precision: Float64[Tensor, " q"]  # NaN = lone
    pessimistic_first_rank: Int64[Tensor, " q"]
    pessimistic_map_at_r: Float64[Tensor, " q"]
    pessimistic_r_precision: Float64[Tensor, " q"]


@dataclass(frozen=True, kw_only=True)
class Search:
    """Queries and references as float32 vectors of length <= 1, their labels, and how they are compared."""

    query: Float32[Tensor, "q d"]
    query_labels: Int64[Tensor, " q"]
    gallery: Float32[Tensor, "n d"]
    gallery_labels: Int64[Tensor, " n"]
    own: Int64[Tensor, " q"]  # the query's own row in the gallery, which is no reference of it; -1 = none
    euclidean: bool

    @property
    def steps(self) -> float:
        """Similarities are compared in steps of 1 / steps: closer ones are equal."""
        return 2.0**35 if self.euclidean else 1e9

    @property
    def band(self) -> float:
        """By how much a float32 product may be off: every one of its roundings in the same direction."""
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

    def keys(
        self, similarity: Float64[Tensor, "*shape"], column: Int64[Tensor, "..."]
    ) -> Int64[Tensor, "*shape"]:
        """Return one integer per pair: larger = more similar, or as similar and of a lower index."""
        return ((similarity * self.steps).round().long() << _INDEX_BITS) + (2**_INDEX_BITS - 1 - column)

    def similarity(self, keys: Int64[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """Return the rounded similarity that a key holds."""
        return (keys >> _INDEX_BITS).double() / self.steps

    def subset(self, rows: Int64[Tensor, " m"]) -> "Search":
        """Return the search of some of the queries."""
        return replace(self, query=self.query[rows], query_labels=self.query_labels[rows], own=self.own[rows])

    def num_relevant(self) -> Int64[Tensor, " q"]:
        """Return R of every query."""
        classes, counts = self.gallery_labels.unique(return_counts=True)
        place = torch.searchsorted(classes, self.query_labels).clamp(max=len(classes) - 1)
        found = classes[place] == self.query_labels
        return torch.where(found, counts[place] - (self.own >= 0).long(), 0)


def as_search(
    query: Float[Tensor, "q d"],
    query_labels: Int64[Tensor, " q"],
    gallery: Float[Tensor, "n d"] | None,
    gallery_labels: Int64[Tensor, " n"] | None,
    *,
    euclidean: bool,
) -> Search:
    """Return the search with vectors normalized (cosine), or scaled by one power of two (Euclidean: exact)."""
    query = query.float()
    if euclidean:
        peak = max(float(x.abs().max()) for x in (query, gallery) if x is not None) * query.shape[1] ** 0.5
        scale = 2.0 ** -max(-100, min(126, math.frexp(peak)[1]))
        query = query * scale
        gallery = None if gallery is None else gallery.float() * scale
    else:
        query = F.normalize(query, dim=1)
        gallery = None if gallery is None else F.normalize(gallery.float(), dim=1)
    own = torch.arange(len(query), device=query.device)
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = query, query_labels
    else:
        own = torch.full_like(own, -1)
    return Search(
        query=query,
        query_labels=query_labels.to(query.device),
        gallery=gallery,
        gallery_labels=gallery_labels.to(query.device),
        own=own,
        euclidean=euclidean,
    )


def positive_keys(
    search: Search, relevant: Int64[Tensor, " q"], wanted: Bool[Tensor, " q"]
) -> Int64[Tensor, "q r"]:
    """Return the keys of every wanted query's positives, descending, filled up with NOTHING.

    Queries and references go class by class, so that a block of queries meets little but its positives.
    """
    width = int(relevant[wanted].max())
    keys = torch.full((len(relevant), width), NOTHING, device=relevant.device)
    rows = wanted.nonzero()[:, 0]
    rows = rows[search.query_labels[rows].argsort(stable=True)]
    columns = torch.isin(search.gallery_labels, search.query_labels[rows]).nonzero()[:, 0]
    columns = columns[search.gallery_labels[columns].argsort(stable=True)]
    labels, row_labels = search.gallery_labels[columns], search.query_labels[rows]
    starts = torch.searchsorted(labels, row_labels).tolist()
    stops = torch.searchsorted(labels, row_labels, right=True).tolist()
    for first in range(0, len(rows), _ROWS):
        block = rows[first : first + _ROWS]
        met = columns[starts[first] : stops[first + len(block) - 1]]
        found = search.keys(search.left(block) @ search.right(met).T, met)
        other = search.query_labels[block, None] != search.gallery_labels[met]
        found.masked_fill_(other | (search.own[block, None] == met), NOTHING)
        found = found.topk(min(width, len(met)), dim=1).values
        keys[block, : found.shape[1]] = found
    return keys


class Precision(NamedTuple):
    """MAP@R and R-precision of some queries, in both conventions of QueryRanks."""

    map_at_r: Float64[Tensor, " m"]
    r_precision: Float64[Tensor, " m"]
    pessimistic_map_at_r: Float64[Tensor, " m"]
    pessimistic_r_precision: Float64[Tensor, " m"]


def precision_at_r(
    positives: Int64[Tensor, "m r"], negatives: Int64[Tensor, "m r"], relevant: Int64[Tensor, " m"]
) -> Precision:
    """Return the precisions from the keys of all positives and of the first R negatives, both descending.

    The i-th positive has rank i + (negatives ahead of it); it counts if that is at most R.
    """
    i = torch.arange(1, positives.shape[1] + 1, device=positives.device)
    backwards = (-negatives).contiguous()
    least = (positives >> _INDEX_BITS) << _INDEX_BITS  # the smallest key of the same similarity
    both = []
    for ahead in (
        torch.searchsorted(backwards, -positives),
        torch.searchsorted(backwards, -least, right=True),
    ):
        rank = i + ahead
        hit = (i <= relevant[:, None]) & (rank <= relevant[:, None])
        # A running sum adds in the same order however wide the table is.
        total = torch.where(hit, i.double() / rank, 0.0).cumsum(dim=1)[:, -1]
        both += [total / relevant, hit.sum(dim=1).double() / relevant]
    return Precision(*both)


def ahead_of(
    keys: Int64[Tensor, "*shape"], first: Int64[Tensor, "..."]
) -> tuple[Bool[Tensor, "*shape"], Bool[Tensor, "*shape"]]:
    """Return which negatives precede the first positive: in the order of keys, and pessimistically."""
    return keys > first, (keys >> _INDEX_BITS) >= (first >> _INDEX_BITS)


def rank_every_pair(
    search: Search, relevant: Int64[Tensor, " q"], rows: Int64[Tensor, " m"], ranks: QueryRanks
) -> None:
    """Write the ranks of some queries, each pair computed in float64: for huge classes and masses of ties."""
    n = len(search.gallery)
    for block in rows.split(max(1, _NUMBERS_HELD // n)) if len(rows) else ():
        keys = torch.empty(len(block), n, dtype=torch.int64, device=rows.device)
        left = search.left(block)
        for columns in torch.arange(n, device=rows.device).split(max(1, _NUMBERS_HELD // 2 // left.shape[1])):
            piece = slice(int(columns[0]), int(columns[-1]) + 1)
            keys[:, piece] = search.keys(left @ search.right(piece).T, columns)
        same = search.query_labels[block, None] == search.gallery_labels
        keys.masked_fill_(search.own[block, None] == torch.arange(n, device=rows.device), NOTHING)
        width = int(relevant[block].max())
        positives = keys.masked_fill(~same, NOTHING).topk(width, dim=1).values
        keys.masked_fill_(same, NOTHING)
        negatives = keys.topk(width, dim=1).values
        ahead, pessimistic = (mask.sum(dim=1) for mask in ahead_of(keys, positives[:, :1]))
        write(ranks, block, ahead, pessimistic, precision_at_r(positives, negatives, relevant[block]))


def write(
    ranks: QueryRanks,
    rows: Int64[Tensor, " m"],
    ahead: Int64[Tensor, " m"],
    pessimistic_ahead: Int64[Tensor, " m"],
    precision: Precision | None = None,
) -> None:
    """Write what is known of some queries; without precision it is 0: no positive among the first R."""
    ranks.first_rank[rows] = ahead + 1
    ranks.pessimistic_first_rank[rows] = pessimistic_ahead + 1
    for name in Precision._fields:
        getattr(ranks, name)[rows] = 0.0 if precision is None else getattr(precision, name)
