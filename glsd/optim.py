"""Around the optimizer: schedules, parameter groups, gradient clipping and the moving average of the teacher.

Nothing here waits for the device.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from glsd.cluster import dist
from glsd.errors import UserError
from glsd.precision import widened

# Added to the norm before dividing, as published.
EPSILON = 1e-6


def cosine(step: int, *, base: float, final: float, total_steps: int, warmup_steps: int = 0) -> float:
    """Return the value at ``step``: a linear rise from 0 to base, then half a cosine from base towards final.

    The rise includes both ends; as published, base comes twice and final is never quite reached. Source: DINO, GLSD.
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


def param_groups(named_parameters: Iterable[tuple[str, Parameter]]) -> list[dict[str, Any]]:
    """Return two optimizer groups: parameters with weight decay, and biases and vectors without.

    Each group has ``params``, ``names`` (in the same order) and ``decays`` (bool). The second also has ``weight_decay`` 0.
    Parameters of two dimensions or more decay unless they are biases, so position embedding and class token do. Parameters
    without gradient are left out; one that comes twice (a shared head) is taken once.
    Source: DINO (arXiv 2104.14294), GLSD (arXiv 2207.14676).
    """
    decay: dict[str, Any] = {"params": [], "names": [], "decays": True}
    no_decay: dict[str, Any] = {"params": [], "names": [], "decays": False, "weight_decay": 0.0}
    seen: set[int] = set()
    for name, parameter in named_parameters:
        if not parameter.requires_grad or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        is_bias = name.rsplit(".", 1)[-1] == "bias"
        group = no_decay if is_bias or parameter.ndim < 2 else decay
        group["params"].append(parameter)
        group["names"].append(name)
    return [decay, no_decay]


@torch.no_grad()
def clip_per_parameter(
    parameters: Iterable[Parameter], max_norm: float, *, sharded: bool = False
) -> Float[Tensor, " p"]:
    """Scale each gradient g by min(1, max_norm / (|g| + 1e-6)), in place, and return the p norms before scaling.

    max_norm 0 only measures. sharded: each rank holds a shard of each gradient; the norms are those of the whole gradients.
    """
    grads = _grads(parameters)
    norms = _norms(grads, sharded)
    if grads and max_norm > 0:
        scales = (max_norm / (norms + EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(scales.unbind()))
    return norms


@torch.no_grad()
def clip_global(
    parameters: Iterable[Parameter], max_norm: float, *, sharded: bool = False
) -> Float[Tensor, " p"]:
    """Scale all gradients by min(1, max_norm / (|all| + 1e-6)), in place, and return the p norms before scaling.

    The norm of all gradients is the norm of the returned norms. Otherwise as clip_per_parameter.
    """
    grads = _grads(parameters)
    norms = _norms(grads, sharded)
    if grads and max_norm > 0:
        total = torch.linalg.vector_norm(norms)
        torch._foreach_mul_(grads, (max_norm / (total + EPSILON)).clamp(max=1.0))
    return norms


CLIPPERS: dict[str, Callable[..., Tensor]] = {"parameter": clip_per_parameter, "global": clip_global}


def _grads(parameters: Iterable[Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norms(grads: list[Tensor], sharded: bool) -> Tensor:
    if not grads:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm([widened(grad) for grad in grads], 2))
    if not sharded:
        return norms
    # Squares in float64: in float32 those of norms above 1e19 would overflow, unlike without shards.
    return dist.all_reduce_sum(norms.double().square()).sqrt().to(norms.dtype)


@torch.no_grad()
def ema_update(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: int | float) -> None:
    """Move every named parameter of the teacher: teacher <- momentum * teacher + (1 - momentum) * student, in place.

    Buffers, such as running statistics, stay the teacher's own. Momentum 1 changes no bit. Source: DINO, section 3.1.
    """
    torch._foreach_lerp_(list(teacher.values()), [student[name] for name in teacher], 1.0 - momentum)
