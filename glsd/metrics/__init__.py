"""Measures of features: k-NN, linear probe, retrieval, clusters, RankMe; exact, in bounded memory.

``from glsd.metrics import knn_accuracy`` imports what it needs, and gives a function that takes numpy arrays as well.
"""

from typing import Any

from glsd.arrays import public

_NAMES = {
    "knn_accuracy": "knn",
    "nearest_neighbors": "knn",
    "linear_probe": "linear",
    "retrieval_scores": "retrieval",
    "rank_queries": "retrieval",
    "kmeans_nmi": "clusters",
    "nmi": "clusters",
    "rankme": "effective_rank",
}
__all__ = list(_NAMES)


def __getattr__(name: str) -> Any:
    return public(__name__, _NAMES, name)


def __dir__() -> list[str]:
    return __all__
