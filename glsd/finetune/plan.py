"""Plans a metric-learning run: its steps and batches, and the scheduled quantities of each step."""

import math
from dataclasses import dataclass

from glsd.cluster import dist
from glsd.config.finetune import FinetuneConfig
from glsd.data.balanced import rank_slots
from glsd.errors import UserError, config_keys, pick
from glsd.losses import obd_sd
from glsd.losses.ranking import RANKING


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run cuts its samples into steps: follows from the configuration, the data and the number of ranks."""

    num_samples: int
    num_classes: int  # to learn from
    classes_per_batch: int  # P; the batch holds data.images_per_class of each
    steps_per_epoch: int
    total_steps: int  # of the schedules
    last_step: int  # where this run ends
    rank_images: int  # images of one rank in a batch


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the schedules say for one step."""

    epoch: int
    scale: float  # of all learning rates
    sd_weight: float  # of the KL term of psd and obdsd, 0 = the teacher is not asked


def make_plan(cfg: FinetuneConfig, num_samples: int, num_classes: int) -> Plan:
    """Check the numbers that belong together and cut the run into steps."""
    o, per_class = cfg.optim, cfg.data.images_per_class
    check_ranges(cfg)
    pick(RANKING, cfg.loss, "loss")
    if o.batch_size % per_class or o.batch_size < 2 * per_class:
        raise UserError(
            f"optim.batch_size {o.batch_size} is not a multiple of data.images_per_class {per_class} that holds two classes "
            f"or more: use {max(2, math.ceil(o.batch_size / per_class)) * per_class}"
        )
    with config_keys({"batch_size": "optim.batch_size"}):
        slots = rank_slots(o.batch_size, rank=dist.rank(), world_size=dist.world_size())
    classes = o.batch_size // per_class
    if num_classes < classes:
        raise UserError(
            f"data.train_shards: {num_classes} classes to learn from, fewer than the {classes} of a batch (optim.batch_size "
            f"{o.batch_size} / data.images_per_class {per_class}): lower optim.batch_size to {num_classes * per_class} or less"
        )
    steps = o.steps_per_epoch or max(1, num_samples // o.batch_size)
    total = o.epochs * steps
    return Plan(
        num_samples=num_samples,
        num_classes=num_classes,
        classes_per_batch=classes,
        steps_per_epoch=steps,
        total_steps=total,
        last_step=min(total, o.max_steps) if o.max_steps else total,
        rank_images=len(slots),
    )


def check_ranges(cfg: FinetuneConfig) -> None:
    """Raise UserError for the first setting that lies outside of what it can mean."""
    o = cfg.optim
    limits: list[tuple[str, int | float | None, int | float, int | float]] = [
        ("seed", cfg.seed, 0, 2**31 - 1),
        ("data.images_per_class", cfg.data.images_per_class, 2, math.inf),
        ("data.flip_prob", cfg.data.flip_prob, 0, 1),
        ("data.max_bad_fraction", cfg.data.max_bad_fraction, 0, 1),
        ("data.val_share", cfg.data.val_share, 0, 0.9),
        ("data.crop", cfg.data.crop, 1, math.inf),
        ("data.resize", cfg.data.resize, cfg.data.crop or 1, math.inf),
        ("model.embed_dim", cfg.model.embed_dim, 0, math.inf),
        ("sd.weight", cfg.sd.weight, 0, math.inf),
        ("mdr.weight", cfg.mdr.weight, 0, math.inf),
        ("mdr.level_weight", cfg.mdr.level_weight, 0, math.inf),
        ("mdr.momentum", cfg.mdr.momentum, 0, 1),
        *(("mdr.levels", level, -math.inf, math.inf) for level in cfg.mdr.levels or [math.nan]),
        *((f"optim.{key}", getattr(o, key), 1, math.inf) for key in ("epochs", "batch_size")),
        *((f"optim.{key}", getattr(o, key), 0, math.inf) for key in ("steps_per_epoch", "max_steps")),
        *((f"optim.{key}", getattr(o, key), 0, math.inf) for key in ("lr", "head_lr", "loss_lr", "level_lr")),
        *((f"optim.{key}", getattr(o, key), 0, math.inf) for key in ("weight_decay", "gamma", "clip_grad")),
        *((f"watch.{key}", getattr(cfg.watch, key), 1, math.inf) for key in ("log_every", "eval_every")),
        ("watch.checkpoint_every", cfg.watch.checkpoint_every, 0, math.inf),
        ("watch.keep_checkpoints", cfg.watch.keep_checkpoints, 2, math.inf),
        ("watch.batch_size", cfg.watch.batch_size, 1, math.inf),
        *(("watch.recall_at", k, 1, math.inf) for k in cfg.watch.recall_at or [0]),
        *(("optim.milestones", epoch, 1, math.inf) for epoch in o.milestones),
    ]
    for name, value, low, high in limits:
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            expected = f"{low} or more" if high == math.inf else f"{low} to {high}"
            expected = "finite numbers, at least one" if low == -math.inf else expected
            raise UserError(f"{name} is {value}: expected {expected}")
    low, high = cfg.data.scale
    if not 0 < low <= high <= 1:
        raise UserError(f"data.scale is {cfg.data.scale}: expected 0 < smallest <= largest <= 1")
    if cfg.distills:
        keys = {"batch_size": "optim.batch_size", "tau": "sd.tau", "tau_d": "sd.tau_d", "w": "sd.w"}
        with config_keys(keys):
            obd_sd.check_settings(
                tau=cfg.sd.tau,
                w=cfg.sd.w if "obdsd" in cfg.reg else None,
                tau_d=cfg.sd.tau_d,
                mask_self=cfg.sd.mask_self,
                batch_size=o.batch_size,
            )
    if cfg.uses_mdr and o.batch_size < 3:
        raise UserError(
            f"optim.batch_size {o.batch_size} with reg {cfg.reg}: distances have no deviation, expected 3 or more"
        )


def diffusion_share(cfg: FinetuneConfig) -> float:
    """Return the w of the diffusion; psd is the diffusion that does not walk."""
    return cfg.sd.w if "obdsd" in cfg.reg else 0.0


def rates_at(cfg: FinetuneConfig, plan: Plan, step: int) -> Rates:
    """Every scheduled quantity is a function of the step alone."""
    epoch = step // plan.steps_per_epoch
    weight = (
        obd_sd.ramp(epoch, cfg.optim.epochs, weight=cfg.sd.weight, tau=cfg.sd.tau) if cfg.distills else 0.0
    )
    passed = sum(epoch >= milestone for milestone in cfg.optim.milestones)
    return Rates(epoch=epoch, scale=cfg.optim.gamma**passed, sd_weight=weight)
