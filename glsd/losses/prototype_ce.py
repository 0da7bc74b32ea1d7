"""Cross-entropy of teacher and student through their prototypes, exact, without ever holding a (rows x k) array.

What it rests on: the cross-entropy is linear in the target, so the targets of a row are summed first, and its gradient with
respect to the logits is softmax - target, so a few student rows at a time give loss and gradients in one pass; rows whose
matches were all rejected and teacher rows that nobody matched are never multiplied with the prototypes; and the mean of the
teacher's logits is the prototype layer of the mean vector.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from glsd.losses.row_plan import RowPlan, plan_rows

# Bytes of logits and what is made of them that are held at a time: a quarter for the teacher's distributions, the rest for the
# student's rows. On the CPU small enough for its cache, on a GPU large enough to keep it busy. One group's teacher rows
# (for patches 2 x 196 of one image) and MIN_ROWS student rows are held in any case.
MEMORY_BUDGET = {"cpu": 48 * 2**20, "cuda": 2**30}
MIN_ROWS = 64
STUDENT_COPIES = 4  # logits, softmax, target and one temporary


class PrototypeCE(NamedTuple):
    """A prototype cross-entropy and what the teacher looked like in it."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, " k"]  # of the raw teacher logits over all rows: the EMA centre follows it
    teacher_entropy: Float[Tensor, ""]  # mean entropy in nats of the teacher rows in use (uniform: ln k)


class Settings(NamedTuple):
    """What the chunks are worked off with: plain values."""

    product_dtype: torch.dtype  # of the operands of matrix products; the results are float32 or better
    student_rows: int  # worked off at a time
    gradients: bool
    fuse: bool


