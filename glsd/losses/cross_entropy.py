"""Exact cross-entropy between teacher and student over the prototypes, without ever holding a (rows x k) array.

The cross-entropy is linear in the target, so the targets of a row are summed first. Its gradient with respect to the logits
is softmax - target, so one pass over chunks of student rows gives loss and gradients. Student rows without a kept match and
teacher rows that no match points to are never multiplied with the prototypes. The mean of the teacher's logits is the
prototype layer applied to the mean vector.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor
from torch.autograd.function import once_differentiable

from glsd.batches import NeededRows
from glsd.precision import add_product, operand, operand_dtype, product, wide_dtype

# Bytes of logits and their derived arrays held at a time: a few times a CPU's caches, a 16th of a GPU's memory. A third is
# for the teacher's distributions, the rest for the student's rows. One group's teacher rows (for patches at most 2 x 196 of
# one image) and MIN_ROWS student rows are held in any case.
CPU_BUDGET, GPU_SHARE = 48 * 2**20, 16
MIN_ROWS = 64
# So few rows of logits stay in a CPU's caches during the work on them.
CACHED_ROWS = 32
# Copies of the logits: a CPU works in place, on a few rows at a time.
COPIES = {"cpu": 1, "cuda": 4}


class PrototypeCE(NamedTuple):
    """A prototype cross-entropy and statistics of its teacher."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, " k"]  # mean raw teacher logits over all rows: the EMA center follows it
    teacher_entropy: Float[Tensor, ""]  # mean entropy in nats of the teacher rows in use (uniform: ln k)
    teacher_rows: int  # number of teacher rows in use


class Chunk(NamedTuple):
    """Rows of the student that point into rows of the teacher: some successive groups (images)."""

    rows: slice
    columns: slice


class RowPlan(NamedTuple):
    """The entries of the loss: teacher rows and weights of every student row, and the chunks to work on."""

    index: Int64[Tensor, "p m"]  # type: ignore[assignment]  # teacher rows; shadows tuple.index on purpose
    share: Float[Tensor, "p m"]  # weights of a row, divided by their sum (all 0 if that is 0)
    total: Float[Tensor, " p"]  # that sum
    chunks: list[Chunk]


