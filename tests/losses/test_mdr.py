"""MDR against loops over the equations, its invariances, its statistics, and batches that have no distances."""

import math
from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from glsd.losses import mdr
from glsd.losses.mdr import (
    MdrStatistics,
    initial_statistics,
    level_penalty,
    mdr_loss,
    mean_normalize,
    pairwise_distances,
)

LEVELS = (-3.0, 0.0, 3.0)
observe = partial(mdr.observe, momentum=0.9, include_diagonal=True)


def rows(b=9, e=4, seed=0, dtype=torch.float64):
    return torch.randn(b, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def levels_of(values=LEVELS, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def statistics(mean, std):
    return MdrStatistics(
        torch.tensor(mean, dtype=torch.float64), torch.tensor(std, dtype=torch.float64), torch.tensor(1)
    )


def whole_loss(f, levels, *, normalize=True, include_diagonal=True, stats=None):
    """One training step's MDR, from raw outputs."""
    distances = pairwise_distances(mean_normalize(f) if normalize else f)
    stats = observe(stats or initial_statistics(), distances, include_diagonal=include_diagonal)
    return mdr_loss(distances, levels, stats), stats


def literal(f, levels, *, normalize, include_diagonal, old=None):
    """Value, mean and deviation by loops; differentiable through torch's scalar operations, not through the statistics."""
    b = len(f)
    pairs = [(i, j) for i in range(b) for j in range(b) if i != j]
    d = {(i, j): ((f[i] - f[j]) ** 2).sum() ** 0.5 for i, j in pairs}
    if normalize:
        mean = sum(d.values()) / len(pairs)
        d = {pair: value / mean for pair, value in d.items()}
    values = [float(value.detach()) for value in d.values()] + [0.0] * (b if include_diagonal else 0)
    m = sum(values) / len(values)
    s = math.sqrt(sum((value - m) ** 2 for value in values) / (len(values) - 1))
    if old is not None:
        m, s = 0.9 * old[0] + 0.1 * m, 0.9 * old[1] + 0.1 * s
    total = 0.0
    for value in d.values():
        gaps = [((value - m) / s - level).abs() for level in levels]
        total = total + gaps[min(range(len(gaps)), key=[float(gap.detach()) for gap in gaps].__getitem__)]
    return total / len(pairs), m, s


@pytest.mark.parametrize("include_diagonal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("values", [LEVELS, (-1.0, 0.2, 0.9, 2.0), (0.1,)])
def test_loss_gradients_and_statistics_are_those_of_the_equations(values, normalize, include_diagonal):
    levels, stats, old = levels_of(values), None, None
    for batch in range(3):
        f = (rows(seed=batch) * (1 + batch)).requires_grad_()
        flags = {"normalize": normalize, "include_diagonal": include_diagonal}
        loss, stats = whole_loss(f, levels, stats=stats, **flags)
        want, *old = literal(f, levels, old=old, **flags)
        torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
        torch.testing.assert_close([float(stats.mean), float(stats.std)], old, rtol=1e-12, atol=0)
        for got, expected in zip(
            torch.autograd.grad(loss, [f, levels]), torch.autograd.grad(want, [f, levels]), strict=True
        ):
            torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-13)
        assert int(stats.num_updates) == batch + 1


def test_mean_distance_becomes_one_and_the_gradient_flows_through_it():
    f = rows().requires_grad_()
    distances = pairwise_distances(mean_normalize(f))
    assert float(distances.detach().sum() / (9 * 8)) == pytest.approx(1.0, rel=1e-14)
    of_mean = torch.autograd.grad(distances.sum(), f)[0]  # a constant, if the divisor is differentiated too
    assert of_mean.abs().max() < 1e-12


def test_scaling_and_shifting_change_nothing_and_the_gradient_is_orthogonal():
    levels = levels_of()
    f = rows().requires_grad_()
    loss = whole_loss(f, levels)[0]
    of_f = torch.autograd.grad(loss, f)[0]
    assert of_f.norm() > 1e-2
    assert abs(float((f.detach() * of_f).sum())) < 1e-12
    assert of_f.sum(0).abs().max() < 1e-12
    for scale, shift in ((1e-3, 0.0), (50.0, 0.0), (1.0, 30.0)):
        other = (f.detach() * scale + shift).requires_grad_()
        moved = whole_loss(other, levels)[0]
        torch.testing.assert_close(moved, loss, rtol=1e-10, atol=0)
        torch.testing.assert_close(torch.autograd.grad(moved, other)[0] * scale, of_f, rtol=1e-8, atol=1e-11)


def test_order_of_the_batch_does_not_matter():
    f, levels = rows(), levels_of()
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    loss, stats = whole_loss(f, levels)
    other, same = whole_loss(f[order], levels)
    torch.testing.assert_close(other, loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.stack(same[:2]), torch.stack(stats[:2]), rtol=1e-13, atol=0)


def test_of_equally_near_levels_the_first_counts():
    """Distance 1.5 between the levels 0 and 3, standardized by mean 0 and deviation 1."""
    distances, levels = torch.tensor([[0.0, 1.5], [1.5, 0.0]]), levels_of(dtype=torch.float32)
    loss = mdr_loss(distances, levels, statistics(0.0, 1.0))
    assert loss.item() == 1.5
    assert torch.autograd.grad(loss, levels)[0].tolist() == [0.0, -1.0, 0.0]


def test_at_a_level_there_is_no_gradient():
    distances, levels = (
        torch.tensor([[0.0, 3.0], [3.0, 0.0]]).requires_grad_(),
        levels_of(dtype=torch.float32),
    )
    loss = mdr_loss(distances, levels, statistics(0.0, 1.0))
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [distances, levels]):
        assert not gradient.any()


def test_level_gradient_counts_the_pairs_below_and_above():
    levels, distances = levels_of(), pairwise_distances(rows())
    stats = observe(initial_statistics(), distances)
    z = ((distances - stats.mean) / stats.std)[~torch.eye(9, dtype=torch.bool)]
    nearest = (z[:, None] - levels).abs().argmin(1)
    want = [-float(torch.sign(z - level)[nearest == k].sum()) / 72 for k, level in enumerate(levels.detach())]
    got = torch.autograd.grad(mdr_loss(distances, levels, stats), levels)[0]
    torch.testing.assert_close(got.tolist(), want, rtol=1e-12, atol=1e-15)


def test_statistics_do_not_change_in_place_and_take_no_gradient():
    start = initial_statistics()
    distances = pairwise_distances(rows().requires_grad_())
    after = observe(start, distances)
    assert int(start.num_updates) == 0
    assert float(start.mean) == 0.0
    assert not any(value.requires_grad for value in after)
    assert [value.shape for value in after] == [torch.Size([])] * 3
    assert [value.dtype for value in after] == [value.dtype for value in start]


@pytest.mark.parametrize(("include_diagonal", "mean"), [(True, 8 / 9), (False, 1.0)])
def test_mean_of_normalized_distances_is_known(include_diagonal, mean):
    distances = pairwise_distances(mean_normalize(rows()))
    stats = observe(initial_statistics(), distances, include_diagonal=include_diagonal)
    assert float(stats.mean) == pytest.approx(mean, rel=1e-13)


def test_distances_of_near_duplicates_far_from_the_origin_keep_their_digits():
    """Float32 vectors of length 1000 that differ by 0.01: the plain expansion would be wrong by more than the distance."""
    f = 100 + rows(b=6, e=100, dtype=torch.float32)
    twin = f.clone()
    twin[:, 0] += 0.01
    both = torch.cat([f, twin])
    got = pairwise_distances(both)
    want = (both.double()[:, None] - both.double()).norm(dim=2)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)


