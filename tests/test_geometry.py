"""Patch centers against a literal average of pixel coordinates, and the properties a box must have."""

import numpy as np
import pytest
import torch

from glsd.errors import UserError
from glsd.geometry import patch_centers, squared_half_diagonals


def literal_centers(box, crop_size: int, stride: int) -> np.ndarray:
    """Resample every output pixel's source coordinate (pixel centers, half-pixel convention), mirror, average by patch."""
    x0, y0, x1, y1 = box
    left, width = min(x0, x1), abs(x1 - x0)
    columns = np.array([left + (c + 0.5) * width / crop_size - 0.5 for c in range(crop_size)])
    rows = np.array([y0 + (r + 0.5) * (y1 - y0) / crop_size - 0.5 for r in range(crop_size)])
    if x0 > x1:
        columns = columns[::-1]
    grid = crop_size // stride
    found = []
    for a in range(grid):
        for b in range(grid):
            x = columns[b * stride : (b + 1) * stride].mean()
            y = rows[a * stride : (a + 1) * stride].mean()
            found.append((x, y))
    return np.array(found)


@pytest.mark.parametrize(("crop_size", "stride"), [(224, 16), (96, 16), (50, 8), (32, 32), (224, 32)])
@pytest.mark.parametrize("mirrored", [False, True])
def test_centers_are_the_mean_pixel_coordinates(crop_size, stride, mirrored):
    rng = np.random.default_rng(crop_size + stride)
    for _ in range(5):
        x0, y0 = rng.integers(0, 300, 2)
        w, h = rng.integers(20, 400, 2)
        box = [x0 + w, y0, x0, y0 + h] if mirrored else [x0, y0, x0 + w, y0 + h]
        ours = patch_centers(torch.tensor([box], dtype=torch.float64), crop_size, stride)[0]
        np.testing.assert_allclose(ours.numpy(), literal_centers(box, crop_size, stride), rtol=0, atol=1e-9)


def test_a_mirrored_box_gives_the_mirrored_grid():
    plain, mirrored = torch.tensor([[10.0, 20.0, 90.0, 70.0]]), torch.tensor([[90.0, 20.0, 10.0, 70.0]])
    grid = patch_centers(plain, 48, 16).view(3, 3, 2)
    torch.testing.assert_close(patch_centers(mirrored, 48, 16).view(3, 3, 2), grid.flip(1))


def test_the_whole_image_at_its_own_size_has_its_own_coordinates():
    centers = patch_centers(torch.tensor([[0.0, 0.0, 4.0, 4.0]], dtype=torch.float64), 4, 1)
    expected = torch.tensor([[x, y] for y in range(4) for x in range(4)], dtype=torch.float64)
    assert torch.equal(centers[0], expected)


def test_half_diagonals_come_from_the_spacing_of_patches():
    boxes = torch.tensor([[10.0, 20.0, 90.0, 70.0], [90.0, 20.0, 10.0, 70.0]], dtype=torch.float64)
    centers = patch_centers(boxes, 48, 16).view(2, 3, 3, 2)
    dx = centers[:, 0, 1] - centers[:, 0, 0]
    dy = centers[:, 1, 0] - centers[:, 0, 0]
    expected = (dx.norm(dim=1) / 2) ** 2 + (dy.norm(dim=1) / 2) ** 2
    torch.testing.assert_close(squared_half_diagonals(boxes, 48, 16), expected)
    assert squared_half_diagonals(boxes, 16, 16).shape == (2,)  # a grid of one patch has a size too


def test_a_crop_smaller_than_a_patch_is_the_users_mistake():
    with pytest.raises(UserError, match="crop size 8 is smaller than one patch of 16"):
        patch_centers(torch.zeros(1, 4), 8, 16)
