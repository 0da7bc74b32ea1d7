"""Normalized mutual information of k-means clusters and classes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch.nn.functional as F
from jaxtyping import Float, Int64
from sklearn.cluster import KMeans
from sklearn.metrics import normalized_mutual_info_score
from torch import Tensor

from glsd.errors import UserError, pick

_ITERATIONS = 20
_NORMALIZED = {"cosine": True, "euclidean": False}


class ClusterScores(NamedTuple):
    """NMI of k-means, its mean over the seeds and the value of each."""

    nmi: float
    per_seed: dict[int, float]
    num_clusters: int


def nmi(labels: Int64[Tensor, " n"], assignment: Int64[Tensor, " n"]) -> float:
    """Return 2 I(Y; C) / (H(Y) + H(C)), in 0..1, of classes Y and clusters C; 1 if there is one of each."""
    return float(normalized_mutual_info_score(labels.cpu().numpy(), assignment.cpu().numpy()))


def kmeans_nmi(
    features: Float[Tensor, "n d"],
    labels: Int64[Tensor, " n"],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    distance: str = "cosine",
) -> ClusterScores:
    """Return the NMI of the labels and of k-means with as many clusters as there are labels.

    k-means starts from random images, runs 20 iterations at most over all images, in float32, and depends on nothing
    but the seed; cosine: the vectors are normalized first. 11,000 clusters of 60,000 images are minutes of work.
    Raises UserError for an empty set, features that are not finite, missing labels, no seed, an unknown distance.
    """
    normalized = pick(_NORMALIZED, distance, "distance")
    if not len(features):
        raise UserError("NMI: the set is empty")
    if not features.isfinite().all():
        raise UserError("NMI: features are not finite: the network diverged, take an earlier checkpoint")
    if (labels < 0).any():
        raise UserError(
            f"NMI: {int((labels < 0).sum())} of {len(labels)} images lack a label: pack folders of classes"
        )
    if not seeds:
        raise UserError("NMI: the list of seeds is empty: give at least one")
    points = features.detach().float()
    points = F.normalize(points, dim=1) if normalized else points
    num_clusters = len(labels.unique())
    values = {}
    for seed in seeds:
        kmeans = KMeans(num_clusters, init="random", n_init=1, max_iter=_ITERATIONS, random_state=seed)
        values[seed] = nmi(labels, labels.new_tensor(kmeans.fit_predict(points.cpu().numpy())))
    return ClusterScores(sum(values.values()) / len(values), values, num_clusters)
