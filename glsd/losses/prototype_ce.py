"""Cross-entropy of teacher and student through their prototypes, exact, without ever holding a (rows x k) array.

What it rests on: the cross-entropy is linear in the target, so the targets of a row are summed first, and its gradient with
respect to the logits is softmax - target, so a few student rows at a time give loss and gradients in one pass; rows whose
matches were all rejected and teacher rows that nobody matched are never multiplied with the prototypes; and the mean of the
teacher's logits is the prototype layer of the mean vector.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from glsd.losses.logit_terms import student_terms, teacher_terms
from glsd.losses.products import (
    add_product,
    operand,
    operand_dtype,
    product,
)
from glsd.losses.row_plan import RowPlan, plan_rows

# Bytes of logits and what is made of them that are held at a time: a third for the teacher's distributions, the rest for the
# student's rows. On a CPU a few times its caches, on a GPU a 16th of its memory. One group's teacher rows (for patches at
# most 2 x 196 of one image) and MIN_ROWS student rows are held in any case.
CPU_BUDGET, GPU_SHARE = 48 * 2**20, 16
MIN_ROWS = 64
COPIES = {"cpu": 1, "cuda": 4}  # of the logits: a CPU works in place, a few rows at a time


class PrototypeCE(NamedTuple):
    """A prototype cross-entropy and what the teacher looked like in it."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, " k"]  # of the raw teacher logits over all rows: the EMA center follows it
    teacher_entropy: Float[Tensor, ""]  # mean entropy in nats of the teacher rows in use (uniform: ln k)
    teacher_rows: int  # in use


class Settings(NamedTuple):
    """Plain values for the pass over the chunks."""

    student_temp: float
    teacher_temp: float
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
    pass, reach the student's vectors and prototypes, never the teacher, the center or the weights; they can be taken once
    and not be differentiated again.
    index points into the s teacher rows; weights are not negative, and one of 0 leaves the entry out (its index must
    still be valid).
    kept: which entries can have a weight other than 0, by default those that do; rows without any are dropped where
    index is a CPU tensor (on a GPU their number is unknown to the host).
    groups: number of equal, successive parts (images) of both sides such that no row points into another part.
    budget: bytes to work in, by default memory_budget of the device; fuse: torch.compile what is done to the logits.
    Raises ValueError if the rows do not divide into the groups.
    Source: DINO (arXiv 2104.14294, eq. 1 and 4), for patches GLSD (arXiv 2207.14676).
    """
    device = student.device
    wide = torch.promote_types(student.dtype, torch.float32)
    product_dtype = operand_dtype(student)
    budget = memory_budget(device) if budget is None else budget
    row_bytes = COPIES.get(device.type, COPIES["cuda"]) * wide.itemsize * len(center)
    teacher, teacher_prototypes = teacher.detach(), teacher_prototypes.detach().to(wide)
    with torch.autocast(device.type, enabled=False):
        plan = plan_rows(
            index,
            weight.detach().to(wide),
            kept=kept,
            num_teacher=len(teacher),
            groups=groups,
            teacher_rows=budget // 3 // row_bytes,
            device=device,
        )
        settings = Settings(
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            product_dtype=product_dtype,
            student_rows=max(MIN_ROWS, budget * 2 // 3 // row_bytes),
            gradients=torch.is_grad_enabled(),
            fuse=fuse,
        )
        loss, entropies = _ChunkedCE.apply(
            *(student, student_prototypes.to(wide), teacher, teacher_prototypes, center.to(wide)),
            *(plan, settings),
        )
        # Logits are linear in the vector, so the mean logits need one product, not s of them.
        mean = teacher_prototypes @ teacher.to(wide).mean(dim=0)
    rows_in_use = sum(columns.stop - columns.start for _, columns in plan.chunks)
    return PrototypeCE(loss, mean, entropies / max(rows_in_use, 1), rows_in_use)


def memory_budget(device: torch.device) -> int:
    """Return how many bytes the loss may work in by default."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
    return CPU_BUDGET


