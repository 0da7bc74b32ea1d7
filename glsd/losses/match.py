"""Which teacher patch a student patch answers to: the nearest in the source image or the most similar one."""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glsd.batches import Match
from glsd.precision import widened


@torch.no_grad()
def geometric(
    student_centers: Float[Tensor, "b n 2"],
    teacher_centers: Float[Tensor, "b t 2"],
    *,
    student_half: Float[Tensor, " b"],
    teacher_half: Float[Tensor, " b"],
    hinge: bool = True,
    hinge_factor: float = 1.0,
) -> Match:
    """Return the teacher patch nearest to every student patch, by their centers in the source image.

    Where the centers (on the CPU) form square, axis-parallel grids, as those of crops do, the nearest row and the nearest
    column are searched on their own: the same answer for a small part of the work.

    *_centers: x, y in source pixels; *_half: squared half diagonal of a patch cell, in squared source pixels.
    With hinge the weight is 1 where the distance is smaller than hinge_factor times the larger half diagonal
    (strictly) and 0 elsewhere, without it 1 everywhere. Equal distances: the lowest index. Several student
    patches may share a teacher patch. In the dtype of the centers.
    Source: GLSD (arXiv 2207.14676), rejection threshold as in its published code.
    """
    axes = _grid_axes(student_centers), _grid_axes(teacher_centers)
    if axes[0] is None or axes[1] is None:
        distance, index = _nearest(student_centers, teacher_centers)
    else:
        distance, index = _nearest_on_grids(axes[0], axes[1])
    if not hinge:
        return Match(index, torch.ones_like(distance))
    limit = hinge_factor**2 * torch.maximum(student_half, teacher_half)
    return Match(index, (distance < limit[:, None]).to(distance.dtype))


def _nearest(student: Float[Tensor, "b n 2"], teacher: Float[Tensor, "b t 2"]) -> tuple[Tensor, Tensor]:
    # Differences, not the expansion |s|^2 - 2st + |t|^2: that one loses the digits that decide ties and the
    # threshold.
    dx = student[:, :, None, 0] - teacher[:, None, :, 0]
    dy = student[:, :, None, 1] - teacher[:, None, :, 1]
    distance, index = dx.square().add_(dy.square()).min(dim=2)
    return distance, index


def _nearest_on_grids(
    student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return squared distance and index of the nearest point of the teacher's grid; axes: (b columns), (b rows)."""
    (dx, column), (dy, row) = (
        (mine[:, :, None] - other[:, None, :]).square().min(dim=2)
        for mine, other in zip(student, teacher, strict=True)
    )
    distance = dx[:, None, :] + dy[:, :, None]  # (b, rows, columns) of the student
    index = column[:, None, :] + teacher[0].shape[1] * row[:, :, None]
    return distance.flatten(1), index.flatten(1)


def _grid_axes(centers: Float[Tensor, "b n 2"]) -> tuple[Tensor, Tensor] | None:
    """Return x of the columns and y of the rows if row-major centers form a square grid exactly; None elsewhere or unseen."""
    side = math.isqrt(centers.shape[1])
    if centers.device.type != "cpu" or side * side != centers.shape[1]:
        return None
    x, y = centers.unflatten(1, (side, side)).unbind(-1)  # (b, rows, columns)
    columns, rows = x[:, 0], y[:, :, 0]
    # Compared in numpy: it is host data, and a host synchronization in the step would be told by torch.equal.
    exact = (x.numpy() == columns[:, None].numpy()).all() and (y.numpy() == rows[:, :, None].numpy()).all()
    return (columns, rows) if exact else None


@torch.no_grad()
def similarity(student_features: Float[Tensor, "b n d"], teacher_features: Float[Tensor, "b t d"]) -> Match:
    """Return the teacher patch with the largest cosine to every student patch's backbone feature; weight 1.

    Norms are clamped at 1e-12; float32 or better; equal cosines: the lowest index; no gradient.
    Source: EsViT (arXiv 2106.09785), region-level task.
    """
    with torch.autocast(student_features.device.type, enabled=False):
        student = F.normalize(widened(student_features), dim=2, eps=1e-12)
        teacher = F.normalize(widened(teacher_features), dim=2, eps=1e-12)
        cosine, index = (student @ teacher.transpose(1, 2)).max(dim=2)
    return Match(index, torch.ones_like(cosine))
