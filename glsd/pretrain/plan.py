"""Plans a pretraining run: its steps and micro-batches, and the scheduled quantities of each step."""

import dataclasses
import math
from dataclasses import dataclass

from glsd.cluster import dist
from glsd.config.pretrain import DataConfig, PretrainConfig
from glsd.data.crops import CropSpec
from glsd.data.order import epoch_length, micro_batches
from glsd.errors import UserError, config_keys
from glsd.optim import check_schedule, cosine, teacher_temp


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run cuts its samples into steps: follows from the configuration, the data and the number of ranks."""

    num_samples: int
    steps_per_epoch: int  # of batch_size samples; the ragged tail of an epoch is dropped
    total_steps: int  # of the schedules
    last_step: int  # where this run ends
    # Images of this rank in each forward pass of a step; as many passes on every rank.
    micro_batches: tuple[int, ...]
    rank_images: int  # images of this rank in a batch
    shares: tuple[float, ...]  # how much each counts in the mean over ranks: size x ranks / batch_size
    sinkhorn_iterations: int | None  # None = EMA centers


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    momentum: float
    teacher_temp: float
    freeze_prototypes: bool
    epoch: int

    def shown(self) -> dict[str, float | int]:
        """Return what belongs into a row of metrics."""
        return {
            "epoch": self.epoch,
            "lr": self.lr,
            "weight_decay": self.weight_decay,
            "teacher_momentum": self.momentum,
            "teacher_temp": self.teacher_temp,
        }


def make_plan(cfg: PretrainConfig, num_samples: int) -> Plan:
    """Check the numbers that belong together and cut the run into steps."""
    o, world = cfg.optim, dist.world_size()
    check_ranges(cfg)
    with config_keys({"batch_size": "optim.batch_size", "micro_batch": "optim.micro_batch"}):
        sizes = micro_batches(
            batch_size=o.batch_size, rank=dist.rank(), world_size=world, micro_batch=o.micro_batch
        )
        steps_per_epoch = epoch_length(num_samples, o.batch_size) // o.batch_size
    at_once = {
        "loss.local_mean accepted counts patches": cfg.loss.local_mean == "accepted",
        "loss.koleo_weight compares images": cfg.loss.koleo_weight > 0,
    }
    for what, wanted in at_once.items():
        if wanted and (len(sizes) > 1 or o.batch_size % world):
            raise UserError(
                f"{what} over one forward pass of all ranks: it needs optim.micro_batch 0 and an "
                f"optim.batch_size (here {o.batch_size}) that is a multiple of the {world} ranks"
            )
    for key, warmup_epochs in {
        "optim.warmup_epochs": o.warmup_epochs,
        "loss.warmup_teacher_temp_epochs": cfg.loss.warmup_teacher_temp_epochs,
    }.items():
        with config_keys({"epochs": "optim.epochs", "warmup_epochs": key}):
            check_schedule(epochs=o.epochs, warmup_epochs=warmup_epochs)
    total = o.epochs * steps_per_epoch
    return Plan(
        num_samples=num_samples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        last_step=min(total, o.max_steps) if o.max_steps else total,
        micro_batches=sizes,
        rank_images=sum(sizes),
        shares=tuple(size * world / o.batch_size for size in sizes),
        sinkhorn_iterations=cfg.loss.sinkhorn_iterations if cfg.loss.centering == "sinkhorn" else None,
    )


def check_ranges(cfg: PretrainConfig) -> None:
    """Raise UserError for the first number that lies outside of what it can mean."""
    whole = {"optim": ("batch_size", "epochs"), "loss": ("sinkhorn_iterations",)}
    whole["watch"] = ("log_every", "checkpoint_every", "probe_k", "probe_images")
    temps = ("student_temp", "teacher_temp", "warmup_teacher_temp", "hinge_factor")
    rates = (
        "lr",
        "min_lr",
        "weight_decay",
        "weight_decay_end",
        "clip_grad",
        "max_steps",
        "freeze_prototypes_epochs",
    )
    shares = ("center_momentum", "local_weight", "koleo_weight", "geometric_weight", "similarity_weight")
    limits = [
        *((group, key, 1, math.inf) for group, keys in whole.items() for key in keys),
        *(("loss", key, math.ulp(0.0), math.inf) for key in temps),
        *(("optim", key, 0, math.inf) for key in rates),
        *(("loss", key, 0, 1 if key == "center_momentum" else math.inf) for key in shares),
        *(("optim", key, 0, 1) for key in ("teacher_momentum", "teacher_momentum_end")),
        ("watch", "keep_checkpoints", 2, math.inf),
        *(("watch", key, 0, math.inf) for key in ("keep_every", "probe_every")),
        ("data", "max_bad_fraction", 0, 1),
        ("", "seed", 0, 2**31 - 1),
    ]
    for group, key, low, high in limits:
        name, value = (
            (f"{group}.{key}", getattr(getattr(cfg, group), key)) if group else (key, getattr(cfg, key))
        )
        if value is not None and not low <= value <= high:
            above = "more than 0" if low == math.ulp(0.0) else f"{low} or more"
            expected = above if high == math.inf else f"{low} to {high}"
            raise UserError(f"{name} is {value}: expected {expected}")


def crop_spec(data: DataConfig) -> CropSpec:
    """Return the crops that the configuration asks for."""
    names = [field.name for field in dataclasses.fields(CropSpec)]
    with config_keys({name: f"data.{name}" for name in names}):
        return CropSpec.of(data)


def rates_at(cfg: PretrainConfig, plan: Plan, step: int) -> Rates:
    """Every scheduled quantity is a function of the step alone."""
    o, c = cfg.optim, cfg.loss
    epoch, scale = step // plan.steps_per_epoch, o.batch_size / 256
    warmup = o.warmup_epochs * plan.steps_per_epoch
    total = plan.total_steps
    temps, temp_epochs = (c.warmup_teacher_temp, c.teacher_temp), c.warmup_teacher_temp_epochs
    return Rates(
        lr=cosine(step, base=o.lr * scale, final=o.min_lr, total_steps=total, warmup_steps=warmup),
        weight_decay=cosine(step, base=o.weight_decay, final=o.weight_decay_end, total_steps=total),
        momentum=cosine(step, base=o.teacher_momentum, final=o.teacher_momentum_end, total_steps=total),
        teacher_temp=teacher_temp(epoch, warmup_temp=temps[0], temp=temps[1], warmup_epochs=temp_epochs),
        epoch=epoch,
        freeze_prototypes=epoch < o.freeze_prototypes_epochs,
    )
