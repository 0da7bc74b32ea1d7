"""The global and the local loss against loops over pairs, images and patches."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pair_matches import apart, joined
from torch import Tensor

from glsd.batches import Match
from glsd.geometry import geometric_match
from glsd.losses.distill import global_loss, local_loss, similarity_match

TEMPS: dict[str, Any] = {"student_temp": 0.4, "teacher_temp": 0.3}


def cross_entropy(student, teacher, ps, pt, center) -> Tensor:
    """-<softmax((t - c)/tau_t), log_softmax(s/tau_s)> of one pair of vectors."""
    target = torch.softmax((pt @ teacher - center) / TEMPS["teacher_temp"], 0).detach()
    return -(target * torch.log_softmax(ps @ student / TEMPS["student_temp"], 0)).sum()


def literal_global(student, teacher, ps, pt, center) -> Tensor:
    terms = []
    for q in range(len(teacher)):
        for v in range(len(student)):
            if v != q:
                images = [
                    cross_entropy(s, t, ps, pt, center) for s, t in zip(student[v], teacher[q], strict=True)
                ]
                terms.append(torch.stack(images).mean())
    return torch.stack(terms).mean()


def literal_local(views, teacher, ps, pt, center, matches, mean) -> Tensor:
    """views: one (b, n_v, e) per view; matches: with their weights."""
    patches, total = [view.shape[1] for view in views], torch.zeros((), dtype=torch.float64)
    for match, share in matches:
        pairs = apart(match, patches)
        for (q, v), (index, weight) in pairs.items():
            pair, accepted = torch.zeros((), dtype=torch.float64), 0
            for b in range(index.shape[0]):
                for i in range(index.shape[1]):
                    vectors = views[v][b, i], teacher[q, b, index[b, i]]
                    pair = pair + share * weight[b, i] * cross_entropy(*vectors, ps, pt, center)
                    accepted += int(weight[b, i] > 0)
            total = total + pair / (index.numel() if mean == "all" else max(accepted, 1)) / len(pairs)
    return total


def normal(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(k=6, e=4):
    return normal(11, k, e).requires_grad_(), normal(12, k, e), 0.1 * normal(13, k)


class Example:
    """b = 2 images, 2 global crops of 3x3 patches and ``num_local`` local crops of 2x2."""

    def __init__(self, num_local=3, b=2, e=4, d=5):
        self.groups = [normal(1, 2, b, 9, e).requires_grad_()]
        self.features = [normal(2, 2, b, 9, d)]
        boxes = torch.tensor([[0, 0, 60, 50], [30, 10, 90, 70]] * b).double()
        self.boxes = [boxes[[0, 2, 1, 3]] if b == 2 else boxes]
        sizes = [24]
        if num_local:
            self.groups.append(normal(3, num_local, b, 4, e).requires_grad_())
            self.features.append(normal(4, num_local, b, 4, d))
            start = torch.randint(
                0, 70, (num_local * b, 2), generator=torch.Generator().manual_seed(5)
            ).double()
            self.boxes.append(torch.cat([start, start + 25], 1))
            sizes.append(16)
        self.sizes = sizes
        self.teacher = normal(6, 2, b, 9, e)
        self.teacher_features = normal(7, 2, b, 9, d)
        self.boxes = [box.unflatten(0, (-1, b)) for box in self.boxes]

    def match(self, matching, *, hinge=True, hinge_factor=1.0, geometric_weight=1.0, similarity_weight=1.0):
        place = geometric_match(self.boxes, self.sizes, stride=8, hinge=hinge, hinge_factor=hinge_factor)
        alike = similarity_match(self.features, self.teacher_features)
        found = {"geometric": (place, geometric_weight), "similarity": (alike, similarity_weight)}
        return list(found.values()) if matching == "both" else [found[matching]]

    @property
    def views(self):
        return [view for group in self.groups for view in group]


@pytest.mark.parametrize(("v", "g"), [(2, 2), (5, 2), (4, 3), (2, 1)])
def test_global_loss_equals_the_loops(v, g):
    student, teacher = normal(1, v, 3, 4).requires_grad_(), normal(2, g, 3, 4)
    ps, pt, center = heads()
    got = global_loss(student, teacher, ps, pt, center=center, **TEMPS)
    want = literal_global(student, teacher, ps, pt, center)
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0)
    for a, b in zip(
        torch.autograd.grad(got.loss, [student, ps]), torch.autograd.grad(want, [student, ps]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(got.teacher_mean, (teacher.flatten(0, 1) @ pt.T).mean(0))


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("mean", ["all", "accepted"])
@pytest.mark.parametrize("matching", ["geometric", "similarity", "both"])
def test_local_loss_equals_the_loops(matching, mean, num_local):
    example = Example(num_local)
    ps, pt, center = heads()
    matches = example.match(matching, geometric_weight=0.7, similarity_weight=0.2)
    got = local_loss(
        example.groups, example.teacher, ps, pt, matches=matches, center=center, mean=mean, **TEMPS
    )
    want = literal_local(example.views, example.teacher, ps, pt, center, matches, mean)
    torch.testing.assert_close(got.loss, want, rtol=1e-12, atol=0)
    leaves = [*example.groups, ps]
    for a, b in zip(torch.autograd.grad(got.loss, leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(got.teacher_mean, (example.teacher.flatten(0, 2) @ pt.T).mean(0))
    patches = [view.shape[1] for view in example.views]
    weights = [(weight > 0).double().flatten() for _, weight in apart(matches[0][0], patches).values()]
    torch.testing.assert_close(got.matched_share, torch.cat(weights).mean())


def test_the_example_accepts_some_and_rejects_some():
    ((match, _),) = Example().match("geometric")
    assert 0.1 < match.weight.mean() < 0.8


def test_nothing_accepted_gives_zero_loss_and_zero_gradient():
    example = Example(0)
    ps, pt, center = heads()
    ((match, _),) = example.match("geometric")
    matches = [(Match(match.index, torch.zeros_like(match.weight)), 1.0)]
    for mean in ("all", "accepted"):
        result = local_loss(
            example.groups, example.teacher, ps, pt, matches=matches, center=center, mean=mean, **TEMPS
        )
        assert result.loss.item() == 0
        assert result.matched_share.item() == 0
        assert torch.autograd.grad(result.loss, example.groups)[0].abs().max() == 0


def test_both_is_the_weighted_sum_of_the_two():
    example = Example()
    ps, pt, center = heads()

    def loss(matching, **options):
        matches = example.match(matching, **options)
        return local_loss(
            example.groups, example.teacher, ps, pt, matches=matches, center=center, **TEMPS
        ).loss

    both = loss("both", geometric_weight=0.3, similarity_weight=0.6)
    torch.testing.assert_close(both, 0.3 * loss("geometric") + 0.6 * loss("similarity"))


def test_options_reach_the_matcher():
    example = Example()
    ((match, _),) = example.match("geometric", hinge=False)
    pairs = apart(match, [9, 9, 4, 4, 4])
    assert len(pairs) == 2 * 4
    assert all(weight.min() == 1 for _, weight in pairs.values())
    ((narrow, _),) = example.match("geometric", hinge_factor=1e-3)
    assert float(narrow.weight.sum()) < 3


def test_permuting_images_changes_nothing():
    example, ps_pt_center = Example(), heads()
    ps, pt, center = ps_pt_center
    order = [1, 0]
    ((match, _),) = example.match("geometric")
    permuted = Match(match.index[order], match.weight[order])
    a = local_loss(example.groups, example.teacher, ps, pt, matches=[(match, 1.0)], center=center, **TEMPS)
    groups = [group[:, order] for group in example.groups]
    b = local_loss(
        groups, example.teacher[:, order], ps, pt, matches=[(permuted, 1.0)], center=center, **TEMPS
    )
    torch.testing.assert_close(a.loss, b.loss)


def test_a_perfect_student_of_coincident_crops_reaches_the_teacher_entropy():
    """CE >= entropy, with equality when student and teacher distributions agree."""
    vectors = F.normalize(normal(1, 2, 2, 9, 4), dim=-1)
    vectors[1] = vectors[0]
    prototypes = normal(2, 6, 4)
    pair = torch.arange(9).expand(2, 9), torch.ones(2, 9).double()
    match = joined({(0, 1): pair, (1, 0): pair}, 9)
    result = local_loss(
        [vectors], vectors, prototypes, prototypes, matches=[(match, 1.0)],
        center=torch.zeros(6).double(), student_temp=0.2, teacher_temp=0.2,
    )  # fmt: skip
    torch.testing.assert_close(result.loss, result.teacher_entropy)