def prototype_ce(
    student: Float[Tensor, "r e"],
    teacher: Float[Tensor, "s e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    *,
    index: Int64[Tensor, "r m"],
    weight: Float[Tensor, "r m"],
    center: Float[Tensor, " k"],
    student_temp: int | float,
    teacher_temp: int | float,
    kept: Bool[Tensor, "r m"] | None = None,
    groups: int = 1,
    budget: int | None = None,
    fuse: bool = False,
) -> PrototypeCE:
    """Return the sum over rows i and columns j of weight[i, j] * CE(teacher row index[i, j], student row i).

    CE(t, s) = -<softmax((t - center) / teacher_temp), log_softmax(s / student_temp)> over the k logits t =
    teacher_prototypes @ vector and s = student_prototypes @ vector. Under autocast the operands of the products are
    rounded to its dtype; sums, softmax and everything else are float32 or better. Gradients, formed in this very
    pass, reach the student's vectors and prototypes, never the teacher, the centre or the weights; they cannot be
    differentiated again.
    index points into the s teacher rows; a weight of 0 leaves the entry out (its index must still be valid).
    kept: which entries can have a weight other than 0, by default those that do; rows without any are dropped where
    index is a CPU tensor (on a GPU their number is unknown to the host).
    groups: number of equal, successive parts (images) of both sides such that no row points into another part.
    budget: bytes to work in, by default MEMORY_BUDGET of the device; fuse: torch.compile what is done to the logits.
    Source: DINO (arXiv 2104.14294, eq. 1 and 4), for patches GLSD (arXiv 2207.14676).
    """
    device = student.device
    wide = torch.promote_types(student.dtype, torch.float32)
    half = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if half and wide == torch.float32 else student.dtype
    budget = MEMORY_BUDGET.get(device.type, MEMORY_BUDGET["cpu"]) if budget is None else budget
    teacher, teacher_prototypes = teacher.detach(), teacher_prototypes.detach()
    with torch.autocast(device.type, enabled=False):
        plan = plan_rows(
            index,
            weight.detach().to(wide),
            kept=kept,
            num_teacher=len(teacher),
            groups=groups,
            teacher_rows=budget // 4 // (2 * wide.itemsize * len(center)),
            device=device,
        )
        columns = teacher if plan.columns is None else teacher.index_select(0, plan.columns)
        rows = student if plan.rows is None else student.index_select(0, plan.rows)
        held = STUDENT_COPIES * wide.itemsize * len(center)
        settings = Settings(
            product_dtype=dtype,
            student_rows=max(MIN_ROWS, budget * 3 // 4 // held),
            gradients=torch.is_grad_enabled(),
            fuse=fuse,
        )
        loss, entropy = _ChunkedCE.apply(
            rows.to(wide) / student_temp,
            student_prototypes.to(wide),
            columns.to(wide) / teacher_temp,
            teacher_prototypes.to(wide),
            center.to(wide) / teacher_temp,
            plan,
            settings,
        )
        # Logits are linear in the vector, so the mean logits need one product, not s of them.
        mean = teacher_prototypes.to(wide) @ teacher.to(wide).mean(dim=0)
    return PrototypeCE(loss, mean, entropy)


class _ChunkedCE(torch.autograd.Function):
    """Loss and gradients of all rows in one pass over chunks; vectors and centre come divided by their temperatures."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "p e"],
        prototypes: Float[Tensor, "k e"],
        teacher: Float[Tensor, "q e"],
        teacher_prototypes: Float[Tensor, "k e"],
        center: Float[Tensor, " k"],
        plan: RowPlan,
        settings: Settings,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        dtype = settings.product_dtype
        vectors, rounded = _operand(student, dtype), _operand(prototypes, dtype)
        teacher, teacher_prototypes = _operand(teacher, dtype), _operand(teacher_prototypes, dtype)
        student_terms = _fused_terms() if settings.fuse else _student_terms
        for_student, for_prototypes = (needed and settings.gradients for needed in ctx.needs_input_grad[:2])
        of_student = torch.empty_like(student) if for_student else None
        of_prototypes = torch.zeros_like(prototypes) if for_prototypes else None
        loss, entropy = student.new_zeros(()), student.new_zeros(())
        for rows, columns in plan.chunks:
            targets, entropies = _targets(_product(teacher[columns], teacher_prototypes.T), center)
            entropy += entropies.sum()
            for part in _parts(rows, settings.student_rows):
                index = plan.index[part] - columns.start
                losses, of_logits = student_terms(
                    _product(vectors[part], rounded.T), targets, index, plan.share[part]
                )
                total = plan.total[part]
                loss += total.dot(losses)
                of_logits = _operand(of_logits, dtype)
                if of_student is not None:
                    torch.mul(_product(of_logits, rounded), total[:, None], out=of_student[part])
                if of_prototypes is not None:
                    _add_product(of_prototypes, of_logits.T, _operand(student[part] * total[:, None], dtype))
        ctx.save_for_backward(*(of for of in (of_student, of_prototypes) if of is not None))
        ctx.saved = for_student, for_prototypes
        entropy = entropy / max(len(teacher), 1)
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Float[Tensor, ""], _of_entropy: Any) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        of_student, of_prototypes = (of_loss * next(saved) if there else None for there in ctx.saved)
        return of_student, of_prototypes, None, None, None, None, None


def _parts(rows: slice, size: int) -> list[slice]:
    """Divide rows into parts of at most ``size``, as equal as can be."""
    count = -(-(rows.stop - rows.start) // size)
    size = -(-(rows.stop - rows.start) // count)
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


def _targets(
    logits: Float[Tensor, "q k"], center: Float[Tensor, " k"]
) -> tuple[Float[Tensor, "q k"], Float[Tensor, " q"]]:
    """Return the teacher's distributions and their entropies; the logits are overwritten."""
    logits -= center
    targets = logits.softmax(1)
    return targets, _logsumexp(logits, targets) - torch.linalg.vecdot(targets, logits)


def _student_terms(
    logits: Float[Tensor, "p k"],
    targets: Float[Tensor, "q k"],
    index: Int64[Tensor, "p m"],
    share: Float[Tensor, "p m"],
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    """Return the cross-entropy of every row with its target, and its gradient: softmax - target.

    A target, the share-weighted sum of rows of ``targets``, sums to 1, so CE = logsumexp(s) - <target, s>.
    """
    softmax = logits.softmax(1)
    target = F.embedding_bag(index, targets, per_sample_weights=share, mode="sum")
    losses = _logsumexp(logits, softmax) - torch.linalg.vecdot(target, logits)
    return losses, softmax.sub_(target)


@functools.cache
def _fused_terms() -> Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    return torch.compile(_student_terms, dynamic=True)


def _logsumexp(logits: Float[Tensor, "p k"], softmax: Float[Tensor, "p k"]) -> Float[Tensor, " p"]:
    """Return it from the largest logit and its softmax, which is at least 1 / k: no second exponential."""
    return logits.amax(1) - softmax.amax(1).log()


def _operand(tensor: Float[Tensor, "a c"], dtype: torch.dtype) -> Float[Tensor, "a c"]:
    """Round to the dtype of the products; CPUs then multiply the rounded numbers in float32, as tensor cores do."""
    rounded = tensor.to(dtype)
    return rounded if tensor.device.type == "cuda" else rounded.to(tensor.dtype)


def _product(a: Float[Tensor, "a c"], b: Float[Tensor, "c d"]) -> Float[Tensor, "a d"]:
    """Return the product in float32 or better."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype.itemsize < 4 else torch.mm(a, b)


def _add_product(total: Float[Tensor, "a d"], a: Float[Tensor, "a c"], b: Float[Tensor, "c d"]) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    else:
        total += _product(a, b)
