"""Learning rate, weight decay, teacher momentum and teacher temperature as pure functions of the step or
epoch.
"""

import math

from glsd.errors import UserError


def cosine(
    step: int,
    *,
    base: int | float,
    final: int | float,
    total_steps: int,
    warmup_steps: int = 0,
    start: int | float = 0.0,
) -> float:
    """Return the value at ``step``: a straight rise from start to base, then half a cosine from base
    towards final.

    The rise takes warmup_steps values and includes both ends, so base comes twice (at the last step of the
    rise and at the first of the cosine) and final is never quite reached, as published. step: 0 ..
    total_steps - 1, ValueError outside. Source: the schedules of DINO (Caron et al. 2021) and GLSD (arXiv
    2207.14676), per step.
    """
    if not 0 <= step < total_steps:
        raise ValueError(f"step {step} is outside a schedule of {total_steps} steps")
    if step < warmup_steps:
        return _between(start, base, step, warmup_steps)
    progress = (step - warmup_steps) / (total_steps - warmup_steps)
    return final + 0.5 * (base - final) * (1.0 + math.cos(math.pi * progress))


def teacher_temp(epoch: int, *, warmup_temp: int | float, temp: int | float, warmup_epochs: int) -> float:
    """Return the teacher's temperature in ``epoch``: warmup_epochs values from warmup_temp to temp, both
    included, then temp.

    Source: DINO (Caron et al. 2021), one value per epoch.
    """
    if epoch < 0:
        raise ValueError(f"epoch {epoch} is negative")
    return _between(warmup_temp, temp, epoch, warmup_epochs) if epoch < warmup_epochs else float(temp)


def _between(first: int | float, last: int | float, place: int, count: int) -> float:
    """Return value ``place`` of ``count`` equally spaced ones from first to last; a single one is first."""
    return first + (last - first) * place / (count - 1) if count > 1 else float(first)


def check_schedule(*, total: int, warmup: int, total_key: str, warmup_key: str) -> None:
    """Raise UserError, naming both keys, unless 0 <= warmup <= total and total > 0 (same unit, epochs or
    steps).
    """
    if total <= 0:
        raise UserError(f"{total_key} is {total}: expected at least 1")
    if warmup < 0:
        raise UserError(f"{warmup_key} is {warmup}: expected 0 or more")
    if warmup > total:
        raise UserError(
            f"{warmup_key} is {warmup} but {total_key} is only {total}: "
            f"the warm-up cannot be longer than the run, lower {warmup_key} or raise {total_key}"
        )
