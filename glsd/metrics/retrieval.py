"""Retrieval metrics: Recall@K (hit@K), MAP@R and R-precision, exact, in bounded memory, for both orders of ties."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from glsd.errors import UserError, pick
from glsd.metrics.ranks import QueryRanks, as_search, positive_keys, rank_by_tiles, rank_every_pair
from glsd.metrics.search import check_labeled

DISTANCES = {"cosine": False, "euclidean": True}
# A query with more positives looks at every reference anyway.
_MOST_RELEVANT = 256


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Means over the queries; ``recall[k]`` is hit@k: the share of queries with a positive among the first k references.

    A *lone* query has no positive: it counts as a miss in recall, and the other means leave it out. References of
    equal similarity are in the order of their indices; ``pessimistic_*`` puts the negatives first.
    """

    recall: dict[int, float]
    recall_excluding_lone: dict[int, float]
    map_at_r: float
    r_precision: float
    pessimistic_recall: dict[int, float]
    pessimistic_map_at_r: float
    pessimistic_r_precision: float
    num_queries: int
    num_lone: int

    def plain(self) -> dict[str, Any]:
        """Return the scores as nested dicts of numbers."""
        return asdict(self)

    def tie_gap(self) -> float:
        """Return by how much recall or MAP@R depends on the order of equally similar references."""
        gaps = [self.recall[k] - self.pessimistic_recall[k] for k in self.recall]
        return max([*gaps, self.map_at_r - self.pessimistic_map_at_r])


def retrieval_scores(
    query: Float[Tensor, "q d"],
    query_labels: Int64[Tensor, " q"],
    gallery: Float[Tensor, "n d"] | None = None,
    gallery_labels: Int64[Tensor, " n"] | None = None,
    *,
    recall_at: Sequence[int],
    distance: str = "cosine",
) -> RetrievalScores:
    """Return Recall@K, MAP@R and R-precision; arguments and errors as in rank_queries; every K is 1 or more.

    Source: Musgrave et al. (arXiv 2003.08505, section 3.2) for MAP@R and R-precision.
    """
    if not recall_at or min(recall_at) < 1:
        raise UserError(f"recall_at is {list(recall_at)}: give at least one K, every K 1 or more")
    ranks = rank_queries(
        query,
        query_labels,
        gallery,
        gallery_labels,
        furthest=max(recall_at),
        distance=distance,
    )
    return scores(ranks, recall_at=recall_at)


def scores(ranks: QueryRanks, *, recall_at: Sequence[int]) -> RetrievalScores:
    """Return the means of the ranks of queries of which at least one is not lone."""
    kept = ranks.num_relevant > 0
    found, pessimistic = ranks.first_rank[kept], ranks.pessimistic_first_rank[kept]

    def shares(first_rank: Tensor, of: int) -> dict[int, float]:
        return {k: int((first_rank <= k).sum()) / of for k in recall_at}

    return RetrievalScores(
        recall=shares(found, len(kept)),
        recall_excluding_lone=shares(found, len(found)),
        map_at_r=float(ranks.map_at_r[kept].mean()),
        r_precision=float(ranks.r_precision[kept].mean()),
        pessimistic_recall=shares(pessimistic, len(kept)),
        pessimistic_map_at_r=float(ranks.pessimistic_map_at_r[kept].mean()),
        pessimistic_r_precision=float(ranks.pessimistic_r_precision[kept].mean()),
        num_queries=len(kept),
        num_lone=int((~kept).sum()),
    )


def rank_queries(
    query: Float[Tensor, "q d"],
    query_labels: Int64[Tensor, " q"],
    gallery: Float[Tensor, "n d"] | None = None,
    gallery_labels: Int64[Tensor, " n"] | None = None,
    *,
    furthest: int | None = None,
    distance: str = "cosine",
) -> QueryRanks:
    """Return (on the CPU) the ranks of every query among the gallery, or among the other queries (leave-one-out).

    References are in the order of (similarity descending, index ascending). Without a gallery a query is not its own
    reference; it is excluded by index. distance: "cosine" = products of float32-normalized vectors in float64, rounded
    to 1e-9; "euclidean" = squared distances of the float32 vectors in float64, rounded to 2^-34 of the square of a
    power of two that bounds all lengths, so those of integers below 2^17 in length are exact. furthest: a first rank
    beyond it and beyond R is only reported as some number beyond, which saves work, most of all with an untrained
    network; None = every first rank is exact. Raises UserError for an empty set, missing labels (-1), features that
    are not finite, no positive for any query, an unknown distance.
    """
    euclidean = pick(DISTANCES, distance, "distance")
    if (gallery is None) != (gallery_labels is None):
        raise UserError("give the gallery's features together with its labels, or neither of them")
    sets = {"query": (query, query_labels)}
    if gallery is not None and gallery_labels is not None:
        sets["gallery"] = gallery, gallery_labels
    check_labeled(**sets)
    search = as_search(query, query_labels, gallery, gallery_labels, euclidean=euclidean)
    relevant = search.num_relevant()
    if not relevant.any():
        raise UserError("no query has another image of its class to find: check the labels, or the gallery")
    ranks = _all_lone(relevant)
    wanted = (relevant > 0) & (relevant <= _MOST_RELEVANT)
    rest = (relevant > _MOST_RELEVANT).nonzero()[:, 0]
    if wanted.any():
        positives = positive_keys(search, relevant, wanted)
        rest = torch.cat([rest, rank_by_tiles(search, relevant, positives, ranks, furthest)])
    rank_every_pair(search, relevant, rest, ranks)
    return QueryRanks(*(values.cpu() for values in ranks))


def _all_lone(relevant: Int64[Tensor, " q"]) -> QueryRanks:
    nowhere = torch.full_like(relevant, -1)
    none = torch.full(relevant.shape, torch.nan, dtype=torch.float64, device=relevant.device)
    return QueryRanks(
        num_relevant=relevant,
        first_rank=nowhere,
        map_at_r=none,
        r_precision=none.clone(),
        pessimistic_first_rank=nowhere.clone(),
        pessimistic_map_at_r=none.clone(),
        pessimistic_r_precision=none.clone(),
    )