class Settings(NamedTuple):
    """Plain values for the pass over the chunks."""

    student_temp: float
    teacher_temp: float
    product_dtype: torch.dtype  # of the operands of matrix products; the results are float32 or better
    student_rows: int  # student rows held at a time
    gradients: bool
    terms: Callable[..., tuple[Tensor, Tensor]]  # student_terms, or compiled


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
    needed: NeededRows | None = None,
    groups: int = 1,
    fuse: bool = False,
) -> PrototypeCE:
    """Return the sum over rows i and columns j of weight[i, j] * CE(teacher row index[i, j], student row i).

    CE(t, s) = -<softmax((t - center) / teacher_temp), log_softmax(s / student_temp)> over the k logits t =
    teacher_prototypes @ vector and s = student_prototypes @ vector. Under autocast the operands of the products are rounded
    to its dtype; everything else is float32 or better. Gradients are formed in the forward pass. They reach the student's
    vectors and prototypes alone, can be taken once, and cannot be differentiated again.
    index: rows of the teacher, valid also where the weight is 0. needed: the rows in use (geometry.needed_rows), by default
    all. groups: equal, successive groups (images) of both sides, else ValueError; a row points into its own group only. fuse:
    torch.compile the work on the logits. Source: DINO (arXiv 2104.14294, eq. 1 and 4), GLSD.
    """
    device, wide = student.device, wide_dtype(student)
    budget_rows = memory_budget(device) // (COPIES.get(device.type, 4) * wide.itemsize * len(center))
    teacher, teacher_prototypes = teacher.detach(), teacher_prototypes.detach().to(wide)
    student_rows, dtype = max(MIN_ROWS, budget_rows * 2 // 3), operand_dtype(student)
    with torch.autocast(device.type, enabled=False):
        # Logits are linear in the vector, so the mean logits need one product instead of s.
        mean = teacher_prototypes @ teacher.to(wide).mean(dim=0)
        weight = weight.detach().to(wide)
        row_ends: Sequence[int] = ends_of_groups(len(student), groups)
        column_ends: Sequence[int] = ends_of_groups(len(teacher), groups)
        if needed is not None:
            student, weight = student.index_select(0, needed.rows), weight[needed.rows]
            teacher = teacher[needed.columns]
            _, _, index, row_ends, column_ends = needed
        total = weight.sum(1)
        share = weight / torch.where(total == 0, 1.0, total)[:, None]
        plan = RowPlan(index, share, total, chunks_of(row_ends, column_ends, budget_rows // 3))
        terms = _fused_terms() if fuse else student_terms
        settings = Settings(student_temp, teacher_temp, dtype, student_rows, torch.is_grad_enabled(), terms)
        inputs = student, student_prototypes.to(wide), teacher, teacher_prototypes, center.to(wide)
        loss, entropies = _ChunkedCE.apply(*inputs, plan, settings)
    rows_in_use = sum(columns.stop - columns.start for _, columns in plan.chunks)
    return PrototypeCE(loss, mean, entropies / max(rows_in_use, 1), rows_in_use)


def memory_budget(device: torch.device) -> int:
    """Return how many bytes of logits the loss may hold at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
    return CPU_BUDGET


def ends_of_groups(num_rows: int, groups: int) -> range:
    """Return where each of equal groups of rows ends; ValueError if the rows do not divide into the groups."""
    if num_rows % groups:
        raise ValueError(f"{num_rows} rows do not divide into {groups} groups")
    return range(num_rows // groups, num_rows + 1, num_rows // groups)


def chunks_of(row_ends: Sequence[int], column_ends: Sequence[int], teacher_rows: int) -> list[Chunk]:
    """Put successive groups together while they have at most ``teacher_rows`` teacher rows; one group at least."""
    chunks: list[Chunk] = []
    first_row = first_column = 0
    for row_end, column_end, next_end in zip(row_ends, column_ends, [*column_ends[1:], None], strict=True):
        if next_end is not None and next_end - first_column <= teacher_rows:
            continue
        if row_end > first_row:
            chunks.append(Chunk(slice(first_row, row_end), slice(first_column, column_end)))
        first_row, first_column = row_end, column_end
    return chunks


class _ChunkedCE(torch.autograd.Function):
    """Loss and gradients of all planned rows in one pass over the chunks (autograd function)."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
        student, prototypes, teacher, teacher_prototypes, center, plan, settings = (
            inputs  # as in prototype_ce
        )
        wide, dtype = prototypes.dtype, settings.product_dtype
        ctx.wanted = tuple(needed and settings.gradients for needed in ctx.needs_input_grad[:2])
        of_student = torch.zeros_like(student) if ctx.wanted[0] else None
        of_prototypes = torch.zeros_like(prototypes) if ctx.wanted[1] else None
        rounded, teacher_rounded = operand(prototypes, dtype), operand(teacher_prototypes, dtype)
        center = center / settings.teacher_temp
        loss, entropy = prototypes.new_zeros(()), prototypes.new_zeros(())
        memory = [_memory(plan.chunks, side, settings.student_rows, prototypes) for side in (0, 1)]
        for rows, columns in plan.chunks:
            vectors = operand(teacher[columns].to(wide) / settings.teacher_temp, dtype)
            logits = product(vectors, teacher_rounded.T, out=_rows(memory[1], columns))
            targets, entropies = teacher_terms(logits, center)
            entropy += entropies.sum()
            for part in _parts(rows, settings.student_rows):
                vectors = student[part].to(wide) / settings.student_temp
                logits = product(operand(vectors, dtype), rounded.T, out=_rows(memory[0], part))
                index = plan.index[part] - columns.start
                losses, of_logits = settings.terms(logits, targets, index, plan.share[part])
                total = plan.total[part]
                loss += total.dot(losses)
                of_logits, total = operand(of_logits, dtype), total[:, None]
                if of_student is not None:
                    of_student[part] = product(of_logits, rounded).mul_(total / settings.student_temp)
                if of_prototypes is not None:
                    add_product(of_prototypes, of_logits.T, operand(vectors * total, dtype))
        ctx.save_for_backward(*(of for of in (of_student, of_prototypes) if of is not None))
        ctx.mark_non_differentiable(entropy)
        return loss, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_loss: Float[Tensor, ""], _of_entropy: Any) -> tuple[Tensor | None, ...]:
        # In place, because they are as large as the prototypes. Autograd notices and refuses a second backward pass.
        saved = iter(ctx.saved_tensors)
        of_student, of_prototypes = (next(saved).mul_(of_loss) if wanted else None for wanted in ctx.wanted)
        return of_student, of_prototypes, None, None, None, None, None


def _memory(
    chunks: list[Chunk], side: int, student_rows: int, prototypes: Float[Tensor, "k e"]
) -> Float[Tensor, "c k"] | None:
    """Return memory for the logits of any chunk: on a CPU fresh pages would cost more than the arithmetic on them."""
    if prototypes.device.type != "cpu" or not chunks:
        return None
    longest = max(chunk[side].stop - chunk[side].start for chunk in chunks)
    return prototypes.new_empty(longest if side else min(longest, student_rows), len(prototypes))


def _rows(memory: Float[Tensor, "c k"] | None, part: slice) -> Float[Tensor, "p k"] | None:
    return None if memory is None else memory[: part.stop - part.start]


def _parts(rows: slice, size: int) -> list[slice]:
    """Divide rows into parts of at most ``size`` and nearly equal length."""
    count = -(-(rows.stop - rows.start) // size)
    size = -(-(rows.stop - rows.start) // count)
    return [slice(start, min(start + size, rows.stop)) for start in range(rows.start, rows.stop, size)]


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
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    """Return every row's cross-entropy with its target, the share-weighted sum of ``targets`` at ``index``, and its gradient.

    May overwrite the logits (on a CPU with the gradient).
    """
    if logits.device.type != "cpu":
        return _student_terms(logits, targets, index, share)
    parts = (tensor.split(CACHED_ROWS) for tensor in (logits, index, share))
    losses = [_student_terms(rows, targets, *rest, out=rows)[0] for rows, *rest in zip(*parts, strict=True)]
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
