"""Gradient clipping without host synchronization."""

from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import Parameter

from glsd.cluster import dist
from glsd.precision import widened

# Added to the norm before dividing, as published.
EPSILON = 1e-6


@torch.no_grad()
def clip_per_parameter(
    parameters: Iterable[Parameter], max_norm: int | float, *, sharded: bool = False
) -> Float[Tensor, " p"]:
    """Scale each gradient g on its own by min(1, max_norm / (|g| + 1e-6)), in place, and return the p norms
    before that.

    Parameters without a gradient are passed over; max_norm 0 measures and leaves the gradients alone. Norms
    are float32 or better. sharded: each rank holds some rows of each gradient, and the norms are those of
    the whole ones (a collective call). Source: DINO (Caron et al. 2021), GLSD (arXiv 2207.14676).
    """
    grads = _grads(parameters)
    norms = _norms(grads, sharded)
    if grads and max_norm > 0:
        scales = (max_norm / (norms + EPSILON)).clamp(max=1.0)
        torch._foreach_mul_(grads, list(scales.unbind()))
    return norms


@torch.no_grad()
def clip_global(
    parameters: Iterable[Parameter], max_norm: int | float, *, sharded: bool = False
) -> Float[Tensor, " p"]:
    """Scale all gradients together by min(1, max_norm / (|all| + 1e-6)), in place, and return the p norms
    before that.

    The norm of all is the norm of the returned norms. Otherwise as clip_per_parameter.
    """
    grads = _grads(parameters)
    norms = _norms(grads, sharded)
    if grads and max_norm > 0:
        total = torch.linalg.vector_norm(norms)
        torch._foreach_mul_(grads, (max_norm / (total + EPSILON)).clamp(max=1.0))
    return norms


CLIPPERS = {"parameter": clip_per_parameter, "global": clip_global}


def _grads(parameters: Iterable[Parameter]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _norms(grads: list[Tensor], sharded: bool) -> Tensor:
    if not grads:
        return torch.zeros(0)
    norms = torch.stack(torch._foreach_norm([widened(grad) for grad in grads], 2))
    if not sharded:
        return norms
    # Squares in float64: those of norms above 1e19 would not be finite, and ddp would clip them.
    return dist.all_reduce_sum(norms.double().square()).sqrt().to(norms.dtype)
