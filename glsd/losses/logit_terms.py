"""What becomes of a few rows of logits: targets and entropies of the teacher, losses and gradients of the student."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

CACHED_ROWS = 32  # so few rows of logits stay in a CPU's caches while they are worked on


def teacher_terms(
    logits: Float[Tensor, "q k"], center: Float[Tensor, " k"], *, out: Float[Tensor, "q k"] | None = None
) -> tuple[Float[Tensor, "q k"], Float[Tensor, " q"]]:
    """Return softmax(logits - center), in ``out`` if given, and its entropies; the logits are overwritten."""
    logits -= center
    targets = torch.softmax(logits, 1, out=out)
    return targets, _logsumexp(logits, targets) - logits.mul_(targets).sum(1)


def student_terms(
    logits: Float[Tensor, "p k"],
    targets: Float[Tensor, "q k"],
    index: Int64[Tensor, "p m"],
    share: Float[Tensor, "p m"],
    *,
    out: Float[Tensor, "p k"] | None = None,
    fuse: bool = False,
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    """Return the cross-entropy of every row with its target, and its gradient, softmax - target.

    A target is the share-weighted sum of the rows of ``targets`` at ``index``. out: memory for the gradient, on a CPU, which
    then goes a few rows at a time; fuse: through torch.compile.
    """
    if out is None:
        return (_fused_terms() if fuse else _terms)(logits, targets, index, share)
    parts = range(0, len(logits), CACHED_ROWS)
    cuts = [slice(start, start + CACHED_ROWS) for start in parts]
    losses = [_terms(logits[cut], targets, index[cut], share[cut], out=out[cut])[0] for cut in cuts]
    return torch.cat(losses), out


def _terms(
    logits: Float[Tensor, "p k"],
    targets: Float[Tensor, "q k"],
    index: Int64[Tensor, "p m"],
    share: Float[Tensor, "p m"],
    *,
    out: Float[Tensor, "p k"] | None = None,
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    """A target sums to 1, so CE = logsumexp(s) - <target, s>."""
    softmax = torch.softmax(logits, 1, out=out)
    logsumexp = _logsumexp(logits, softmax)
    target = F.embedding_bag(index, targets, per_sample_weights=share, mode="sum")
    of_logits = softmax.sub_(target)
    return logsumexp - target.mul_(logits).sum(1), of_logits


@functools.cache
def _fused_terms() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_terms, dynamic=True)


def _logsumexp(logits: Float[Tensor, "p k"], softmax: Float[Tensor, "p k"]) -> Float[Tensor, " p"]:
    """Return it from the largest logit and its softmax, which is at least 1 / k: no second exponential."""
    return logits.amax(1) - softmax.amax(1).log()
