"""Learning rate, weight decay, teacher momentum and teacher temperature as pure functions of step or epoch."""

import math

from glsd.errors import UserError


def cosine(step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the value at ``step``: a linear rise from 0 to base, then half a cosine from base towards final.

    The rise takes warmup_steps values and includes both ends, so base comes twice: at the last step of the rise and at the
    first of the cosine. As published, final is never quite reached. step: 0 .. total_steps - 1, ValueError outside.
    Source: the schedules of DINO (arXiv 2104.14294) and GLSD (arXiv 2207.14676), per step.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a schedule of {total_steps} steps")
    if step < warmup_steps:
        return _between(0.0, base, step, warmup_steps)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))


def teacher_temp(epoch: int, *, warmup_temp: float, temp: float, warmup_epochs: int) -> float:
    """Return the teacher's temperature in ``epoch``: warmup_epochs values from warmup_temp to temp, then temp.

    Source: DINO (arXiv 2104.14294), one value per epoch.
    """
    return _between(warmup_temp, temp, epoch, warmup_epochs) if epoch < warmup_epochs else float(temp)


def _between(first: float, last: float, place: int, count: int) -> float:
    """Return value ``place`` of ``count`` equally spaced ones from first to last; a single one is first."""
    return first + (last - first) * place / (count - 1) if count > 1 else float(first)


def check_schedule(*, epochs: int, warmup_epochs: int) -> None:
    """Raise UserError unless 0 <= warmup_epochs <= epochs and epochs > 0."""
    if epochs <= 0:
        raise UserError(f"epochs is {epochs}: expected at least 1")
    if warmup_epochs < 0:
        raise UserError(f"warmup_epochs is {warmup_epochs}: expected 0 or more")
    if warmup_epochs > epochs:
        raise UserError(
            f"warmup_epochs is {warmup_epochs} but epochs is only {epochs}: the warm-up cannot be longer than the run, "
            "lower warmup_epochs or raise epochs"
        )
