"""Cross-entropy of teacher and student through their prototypes: the one place with (rows x k) arrays."""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# Student rows are worked off in blocks of at most this many logits (128 MiB in float32), each block computed again in the
# backward pass, so that the student's side takes no memory of the order rows * k. The teacher's distributions are held whole:
# 4 bytes x teacher rows x k, 6.6 GB for 64 images of 2 x 196 patches and 65,536 prototypes.
BLOCK_LOGITS = 2**25


class PrototypeCE(NamedTuple):
    """A prototype cross-entropy and what the teacher looked like in it."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, " k"]  # of the raw teacher logits over all rows: the EMA centre follows it
    teacher_entropy: Float[Tensor, ""]  # mean entropy of the teacher's distributions, in nats (uniform: ln k)


def prototype_ce(
    student: Float[Tensor, "r e"],
    teacher: Float[Tensor, "s e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    *,
    index: Int64[Tensor, "r m"],
    weight: Float[Tensor, "r m"],
    center: Float[Tensor, " k"],
    student_temp: float,
    teacher_temp: float,
) -> PrototypeCE:
    """Return the sum over rows i and columns j of weight[i, j] * CE(teacher row index[i, j], student row i).

    CE(t, s) = -<softmax((t - center) / teacher_temp), log_softmax(s / student_temp)> over the k logits t =
    teacher_prototypes @ vector and s = student_prototypes @ vector. The products run in the dtype of the
    vectors, everything after them in float32 or better, whatever the autocast. Gradients reach the student's
    vectors and prototypes, never the teacher, the centre or the weights. index points into the s teacher
    rows; a weight of 0 leaves the entry out (its index must still be valid).
    Source: DINO (arXiv 2104.14294, eq. 1 and 4), for patches GLSD (arXiv 2207.14676).
    """
    teacher, teacher_prototypes = teacher.detach(), teacher_prototypes.detach()
    with torch.autocast(student.device.type, enabled=False):
        targets, entropy = _teacher_distributions(teacher, teacher_prototypes, center, teacher_temp)
        weight = weight.detach().to(targets.dtype)
        rows = max(1, BLOCK_LOGITS // len(student_prototypes))
        blocks = zip(student.split(rows), index.split(rows), weight.split(rows), strict=True)
        if len(student) > rows and torch.is_grad_enabled():
            losses = [
                checkpoint(
                    _block_loss,
                    *(vectors, student_prototypes, targets, chosen, share, student_temp),
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
                for vectors, chosen, share in blocks
            ]
        else:
            losses = [
                _block_loss(vectors, student_prototypes, targets, chosen, share, student_temp)
                for vectors, chosen, share in blocks
            ]
        # Logits are linear in the vector, so the mean logits need one product, not s of them.
        mean = teacher_prototypes.to(targets.dtype) @ teacher.to(targets.dtype).mean(dim=0)
        return PrototypeCE(torch.stack(losses).sum(), mean, entropy)


def _block_loss(
    student: Float[Tensor, "r e"],
    prototypes: Float[Tensor, "k e"],
    targets: Float[Tensor, "s k"],
    index: Int64[Tensor, "r m"],
    weight: Float[Tensor, "r m"],
    temp: float,
) -> Float[Tensor, ""]:
    """Return the loss of one block of student rows.

    Cross-entropy is linear in the target, so the weighted targets of a row are summed first; a target sums to
    1, so CE = logsumexp(s / temp) - <target, s / temp>.
    """
    logits = _logits(student, prototypes) / temp
    target = torch.zeros_like(logits)
    for chosen, share in zip(index.unbind(1), weight.unbind(1), strict=True):
        target.addcmul_(targets[chosen], share[:, None])
    return (weight.sum(1) * logits.logsumexp(1)).sum() - (target * logits).sum()


@torch.no_grad()
def _teacher_distributions(
    teacher: Float[Tensor, "s e"], prototypes: Float[Tensor, "k e"], center: Float[Tensor, " k"], temp: float
) -> tuple[Float[Tensor, "s k"], Float[Tensor, ""]]:
    """Return softmax((t - center) / temp) of every teacher row, and the mean entropy of the rows."""
    blocks, entropies = [], []
    for vectors in teacher.split(max(1, BLOCK_LOGITS // len(prototypes))):
        logits = _logits(vectors, prototypes)
        log_target = ((logits - center.to(logits.dtype)) / temp).log_softmax(1)
        target = log_target.exp()
        blocks.append(target)
        entropies.append(-(target * log_target).sum())
    return torch.cat(blocks), torch.stack(entropies).sum() / len(teacher)


def _logits(vectors: Float[Tensor, "r e"], prototypes: Float[Tensor, "k e"]) -> Float[Tensor, "r k"]:
    """Return the logits in float32 or better, multiplied in the dtype of the vectors."""
    logits = vectors @ prototypes.to(vectors.dtype).T
    return logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
