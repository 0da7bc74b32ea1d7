"""Which rows of student and teacher a loss works on, and in which chunks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from glsd.batches import NeededRows


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


def plan_rows(
    index: Int64[Tensor, "r m"],
    weight: Float[Tensor, "r m"],
    *,
    needed: NeededRows | None,
    num_teacher: int,
    groups: int,
    teacher_rows: int,
) -> RowPlan:
    """Return the plan for entries (row i, teacher row index[i, j], weight[i, j]); other arguments as in prototype_ce.

    teacher_rows: a chunk takes as many groups as have no more teacher rows than these, but at least one group.
    Raises ValueError if the rows do not divide into the groups.
    """
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
