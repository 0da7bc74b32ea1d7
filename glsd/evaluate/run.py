"""The third story: a frozen network looks at labeled images, and we count what its features know."""

import time
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from glsd.cluster import dist, shutdown
from glsd.cluster.interface import choose_interface
from glsd.config.evaluate import EvalConfig
from glsd.errors import UserError
from glsd.evaluate.embed import Embedded
from glsd.evaluate.model import Measured, load_model
from glsd.evaluate.record import append_record, cannot_write
from glsd.evaluate.retrieval import describe_scores, describe_search, score_retrieval
from glsd.evaluate.sets import embed_set, open_labeled, open_retrieval
from glsd.metrics.clusters import kmeans_nmi
from glsd.metrics.knn import knn_accuracy
from glsd.metrics.linear import check_settings, linear_probe
from glsd.shards.store import ShardSet, check_disjoint, check_same_classes


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Measure as configured, print the numbers and their protocol, append both to evals.json, return them.

    Every rank calls and embeds its share; then the process group is left, and rank 0 alone measures, writes and gets
    the record (the others an empty one). Raises UserError for what in the configuration, the shards or the weights
    cannot work, before the first forward pass where that can be known.
    """
    choose_interface()
    processes = PartialState(cpu=not torch.cuda.is_available())
    dist.check_world(processes.num_processes, "launch/evaluate.py")
    shutdown.watch_others()
    device = processes.device
    sets = dist.together(lambda: OPENERS[cfg.protocol](cfg))
    measured = dist.together(lambda: load_model(cfg))
    out = Path(cfg.out) if cfg.out else measured.run
    dist.raise_together(cannot_write(out) if out and dist.is_main() else None)

    measured.network.to(device).eval()
    embedded = {
        name: embed_set(
            shards,
            measured.features,
            name=name,
            sizes=measured.sizes,
            batch_size=cfg.data.batch_size,
            num_workers=cfg.data.num_workers,
            device=device,
            precision=cfg.precision,
            limit=cfg.data.limit,
        )
        for name, shards in sets.items()
    }
    main = dist.is_main()
    # The rest may take long or fail on rank 0 alone: nobody is left waiting for it.
    shutdown.finish()
    if not main:
        return {}
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": measured.name,
        "step": measured.step,
        **{name: about_set(cfg, name, sets[name], part) for name, part in embedded.items()},
    }
    protocol, record["result"] = PROTOCOLS[cfg.protocol](cfg, measured, embedded, device)
    record["protocol"] = f"{describe_features(cfg, measured)}; {protocol}"
    print(report(record, list(sets)), flush=True)
    if out:
        append_record(out, record)
    return record


def open_classified(cfg: EvalConfig) -> dict[str, ShardSet]:
    """Open the sets that vote and that are classified; check that they and the protocol's settings go together."""
    if cfg.protocol == "linear":
        check_settings(
            cfg.linear_lr, epochs=cfg.linear_epochs, batch_size=cfg.linear_batch_size, seed=cfg.seed
        )
    train = open_labeled(cfg.data.train_shards, "data.train_shards")
    val = open_labeled(cfg.data.val_shards, "data.val_shards")
    check_disjoint(train, val, names=("data.train_shards", "data.val_shards"))
    check_same_classes(train, val)
    check_k(cfg, min(cfg.data.limit, len(train)) if cfg.data.limit else len(train))
    return {"train": train, "val": val}


def open_searched(cfg: EvalConfig) -> dict[str, ShardSet]:
    """Open the set that is searched in itself, or the query and the gallery set; check the protocol's settings."""
    for key, value, low in (("recall_at", min(cfg.recall_at, default=0), 1), ("nmi_seeds", cfg.nmi_seeds, 0)):
        if value < low:
            raise UserError(f"{key} is {getattr(cfg, key)}: expected {low} or more")
    if not 0 <= cfg.seed <= 2**31:
        raise UserError(f"seed is {cfg.seed}: expected 0 to {2**31}")
    return open_retrieval(cfg.data)


def check_k(cfg: EvalConfig, num_train: int) -> None:
    """Raise UserError for a k that the train set is too small for."""
    for k in cfg.k if cfg.protocol == "knn" else ():
        if not 1 <= k <= num_train:
            raise UserError(f"k: {k} neighbors of {num_train} train images: expected 1 to {num_train}")


def about_set(cfg: EvalConfig, name: str, shards: ShardSet, embedded: Embedded) -> dict[str, Any]:
    """Return what the record says of a set."""
    used = min(cfg.data.limit, len(shards)) if cfg.data.limit else len(shards)
    count = len(embedded.labels)
    return {"shards": getattr(cfg.data, f"{name}_shards"), "images": count, "unreadable": used - count}


def by_neighbors(
    cfg: EvalConfig, measured: Measured, sets: dict[str, Embedded], device: torch.device
) -> tuple[str, dict]:
    """Weighted k-NN of the val images among the train images."""
    train, val = sets["train"], sets["val"]
    check_k(cfg, len(train.labels))
    result = knn_accuracy(
        train.features.to(device),
        train.labels,
        val.features.to(device),
        val.labels,
        k_list=cfg.k,
        temperature=cfg.temperature,
        backend=cfg.backend,
    )
    text = f"k-NN of L2-normalized features, votes weighted exp(cos / {cfg.temperature:g})"
    return text, {f"k={k}": shares for k, shares in result.items()}


def by_classifier(
    cfg: EvalConfig, measured: Measured, sets: dict[str, Embedded], device: torch.device
) -> tuple[str, dict]:
    """A linear classifier trained on the cached train features."""
    train, val = sets["train"], sets["val"]
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
        f" lr {found.lr:g} * batch / 256{choice} to 0 by cosine"
    )
    return text, {"linear": {"top1": found.top1, "top5": found.top5}}


def by_retrieval(
    cfg: EvalConfig, measured: Measured, sets: dict[str, Embedded], device: torch.device
) -> tuple[str, dict]:
    """Recall@K, MAP@R and R-precision of each image's search, and the NMI of k-means on what is searched."""
    distances = (cfg.distance,) if cfg.distance else measured.distances
    result: dict[str, dict[str, Any]] = {}
    result |= score_retrieval(
        sets, recall_at=cfg.recall_at, distances=distances, device=device, backend=cfg.backend
    )
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


OPENERS = {"knn": open_classified, "linear": open_classified, "retrieval": open_searched}
PROTOCOLS = {"knn": by_neighbors, "linear": by_classifier, "retrieval": by_retrieval}


def describe_features(cfg: EvalConfig, measured: Measured) -> str:
    """Say what a feature is, in words that go with the number."""
    precision = {"no": "float32", "bf16": "bfloat16"}[cfg.precision]
    size = f"resize {measured.sizes.resize} bicubic, center crop {measured.sizes.crop}"
    return f"{size}, {measured.what}, {precision}"


def report(record: dict[str, Any], names: list[str]) -> str:
    """Return the lines that are printed: what was measured, how, on what, and the shares in percent."""
    step = "" if record["step"] is None else f", step {record['step']}"
    sets = (f"{name} {record[name]['images']} images of {record[name]['shards']}" for name in names)
    lines = [
        f"model     {record['model']}{step}",
        f"protocol  {record['protocol']}",
        f"data      {', '.join(sets)}",
    ]
    for name, shares in record["result"].items():
        if "map_at_r" in shares:
            lines.append(f"{name:<9} {describe_scores(shares)}")
        else:
            lines.append(f"{name:<9} top-1 {100 * shares['top1']:.2f} %   top-5 {100 * shares['top5']:.2f} %")
    return "\n".join(lines)
