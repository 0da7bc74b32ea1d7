"""What a step does with the parameters of a network: group them, clip their gradients, move the teacher.

Nothing here waits for the device.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from glsd.cluster import dist
from glsd.precision import widened

# Added to the norm before dividing, as published.
EPSILON = 1e-6


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

    Parameters without a gradient are skipped. max_norm 0 measures and leaves the gradients alone. Norms are float32 or
    better. sharded: each rank holds a shard of each gradient, and the norms are those of the whole gradients (a collective
    call). Source: DINO (arXiv 2104.14294), GLSD (arXiv 2207.14676).
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
def ema_update(teacher: Mapping[str, Tensor], student: Mapping[str, Tensor], momentum: float) -> None:
    """Move every named parameter of the teacher in place: teacher <- momentum * teacher + (1 - momentum) * student.

    Parameters only: buffers, such as the statistics of batch normalization, stay the teacher's own. Momentum 1 changes no
    bit. Raises ValueError if names or shapes differ, or if a parameter is below float32, which would round small steps
    away. Source: DINO (arXiv 2104.14294), section 3.1.
    """
    if teacher.keys() != student.keys():
        raise ValueError(
            f"teacher and student differ in parameters: {sorted(teacher.keys() ^ student.keys())[:5]}"
        )
    for name, target in teacher.items():
        if target.shape != student[name].shape:
            raise ValueError(
                f"{name} is {tuple(target.shape)} in the teacher, {tuple(student[name].shape)} in the student"
            )
        if torch.finfo(target.dtype).bits < 32:
            raise ValueError(f"{name} of the teacher is {target.dtype}: an average needs float32")
    torch._foreach_lerp_(list(teacher.values()), [student[name] for name in teacher], 1.0 - momentum)
