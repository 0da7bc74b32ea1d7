"""Which rows of student and teacher a loss needs at all, and in which chunks they are worked off."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor


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
    kept: Bool[Tensor, "r m"] | None,
    num_teacher: int,
    groups: int,
    teacher_rows: int,
    device: torch.device,
) -> RowPlan:
    """Return the plan for entries (row i, teacher row index[i, j], weight[i, j]); other arguments as in prototype_ce.

    Where ``index`` lies on the CPU, rows without a kept entry and teacher rows that no entry points to are left out: numbers
    that the host knows, so nothing waits for the device. Elsewhere all stay. teacher_rows: a chunk takes so many groups that
    it has no more teacher rows than these, but one group at least. Raises ValueError if the rows do not divide into the groups.
    """
    if len(index) % groups or num_teacher % groups:
        raise ValueError(
            f"{len(index)} student and {num_teacher} teacher rows do not divide into {groups} groups"
        )
    rows_on: Tensor | None = None
    columns_on: Tensor | None = None
    if on_host(index):
        if kept is None:
            kept = weight != 0 if weight.device.type == "cpu" else torch.ones_like(index, dtype=torch.bool)
        rows, columns, compact, row_ends, column_ends = _needed(
            index.numpy(), kept.numpy(), num_teacher, groups
        )
        rows_on, columns_on = send(rows, device), send(columns, device)
        weight = send(weight[rows], device) if weight.device.type == "cpu" else weight[rows_on]
        index = send(compact, device)
    else:
        row_ends = np.arange(1, groups + 1) * (len(index) // groups)
        column_ends = np.arange(1, groups + 1) * (num_teacher // groups)
    total = weight.sum(1)
    share = weight / torch.where(total == 0, 1.0, total)[:, None]
    return RowPlan(
        rows=rows_on,
        columns=columns_on,
        index=index,
        share=share,
        total=total,
        chunks=_chunks(row_ends.tolist(), column_ends.tolist(), teacher_rows),
    )


def on_host(index: Int64[Tensor, "r m"]) -> bool:
    """Tell whether the host may look at the index without waiting for a device."""
    return index.device.type == "cpu"


def _needed(
    index: np.ndarray, kept: np.ndarray, num_teacher: int, groups: int
) -> tuple[Tensor, Tensor, Tensor, np.ndarray, np.ndarray]:
    """Return the needed rows of both sides, the index into the needed teacher rows, and where each group ends in both."""
    needed_row = kept.any(1)
    needed_column = np.zeros(num_teacher, dtype=bool)
    needed_column[index[kept]] = True
    place = np.cumsum(needed_column) - 1
    rows, columns = np.flatnonzero(needed_row), np.flatnonzero(needed_column)
    # An entry that is not kept may point to a row that is gone: to any other of the same chunk, its weight is 0.
    first = np.where(kept, place[index], np.iinfo(np.int64).max).min(1, keepdims=True)
    compact = np.where(kept, place[index], first)[rows]
    row_ends = np.cumsum(needed_row.reshape(groups, -1).sum(1))
    column_ends = np.cumsum(needed_column.reshape(groups, -1).sum(1))
    return torch.from_numpy(rows), torch.from_numpy(columns), torch.from_numpy(compact), row_ends, column_ends


def _chunks(row_ends: list[int], column_ends: list[int], teacher_rows: int) -> list[Chunk]:
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


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device without waiting for it, which takes pinned memory."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
