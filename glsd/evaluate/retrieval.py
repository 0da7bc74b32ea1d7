"""Retrieval of embedded sets, and how it is written down."""

from typing import Any

import torch

from glsd.cluster import dist
from glsd.errors import UserError
from glsd.evaluate.embed import Embedded
from glsd.metrics.retrieval import retrieval_scores

DEFINITIONS = (
    "Recall@K: share of all queries with an item of their class among the first K (hit@K); MAP@R, R-precision: means over "
    "the queries that have such an item, R = how many; "
)


def score_retrieval(
    sets: dict[str, Embedded],
    *,
    recall_at: list[int],
    distances: tuple[str, ...],
    device: torch.device,
    backend: str = "auto",
) -> dict[str, dict[str, Any]]:
    """Return {distance: {'recall@1': share, ..., 'map_at_r', 'r_precision'}} of {'test'} or {'query', 'gallery'}.

    Every rank calls; rank 0 computes, and its result or its UserError is everybody's.
    """
    scores: dict[str, dict[str, Any]] = {}
    error = None
    if dist.is_main():
        query, gallery = sets["test"] if "test" in sets else sets["query"], sets.get("gallery")
        try:
            for distance in distances:
                found = retrieval_scores(
                    query.features.to(device),
                    query.labels,
                    None if gallery is None else gallery.features.to(device),
                    None if gallery is None else gallery.labels,
                    recall_at=recall_at,
                    distance=distance,
                    backend=backend,
                )
                scores[distance] = {
                    **{f"recall@{k}": share for k, share in found.recall.items()},
                    "map_at_r": found.map_at_r,
                    "r_precision": found.r_precision,
                    "tie_gap": found.tie_gap(),
                    "queries": found.num_queries,
                    "queries_without_match": found.num_lone,
                }
        except UserError as problem:
            error = problem
    dist.raise_together(error)
    return dist.broadcast_object(scores)


def describe_search(sets: dict[str, Any], distance: str) -> str:
    """Say who was searched among whom, and how."""
    how = (
        "leave-one-out, self excluded by index" if "test" in sets else "query set searched in the gallery set"
    )
    return f"retrieval by {distance} distance, {how}; {DEFINITIONS}of equal distances the lower index first"


def describe_scores(scores: dict[str, Any]) -> str:
    """Return one line of shares in percent."""
    shown = [(name, value) for name, value in scores.items() if name.startswith("recall@")]
    shown += [("MAP@R", scores["map_at_r"]), ("R-precision", scores["r_precision"])]
    line = "  ".join(f"{name.replace('recall', 'Recall')} {100 * value:.2f} %" for name, value in shown)
    if "nmi" in scores:
        line += f"  NMI {100 * scores['nmi']:.2f} %"
    if scores["tie_gap"] > 1e-4:
        line += (
            f"  (warning: up to {100 * scores['tie_gap']:.2f} points of this hang on the order of equal distances: a sign of "
            "collapse or of too few digits)"
        )
    if lone := scores["queries_without_match"]:
        line += f"  ({lone} of {scores['queries']} queries have no match at all)"
    return line
