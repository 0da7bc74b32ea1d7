"""From configuration to numbers: how a pretraining run is cut into steps, and what the schedules say at each."""

import hashlib
import math
from dataclasses import dataclass

from glsd.config import PretrainConfig
from glsd.contracts import UserError
from glsd.optim.schedules import check_schedule, cosine, teacher_temp
from glsd.runtime import dist


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a run cuts its samples into steps: follows from the configuration, the data and the number of ranks."""

    num_samples: int
    steps_per_epoch: int  # of batch_size samples; the ragged tail of an epoch is dropped
    total_steps: int  # of the schedules
    last_step: int  # where this run ends
    micro_batch: int  # images in one forward pass of one rank


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
    o = cfg.optim
    for key in ("batch_size", "accumulate_steps", "epochs"):
        if getattr(o, key) < 1:
            raise UserError(f"optim.{key} is {getattr(o, key)}: expected at least 1")
    for key in ("log_every", "checkpoint_every"):
        if getattr(cfg.watch, key) < 1:
            raise UserError(f"watch.{key} is {getattr(cfg.watch, key)}: expected at least 1")
    if not 0 <= cfg.seed < 2**31:
        raise UserError(f"seed is {cfg.seed}: expected 0 to {2**31 - 1}")
    for key in ("student_temp", "teacher_temp", "warmup_teacher_temp"):
        if not getattr(cfg.loss, key) > 0:
            raise UserError(f"loss.{key} is {getattr(cfg.loss, key)}: expected more than 0")
    parts = dist.world_size() * o.accumulate_steps
    if o.batch_size % parts:
        raise UserError(
            f"optim.batch_size {o.batch_size} is not a multiple of {dist.world_size()} ranks x optim.accumulate_steps "
            f"{o.accumulate_steps}: use {math.ceil(o.batch_size / parts) * parts}"
        )
    if num_samples < o.batch_size:
        raise UserError(
            f"data.shards hold {num_samples} samples, less than one optim.batch_size of {o.batch_size}: "
            "lower it or add shards"
        )
    check_schedule(
        total=o.epochs, warmup=o.warmup_epochs, total_key="optim.epochs", warmup_key="optim.warmup_epochs"
    )
    check_schedule(
        total=o.epochs,
        warmup=cfg.loss.warmup_teacher_temp_epochs,
        total_key="optim.epochs",
        warmup_key="loss.warmup_teacher_temp_epochs",
    )
    steps_per_epoch = num_samples // o.batch_size
    total = o.epochs * steps_per_epoch
    return Plan(
        num_samples=num_samples,
        steps_per_epoch=steps_per_epoch,
        total_steps=total,
        last_step=min(total, o.max_steps) if o.max_steps else total,
        micro_batch=o.batch_size // parts,
    )


def rates_at(cfg: PretrainConfig, plan: Plan, step: int) -> Rates:
    """Every scheduled quantity is a function of the step alone."""
    o = cfg.optim
    epoch = step // plan.steps_per_epoch
    scale = o.batch_size / 256
    warmup = o.warmup_epochs * plan.steps_per_epoch
    total = plan.total_steps
    return Rates(
        lr=cosine(step, base=o.lr * scale, final=o.min_lr, total_steps=total, warmup_steps=warmup),
        weight_decay=cosine(step, base=o.weight_decay, final=o.weight_decay_end, total_steps=total),
        momentum=cosine(step, base=o.teacher_momentum, final=1.0, total_steps=total),
        teacher_temp=teacher_temp(
            epoch,
            warmup_temp=cfg.loss.warmup_teacher_temp,
            temp=cfg.loss.teacher_temp,
            warmup_epochs=cfg.loss.warmup_teacher_temp_epochs,
        ),
        epoch=epoch,
        freeze_prototypes=epoch < o.freeze_prototypes_epochs,
    )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the random draws that a rank makes inside a step (stochastic depth)."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch takes signed 64-bit seeds
