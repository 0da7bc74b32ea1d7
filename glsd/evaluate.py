"""The second story: a frozen backbone looks at labelled images, and we count what its features know."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from accelerate import PartialState
from tqdm import tqdm

from glsd.command_line import load_file
from glsd.config import EvalConfig, PretrainConfig
from glsd.contracts import UserError, pick
from glsd.data.eval_loader import eval_loader
from glsd.data.shards import ShardSet, check_disjoint, check_same_classes, open_shards
from glsd.evals.embed import Embedded, embed
from glsd.evals.knn import knn_accuracy
from glsd.evals.linear import check_settings, linear_probe
from glsd.evals.record import append_record, cannot_write
from glsd.models.backbone import Backbone, build_backbone, check_crop_size
from glsd.runtime import checkpoint, dist

Result = TypeVar("Result")
NATIVE_SIZE = 224  # pixels, of models that are not our runs
RESIZE_TO_CROP = 256 / 224  # the margin around the centre crop in DINO's protocol (arXiv 2104.14294)


class Sizes(NamedTuple):
    """What is done to an image, in pixels: short side resized, square cut from the centre."""

    resize: int
    crop: int


class Measured(NamedTuple):
    """The network that is measured, and how to call it in the record."""

    backbone: Backbone
    sizes: Sizes
    name: str  # 'teacher of runs/x', 'timm:vit_small_patch16_224', ...
    step: int | None  # of the checkpoint
    run: Path | None


def evaluate(cfg: EvalConfig) -> dict[str, Any]:
    """Measure as configured, print the numbers and their protocol, append both to evals.json, return them.

    Every rank calls and embeds its share; then the process group is left, and rank 0 alone measures, writes and gets
    the record (the others an empty one). Raises UserError for what in the configuration, the shards or the weights
    cannot work, before the first forward pass where that can be known.
    """
    processes = PartialState(cpu=not torch.cuda.is_available())
    dist.check_world(processes.num_processes, "launch/evaluate.py")
    device = processes.device
    train_set, val_set = together(lambda: open_sets(cfg))
    measured = together(lambda: load_model(cfg))
    out = Path(cfg.out) if cfg.out else measured.run
    dist.raise_together(cannot_write(out) if out and dist.is_main() else None)

    backbone = measured.backbone.to(device).eval()
    train, broken_train = embed_set(cfg, measured.sizes, backbone, train_set, device, "train")
    val, broken_val = embed_set(cfg, measured.sizes, backbone, val_set, device, "val")
    main = dist.is_main()
    # The rest may take long or fail on rank 0 alone: nobody is left waiting for it.
    dist.finish()
    if not main:
        return {}
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "model": measured.name,
        "step": measured.step,
        "train": {"shards": cfg.data.train_shards, "images": len(train.labels), "unreadable": broken_train},
        "val": {"shards": cfg.data.val_shards, "images": len(val.labels), "unreadable": broken_val},
    }
    protocol, record["result"] = PROTOCOLS[cfg.protocol](cfg, train, val, device)
    record["protocol"] = f"{describe_features(cfg, measured.sizes, backbone)}; {protocol}"
    print(report(record), flush=True)
    if out:
        append_record(out, record)
    return record


def together(prepare: Callable[[], Result]) -> Result:
    """Return what every rank prepares for itself; a UserError of one rank is raised on all."""
    result, error = None, None
    try:
        result = prepare()
    except UserError as problem:
        error = problem
    dist.raise_together(error)
    return result  # type: ignore[return-value]  # None only where prepare returned it


def open_sets(cfg: EvalConfig) -> tuple[ShardSet, ShardSet]:
    """Open both sets and check that they and the protocol's settings go together."""
    if cfg.protocol == "linear":
        check_settings(
            cfg.linear_lr, epochs=cfg.linear_epochs, batch_size=cfg.linear_batch_size, seed=cfg.seed
        )
    train_set, val_set = open_labelled(cfg, "train_shards"), open_labelled(cfg, "val_shards")
    check_disjoint(train_set, val_set, names=("data.train_shards", "data.val_shards"))
    check_same_classes(train_set, val_set)
    check_k(cfg, count(cfg, train_set))
    return train_set, val_set


