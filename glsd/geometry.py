"""From crop boxes to patch centers and to the nearest patches of two crops, in pixels of the source image."""

from collections.abc import Sequence

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from glsd.batches import Match, NeededRows
from glsd.errors import UserError

Stride = int | tuple[int, int]  # side of a patch in pixels of the resized crop; or its height and width


def patch_sides(stride: Stride) -> tuple[int, int]:
    """Return height and width of a patch in pixels."""
    return stride if isinstance(stride, tuple) else (stride, stride)


def patch_centers(boxes: Float[Tensor, "*m 4"], crop_size: int, stride: Stride) -> Float[Tensor, "*m n 2"]:
    """Return the center (x, y) of every patch of every crop, n = rows times columns of ``patch_grid``, row-major.

    boxes: x0 y0 x1 y1 at outer pixel edges of the source image, x0 > x1 for a mirrored crop; crop_size: side of the resized
    crop in pixels. Coordinates are pixel indices: the center of the
    first pixel of the source image is (0, 0). Same dtype as boxes. Raises UserError if the crop is smaller than one patch.
    Source: GLSD (arXiv 2207.14676), closed form of its position maps.
    """
    x, y = patch_axes(boxes, crop_size, stride)
    y, x = torch.broadcast_tensors(y[..., :, None], x[..., None, :])
    return torch.stack([x, y], dim=-1).flatten(-3, -2)


def patch_axes(
    boxes: Float[Tensor, "*m 4"], crop_size: int, stride: Stride
) -> tuple[Float[Tensor, "*m c"], Float[Tensor, "*m r"]]:
    """Return x of the columns and y of the rows of patch centers; a remainder of the crop belongs to no patch."""

    def centers(axis: int, count: int, side: int) -> Tensor:
        place = (torch.arange(count, dtype=boxes.dtype, device=boxes.device) + 0.5) * side
        start, end = boxes[..., axis, None], boxes[..., axis + 2, None]
        # Multiplying before dividing keeps simple scales exact, and with them ties. A mirrored box runs backwards by itself.
        return start + place * (end - start) / crop_size - 0.5

    (rows, columns), (height, width) = patch_grid(crop_size, stride), patch_sides(stride)
    return centers(0, columns, width), centers(1, rows, height)


def squared_half_diagonals(
    boxes: Float[Tensor, "*m 4"], crop_size: int, stride: Stride
) -> Float[Tensor, "*m"]:
    """Return the squared half diagonal of one patch cell of every crop, in squared source pixels. Source: GLSD."""
    height, width = patch_sides(stride)
    cell = (boxes[..., 2:] - boxes[..., :2]).abs() * boxes.new_tensor([width, height]) / crop_size
    return (cell / 2).square().sum(-1)


def geometric_match(
    boxes: Sequence[Float[Tensor, "_ b 4"]],
    crop_sizes: Sequence[int],
    *,
    stride: Stride,
    hinge: bool,
    hinge_factor: float,
) -> Match:
    """Return the patch of every teacher view that is nearest to each student patch in the source image.

    boxes: (views, images, 4) per resolution, global crops (the teacher's) first; a resolution may be empty. With ``hinge`` a
    match counts if the distance is smaller than hinge_factor times the larger half diagonal of the two cells. Of equal
    distances the lowest index. Source: GLSD (arXiv 2207.14676) and its code. It equals losses.match.geometric.
    """
    num_teacher = len(boxes[0])
    teacher_x, teacher_y = patch_axes(boxes[0], crop_sizes[0], stride)
    teacher_half = squared_half_diagonals(boxes[0], crop_sizes[0], stride)
    columns, patches = teacher_x.shape[-1], teacher_x.shape[-1] * teacher_y.shape[-1]  # of a teacher view
    first_patch = torch.arange(num_teacher)[:, None, None, None] * patches
    found: list[tuple[Tensor, Tensor]] = []
    resolutions = [pair for pair in zip(boxes, crop_sizes, strict=True) if len(pair[0])]
    for student, crop_size in resolutions:
        x, y = patch_axes(student, crop_size, stride)
        # Patches form a grid, so the nearest column and the nearest row are searched on their own.
        dx, column = (x[:, None, :, :, None] - teacher_x[:, :, None]).square().min(-1)  # (v, g, b, columns)
        dy, row = (y[:, None, :, :, None] - teacher_y[:, :, None]).square().min(-1)
        index = first_patch + row[..., :, None] * columns + column[..., None, :]  # (v, g, b, rows, columns)
        half = torch.maximum(squared_half_diagonals(student, crop_size, stride)[:, None], teacher_half)
        limit = hinge_factor**2 * half[..., None, None] if hinge else torch.inf
        accepted = (dx[..., None, :] + dy[..., :, None] < limit).float()
        if not found:  # a global crop is not compared with itself
            accepted[range(num_teacher), range(num_teacher)] = 0
        layout = "v g b y x -> b (v y x) g"
        found.append((rearrange(index, layout), rearrange(accepted, layout)))
    index, weight = (torch.cat(parts, 1) for parts in zip(*found, strict=True))
    images, of_image = len(index), num_teacher * patches
    rows = (index + torch.arange(images)[:, None, None] * of_image).flatten(0, 1)
    return Match(index, weight, needed_rows(rows, weight.flatten(0, 1) > 0, images * of_image, images))


def needed_rows(
    index: Int64[Tensor, "r m"], kept: Bool[Tensor, "r m"], num_teacher: int, groups: int
) -> NeededRows:
    """Return the rows with a kept entry and the teacher rows that these point to; ``groups`` as in prototype_ce."""
    rows, pointed = kept.numpy().any(1), np.zeros(num_teacher, dtype=bool)
    pointed[index.numpy()[kept.numpy()]] = True
    # An entry that is not kept may point to a row that is gone: let it point to a kept one of its row, its weight is 0.
    place = torch.from_numpy(np.cumsum(pointed) - 1)[index].masked_fill(~kept, torch.iinfo(torch.int64).max)
    compact = torch.where(kept, place, place.amin(1, keepdim=True))[torch.from_numpy(rows)]
    numbers = (torch.from_numpy(np.flatnonzero(chosen)) for chosen in (rows, pointed))
    ends = (np.cumsum(chosen.reshape(groups, -1).sum(1)).tolist() for chosen in (rows, pointed))
    return NeededRows(*numbers, compact, *ends)  # type: ignore[call-arg, arg-type]


def patch_grid(crop_size: int, stride: Stride) -> tuple[int, int]:
    """Return the numbers of rows and columns of patches; UserError if not even one fits."""
    height, width = patch_sides(stride)
    if crop_size < max(height, width):
        raise UserError(
            f"crop size {crop_size} is below one patch of {max(height, width)} pixels: use a larger crop"
        )
    return crop_size // height, crop_size // width
