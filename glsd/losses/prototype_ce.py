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
    """The p rows of the student and the q of the teacher that are needed, on the device."""

    rows: Int64[Tensor, " p"] | None  # None = all, in order
    columns: Int64[Tensor, " q"] | None
    index: Int64[Tensor, "p m"]  # type: ignore[assignment]  # into the q; shadows tuple.index on purpose
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
    needed: NeededRows | None = None,
    groups: int = 1,
    fuse: bool = False,
) -> PrototypeCE:
    """Return the sum over rows i and columns j of weight[i, j] * CE(teacher row index[i, j], student row i).

    CE(t, s) = -<softmax((t - center) / teacher_temp), log_softmax(s / student_temp)> over the k logits t =
    teacher_prototypes @ vector and s = student_prototypes @ vector. Under autocast the operands of the products are rounded
    to its dtype; everything else is float32 or better. Gradients are formed in the forward pass. They reach the student's
    vectors and prototypes alone, can be taken once, and cannot be differentiated again.
    index: rows of the teacher, valid also where the weight is 0; weight: 0 or more, 0 leaves an entry out. needed: the rows in
    use as the host knows them (geometry.needed_rows), by default all. groups: number of equal, successive groups (images) of
    both sides; a row points into its own group only. fuse: torch.compile the work on the logits.
    Raises ValueError if the rows do not divide into the groups. Source: DINO (arXiv 2104.14294, eq. 1 and 4), GLSD.
    """
    device, wide, product_dtype = student.device, wide_dtype(student), operand_dtype(student)
    row_bytes = COPIES.get(device.type, COPIES["cuda"]) * wide.itemsize * len(center)
    budget_rows = memory_budget(device) // row_bytes
    teacher, teacher_prototypes = teacher.detach(), teacher_prototypes.detach().to(wide)
    with torch.autocast(device.type, enabled=False):
        plan = plan_rows(
            index,
            weight.detach().to(wide),
            needed=needed,
            num_teacher=len(teacher),
            groups=groups,
            teacher_rows=budget_rows // 3,
        )
        settings = Settings(
            student_temp=student_temp,
            teacher_temp=teacher_temp,
            product_dtype=product_dtype,
            student_rows=max(MIN_ROWS, budget_rows * 2 // 3),
            gradients=torch.is_grad_enabled(),
            fuse=fuse,
        )
        loss, entropies = _ChunkedCE.apply(
            *(student, student_prototypes.to(wide), teacher, teacher_prototypes, center.to(wide)),
            *(plan, settings),
        )
        # Logits are linear in the vector, so the mean logits need one product instead of s.
        mean = teacher_prototypes @ teacher.to(wide).mean(dim=0)
    rows_in_use = sum(columns.stop - columns.start for _, columns in plan.chunks)
    return PrototypeCE(loss, mean, entropies / max(rows_in_use, 1), rows_in_use)


def memory_budget(device: torch.device) -> int:
    """Return how many bytes of logits the loss may hold at a time."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // GPU_SHARE
    return CPU_BUDGET


def plan_rows(
    index: Int64[Tensor, "r m"],
    weight: Float[Tensor, "r m"],
    *,
    needed: NeededRows | None,
    num_teacher: int,
    groups: int,
    teacher_rows: int,
) -> RowPlan:
    """Return the plan; teacher_rows: a chunk takes the groups that have no more than these, but at least one group."""
    if len(index) % groups or num_teacher % groups:
        raise ValueError(
            f"{len(index)} student and {num_teacher} teacher rows do not divide into {groups} groups"
        )
    rows = columns = None
    row_ends: Sequence[int] = range(len(index) // groups, len(index) + 1, len(index) // groups)
    column_ends: Sequence[int] = range(num_teacher // groups, num_teacher + 1, num_teacher // groups)
    if needed is not None:
        rows, columns, index, row_ends, column_ends = needed
        weight = weight[rows]
    total = weight.sum(1)
    share = weight / torch.where(total == 0, 1.0, total)[:, None]
    return RowPlan(rows, columns, index, share, total, _chunks(row_ends, column_ends, teacher_rows))


def _chunks(row_ends: Sequence[int], column_ends: Sequence[int], teacher_rows: int) -> list[Chunk]:
    """Put successive groups together while their teacher rows are few enough."""
    chunks: list[Chunk] = []
    first_row = first_column = 0
    for group, (row_end, column_end) in enumerate(zip(row_ends, column_ends, strict=True)):
        last = group + 1 == len(row_ends)
        if not last and column_ends[group + 1] - first_column <= teacher_rows:
            continue
        if row_end > first_row:
            chunks.append(Chunk(slice(first_row, row_end), slice(first_column, column_end)))
        first_row, first_column = row_end, column_end
    return chunks


class _ChunkedCE(torch.autograd.Function):
    """Loss and gradients of all planned rows in one pass over the chunks (autograd function)."""

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
        # In place, because they are as large as the prototypes. Autograd notices and refuses a second backward pass.
        saved = iter(ctx.saved_tensors)
        of_student, of_prototypes = (next(saved).mul_(of_loss) if wanted else None for wanted in ctx.wanted)
        return of_student, of_prototypes, None, None, None, None, None


class _Scratch:
    """Memory for the logits of one chunk, allocated once: on a CPU fresh pages cost more than the arithmetic on them.

    On a GPU it is None (each operation allocates its result), because the allocator there reuses memory.
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
    *,
    fuse: bool = False,
) -> tuple[Float[Tensor, " p"], Float[Tensor, "p k"]]:
    """Return every row's cross-entropy with its target, the share-weighted sum of ``targets`` at ``index``, and its gradient.

    May overwrite the logits (on a CPU with the gradient). fuse: use torch.compile.
    """
    if fuse:
        return _fused_terms()(logits, targets, index, share)
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
