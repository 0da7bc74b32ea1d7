"""Centers of the teacher's logits, which prevent collapse onto one prototype: EMA and Sinkhorn-Knopp."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from glsd.cluster import dist
from glsd.precision import operand, operand_dtype, product, wide_dtype, widened

# Bytes of logits and their COPIES held at a time; more are computed anew in every iteration.
SINKHORN_BUDGET = 2**28
COPIES = 4


@torch.no_grad()
def ema_center(
    center: Float[Tensor, " k"], mean: Float[Tensor, " k"], momentum: float
) -> Float[Tensor, " k"]:
    """Return momentum * center + (1 - momentum) * mean, the mean raw teacher logits of all ranks, in float32 or better.

    Source: DINO (arXiv 2104.14294, eq. 4).
    """
    return momentum * widened(center) + (1 - momentum) * widened(mean)


@torch.no_grad()
def sinkhorn_center(
    vectors: Float[Tensor, "r e"],
    prototypes: Float[Tensor, "k e"],
    *,
    teacher_temp: int | float,
    iterations: int,
) -> Float[Tensor, " k"]:
    """Return the center that makes softmax((t - center) / teacher_temp) of the logits t Sinkhorn-Knopp over all ranks.

    Sinkhorn-Knopp scales the columns and rows of exp(t / teacher_temp), t = prototypes @ vector, in turn until every
    prototype gets the same mass and every row sums to 1. It ends with the rows, so its column scales u act as a center,
    -teacher_temp * log u, of this batch alone. In the log domain, with the precision of prototype_ce.
    Source: Sinkhorn distances (arXiv 1306.0895), as in SwAV (arXiv 2006.09882, sec. 3.1).
    """
    wide, dtype = wide_dtype(vectors), operand_dtype(vectors)
    with torch.autocast(vectors.device.type, enabled=False):
        num_rows = dist.all_reduce_sum(vectors.new_full((), len(vectors), dtype=wide))
        rounded = operand(prototypes.to(wide), dtype).T
        chunks = vectors.split(max(1, SINKHORN_BUDGET // (COPIES * wide.itemsize * len(prototypes))))

        def scaled(chunk: Float[Tensor, "c e"]) -> Float[Tensor, "c k"]:
            return product(operand(chunk.to(wide) / teacher_temp, dtype), rounded)

        kept = scaled(vectors) if len(chunks) == 1 else None
        log_column = torch.zeros_like(prototypes[:, 0], dtype=wide)
        for iteration in range(iterations):
            columns = torch.full_like(log_column, -math.inf)
            for chunk in chunks:
                logs = scaled(chunk) if kept is None else kept
                # Rows of the first round have equal shares of mass.
                rows = (
                    (logs + log_column).logsumexp(1, keepdim=True) if iteration else math.log(len(prototypes))
                )
                columns = torch.logaddexp(columns, (logs - rows).logsumexp(0))
            top = dist.all_reduce_max(columns)
            columns = top + dist.all_reduce_sum((columns - top).exp()).log()
            log_column = num_rows.log() - math.log(len(prototypes)) - columns
        return -teacher_temp * log_column
