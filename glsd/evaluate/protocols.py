"""The protocols that measure features: weighted k-NN, a linear classifier, retrieval."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from glsd.cluster import dist
from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.errors import UserError, config_keys
from glsd.evaluate.pixels import Pixels, centered
from glsd.evaluate.sets import Embedded, check_known_classes, open_labeled, open_retrieval
from glsd.loading import Loaded
from glsd.metrics.clusters import kmeans_nmi
from glsd.metrics.knn import check_k, knn_accuracy
from glsd.metrics.linear import check_settings, linear_probe
from glsd.metrics.retrieval import retrieval_scores
from glsd.metrics.search import known_labels
from glsd.shards.store import ShardSet, check_disjoint, number_together

KEYS = {"k_list": "--k", "lr_list": "linear_lr", "epochs": "linear_epochs", "batch_size": "linear_batch_size"}
DEFINITIONS = (
    "Recall@K: share of all queries with an item of their class among the first K (hit@K); MAP@R, R-precision: means over "
    "the queries that have such an item, R = how many; "
)
Result = tuple[str, dict[str, dict[str, Any]]]  # the protocol in words; name -> shares


class Protocol(NamedTuple):
    """How a protocol opens its labeled sets and checks its settings, and how it measures the embedded sets."""

    open: Callable[[EvalConfig], dict[str, ShardSet]]
    measure: Callable[[EvalConfig, Loaded, dict[str, Embedded], torch.device], Result]


def open_classified(cfg: EvalConfig) -> dict[str, ShardSet]:
    """Open the train and the val set; check that they and the protocol's settings go together."""
    with config_keys(KEYS):
        if cfg.protocol == "linear":
            check_settings(
                cfg.linear_lr, epochs=cfg.linear_epochs, batch_size=cfg.linear_batch_size, seed=cfg.seed
            )
        train = open_labeled(cfg.data.train_shards, "data.train_shards")
        val = open_labeled(cfg.data.val_shards, "data.val_shards")
        names = ("data.train_shards", "data.val_shards")
        check_disjoint(train, val, names=names)
        number_together(dict(zip(names, (train, val), strict=True)))
        check_known_classes(train, val, names=names, limit=cfg.data.limit)
        if cfg.protocol == "knn":
            check_k(cfg.k, min(cfg.data.limit, len(train)) if cfg.data.limit else len(train))
    return {"train": train, "val": val}


def open_searched(cfg: EvalConfig) -> dict[str, ShardSet]:
    """Open the test set, or the query and the gallery set; check the protocol's settings."""
    for key, value, low in (("recall_at", min(cfg.recall_at, default=0), 1), ("nmi_seeds", cfg.nmi_seeds, 0)):
        if value < low:
            raise UserError(f"{key} is {getattr(cfg, key)}: expected {low} or more")
    if not 0 <= cfg.seed <= 2**31:
        raise UserError(f"seed is {cfg.seed}: expected 0 to {2**31}")
    return open_retrieval(cfg.data)


def by_neighbors(cfg: EvalConfig, loaded: Loaded, sets: dict[str, Embedded], device: torch.device) -> Result:
    """Classify the val images by a weighted vote of their nearest train images."""
    train, val = sets["train"], sets["val"]
    features = {"": (train.features, val.features)}
    if isinstance(loaded.network, Pixels):
        features[", mean-centered"] = centered(train.features, val.features)
    result: dict[str, dict[str, Any]] = {}
    with config_keys(KEYS):
        for what, (voting, asked) in features.items():
            found = knn_accuracy(
                voting.to(device),
                train.labels,
                asked.to(device),
                val.labels,
                k_list=cfg.k,
                temperature=cfg.temperature,
            )
            result |= {f"k={k}{what}": shares for k, shares in found.items()}
    text = (
        f"k-NN of L2-normalized features, votes weighted exp(cos / {cfg.temperature:g}){_unknown(train, val)}"
    )
    return text, result


def by_classifier(cfg: EvalConfig, loaded: Loaded, sets: dict[str, Embedded], device: torch.device) -> Result:
    """Classify the val images by a linear classifier trained on the train features."""
    train, val = sets["train"], sets["val"]
    with config_keys(KEYS):
        found = linear_probe(
            train.features.to(device),
            train.labels.to(device),
            val.features.to(device),
            val.labels.to(device),
            lr_list=cfg.linear_lr,
            epochs=cfg.linear_epochs,
            batch_size=cfg.linear_batch_size,
            seed=cfg.seed,
        )
    choice = f" (best on a held-out tenth of train of {cfg.linear_lr})" if found.held_out else ""
    text = (
        "linear classifier on cached features (no augmentation), SGD momentum 0.9, no weight decay,"
        f" {cfg.linear_epochs} epochs, batch {cfg.linear_batch_size},"
        f" lr {found.lr:g} * batch / 256{choice} to 0 by cosine{_unknown(train, val)}"
    )
    return text, {"linear": {"top1": found.top1, "top5": found.top5}}


def _unknown(train: Embedded, val: Embedded) -> str:
    lost = int((~known_labels(train.labels, val.labels)).sum())
    return (
        f"; {lost} of {len(val.labels)} val images have a class that train lacks, and count as wrong"
        if lost
        else ""
    )


def by_retrieval(cfg: EvalConfig, loaded: Loaded, sets: dict[str, Embedded], device: torch.device) -> Result:
    """Search the images among each other, or the query set in the gallery set; cluster what is searched."""
    distances: tuple[str, ...] = ("cosine",)
    if isinstance(loaded.config, FinetuneConfig):
        distances = loaded.config.distances
    if cfg.distance:
        distances = (cfg.distance,)
    result = score_retrieval(sets, recall_at=cfg.recall_at, distances=distances, device=device)
    text = "; ".join(describe_search(sets, distance) for distance in distances)
    if cfg.nmi_seeds:
        searched = sets["test"] if "test" in sets else sets["gallery"]
        for distance in distances:
            nmi = kmeans_nmi(
                searched.features,
                searched.labels,
                seeds=range(cfg.seed, cfg.seed + cfg.nmi_seeds),
                distance=distance,
            )
            result[distance] |= {"nmi": nmi.nmi, "nmi_by_seed": nmi.per_seed}
        text += f"; NMI: mean of {cfg.nmi_seeds} runs of k-means, k = classes of the set that is searched"
    return text, result


PROTOCOLS = {
    "knn": Protocol(open_classified, by_neighbors),
    "linear": Protocol(open_classified, by_classifier),
    "retrieval": Protocol(open_searched, by_retrieval),
}


def score_retrieval(
    sets: dict[str, Embedded],
    *,
    recall_at: list[int],
    distances: tuple[str, ...],
    device: torch.device,
) -> dict[str, dict[str, Any]]:
    """Return {distance: {'recall@1': share, ..., 'map_at_r', 'r_precision'}} of {'test'} or {'query', 'gallery'}.

    Every rank calls. Rank 0 computes; all ranks get its result, or raise its UserError.
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
    """Return in words what was searched, where, and how ties were ordered."""
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
            f"  (warning: up to {100 * scores['tie_gap']:.2f} points depend on the order of equal distances:"
            " the features have collapsed, or have too few digits)"
        )
    if lone := scores["queries_without_match"]:
        line += f"  ({lone} of {scores['queries']} queries have no match at all)"
    return line