class _ChunkedCE(torch.autograd.Function):
    """Loss and gradients of all planned rows in one pass over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Float[Tensor, "r e"],
        prototypes: Float[Tensor, "k e"],
        teacher: Float[Tensor, "s e"],
        teacher_prototypes: Float[Tensor, "k e"],
        center: Float[Tensor, " k"],
        plan: RowPlan,
        settings: Settings,
    ) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        wide, dtype = prototypes.dtype, settings.product_dtype
        ctx.wanted = tuple(needed and settings.gradients for needed in ctx.needs_input_grad[:2])
        of_student = torch.zeros_like(student) if ctx.wanted[0] else None
        of_prototypes = torch.zeros_like(prototypes) if ctx.wanted[1] else None
        rounded, teacher_rounded = operand(prototypes, dtype), operand(teacher_prototypes, dtype)
        center = center / settings.teacher_temp
        loss, entropy = prototypes.new_zeros(()), prototypes.new_zeros(())
        scratch = _Scratch(plan, settings, prototypes)
        for rows, columns in plan.chunks:
            vectors = _take(teacher, plan.columns, columns).to(wide) / settings.teacher_temp
            targets, entropies = teacher_terms(
                product(operand(vectors, dtype), teacher_rounded.T, out=scratch.teacher(columns)), center
            )
            entropy += entropies.sum()
            for part in _parts(rows, settings.student_rows):
                vectors = _take(student, plan.rows, part).to(wide) / settings.student_temp
                losses, of_logits = student_terms(
                    product(operand(vectors, dtype), rounded.T, out=scratch.student(part)),
                    targets,
                    plan.index[part] - columns.start,
                    plan.share[part],
                    fuse=settings.fuse,
                )
                total = plan.total[part]
                loss += total.dot(losses)
                of_logits = operand(of_logits, dtype)
                total = total[:, None]
                if of_student is not None:
                    of_part = product(of_logits, rounded).mul_(total / settings.student_temp)
                    _put(of_student, plan.rows, part, of_part)
                if of_prototypes is not None:
                    add_product(of_prototypes, of_logits.T, operand(vectors * total, dtype))
        ctx.save_for_backward(*(of for of in (of_student, of_prototypes) if of is not None))
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Float[Tensor, ""], _of_entropy: Any) -> tuple[Tensor | None, ...]:
        # In place, because they are as large as the prototypes: autograd notices, and refuses a second time.
        saved = iter(ctx.saved_tensors)
        of_student, of_prototypes = (next(saved).mul_(of_loss) if wanted else None for wanted in ctx.wanted)
        return of_student, of_prototypes, None, None, None, None, None


class _Scratch:
    """Memory for the logits of one chunk, taken once: fresh pages for each would cost a CPU more than the arithmetic on them.

    A GPU's allocator keeps its memory: None there, the ``out`` of an operation that makes its own result.
    """

    def __init__(self, plan: RowPlan, settings: Settings, prototypes: Float[Tensor, "k e"]):
        def longest(slices: list[slice]) -> int:
            return max((part.stop - part.start for part in slices), default=0)

        columns, rows = (longest([chunk[side] for chunk in plan.chunks]) for side in (1, 0))
        sizes = columns, min(rows, settings.student_rows)
        on_cpu = prototypes.device.type == "cpu"
        memory = (prototypes.new_empty(size, len(prototypes)) if on_cpu else None for size in sizes)
        self.teacher, self.student = map(_lender, memory)


def _lender(memory: Tensor | None) -> Callable[[slice], Tensor | None]:
    return lambda rows: None if memory is None else memory[: rows.stop - rows.start]


def _take(
    vectors: Float[Tensor, "r e"], ids: Int64[Tensor, " p"] | None, part: slice
) -> Float[Tensor, "c e"]:
    return vectors[part] if ids is None else vectors.index_select(0, ids[part])


def _put(total: Float[Tensor, "r e"], ids: Int64[Tensor, " p"] | None, part: slice, rows: Tensor) -> None:
    if ids is None:
        total[part] = rows
    else:
        total.index_copy_(0, ids[part], rows.to(total.dtype))


def _parts(rows: slice, size: int) -> list[slice]:
    """Divide rows into parts of at most ``size``, as equal as can be."""
    count = -(-(rows.stop - rows.start) // size)
    size = -(-(rows.stop - rows.start) // count)
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]
