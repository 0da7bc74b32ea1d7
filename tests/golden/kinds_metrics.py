"""Golden checks of retrieval and clustering metrics."""

import torch
from golden_file import Golden
from torch import Tensor

from glsd.metrics.clusters import kmeans_nmi, nmi
from glsd.metrics.ranks import QueryRanks
from glsd.metrics.retrieval import RetrievalScores, rank_queries, scores

RATIO = 1e-12  # metrics are means of ratios of whole numbers
NMI_OF_A_RUN = 0.04  # k-means from other starting points: a single run of ours varies as much over its seeds

# Quirks of the reference that we do not offer: averages over more references than R, or divided by the class size
# with the query in it; F1; other means and a chance correction of the mutual information.
NOT_OFFERED = (
    "mean_average_precision",
    "obdsd_mAP_c",
    "obdsd_mAP_1000",
    "obdsd_mAP_lim",
    "f1_run_obdsd",
    "nmi_geometric",
    "nmi_min",
    "nmi_max",
    "ami",
)


def check_metrics(golden: Golden) -> None:
    """Leave-one-out retrieval in both distances, and normalized mutual information."""
    embeddings, labels = golden.tensor("embeddings").float(), golden.tensor("labels")
    ranks = rank_queries(embeddings, labels, distance="euclidean")
    _compare_ranks(golden, ranks)
    ratio(golden, "r_precision_per_query", ranks.r_precision)
    means = scores(ranks, recall_at=golden.tensor("ks").tolist())
    _compare_means(golden, means, recall="recall_all_queries")
    ratio(golden, "recall_excluding_lone", list(means.recall_excluding_lone.values()))
    kept = means.num_queries - means.num_lone
    ratio(golden, "map_at_r_lone_as_zero", means.map_at_r * kept / means.num_queries)
    ratio(golden, "r_precision_lone_as_zero", means.r_precision * kept / means.num_queries)
    golden.equal("n_lone", means.num_lone)
    cosine = rank_queries(embeddings, labels, distance="cosine")
    means = scores(cosine, recall_at=golden.tensor("ks").tolist())
    _compare_means(golden, means, recall="cos_recall_all_queries", prefix="cos_")
    ratio(golden, "nmi_arithmetic", nmi(labels, golden.tensor("kmeans_assignment")))
    ours = kmeans_nmi(embeddings, labels, seeds=(0, 1, 2), distance="euclidean").nmi
    for name in ("nmi_run_obdsd", "nmi_run_pml"):
        golden.within(name, abs(ours - float(golden.tensor(name))), NMI_OF_A_RUN)
    golden.used.update(NOT_OFFERED)


def check_metrics_query_gallery(golden: Golden) -> None:
    """Queries among a gallery of other images."""
    sets = [golden.tensor(name) for name in ("query", "query_labels", "gallery", "gallery_labels")]
    ranks = rank_queries(sets[0].float(), sets[1], sets[2].float(), sets[3], distance="euclidean")
    _compare_ranks(golden, ranks)
    _compare_means(golden, scores(ranks, recall_at=golden.tensor("ks").tolist()), recall="recall")


def _compare_ranks(golden: Golden, ranks: QueryRanks) -> None:
    golden.equal("first_hit_rank", ranks.first_rank)
    golden.equal("no tie of a positive and a negative", ranks.pessimistic_first_rank, ranks.first_rank)
    ratio(golden, "map_at_r_per_query", ranks.map_at_r)


def _compare_means(golden: Golden, means: RetrievalScores, *, recall: str, prefix: str = "") -> None:
    ratio(golden, recall, list(means.recall.values()))
    ratio(golden, f"{prefix}map_at_r", means.map_at_r)
    ratio(golden, f"{prefix}r_precision", means.r_precision)


def ratio(golden: Golden, name: str, ours: Tensor | list[float] | float) -> None:
    """Compare numbers in 0..1, NaN where the file has NaN."""
    want, got = golden.tensor(name), torch.as_tensor(ours, dtype=torch.float64)
    same_shape = got.shape == want.shape
    apart = (got - want).abs() if same_shape else torch.tensor(torch.inf)
    if same_shape:
        apart = torch.where(got.isnan() & want.isnan(), 0.0, apart)
    golden.within(name, torch.inf if apart.isnan().any() else apart, RATIO)
