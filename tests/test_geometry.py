"""Patch centers against a literal average of pixel coordinates, and the properties a box must have."""

import numpy as np
import pytest
import torch
from pair_matches import apart

from glsd.errors import UserError
from glsd.geometry import (
    geometric_match,
    needed_rows,
    patch_centers,
    patch_grid,
    squared_half_diagonals,
)
from glsd.losses.match import geometric


def literal_centers(box, crop_size: int, stride) -> np.ndarray:
    """Resample every output pixel's source coordinate (pixel centers, half-pixel convention), mirror, average by patch."""
    x0, y0, x1, y1 = box
    left, width = min(x0, x1), abs(x1 - x0)
    columns = np.array([left + (c + 0.5) * width / crop_size - 0.5 for c in range(crop_size)])
    rows = np.array([y0 + (r + 0.5) * (y1 - y0) / crop_size - 0.5 for r in range(crop_size)])
    if x0 > x1:
        columns = columns[::-1]
    height, width = stride if isinstance(stride, tuple) else (stride, stride)
    found = []
    for a in range(crop_size // height):
        for b in range(crop_size // width):
            x = columns[b * width : (b + 1) * width].mean()
            y = rows[a * height : (a + 1) * height].mean()
            found.append((x, y))
    return np.array(found)


@pytest.mark.parametrize(
    ("crop_size", "stride"),
    [
        (224, 16),
        (96, 16),
        (50, 8),
        (32, 32),
        (224, 32),
        (64, (8, 16)),
        (64, (16, 8)),
        (96, (32, 6)),
        (48, (48, 16)),
    ],
)
@pytest.mark.parametrize("mirrored", [False, True])
def test_centers_are_the_mean_pixel_coordinates(crop_size, stride, mirrored):
    rng = np.random.default_rng(crop_size)
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


def test_half_diagonals_of_oblong_patches():
    """Cells of 4 x 8 pixels in a box of half the crop's height and twice its width: 2 x 16 source pixels."""
    boxes = torch.tensor([[0.0, 0.0, 128.0, 32.0], [128.0, 0.0, 0.0, 32.0]], dtype=torch.float64)
    assert squared_half_diagonals(boxes, 64, (4, 8)).tolist() == [65.0, 65.0]  # 1^2 + 8^2


def test_a_crop_smaller_than_a_patch_is_the_users_mistake():
    with pytest.raises(UserError, match="crop size 8 is below one patch of 16"):
        patch_grid(8, (4, 16))
    with pytest.raises(UserError, match="crop size 8 is below one patch of 16"):
        patch_centers(torch.zeros(1, 4), 8, 16)


def random_boxes(views: int, images: int, seed: int) -> torch.Tensor:
    """Integer boxes of crops, about half of them mirrored."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 60, (views, images, 2), generator=rng)
    size = torch.randint(30, 90, (views, images, 2), generator=rng)
    boxes = torch.cat([corner, corner + size], -1).double()
    mirrored = torch.rand(views, images, generator=rng) < 0.5
    boxes[mirrored] = boxes[mirrored][:, [2, 1, 0, 3]]
    return boxes


@pytest.mark.parametrize(("hinge", "factor"), [(True, 1.0), (True, 0.6), (False, 1.0)])
@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("stride", [8, (4, 14), (28, 10)])
def test_a_geometric_match_equals_the_search_among_all_patches(stride, num_local, hinge, factor):
    boxes, sizes = [random_boxes(2, 5, 1), random_boxes(3, 5, 2)], [56, 30]
    if not num_local:
        boxes, sizes = boxes[:1], sizes[:1]
    match = geometric_match(boxes, sizes, stride=stride, hinge=hinge, hinge_factor=factor)
    centers = [
        patch_centers(view, size, stride) for group, size in zip(boxes, sizes, strict=True) for view in group
    ]
    halves = [
        squared_half_diagonals(view, size, stride)
        for group, size in zip(boxes, sizes, strict=True)
        for view in group
    ]
    pairs = apart(match, [view.shape[1] for view in centers])
    assert len(pairs) == 2 * (len(centers) - 1)
    for (q, v), (index, weight) in pairs.items():
        options = {
            "student_half": halves[v],
            "teacher_half": halves[q],
            "hinge": hinge,
            "hinge_factor": factor,
        }
        want_index, want_weight = geometric(centers[v], centers[q], **options)
        # Distances that are equal but for their rounding may go to either; with whole patches none are.
        found, wanted = (
            (centers[v] - centers[q].gather(1, chosen[..., None].expand(-1, -1, 2))).square().sum(-1)
            for chosen in (index, want_index)
        )
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)
        assert stride != 8 or torch.equal(index, want_index)
        assert torch.equal(weight, want_weight)
    patches = centers[0].shape[1]
    assert match.weight[:, :patches, 0].max() == 0  # a view and itself
    assert match.weight[:, patches : 2 * patches, 1].max() == 0


def test_needed_rows_point_to_what_the_kept_entries_point_to():
    rng = torch.Generator().manual_seed(0)
    index = torch.randint(0, 6, (20, 3), generator=rng) + 6 * (torch.arange(20) // 5)[:, None]
    kept = torch.rand(20, 3, generator=rng) < 0.3
    needed = needed_rows(index, kept, 24, 4)
    assert needed.rows.tolist() == [i for i in range(20) if kept[i].any()]
    assert needed.columns.tolist() == sorted(set(index[kept].tolist()))
    for place, row in enumerate(needed.rows.tolist()):
        for j in range(3):
            compact = int(needed.index[place, j])
            if kept[row, j]:
                assert needed.columns[compact] == index[row, j]
            assert needed.columns[compact] // 6 == row // 5  # of the same image
    ends = [
        (sum(r < 5 * g for r in needed.rows), sum(c < 6 * g for c in needed.columns)) for g in (1, 2, 3, 4)
    ]
    assert list(zip(needed.row_ends, needed.column_ends, strict=True)) == ends
