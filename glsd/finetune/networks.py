"""The network, losses and optimizer of a metric-learning run, built from its configuration."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from glsd.cluster import dist
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import load_file
from glsd.errors import UserError, config_keys
from glsd.loading import (
    NATIVE_SIZE,
    Architecture,
    architecture_of,
    build_embedder,
    find_run,
    find_weights,
    identify,
    is_finetuned,
)
from glsd.losses.mdr import MdrStatistics, initial_statistics
from glsd.losses.ranking import RANKING, RankingLoss, build_ranking
from glsd.models.embedder import Embedder
from glsd.models.weights import absolute_init
from glsd.optim import param_groups
from glsd.runtime.checkpoint import has_checkpoint
from glsd.runtime.loop import BadGradient
from glsd.runtime.run import Run

OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


# Arguments of build_backbone -> configuration keys.
KEYS = {
    "image_size": "data.crop",
    "allow_partial": "--model.allow_partial",
    **{name: f"model.{name}" for name in ("backbone", "drop_path", "pool", "timm_args")},
}


@dataclass(kw_only=True)
class State:
    """Everything that changes while training."""

    student: Embedder
    teacher: Embedder | None  # the student at the end of the previous epoch, with psd and obdsd
    model: nn.Module  # the student as accelerate wrapped it
    ranking: RankingLoss
    levels: nn.Parameter  # of MDR
    mdr_statistics: MdrStatistics
    optimizer: torch.optim.Optimizer
    bad_gradient: BadGradient
    step: int = 0  # optimizer steps done
    num_broken: int = 0  # samples replaced so far, over all ranks
    scores: dict[str, Any] = field(default_factory=dict)  # measurements by epoch

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the parameters outside the network: proxies, margins, levels."""
        return [*self.ranking.parameters(), self.levels]


def resolve(cfg: FinetuneConfig) -> tuple[FinetuneConfig, str]:
    """Return the configuration with all that ``init`` decides filled in, and where the backbone's weights are.

    The latter is what build_backbone takes: 'random', 'timm' or a path. So a run's own config.yaml describes its whole
    network and names the checkpoint it came from, even after that is gone. A run that resumes is described by its own
    config.yaml, and takes its weights from its own checkpoint.
    """
    out = Path(cfg.out)
    if cfg.resume == "auto" and find_run(out) and has_checkpoint(Run(out).checkpoints) and is_finetuned(out):
        earlier = load_file(FinetuneConfig, out / "config.yaml")
        return filled(cfg, architecture_of(earlier), init=earlier.init), "random"
    with config_keys({"path": "init", "backbone": "model.backbone"}):
        named = identify(cfg.init, backbone=cfg.model.backbone)
        weights = find_weights(named)
    return filled(cfg, named.architecture, init=weights if named.run else absolute_init(cfg.init)), weights


def filled(cfg: FinetuneConfig, network: Architecture, *, init: str) -> FinetuneConfig:
    """Return the configuration; ``network`` fills in what it leaves open."""
    m = cfg.model
    other = m.backbone not in ("", network.backbone)
    model = dataclasses.replace(
        m,
        backbone=m.backbone or network.backbone,
        timm_args=dict(m.timm_args) if other else {**network.timm_args, **m.timm_args},
        pool=m.pool or network.pool or "cls",
    )
    native = network.crop or NATIVE_SIZE
    data = dataclasses.replace(cfg.data, crop=native if cfg.data.crop is None else cfg.data.crop)
    return dataclasses.replace(cfg, init=init, model=model, data=data)


def build(cfg: FinetuneConfig, source: str, num_classes: int, accelerator: Accelerator) -> State:
    """Make the network, its teacher, the losses and the optimizer, on this rank's device."""
    device = accelerator.device
    with config_keys(KEYS):
        student = build_embedder(cfg, source).to(device)
    normalized = any(isinstance(module, _BatchNorm) for module in student.modules())
    if normalized and not cfg.model.freeze_batch_norm and dist.world_size() > 1:
        raise UserError(
            "model.freeze_batch_norm is false on several ranks: each rank would keep its own statistics; train on one rank, "
            "or set it to true"
        )
    teacher = None
    if cfg.distills:
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
    with config_keys({key: f"loss_args.{key}" for key in cfg.loss_args}):
        ranking = build_ranking(
            cfg.loss,
            num_classes=num_classes,
            embed_dim=student.embed_dim,
            seed=cfg.seed,
            args=dict(cfg.loss_args),
        ).to(device)
    levels = nn.Parameter(torch.tensor(cfg.mdr.levels, dtype=torch.float32, device=device))
    levels.requires_grad_(cfg.uses_mdr)
    return State(
        student=student,
        teacher=teacher,
        model=accelerator.prepare_model(student),
        ranking=ranking,
        levels=levels,
        mdr_statistics=initial_statistics(device),
        optimizer=build_optimizer(cfg, student, ranking, levels),
        bad_gradient=BadGradient(device),
    )


def build_optimizer(
    cfg: FinetuneConfig, student: Embedder, ranking: RankingLoss, levels: nn.Parameter
) -> torch.optim.Optimizer:
    """Group the parameters by learning rate and weight decay; each group keeps its rate as ``base_lr``."""
    o = cfg.optim
    groups: list[dict[str, Any]] = []
    for part, lr in (("backbone", o.lr), ("head", o.lr if o.head_lr is None else o.head_lr)):
        own = [(name, p) for name, p in student.named_parameters() if name.startswith(f"{part}.")]
        for group in param_groups(own):
            # Published: Adam's L2 on every weight.
            decays = group.pop("decays") or o.optimizer == "adam"
            groups.append({**group, "base_lr": lr, "weight_decay": o.weight_decay if decays else 0.0})
    loss_lr = (RANKING[cfg.loss].learning_rate or o.lr) if o.loss_lr is None else o.loss_lr
    level_lr = o.lr if o.level_lr is None else o.level_lr
    for named, lr in (
        (ranking.named_parameters(prefix="ranking"), loss_lr),
        ([("levels", levels)], level_lr),
    ):
        learned = [(name, p) for name, p in named if p.requires_grad]
        names, parameters = [name for name, _ in learned], [p for _, p in learned]
        groups.append({"params": parameters, "names": names, "base_lr": lr, "weight_decay": 0.0})
    return OPTIMIZERS[o.optimizer]([group for group in groups if group["params"]], lr=0.0, fused=True)
