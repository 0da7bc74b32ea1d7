"""From configuration to networks: the backbone that --init names, its embedding layer, the losses, the optimiser."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from glsd.command_line import load_file
from glsd.config import PretrainConfig
from glsd.contracts import UserError
from glsd.finetune_config import FinetuneConfig
from glsd.losses.mdr import MdrStatistics, initial_statistics
from glsd.losses.ranking import RANKING, RankingLoss, build_ranking
from glsd.models.backbone import build_backbone
from glsd.models.embedder import Embedder
from glsd.optim.param_groups import param_groups
from glsd.run_folder import find_run, is_finetuned, read_checkpoint

HEAD_SEED = 1  # added to the run's seed: the layer must not repeat a random backbone's numbers
NATIVE_SIZE = 224  # pixels, where neither the user nor a run says
OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


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
    bad_step: Tensor  # see glsd.guard
    bad_loss: Tensor
    step: int = 0  # optimizer steps done
    num_broken: int = 0  # samples replaced so far, over all ranks
    scores: dict[str, Any] = field(default_factory=dict)  # measurements by epoch

    def loss_parameters(self) -> list[nn.Parameter]:
        """Return the parameters outside of the network: proxies, margins, levels."""
        return [*self.ranking.parameters(), self.levels]


def resolve(cfg: FinetuneConfig) -> tuple[FinetuneConfig, str]:
    """Return the configuration with all that ``init`` decides filled in, and where the backbone's weights are.

    The latter is what build_backbone takes: 'random', 'timm' or a file. So a run's own config.yaml says everything about
    its network, also when what it started from is gone.
    """
    m, path = cfg.model, Path(cfg.init)
    run = find_run(path) if cfg.init else None
    name, timm_args, pool, crop = m.backbone, dict(m.timm_args), m.pool, cfg.data.crop
    if run is not None:
        saved = read_checkpoint(run, None if path == run else path)
        if is_finetuned(run):
            tuned = load_file(FinetuneConfig, run / "config.yaml")
            old_name, old_args, old_pool = tuned.model.backbone, tuned.model.timm_args, tuned.model.pool
            old_crop, weights = tuned.data.crop, "student"
        else:
            trained = load_file(PretrainConfig, run / "config.yaml")
            old_name, old_args, old_pool = trained.model.backbone, trained.model.timm_args, trained.model.pool
            old_crop, weights = trained.data.global_size, "teacher"
        timm_args = timm_args if name else {**old_args, **timm_args}
        name, pool, crop = name or old_name, pool or old_pool, crop or old_crop
        source = str(saved.path / f"{weights}.safetensors")
    elif cfg.init.startswith("timm:"):
        source = "timm"
        if name not in ("", cfg.init.removeprefix("timm:")):
            raise UserError(f"init {cfg.init!r} and model.backbone {name!r} name two networks: give one")
        name = cfg.init.removeprefix("timm:")
    elif not cfg.init:
        raise UserError(
            "init is not set: give a run folder, a checkpoint folder, timm:NAME, a weights file or 'random'"
        )
    else:
        if cfg.init != "random" and not path.is_file():
            raise UserError(f"init {cfg.init!r}: no such run, checkpoint or weights file, and not timm:NAME")
        if not name:
            raise UserError(
                f"init {cfg.init!r} does not say which network it is: set model.backbone to its timm name"
            )
        source = cfg.init
    model = dataclasses.replace(m, backbone=name, timm_args=timm_args, pool=pool or "cls")
    data = dataclasses.replace(cfg.data, crop=crop or NATIVE_SIZE)
    return dataclasses.replace(cfg, model=model, data=data), source


def build_embedder(cfg: FinetuneConfig, source: str) -> Embedder:
    """Build the network of a resolved configuration, on the CPU; ``source``: as resolve returns it."""
    m = cfg.model
    backbone = build_backbone(
        m.backbone,
        image_size=cfg.data.crop or NATIVE_SIZE,
        drop_path=m.drop_path,
        pool=m.pool or "cls",
        init=source,
        timm_args=dict(m.timm_args),
        seed=cfg.seed,
        allow_partial=m.allow_partial,
    )
    return Embedder(
        backbone, embed_dim=m.embed_dim, freeze_batch_norm=m.freeze_batch_norm, seed=cfg.seed + HEAD_SEED
    )


def build(cfg: FinetuneConfig, source: str, num_classes: int, accelerator: Accelerator) -> State:
    """Make the network, its teacher, the losses and the optimiser, on this rank's device."""
    device = accelerator.device
    student = build_embedder(cfg, source).to(device)
    teacher = None
    if cfg.distills:
        teacher = copy.deepcopy(student).eval().requires_grad_(False)
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
        bad_step=torch.tensor(-1, device=device),
        bad_loss=torch.tensor(False, device=device),
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
