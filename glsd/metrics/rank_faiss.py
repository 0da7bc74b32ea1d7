"""Ranks from faiss: its nearest references in float32, ordered again in float64; what they leave open goes to the tiles."""

import torch
from jaxtyping import Int64
from torch import Tensor

from glsd.metrics.rank_tiles import float32_factors, rank_by_tiles
from glsd.metrics.ranks import (
    NOTHING,
    QueryRanks,
    Search,
    ahead_of,
    precision_at_r,
    write,
)

_SPARE = 32
_NUMBERS_HELD = 2**23  # coordinates gathered in float64 at a time: 64 MiB


def rank_by_faiss(
    search: Search,
    relevant: Int64[Tensor, " q"],
    positives: Int64[Tensor, "q r"],
    ranks: QueryRanks,
    tile: int | None = None,
    furthest: int | None = None,
) -> Int64[Tensor, " m"]:
    """Do what rank_by_tiles does; the tiles see only queries whose first positive faiss did not reach."""
    import faiss

    num_found = min(len(search.gallery), positives.shape[1] + 1 + _SPARE)
    left, right = (x.cpu().numpy() for x in float32_factors(search))
    left_open = []
    rows = (positives[:, 0] != NOTHING).nonzero()[:, 0]
    for block in rows.split(max(1, _NUMBERS_HELD // (num_found * search.query.shape[1]))):
        pairs = faiss.knn(left[block.cpu().numpy()], right, num_found, metric=faiss.METRIC_INNER_PRODUCT)
        products, columns = (torch.from_numpy(array).to(rows.device) for array in pairs)
        factors = search.right(columns.flatten()).unflatten(0, columns.shape)
        keys = search.keys((factors @ search.left(block)[:, :, None])[:, :, 0], columns)
        keys.masked_fill_(search.own[block, None] == columns, NOTHING)
        r, width = relevant[block], positives.shape[1]
        nearest = keys.topk(min(width, num_found), dim=1).values.gather(1, r[:, None] - 1)[:, 0]
        # What faiss left out is below its last product, give or take the rounding.
        reach = products[:, -1].double() + search.band
        needed = search.similarity(torch.minimum(nearest, positives[block, 0]))
        done = (needed > reach) | (num_found == len(search.gallery))
        keys.masked_fill_(search.query_labels[block, None] == search.gallery_labels[columns], NOTHING)
        ahead, pessimistic = (mask.sum(dim=1)[done] for mask in ahead_of(keys, positives[block, :1]))
        negatives = keys.topk(min(width, num_found), dim=1).values
        precision = precision_at_r(positives[block][done], negatives[done], r[done])
        write(ranks, block[done], ahead, pessimistic, precision)
        left_open.append(block[~done])
    return _by_tiles(torch.cat(left_open), search, relevant, positives, ranks, tile, furthest)


def _by_tiles(
    rows: Int64[Tensor, " k"],
    search: Search,
    relevant: Int64[Tensor, " q"],
    positives: Int64[Tensor, "q r"],
    ranks: QueryRanks,
    tile: int | None,
    furthest: int | None,
) -> Int64[Tensor, " m"]:
    if not len(rows):
        return rows
    part = QueryRanks(*(values[rows] for values in ranks))
    given_up = rank_by_tiles(search.subset(rows), relevant[rows], positives[rows], part, tile, furthest)
    for values, of_rows in zip(ranks, part, strict=True):
        values[rows] = of_rows
    return rows[given_up]