def open_labelled(cfg: EvalConfig, key: str) -> ShardSet:
    """Open one of the two sets; UserError naming the key if it is not given, empty, or an image has no label."""
    patterns = getattr(cfg.data, key)
    if not patterns:
        example = f"shards/{key.removesuffix('_shards')}-*.tar"
        raise UserError(f"data.{key} is not set: give labelled shards, e.g. --data.{key} '{example}'")
    shards = open_shards(patterns)
    if not len(shards):
        raise UserError(f"data.{key} {patterns!r}: no images in these shards")
    unlabelled = int((shards.labels() < 0).sum())
    if unlabelled:
        raise UserError(
            f"data.{key}: {unlabelled} of {len(shards)} images have no label:"
            " pack a folder that has one subfolder per class"
        )
    return shards


def count(cfg: EvalConfig, shards: ShardSet) -> int:
    """Return how many images of a set are used."""
    return min(cfg.data.limit, len(shards)) if cfg.data.limit else len(shards)


def check_k(cfg: EvalConfig, num_train: int) -> None:
    """Raise UserError for a k that the train set is too small for."""
    for k in cfg.k if cfg.protocol == "knn" else ():
        if not 1 <= k <= num_train:
            raise UserError(f"k: {k} neighbours of {num_train} train images: expected 1 to {num_train}")


def load_model(cfg: EvalConfig) -> Measured:
    """Build the network that ``cfg.model`` names, with its weights, on the CPU; check that the crop suits it."""
    path = Path(cfg.model)
    if not cfg.model:
        raise UserError(
            "model is not set: give a run folder, a checkpoint folder, timm:NAME or a weights file"
        )
    if (path / "config.yaml").is_file():
        return load_run(cfg, path, None)
    if path.is_dir() and (path.parent.parent / "config.yaml").is_file():
        return load_run(cfg, path.parent.parent, path)
    if cfg.features != "teacher":
        raise UserError(f"features {cfg.features!r}: model {cfg.model!r} is no run or checkpoint folder")
    from_timm = cfg.model.startswith("timm:")
    if not from_timm and not path.exists():
        raise UserError(f"model {cfg.model!r}: no such run, checkpoint or weights file, and not timm:NAME")
    if not from_timm and not cfg.backbone:
        raise UserError(f"model {cfg.model!r} has no config.yaml: name its timm network with --backbone")
    sizes = choose_sizes(cfg, NATIVE_SIZE)
    backbone = build_backbone(
        cfg.model.removeprefix("timm:") if from_timm else cfg.backbone,
        image_size=sizes.crop,
        pool=cfg.pool or "cls",
        init="timm" if from_timm else cfg.model,
    )
    return Measured(backbone, sizes, cfg.model, None, None)


def choose_sizes(cfg: EvalConfig, native: int) -> Sizes:
    """Return the configured sizes; by default ``native`` and the protocol's margin around it."""
    crop = native if cfg.data.crop is None else cfg.data.crop
    return Sizes(round(crop * RESIZE_TO_CROP) if cfg.data.resize is None else cfg.data.resize, crop)


