"""Both matchers against loops over their definitions, ties, and geometric properties."""

from typing import NamedTuple

import pytest
import torch

from glsd.geometry import patch_centers, squared_half_diagonals
from glsd.losses import match as module
from glsd.losses.match import similarity


class Found(NamedTuple):
    index: torch.Tensor  # type: ignore[assignment]
    weight: torch.Tensor


def geometric(*arguments, **options) -> Found:
    return Found(*module.geometric(*arguments, **options))


def literal_geometric(student, teacher, student_half, teacher_half, factor):
    index = torch.zeros(student.shape[:2], dtype=torch.int64)
    weight = torch.zeros(student.shape[:2], dtype=student.dtype)
    for b in range(student.shape[0]):
        limit = factor**2 * max(float(student_half[b]), float(teacher_half[b]))
        for i in range(student.shape[1]):
            best = float("inf")
            for t in range(teacher.shape[1]):
                d = float(((student[b, i] - teacher[b, t]) ** 2).sum())
                if d < best:
                    best, index[b, i] = d, t
            weight[b, i] = float(best < limit)
    return index, weight


def crops(seed, m=6, dtype=torch.float64):
    """Random integer boxes, about half of them mirrored."""
    rng = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 60, (m, 2), generator=rng)
    size = torch.randint(30, 90, (m, 2), generator=rng)
    boxes = torch.cat([corner, corner + size], 1).to(dtype)
    flip = torch.rand(m, generator=rng) < 0.5
    boxes[flip] = boxes[flip][:, [2, 1, 0, 3]]
    return boxes


def view(boxes, size, stride):
    return patch_centers(boxes, size, stride), squared_half_diagonals(boxes, size, stride)


@pytest.mark.parametrize("factor", [1.0, 0.6])
@pytest.mark.parametrize("seed", range(3))
def test_geometric_equals_the_loop(seed, factor):
    student, student_half = view(crops(seed), 24, 8)
    teacher, teacher_half = view(crops(seed + 100), 56, 8)
    match = geometric(
        student,
        teacher,
        student_half=student_half,
        teacher_half=teacher_half,
        hinge=True,
        hinge_factor=factor,
    )
    index, weight = literal_geometric(student, teacher, student_half, teacher_half, factor)
    assert torch.equal(match.index, index)
    assert torch.equal(match.weight, weight)
    assert 0 < weight.mean() < 1  # the example has both kinds


def test_without_the_hinge_every_patch_counts():
    student, half = view(crops(0), 24, 8)
    teacher, _ = view(crops(1), 56, 8)
    kept = geometric(student, teacher, student_half=half, teacher_half=half, hinge=False)
    gated = geometric(student, teacher, student_half=half, teacher_half=half, hinge=True)
    assert torch.equal(kept.index, gated.index)
    assert torch.equal(kept.weight, torch.ones_like(kept.weight))


def test_disjoint_crops_weigh_nothing():
    left = torch.tensor([[0, 0, 40, 40]]).double()
    student, half = view(left, 32, 8)
    teacher, _ = view(left + torch.tensor([200, 0, 200, 0]), 32, 8)
    assert geometric(student, teacher, student_half=half, teacher_half=half).weight.sum() == 0


def test_coincident_crops_match_patch_to_itself_and_mirrored_to_its_mirror():
    box = torch.tensor([[3, 5, 59, 47]]).double()
    centers, half = view(box, 32, 8)
    mirrored, _ = view(box[:, [2, 1, 0, 3]], 32, 8)
    assert torch.equal(
        geometric(centers, centers, student_half=half, teacher_half=half).index, torch.arange(16)[None]
    )
    match = geometric(centers, mirrored, student_half=half, teacher_half=half)
    assert torch.equal(match.index, torch.arange(16).view(4, 4).flip(1).view(1, 16))
    assert match.weight.min() == 1


