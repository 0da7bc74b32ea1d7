"""What a path names: a run of either stage, one of its checkpoints, timm:NAME or a weights file -> a network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
from jaxtyping import Float
from torch import Tensor

from glsd.config.finetune import FinetuneConfig, Pool
from glsd.config.parse import groups_in, load_file
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError, config_keys, pick
from glsd.models.backbone import Backbone, build_backbone
from glsd.models.embedder import Embedder
from glsd.models.weights import absolute_init
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import Checkpoint

NATIVE_SIZE = 224  # pixels, where neither the caller nor a run says
_HEAD_SEED = 1  # added to a run's seed: the layer must not repeat a random backbone's numbers


class Architecture(NamedTuple):
    """What a path says about its network; None = nothing."""

    backbone: str
    timm_args: Mapping[str, Any]
    pool: Pool | None
    crop: int | None  # side of the training images in pixels


class Named(NamedTuple):
    """What a path names. ``weights`` is what ``build_backbone`` takes; see find_weights for those of a run."""

    architecture: Architecture
    weights: str = ""
    run: Path | None = None
    checkpoint: Path | None = None  # the one that the path chose; None = the latest
    config: PretrainConfig | FinetuneConfig | None = None  # of the run


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A network with its weights, on the CPU, and what is needed to use it."""

    network: Backbone | Embedder | Any  # Any: whatever returns features first
    name: str  # 'teacher of runs/x', 'timm:vit_small_patch16_224', ...
    crop: int  # side of the center crop that suits the network, in pixels
    resize: int | None = None  # short side before the crop; None = the run does not say
    step: int | None = None  # of the checkpoint, 0 = before the first step; None = not a run
    run: Path | None = None
    checkpoint: Path | None = None  # of the run; None = the network before the first step
    config: PretrainConfig | FinetuneConfig | None = None  # of the run

    def features(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Return one vector per image: the embedding, or the pooled feature of a backbone without one."""
        return self.network(images) if isinstance(self.network, Embedder) else self.network(images)[0]


def load_network(
    path: str,
    *,
    role: str | None = None,
    backbone: str = "",
    pool: Pool | None = None,
    image_size: int | None = None,
    which: str = "last",
) -> Loaded:
    """Build the network that ``path`` names, and fill it with its weights.

    role: which network of a run, 'teacher', 'student' or 'initial' (before the first step); None = the teacher of
    pretraining, the student of metric learning. backbone: timm name of the network that a weights file belongs to.
    pool: 'cls', 'mean' or 'mean+max'; None = as the run was trained, 'cls' otherwise. image_size: native resolution
    of a network that is not a run's, in pixels; None = 224. which: 'last' or 'best' checkpoint of a run, by its probes.
    Raises UserError if the path names no network, the run has no checkpoint or no such role, or the weights do not fit.
    """
    named = _choose(identify(path, backbone=backbone), path, which)
    if named.config is not None:
        return _load_run(named, named.config, role, pool)
    if role not in (None, "teacher"):
        raise UserError(f"role {role!r}: {path!r} is not a run or checkpoint folder")
    crop = image_size or NATIVE_SIZE
    network = build_backbone(
        named.architecture.backbone, image_size=crop, pool=pool or "cls", init=named.weights
    )
    return Loaded(network=network, name=path, crop=crop)


def _choose(named: Named, path: str, which: str) -> Named:
    """Let ``named`` name the best checkpoint of its run if that is wanted."""
    if pick({"last": False, "best": True}, which, "which"):
        if named.run is None or named.checkpoint is not None:
            raise UserError(
                f"which 'best' chooses among the checkpoints of a run, and {path!r} is not the folder of one"
            )
        best = named.run / "checkpoints" / checkpoint.BEST
        if not best.exists():
            raise UserError(
                f"run {str(named.run)!r} has no best checkpoint: it was not probed since its first one (watch.probe_every)"
            )
        return named._replace(checkpoint=best)
    return named


def identify(path: str, *, backbone: str = "") -> Named:
    """Return what ``path`` names; UserError if that is nothing, or if it does not say which network it is."""
    if not path:
        raise UserError(
            "path is not set: give a run folder, a checkpoint folder, timm:NAME or a weights file"
        )
    folder = Path(path)
    run = find_run(folder)
    if run is not None:
        kind: type[PretrainConfig | FinetuneConfig] = FinetuneConfig if is_finetuned(run) else PretrainConfig
        config = load_file(kind, run / "config.yaml")
        chosen = None if folder == run else folder
        return Named(architecture_of(config), run=run, checkpoint=chosen, config=config)
    if path.startswith("timm:"):
        name = path.removeprefix("timm:")
        if backbone not in ("", name):
            raise UserError(f"path {path!r} and backbone {backbone!r} name two networks: give one")
        return Named(Architecture(name, {}, None, None), weights="timm")
    of_checkpoint = any((folder / f"{role}.safetensors").is_file() for role in ("teacher", "student"))
    if path != "random" and not folder.is_file() and not of_checkpoint:
        hint = f"; did you mean 'timm:{path}'?" if timm.is_model(path) else ""
        raise UserError(f"path {path!r}: no such run, checkpoint or weights file, and not timm:NAME{hint}")
    if not backbone:
        raise UserError(f"path {path!r} does not say which network it is: set backbone to its timm name")
    return Named(Architecture(backbone, {}, None, None), weights=path)


def architecture_of(config: PretrainConfig | FinetuneConfig) -> Architecture:
    """Return the architecture that a run trains."""
    crop = config.data.crop if isinstance(config, FinetuneConfig) else config.data.global_size
    return Architecture(config.model.backbone, config.model.timm_args, config.model.pool, crop)


def find_weights(named: Named) -> str:
    """Return what ``build_backbone`` takes as ``init``: for a run the checkpoint, after it was verified."""
    return named.weights if named.run is None else str(read_checkpoint(named.run, named.checkpoint).path)


def build_embedder(config: FinetuneConfig, weights: str) -> Embedder:
    """Build the network of a metric-learning run on the CPU; ``weights`` are those of its backbone."""
    m = config.model
    backbone = build_backbone(
        m.backbone,
        image_size=config.data.crop or NATIVE_SIZE,
        drop_path=m.drop_path,
        pool=m.pool or "cls",
        init=weights,
        timm_args=dict(m.timm_args),
        seed=config.seed,
        allow_partial=m.allow_partial,
    )
    return Embedder(
        backbone,
        embed_dim=m.embed_dim,
        freeze_batch_norm=m.freeze_batch_norm,
        seed=config.seed + _HEAD_SEED,
    )


def _load_run(
    named: Named, config: PretrainConfig | FinetuneConfig, role: str | None, pool: Pool | None
) -> Loaded:
    """Build the network of a run from its own configuration, and fill it from a checkpoint unless it is the initial one."""
    assert named.run is not None
    finetuned = isinstance(config, FinetuneConfig)
    role = role or ("student" if finetuned else "teacher")
    if finetuned and role == "teacher":
        raise UserError(
            f"role 'teacher': {named.run} is a metric-learning run, whose teacher is an earlier student: "
            "use student or initial"
        )
    if finetuned and pool is not None:
        raise UserError(f"pool {pool!r}: {named.run} is a metric-learning run, whose embedding has its own")
    hint = " (role 'initial' is the network before the first step)"
    if role == "initial":
        _check_start(named.run, config.init if isinstance(config, FinetuneConfig) else config.model.init)
    saved = None if role == "initial" else read_checkpoint(named.run, named.checkpoint, hint)
    network = (
        _tuned(config, saved)
        if isinstance(config, FinetuneConfig)
        else _pretrained(config, role, pool, saved)
    )
    return Loaded(
        network=network,
        name=f"{role if saved else 'initial network'} of {named.run}",
        crop=named.architecture.crop or NATIVE_SIZE,
        resize=config.data.resize if isinstance(config, FinetuneConfig) else None,
        step=saved.step if saved else 0,
        run=named.run,
        checkpoint=saved.path if saved else None,
        config=config,
    )


def _check_start(run: Path, init: str) -> None:
    """Raise UserError if it depends on the present folder which file a run began with."""
    if absolute_init(init) != init:
        raise UserError(
            f"role 'initial': {run / 'config.yaml'} says that the run began with {init!r}, but not in which folder that is: "
            "write the whole path there"
        )


def _pretrained(config: PretrainConfig, role: str, pool: Pool | None, saved: Checkpoint | None) -> Backbone:
    m = config.model
    backbone = build_backbone(
        m.backbone,
        image_size=config.data.global_size,
        pool=pool or m.pool,
        init="random" if saved else m.init,
        timm_args=dict(m.timm_args),
        seed=config.seed,
    )
    if saved:
        tensors, prefix = pick(saved.tensors, role, "network of a checkpoint"), "backbone."
        own = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
        checkpoint.restore(backbone, own, source=f"checkpoint {saved.path}")
    return backbone


def _tuned(config: FinetuneConfig, saved: Checkpoint | None) -> Embedder:
    if saved is None:
        with config_keys({"path": "the run's init"}):
            return build_embedder(config, find_weights(identify(config.init, backbone=config.model.backbone)))
    embedder = build_embedder(config, "random")
    checkpoint.restore(embedder, saved.tensors["student"], source=f"checkpoint {saved.path}/student")
    return embedder


def find_run(path: Path) -> Path | None:
    """Return the run folder that ``path`` is, or that it is a checkpoint of; None if it is neither."""
    if (path / "config.yaml").is_file():
        return path
    if path.is_dir() and (path.parent.parent / "config.yaml").is_file():
        return path.parent.parent
    return None


def is_finetuned(run: Path) -> bool:
    """Tell whether a run folder is one of metric learning, by a key that only those have."""
    return "reg" in groups_in(run / "config.yaml")


def read_checkpoint(run: Path, chosen: Path | None, hint: str = "") -> Checkpoint:
    """Return the chosen checkpoint of a run, or its latest intact one; UserError if there is none."""
    saved = checkpoint.load(chosen) if chosen else checkpoint.load_latest(run / "checkpoints")
    if saved is None:
        raise UserError(f"run {str(run)!r} has no checkpoint yet{hint}")
    return saved