def load_run(cfg: EvalConfig, run: Path, chosen: Path | None) -> Measured:
    """Build a run's backbone from its own config.yaml, filled from ``chosen`` or else its latest checkpoint."""
    trained = load_file(PretrainConfig, run / "config.yaml")
    initial = cfg.features == "initial"
    backbone = build_backbone(
        trained.model.backbone,
        image_size=trained.data.global_size,
        pool=cfg.pool or trained.model.pool,
        init=trained.model.init if initial else "random",
        timm_args=dict(trained.model.timm_args),
        seed=trained.seed,
    )
    sizes = choose_sizes(cfg, trained.data.global_size)
    check_crop_size(sizes.crop, backbone.stride, "data.crop")
    if initial:
        return Measured(backbone, sizes, f"initial network of {run}", 0, run)
    saved = checkpoint.load(chosen) if chosen else checkpoint.load_latest(run / "checkpoints")
    if saved is None:
        raise UserError(f"model {str(run)!r}: no checkpoint yet (--features initial measures its start)")
    weights = pick(saved.tensors, cfg.features, "network of a checkpoint")
    own = {
        name.removeprefix("backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
    checkpoint.restore(backbone, own, source=f"checkpoint {saved.path}")
    return Measured(backbone, sizes, f"{cfg.features} of {run}", saved.step, run)


def embed_set(
    cfg: EvalConfig, sizes: Sizes, backbone: Backbone, shards: ShardSet, device: torch.device, name: str
) -> tuple[Embedded, int]:
    """Return the features of every readable image of a set, and how many were not readable."""
    loader = eval_loader(
        shards,
        resize=sizes.resize,
        crop=sizes.crop,
        batch_size=cfg.data.batch_size,
        rank=dist.rank(),
        world_size=dist.world_size(),
        num_workers=cfg.data.num_workers,
        limit=cfg.data.limit,
    )
    # disable=None: a bar on a terminal, nothing in a log file.
    hidden = None if dist.is_main() else True
    batches = tqdm(loader, desc=f"{name} features", unit="batch", leave=False, disable=hidden)
    embedded = embed(backbone, batches, device=device, precision=cfg.precision)
    broken = [record for part in dist.gather_objects(list(loader.broken)) for record in part]
    expected, found = count(cfg, shards), len(embedded.labels)
    if found + len(broken) != expected:
        raise RuntimeError(f"{name}: {found} features and {len(broken)} unreadable of {expected} images")
    if broken and dist.is_main():
        print(f"warning: {len(broken)} {name} images cannot be read, as {broken[0].key}: {broken[0].reason}")
    if not found:
        raise UserError(f"data.{name}_shards: none of the {expected} images can be read")
    return embedded, len(broken)


def by_neighbours(cfg: EvalConfig, train: Embedded, val: Embedded, device: torch.device) -> tuple[str, dict]:
    """Weighted k-NN of the val images among the train images."""
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
    text = f"k-NN of L2-normalised features, votes weighted exp(cos / {cfg.temperature:g})"
    return text, {f"k={k}": shares for k, shares in result.items()}


def by_classifier(cfg: EvalConfig, train: Embedded, val: Embedded, device: torch.device) -> tuple[str, dict]:
    """A linear classifier trained on the cached train features."""
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


PROTOCOLS = {"knn": by_neighbours, "linear": by_classifier}


def describe_features(cfg: EvalConfig, sizes: Sizes, backbone: Backbone) -> str:
    """Say what a feature is, in words that go with the number."""
    kind = {"cls": "class token", "mean": "mean of patch tokens"}[backbone.pool]
    precision = {"no": "float32", "bf16": "bfloat16"}[cfg.precision]
    size = f"resize {sizes.resize} bicubic, centre crop {sizes.crop}"
    return f"{size}, {kind} of the last layer, width {backbone.embed_dim}, {precision}"


def report(record: dict[str, Any]) -> str:
    """Return the lines that are printed: what was measured, how, on what, and the shares in percent."""
    step = "" if record["step"] is None else f", step {record['step']}"
    sets = (
        f"{name} {record[name]['images']} images of {record[name]['shards']}" for name in ("train", "val")
    )
    lines = [
        f"model     {record['model']}{step}",
        f"protocol  {record['protocol']}",
        f"data      {', '.join(sets)}",
    ]
    for name, shares in record["result"].items():
        lines.append(f"{name:<9} top-1 {100 * shares['top1']:.2f} %   top-5 {100 * shares['top5']:.2f} %")
    return "\n".join(lines)
