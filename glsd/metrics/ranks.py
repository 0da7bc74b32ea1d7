"""Where each query's positives stand among its references, exactly, from few float64 products.

A float32 product is off by at most ``Search.band``. So a tile of products tells for most pairs on which side of the
query's first positive they are; the few other pairs are computed in float64. The tile also keeps the largest product
of every CHUNK references: only chunks whose largest product reaches the first R can hold what MAP@R needs.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float32, Float64, Int64
from torch import Tensor

from glsd.metrics.search import NOTHING, Search, comparable, full_float32, least_keys

CHUNK = 64
_TILE = {"cpu": 2048, "cuda": 8192}  # queries and references at a time
_NUMBERS_HELD = 2**22  # coordinates gathered in float64 at a time: 32 MiB
_PAIRS_HELD = 2**17  # pairs of a query and a chunk at a time: at most 64 MiB of keys
_PRODUCTS_HELD = 2**23  # float64 products of queries with all references: 64 MiB
_ROW_COST = 8  # a query without a pair is held as well
_ROWS = 4096
_CLASS_ROWS = 256


class QueryRanks(NamedTuple):
    """First rank and precision of every query; a query without a positive is *lone*.

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
class LabeledSearch(Search):
    """A search with the labels of both sides."""

    query_labels: Int64[Tensor, " q"]
    gallery_labels: Int64[Tensor, " n"]
    own: Int64[Tensor, " q"]  # the query's own row in the gallery, which is no reference of it; -1 = none

    def subset(self, rows: Int64[Tensor, " m"]) -> "LabeledSearch":
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
) -> LabeledSearch:
    """Return the search of the queries in the gallery, or without a gallery in the other queries."""
    own = torch.arange(len(query), device=query.device)
    if gallery is None or gallery_labels is None:
        gallery, gallery_labels = query, query_labels
    else:
        own = torch.full_like(own, -1)
    query, gallery = comparable(query, gallery, euclidean=euclidean)
    return LabeledSearch(
        query=query,
        query_labels=query_labels.to(query.device),
        gallery=gallery,
        gallery_labels=gallery_labels.to(query.device),
        own=own,
        euclidean=euclidean,
    )


def positive_keys(
    search: LabeledSearch, relevant: Int64[Tensor, " q"], wanted: Bool[Tensor, " q"]
) -> Int64[Tensor, "q r"]:
    """Return the keys of every wanted query's positives, descending, filled up with NOTHING.

    Queries and references are sorted by class, so that a block of queries is compared with little but its positives.
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
    for first in range(0, len(rows), _CLASS_ROWS):
        block = rows[first : first + _CLASS_ROWS]
        met = columns[starts[first] : stops[first + len(block) - 1]]
        found = search.keys(search.left(block) @ search.right(met).T, met)
        other = search.query_labels[block, None] != search.gallery_labels[met]
        found.masked_fill_(other | (search.own[block, None] == met), NOTHING)
        found = found.topk(min(width, len(met)), dim=1).values
        keys[block, : found.shape[1]] = found
    return keys


class Precision(NamedTuple):
    """MAP@R and R-precision of some queries, for both orders of ties."""

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
    least = least_keys(positives)
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
    return keys > first, keys >= least_keys(first)


def rank_every_pair(
    search: LabeledSearch, relevant: Int64[Tensor, " q"], rows: Int64[Tensor, " m"], ranks: QueryRanks
) -> None:
    """Write the ranks of some queries from all their pairs in float64: for huge classes and many ties."""
    n = len(search.gallery)
    for block in rows.split(max(1, _PRODUCTS_HELD // n)) if len(rows) else ():
        keys = torch.empty(len(block), n, dtype=torch.int64, device=rows.device)
        left = search.left(block)
        for columns in torch.arange(n, device=rows.device).split(
            max(1, _PRODUCTS_HELD // 2 // left.shape[1])
        ):
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
    """Write the ranks of some queries; without ``precision`` it is 0, as no positive is among the first R."""
    ranks.first_rank[rows] = ahead + 1
    ranks.pessimistic_first_rank[rows] = pessimistic_ahead + 1
    for name in Precision._fields:
        getattr(ranks, name)[rows] = 0.0 if precision is None else getattr(precision, name)


def rank_by_tiles(
    search: LabeledSearch,
    relevant: Int64[Tensor, " q"],
    positives: Int64[Tensor, "q r"],
    ranks: QueryRanks,
    furthest: int | None,
) -> Int64[Tensor, " m"]:
    """Write the ranks of the queries that have positives; return those with too many undecided pairs.

    Counting stops once a first rank is known to be beyond ``furthest`` and R.
    """
    enough = relevant.clamp(min=len(search.gallery) if furthest is None else furthest)
    sweep = Sweep(search, positives[:, 0], enough, _TILE.get(search.query.device.type, 2048))
    with torch.no_grad(), full_float32():
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
    """One pass over all products: negatives ahead of each query's first positive, and the largest of each chunk."""

    def __init__(
        self, search: LabeledSearch, first: Int64[Tensor, " q"], enough: Int64[Tensor, " q"], tile: int
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
        self.left, self.right = search.float32_factors()

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
        """Count the products of some queries with the references from ``column`` on, chunk by chunk."""
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
        """Decide pairs by their float64 products."""
        search = self.search
        negative = search.query_labels[rows] != search.gallery_labels[columns]
        rows, columns = rows[negative], columns[negative]
        piece = max(1, _NUMBERS_HELD // search.query.shape[1])
        for r, c in zip(rows.split(piece), columns.split(piece), strict=True):
            keys = search.keys((search.left(r) * search.right(c)).sum(dim=1), c)
            ahead, pessimistic = ahead_of(keys, self.first[r])
            self.ahead.index_add_(0, r, ahead.long())
            self.pessimistic_ahead.index_add_(0, r, pessimistic.long())


def first_negatives(
    search: LabeledSearch,
    rows: Int64[Tensor, " m"],
    relevant: Int64[Tensor, " q"],
    positives: Int64[Tensor, "q r"],
    maxima: Float32[Tensor, "q c"],
) -> Int64[Tensor, "m r"]:
    """Return the keys of each query's first negatives, descending: all that can be among its first R.

    The R chunks with the largest maxima hold R references at least as similar as the R-th maximum, so nothing below it
    is among the first R. Negatives below the last positive do not matter either.
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
    search: LabeledSearch, near: Bool[Tensor, "m c"], floors: Float64[Tensor, " m"]
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