def test_a_flipped_student_crop_has_the_mirrored_match():
    boxes, (teacher, teacher_half) = crops(5), view(crops(6), 56, 8)
    student, half = view(boxes, 40, 8)
    mirrored, _ = view(boxes[:, [2, 1, 0, 3]], 40, 8)
    halves = {"student_half": half, "teacher_half": teacher_half}
    a, b = geometric(student, teacher, **halves), geometric(mirrored, teacher, **halves)
    # Not the index: mirrored crops round differently, and integer boxes have exact ties.
    assert torch.equal(a.weight.view(-1, 5, 5).flip(2), b.weight.view(-1, 5, 5))

    def distance(match, centers):
        chosen = teacher.gather(1, match.index[..., None].expand(-1, -1, 2))
        return ((chosen - centers) ** 2).sum(-1).view(-1, 5, 5)

    torch.testing.assert_close(distance(a, student).flip(2), distance(b, mirrored))


def test_exact_ties_take_the_lowest_index_and_the_threshold_is_strict():
    student = torch.tensor([[[1.0, 1.0], [1.0, 0.0]]]).double()
    teacher = torch.tensor([[[5.0, 5.0], [2.0, 2.0], [0.0, 0.0], [2.0, 0.0], [0.0, 2.0]]]).double()
    match = geometric(
        student, teacher, student_half=torch.tensor([2.0]).double(), teacher_half=torch.tensor([1.0]).double()
    )
    assert match.index.tolist() == [[1, 2]]
    assert match.weight.tolist() == [[0, 1]]  # distance^2 2 is not below 2; distance^2 1 is


def test_far_from_the_origin_distances_are_still_exact():
    """|s|^2 - 2st + |t|^2 in float32 would lose these differences at coordinates of 50000."""
    teacher = torch.tensor([[[50000.0, 50000.0], [50001.0, 50000.0], [50002.0, 50000.0]]])
    student = teacher + torch.tensor([0.25, 0.0])
    half = torch.tensor([0.5])
    match = geometric(student, teacher, student_half=half, teacher_half=half)
    assert match.index.tolist() == [[0, 1, 2]]
    assert match.weight.min() == 1


def test_images_do_not_see_each_other():
    student, half = view(crops(7), 24, 8)
    teacher, teacher_half = view(crops(8), 56, 8)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    whole = geometric(student, teacher, student_half=half, teacher_half=teacher_half)
    part = geometric(
        student[order], teacher[order], student_half=half[order], teacher_half=teacher_half[order]
    )
    assert torch.equal(whole.index[order], part.index)
    assert torch.equal(whole.weight[order], part.weight)


def literal_similarity(student, teacher):
    index = torch.zeros(student.shape[:2], dtype=torch.int64)
    for b in range(len(student)):
        for i in range(student.shape[1]):
            cosines = [
                float(s @ t / max(float(s.norm()), 1e-12) / max(float(t.norm()), 1e-12))
                for s, t in ((student[b, i], t) for t in teacher[b])
            ]
            index[b, i] = max(range(len(cosines)), key=cosines.__getitem__)
    return index


def features(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_similarity_equals_the_loop():
    student, teacher = features(0, 3, 7, 5), features(1, 3, 11, 5)
    assert torch.equal(similarity(student, teacher), literal_similarity(student, teacher))


def test_similarity_ignores_lengths_and_takes_the_lowest_of_equals():
    student, teacher = features(0, 2, 7, 5), features(1, 2, 11, 5)
    stretched = similarity(student * 3, teacher * torch.rand(2, 11, 1).double().add(0.1))
    assert torch.equal(stretched, similarity(student, teacher))
    # Products of unit vectors along axes are exact, whatever the order in which a machine sums them up.
    axes = torch.eye(5, dtype=torch.float64)[torch.tensor([[3, 0, 3, 1, 0, 4, 1, 3]])]
    doubled = torch.cat([axes, axes], 1)
    assert similarity(axes, doubled).tolist() == [[0, 1, 0, 3, 1, 5, 3, 0]]


def test_similarity_of_a_zero_feature_is_finite_and_has_no_gradient():
    student = torch.zeros(1, 2, 4, requires_grad=True)
    index = similarity(student, torch.randn(1, 3, 4))
    assert index.tolist() == [[0, 0]]
    assert not index.requires_grad


def test_similarity_is_float32_under_autocast():
    """Cosines 1 - 1e-4 and 1 - 2e-4 are the same number in bfloat16."""
    teacher = torch.tensor([[[1.0, 0.02], [1.0, 0.014], [1.0, 0.0]]])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert similarity(torch.tensor([[[1.0, 0.001]]]), teacher).tolist() == [[2]]