def test_gradient_of_near_duplicates_is_that_of_the_difference():
    f = rows(b=2, e=3, dtype=torch.float32)
    f[1] = f[0] + torch.tensor([1e-4, 0.0, 0.0])
    leaf = f.clone().requires_grad_()
    of_f = torch.autograd.grad(pairwise_distances(leaf).sum(), leaf)[0]
    torch.testing.assert_close(of_f, torch.tensor([[-2.0, 0, 0], [2.0, 0, 0]]), rtol=1e-6, atol=1e-6)


def test_coinciding_points_have_no_distance_and_no_gradient():
    f = rows(b=5, dtype=torch.float32)
    f[3] = f[1]
    leaf = f.clone().requires_grad_()
    distances = pairwise_distances(leaf)
    assert distances[1, 3].item() == distances[3, 1].item() == 0.0
    assert not distances.diagonal().any()
    assert (distances == 0).sum() == 7
    weight = rows(b=5, e=5, seed=1, dtype=torch.float32)
    without = weight.clone()
    without[1, 3] = without[3, 1] = 0
    got, want = (
        torch.autograd.grad((distances * w).sum(), leaf, retain_graph=True)[0] for w in (weight, without)
    )
    assert got.isfinite().all()
    assert torch.equal(got, want)


@pytest.mark.parametrize(("b", "e"), [(33, 7), (130, 65), (64, 100)])
def test_rounding_of_the_product_parts_no_coinciding_points(b, e):
    """A product's entries for equal rows need not be equal: they depend on the block that they fall in."""
    f = rows(b, e, dtype=torch.float32)
    f[-1] = f[0]
    distances = pairwise_distances(f)
    assert distances[0, -1].item() == distances[-1, 0].item() == 0.0
    assert (distances == 0).sum() == len(f) + 2


