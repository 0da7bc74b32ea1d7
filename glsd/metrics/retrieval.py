"""Retrieval metrics: Recall@K (hit@K), MAP@R and R-precision, exact, in bounded memory, with ties told apart."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from glsd.errors import UserError, pick
from glsd.metrics.rank_faiss import rank_by_faiss
from glsd.metrics.rank_tiles import rank_by_tiles
from glsd.metrics.ranks import (
    QueryRanks,
    as_search,
    positive_keys,
    rank_every_pair,
)

DISTANCES = {"cosine": False, "euclidean": True}
BACKENDS: dict[str, Callable[..., Tensor]] = {"faiss": rank_by_faiss, "torch": rank_by_tiles}
# Of classes with more positives a query looks at every reference anyway.
_MOST_RELEVANT = 256


@dataclass(frozen=True, kw_only=True)
class RetrievalScores:
    """Means over the queries; ``recall[k]`` is hit@k: the share with a positive among the first k references.

    A *lone* query has no positive: it counts as a miss in recall, and is left out of the other means. References of
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
        """Return how much of recall or MAP@R rests on the order of equally similar references."""
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
    backend: str = "auto",
    tile: int | None = None,
) -> RetrievalScores:
    """Return Recall@K, MAP@R and R-precision; arguments and errors as in rank_queries, and every K is 1 or more.

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
        backend=backend,
        tile=tile,
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
    backend: str = "auto",
    tile: int | None = None,
) -> QueryRanks:
    """Return (on the CPU) the ranks of every query among the gallery, or among the other queries (leave-one-out).

    References are in the order of (similarity descending, index ascending); without a gallery the query itself,
    known by its index, is no reference. distance: "cosine" = products of float32-normalized vectors in float64,
    rounded to 1e-9; "euclidean" = squared distances of the float32 vectors in float64, rounded to 2^-34 of the square
    of a power of two that bounds all lengths, so those of integers below 2^17 in length are exact. backend: "auto" =
    "torch" (where the gallery is the queries themselves it needs half of the products) or "faiss"; tile: references
    at a time. Neither changes the result. furthest: of a first rank beyond it and beyond R only that is said, by some
    number that is beyond (less work, most of all with an untrained network); None = every first rank is exact.
    Raises UserError for an empty set, missing labels (-1), features that are not
    finite, no positive for any query, an unknown distance or backend.
    """
    euclidean = pick(DISTANCES, distance, "distance")
    if backend == "faiss" and importlib.util.find_spec("faiss") is None:
        raise UserError(
            "retrieval backend 'faiss' is not installed: pip install faiss-cpu, or use backend torch"
        )
    ranked_by = pick(BACKENDS, "torch" if backend == "auto" else backend, "retrieval backend")
    if (gallery is None) != (gallery_labels is None):
        raise UserError("retrieval: give the gallery's features together with its labels, or neither of them")
    _check(query, query_labels, "query")
    if gallery is not None and gallery_labels is not None:
        _check(gallery, gallery_labels, "gallery")
    search = as_search(query, query_labels, gallery, gallery_labels, euclidean=euclidean)
    relevant = search.num_relevant()
    if not relevant.any():
        raise UserError(
            "retrieval: no query has another image of its class to find: check the labels, or the gallery"
        )
    ranks = _all_lone(relevant)
    wanted = (relevant > 0) & (relevant <= _MOST_RELEVANT)
    rest = (relevant > _MOST_RELEVANT).nonzero()[:, 0]
    if wanted.any():
        positives = positive_keys(search, relevant, wanted)
        rest = torch.cat([rest, ranked_by(search, relevant, positives, ranks, tile, furthest)])
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


def _check(features: Tensor, labels: Tensor, name: str) -> None:
    if not features.numel():
        raise UserError(f"retrieval: the {name} set is empty")
    if not features.isfinite().all():
        raise UserError(
            f"retrieval: {name} features are not finite: the network diverged, take an earlier checkpoint"
        )
    if (labels < 0).any():
        raise UserError(
            f"retrieval: {int((labels < 0).sum())} of {len(labels)} {name} images lack a label: pack folders of classes"
        )
