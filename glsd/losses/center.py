"""Centers of the teacher's logits: what keeps every image from choosing the same prototype."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from glsd.cluster import dist
from glsd.losses.products import operand, operand_dtype, product

SINKHORN_BUDGET = 2**28  # bytes of logits and what is made of them at a time
COPIES = 4


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
    vectors: Float[Tensor, "r e"],
    prototypes: Float[Tensor, "k e"],
    *,
    teacher_temp: int | float,
    iterations: int,
    budget: int = SINKHORN_BUDGET,
) -> Float[Tensor, " k"]:
    """Return the center that makes softmax((t - center) / teacher_temp) of the logits t Sinkhorn-Knopp over all ranks.

    Sinkhorn-Knopp scales the columns and rows of exp(t / teacher_temp), t = prototypes @ vector, in turn until every
    prototype gets the same mass and every row sums to 1. Ending with the rows makes its result a softmax whose column
    scales u act as a center, center = -teacher_temp * log u. It belongs to this batch alone: no momentum.
    Every rank gets the same center. Computed in the log domain, in float32 or better; the operands of the products
    are rounded to autocast's dtype, as in prototype_ce. Logits beyond ``budget`` bytes are computed anew in every
    iteration, a few rows at a time. A shift of all entries of the center changes nothing; at convergence the
    columns of the softmax sum to rows / k.
    Source: Sinkhorn distances (arXiv 1306.0895), as in SwAV (arXiv 2006.09882, sec. 3.1).
    """
    wide = torch.promote_types(vectors.dtype, torch.float32)
    dtype = operand_dtype(vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        num_rows = dist.all_reduce_sum(vectors.new_full((), len(vectors), dtype=wide))
        rounded = operand(prototypes.to(wide), dtype).T
        parts = vectors.split(max(1, budget // (COPIES * wide.itemsize * len(prototypes))))

        def scaled(part: Float[Tensor, "c e"]) -> Float[Tensor, "c k"]:
            return product(operand(part.to(wide) / teacher_temp, dtype), rounded)

        kept = scaled(vectors) if len(parts) == 1 else None
        log_column = torch.zeros_like(prototypes[:, 0], dtype=wide)
        for iteration in range(iterations):
            columns = _Columns(log_column)
            for part in parts:
                logs = scaled(part) if kept is None else kept
                if iteration == 0:
                    columns.add(logs - math.log(len(prototypes)))
                else:
                    columns.add(logs - (logs + log_column).logsumexp(dim=1, keepdim=True))
            log_column = num_rows.log() - math.log(len(prototypes)) - columns.logsumexp()
        return -teacher_temp * log_column


class _Columns:
    """The logsumexp of every column over rows that come in parts, and over all ranks."""

    def __init__(self, like: Float[Tensor, " k"]):
        self.top, self.sum = torch.full_like(like, -math.inf), torch.zeros_like(like)

    def add(self, logs: Float[Tensor, "c k"]) -> None:
        top = torch.maximum(self.top, logs.amax(dim=0))
        self.sum = self.sum * (self.top - top).exp() + (logs - top).exp().sum(dim=0)
        self.top = top

    def logsumexp(self) -> Float[Tensor, " k"]:
        top = dist.all_reduce_max(self.top)
        return top + dist.all_reduce_sum(self.sum * (self.top - top).exp()).log()
