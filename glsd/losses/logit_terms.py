"""Teacher targets and student cross-entropy for a chunk of logits."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

# So few rows of logits stay in a CPU's caches during the work on them.
CACHED_ROWS = 32


def teacher_terms(
    logits: Float[Tensor, "q k"], center: Float[Tensor, " k"]
) -> tuple[Float[Tensor, "q k"], Float[Tensor, " q"]]:
    """Return softmax(logits - center) and its entropies in nats; overwrites the logits."""
    logits -= center
    if logits.device.type != "cpu":
        return _teacher_terms(logits)
    entropies = [_teacher_terms(rows, out=rows)[1] for rows in logits.split(CACHED_ROWS)]
    return logits, torch.cat(entropies)


def student_terms(
    logits: Float[Tensor, "p k"],
    targets: Float[Tensor, "q k"],
    index: Int64[Tensor, "p m"],
    share: Float[Tensor, "p m"],
    *,
    fuse: bool = False,
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    """Return the cross-entropy of every row with its target, and its gradient by the logits, softmax - target.

    A row's target is the share-weighted sum of the rows of ``targets`` at ``index``. May overwrite the logits (on a CPU with
    the gradient). fuse: use torch.compile.
    """
    if fuse:
        return _fused_terms()(logits, targets, index, share)
    if logits.device.type != "cpu":
        return _student_terms(logits, targets, index, share)
    parts = (tensor.split(CACHED_ROWS) for tensor in (logits, index, share))
    losses = [
        _student_terms(rows, targets, chosen, shares, out=rows)[0]
        for rows, chosen, shares in zip(*parts, strict=True)
    ]
    return torch.cat(losses), logits


def _teacher_terms(
    logits: Float[Tensor, "q k"], *, out: Float[Tensor, "q k"] | None = None
) -> tuple[Float[Tensor, "q k"], Float[Tensor, " q"]]:
    softmax = logits.softmax(1)
    entropies = _logsumexp(logits, softmax) - logits.mul_(softmax).sum(1)
    return softmax if out is None else out.copy_(softmax), entropies


def _student_terms(
    logits: Float[Tensor, "p k"],
    targets: Float[Tensor, "q k"],
    index: Int64[Tensor, "p m"],
    share: Float[Tensor, "p m"],
    *,
    out: Float[Tensor, "p k"] | None = None,
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    # A target sums to 1, so CE = logsumexp(s) - <target, s>.
    softmax = logits.softmax(1)
    target = F.embedding_bag(index, targets, per_sample_weights=share, mode="sum")
    losses = _logsumexp(logits, softmax) - (target * logits).sum(1)
    return losses, torch.sub(softmax, target, out=out)


@functools.cache
def _fused_terms() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_student_terms, dynamic=True)


def _logsumexp(logits: Float[Tensor, "p k"], softmax: Float[Tensor, "p k"]) -> Float[Tensor, " p"]:
    """Return the logsumexp from the largest logit and its softmax, which is at least 1 / k: no second exponential."""
    return logits.amax(1) - softmax.amax(1).log()
