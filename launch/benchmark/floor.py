"""The lower bound of the local loss: its matrix products alone, with prepared rows and buffers, in the fastest layout."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from glsd.batches import NeededRows


def product_flops(sizes: dict[str, Any], teacher_rows: int, student_rows: int) -> float:
    """Return the FLOPs of teacher logits, student logits and both gradient products, by formula."""
    return 2.0 * sizes["prototypes"] * sizes["bottleneck"] * (teacher_rows + 3 * student_rows)


def layouts(
    student: Sequence[Tensor],
    teacher: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    needed: NeededRows,
    dtype: torch.dtype,
) -> dict[str, Callable[[], object]]:
    """Return the matrix products alone, in two layouts; rows and buffers are prepared beforehand.

    Of a row that nothing was matched with, neither logits nor gradients are needed.
    """
    device, num_images = teacher.device, teacher.shape[1]
    targets = rearrange(teacher, "g b n e -> (b g n) e")[needed.columns].to(dtype)
    patches = torch.cat([rearrange(group.detach(), "v b n e -> b (v n) e") for group in student], 1)
    vectors = patches.flatten(0, 1)[needed.rows].to(dtype)
    prototypes = student_prototypes.detach().to(dtype), teacher_prototypes.to(dtype)
    # One buffer serves all logits.
    buffer = torch.empty(max(len(targets), len(vectors)) * len(prototypes[0]), device=device, dtype=dtype)
    gradients = torch.empty_like(vectors), torch.empty_like(prototypes[0])
    block_rows = {
        "whole batch": (len(targets), len(vectors)),
        "image by image": (-(-len(targets) // num_images), -(-len(vectors) // num_images)),
    }
    return {
        name: functools.partial(
            products, targets.split(rows[0]), vectors.split(rows[1]), *prototypes, buffer, *gradients
        )
        for name, rows in block_rows.items()
    }


def products(
    teacher_blocks: tuple[Tensor, ...],
    student_blocks: tuple[Tensor, ...],
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    buffer: Tensor,
    vector_gradient: Tensor,
    prototype_gradient: Tensor,
) -> None:
    """Compute teacher logits, student logits, and both products with a gradient of the logits (their own values)."""
    k, done = len(student_prototypes), 0
    for teacher, student in itertools.zip_longest(teacher_blocks, student_blocks):
        if teacher is not None:
            torch.mm(teacher, teacher_prototypes.T, out=buffer[: len(teacher) * k].view(-1, k))
        if student is None:
            continue
        logits = buffer[: len(student) * k].view(-1, k)
        torch.mm(student, student_prototypes.T, out=logits)
        torch.mm(logits, student_prototypes, out=vector_gradient[done : done + len(student)])
        prototype_gradient.addmm_(logits.T, student, beta=1 if done else 0)
        done += len(student)
