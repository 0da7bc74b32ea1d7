"""Centres of the teacher's logits: what keeps every image from choosing the same prototype."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from glsd.runtime import dist


@torch.no_grad()
def ema_center(
    center: Float[Tensor, " k"], batch_mean: Float[Tensor, " k"], momentum: float
) -> Float[Tensor, " k"]:
    """Return momentum * center + (1 - momentum) * batch_mean, in float32 or better.

    batch_mean: mean raw teacher logits over the rows of all ranks.
    Source: DINO (arXiv 2104.14294, eq. 4).
    """
    wide = torch.promote_types(torch.promote_types(center.dtype, batch_mean.dtype), torch.float32)
    return momentum * center.to(wide) + (1 - momentum) * batch_mean.to(wide)


@torch.no_grad()
def sinkhorn_center(
    logits: Float[Tensor, "r k"], *, teacher_temp: float, iterations: int
) -> Float[Tensor, " k"]:
    """Return the centre that makes softmax((logits - centre) / teacher_temp) Sinkhorn-Knopp over all ranks.

    Sinkhorn-Knopp scales the columns and rows of exp(logits / teacher_temp) in turn until every prototype
    gets the same mass and every row sums to 1. Ending with the rows makes its result a softmax whose column
    scales u act as a centre, centre = -teacher_temp * log u. It belongs to this batch alone: no momentum.
    Every rank gets the same centre. Computed in the log domain, in float32 or better. A shift of all its
    entries changes nothing; at convergence the columns of the softmax sum to rows / k.
    Source: Sinkhorn distances (arXiv 1306.0895), as in SwAV (arXiv 2006.09882, sec. 3.1).
    """
    with torch.autocast(logits.device.type, enabled=False):
        scaled = logits.to(torch.promote_types(logits.dtype, torch.float32)) / teacher_temp
        num_prototypes = scaled.shape[1]
        num_rows = dist.all_reduce_sum(torch.full((), len(scaled), dtype=scaled.dtype, device=scaled.device))
        log_row = scaled.new_full((len(scaled), 1), -math.log(num_prototypes))
        log_column = scaled.new_zeros(num_prototypes)
        for _ in range(iterations):
            log_column = num_rows.log() - math.log(num_prototypes) - _sum_rows(scaled + log_row)
            log_row = -(scaled + log_column).logsumexp(dim=1, keepdim=True)
        return -teacher_temp * log_column


def _sum_rows(logs: Float[Tensor, "r k"]) -> Float[Tensor, " k"]:
    """Return the logsumexp over the rows of all ranks."""
    top = dist.all_reduce_max(logs.amax(dim=0))
    return top + dist.all_reduce_sum((logs - top).exp().sum(dim=0)).log()
