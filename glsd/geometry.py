"""From crop boxes to patch centers and cell sizes, in pixels of the source image: closed form, no coordinate maps."""

import torch
from jaxtyping import Float
from torch import Tensor

from glsd.errors import UserError


def patch_centers(boxes: Float[Tensor, "m 4"], crop_size: int, stride: int) -> Float[Tensor, "m n 2"]:
    """Return the center (x, y) of every patch of every crop, n = (crop_size // stride)^2, row-major.

    boxes: x0 y0 x1 y1 at outer pixel edges of the source image, x0 > x1 for a mirrored crop; crop_size: side of the resized
    crop in pixels; stride: side of a patch in pixels of the resized crop. What does not fill a patch at the right and bottom
    of the (already mirrored) crop is dropped, as a convolution of that stride does. Coordinates are pixel indices: the center
    of the first pixel of the source image is (0, 0), hence the half. Same dtype as boxes.
    Raises UserError if the crop is smaller than one patch. Source: GLSD (arXiv 2207.14676), closed form of its position maps.
    """
    grid = grid_side(crop_size, stride)
    # Pixels of the resized crop at each patch center, then the same share of the box. Multiplying before dividing keeps simple
    # scales exact, and with them the ties between patches. A mirrored box runs backwards by itself.
    place = (torch.arange(grid, dtype=boxes.dtype, device=boxes.device) + 0.5) * stride
    x = boxes[:, 0:1] + place * (boxes[:, 2:3] - boxes[:, 0:1]) / crop_size - 0.5  # (m, grid)
    y = boxes[:, 1:2] + place * (boxes[:, 3:4] - boxes[:, 1:2]) / crop_size - 0.5
    centers = torch.stack([x[:, None, :].expand(-1, grid, -1), y[:, :, None].expand(-1, -1, grid)], dim=-1)
    return centers.flatten(1, 2)


def squared_half_diagonals(boxes: Float[Tensor, "m 4"], crop_size: int, stride: int) -> Float[Tensor, " m"]:
    """Return the squared half diagonal of one patch cell of every crop, in squared source pixels.

    With cell sides dx, dy it is (dx/2)^2 + (dy/2)^2, taken from the box so that a grid of one row works as well.
    Source: GLSD (arXiv 2207.14676), rejection threshold of its geometric matching.
    """
    cell_w = (boxes[:, 2] - boxes[:, 0]).abs() * stride / crop_size
    cell_h = (boxes[:, 3] - boxes[:, 1]).abs() * stride / crop_size
    return (cell_w / 2) ** 2 + (cell_h / 2) ** 2


def grid_side(crop_size: int, stride: int) -> int:
    """Return the number of patches along one side; UserError if not even one fits."""
    if crop_size < stride:
        raise UserError(
            f"crop size {crop_size} is smaller than one patch of {stride} pixels: use a larger crop"
        )
    return crop_size // stride