@pytest.mark.parametrize("include_diagonal", [True, False])
@pytest.mark.parametrize("started", [True, False])
@pytest.mark.parametrize(
    "f", [rows(b=1), rows(b=1).repeat(6, 1), torch.zeros(4, 3)], ids=["one", "equal", "zero"]
)
def test_batches_without_distances_change_nothing(f, started, include_diagonal):
    leaf, levels = f.float().requires_grad_(), levels_of(dtype=torch.float32)
    before = observe(initial_statistics(), pairwise_distances(rows())) if started else initial_statistics()
    loss, after = whole_loss(leaf, levels, stats=before, include_diagonal=include_diagonal)
    assert loss.item() == 0.0
    for gradient in torch.autograd.grad(loss, [leaf, levels]):
        assert not gradient.any()
    assert after == before
    assert torch.equal(mean_normalize(leaf), leaf)


# Distances equal but for rounding, which differs from rotation to rotation.
TURNED = [torch.linalg.qr(rows(3, 3, seed)).Q.float() for seed in range(6)]


@pytest.mark.parametrize("f", [rows(b=2), torch.eye(3), *TURNED])
def test_equal_distances_have_no_deviation_to_measure_in(f):
    f = f.clone().requires_grad_()
    loss, stats = whole_loss(f, levels_of(), include_diagonal=False)
    assert int(stats.num_updates) == 0
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, f)[0].any()


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_numbers_that_are_not_finite_stay_out_of_the_statistics_and_show_in_the_loss(poison):
    before = observe(initial_statistics(), pairwise_distances(rows()))
    f = rows()
    f[2, 1] = poison
    loss, after = whole_loss(f, levels_of(), stats=before)
    assert after == before
    assert not loss.isfinite()


def test_autocast_changes_nothing():
    f = rows(b=16, e=32, dtype=torch.float32)

    def results(enabled):
        leaf, levels = f.clone().requires_grad_(), levels_of(dtype=torch.float32)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss, stats = whole_loss(leaf, levels)
            total = loss + level_penalty(levels)
        return total.detach(), stats.mean, stats.std, *torch.autograd.grad(total, [leaf, levels])

    for off, on in zip(results(False), results(True), strict=True):
        torch.testing.assert_close(on, off, rtol=1e-6, atol=0)


def test_half_precision_outputs_are_widened():
    f = rows(dtype=torch.bfloat16)
    assert mean_normalize(f).dtype == torch.float32
    assert torch.equal(pairwise_distances(f), pairwise_distances(f.float()))


def test_float32_is_close_to_float64():
    f, levels = rows(b=64, e=32), levels_of()
    narrow = whole_loss(f.float(), levels_of(dtype=torch.float32))[0]
    assert narrow.item() == pytest.approx(whole_loss(f, levels)[0].item(), rel=1e-6)


def test_level_penalty():
    levels = levels_of((1.0, -2.0))
    assert float(level_penalty(levels).detach()) == 5.0
    assert torch.autograd.grad(level_penalty(levels), levels)[0].tolist() == [2.0, -4.0]


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: whatever looks at one on the host raises."""
    with FakeTensorMode():
        f, levels = torch.empty(8, 4, requires_grad=True), torch.empty(3, requires_grad=True)
        loss, stats = whole_loss(f, levels)
        loss, _ = whole_loss(f, levels, stats=stats)
        torch.autograd.grad(loss + level_penalty(levels), [f, levels])
