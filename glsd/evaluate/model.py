"""Which network is measured: a run's, a checkpoint's, timm's, or one from a weights file."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import load_file
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError, pick
from glsd.evaluate.sets import Sizes, choose_sizes
from glsd.finetune.networks import NATIVE_SIZE, build_embedder, resolve
from glsd.load import find_run, is_finetuned, read_checkpoint
from glsd.models.backbone import Backbone, build_backbone, check_crop_size
from glsd.runtime import checkpoint

POOLS = {
    "cls": "class token",
    "mean": "mean of patch tokens",
    "mean+max": "mean plus maximum of patch tokens",
}


class Measured(NamedTuple):
    """The network that is measured, and how to call it in the record."""

    network: nn.Module
    features: Callable[[Tensor], Tensor]  # images (b 3 h w) -> features (b d)
    sizes: Sizes
    name: str  # 'teacher of runs/x', 'timm:vit_small_patch16_224', ...
    what: str  # what a feature is
    distances: tuple[str, ...]  # in which the run's retrieval is measured
    step: int | None  # of the checkpoint
    run: Path | None


def load_model(cfg: EvalConfig) -> Measured:
    """Build the network that ``cfg.model`` names, with its weights, on the CPU; check that the crop suits it."""
    path = Path(cfg.model)
    if not cfg.model:
        raise UserError(
            "model is not set: give a run folder, a checkpoint folder, timm:NAME or a weights file"
        )
    run = find_run(path)
    if run is not None:
        chosen = None if path == run else path
        return (load_finetuned if is_finetuned(run) else load_pretrained)(cfg, run, chosen)
    if cfg.features not in (None, "teacher"):
        raise UserError(f"features {cfg.features!r}: model {cfg.model!r} is no run or checkpoint folder")
    from_timm = cfg.model.startswith("timm:")
    if not from_timm and not path.exists():
        raise UserError(f"model {cfg.model!r}: no such run, checkpoint or weights file, and not timm:NAME")
    if not from_timm and not cfg.backbone:
        raise UserError(f"model {cfg.model!r} has no config.yaml: name its timm network with --backbone")
    sizes = choose_sizes(NATIVE_SIZE, crop=cfg.data.crop, resize=cfg.data.resize)
    backbone = build_backbone(
        cfg.model.removeprefix("timm:") if from_timm else cfg.backbone,
        image_size=sizes.crop,
        pool=cfg.pool or "cls",
        init="timm" if from_timm else cfg.model,
    )
    return measured_backbone(backbone, sizes, cfg.model, None, None)


def measured_backbone(
    backbone: Backbone, sizes: Sizes, name: str, step: int | None, run: Path | None
) -> Measured:
    """Return a backbone whose feature is what its global loss looks at."""
    what = f"{POOLS[backbone.pool]} of the last layer, width {backbone.embed_dim}"
    return Measured(backbone, lambda images: backbone(images)[0], sizes, name, what, ("cosine",), step, run)


def load_pretrained(cfg: EvalConfig, run: Path, chosen: Path | None) -> Measured:
    """Build a pretraining run's backbone from its own config.yaml, filled from a checkpoint."""
    trained = load_file(PretrainConfig, run / "config.yaml")
    features = cfg.features or "teacher"
    initial = features == "initial"
    backbone = build_backbone(
        trained.model.backbone,
        image_size=trained.data.global_size,
        pool=cfg.pool or trained.model.pool,
        init=trained.model.init if initial else "random",
        timm_args=dict(trained.model.timm_args),
        seed=trained.seed,
    )
    sizes = choose_sizes(trained.data.global_size, crop=cfg.data.crop, resize=cfg.data.resize)
    check_crop_size(sizes.crop, backbone.stride, "data.crop")
    if initial:
        return measured_backbone(backbone, sizes, f"initial network of {run}", 0, run)
    saved = read_checkpoint(run, chosen, " (--features initial measures its start)")
    weights = pick(saved.tensors, features, "network of a checkpoint")
    own = {
        name.removeprefix("backbone."): tensor
        for name, tensor in weights.items()
        if name.startswith("backbone.")
    }
    checkpoint.restore(backbone, own, source=f"checkpoint {saved.path}")
    return measured_backbone(backbone, sizes, f"{features} of {run}", saved.step, run)


def load_finetuned(cfg: EvalConfig, run: Path, chosen: Path | None) -> Measured:
    """Build a metric-learning run's network with its embedding layer, filled from a checkpoint."""
    trained = load_file(FinetuneConfig, run / "config.yaml")
    features = cfg.features or "student"
    if features == "teacher":
        raise UserError(
            f"features 'teacher': {run} is a metric-learning run, whose teacher is its own past: use student or initial"
        )
    if cfg.pool is not None:
        raise UserError(f"pool {cfg.pool!r}: {run} is a metric-learning run, whose embedding has its own")
    initial = features == "initial"
    saved = None if initial else read_checkpoint(run, chosen, " (--features initial measures its start)")
    embedder = build_embedder(trained, resolve(trained)[1] if initial else "random")
    if saved is not None:
        checkpoint.restore(embedder, saved.tensors["student"], source=f"checkpoint {saved.path}/student")
    resize = trained.data.resize if cfg.data.crop is None and cfg.data.resize is None else cfg.data.resize
    sizes = choose_sizes(trained.data.crop or NATIVE_SIZE, crop=cfg.data.crop, resize=resize)
    check_crop_size(sizes.crop, embedder.stride, "data.crop")
    layer = "linear embedding of the " if trained.model.embed_dim else ""
    what = f"{layer}{POOLS[embedder.backbone.pool]}, width {embedder.embed_dim}"
    name = f"{'initial network' if initial else features} of {run}"
    distances = ("euclidean", "cosine") if trained.uses_mdr else ("cosine",)
    return Measured(embedder, embedder, sizes, name, what, distances, saved.step if saved else 0, run)
