"""PSD and OBD-SD against loops over the equations, and what has to hold of targets, divergence and gradient."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode

from glsd.errors import UserError
from glsd.losses import obd_sd
from glsd.losses.obd_sd import (
    diffuse,
    ramp,
    symmetric_affinity,
    target_statistics,
    transition_matrix,
)

# Published settings, which most tests leave as they are.
diffusion_target = partial(obd_sd.diffusion_target, tau_d=1.0, form="softmax", mask_self=False)
similarity_target = partial(obd_sd.similarity_target, mask_self=False)
distillation_kl = partial(obd_sd.distillation_kl, mask_self=False)
check_settings = partial(obd_sd.check_settings, tau=1.0, w=0.5, tau_d=1.0, mask_self=False, batch_size=8)

SETTINGS = [  # form, w, tau, tau_d
    ("softmax", 0.3, 1.0, 1.0),
    ("softmax", 0.9, 0.1, 0.05),
    ("softmax", 0.99, 1.0, 0.005),
    ("symmetric", 0.5, 0.2, 1.0),
    ("symmetric", 0.9, 1.0, 1.0),
]


def units(b=12, e=5, seed=0, shift=0.0, dtype=torch.float64):
    """Unit vectors; a shift makes all their cosines positive."""
    rows = torch.randn(b, e, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift
    return F.normalize(rows, dim=1).to(dtype)


def literal_softmax(row, tau, skip=None):
    weights = [0.0 if j == skip else math.exp(float(s) / tau) for j, s in enumerate(row)]
    return [weight / sum(weights) for weight in weights]


def walk(matrix, start, w, rounds=6000):
    """The fixed point of values <- w matrix values + (1 - w) start, by walking there."""
    values = start
    for _ in range(rounds):
        values = w * matrix @ values + (1 - w) * start
    return values


def literal_target(z_teacher, *, tau, w, tau_d, form, mask_self):
    """The target from the equations, entry by entry."""
    b = len(z_teacher)
    cosines = torch.tensor([[float(x @ y) for y in z_teacher] for x in z_teacher], dtype=torch.float64)
    skip = list(range(b)) if mask_self else [None] * b
    if form == "softmax":
        start = torch.tensor([literal_softmax(cosines[i], tau, skip[i]) for i in range(b)])
        steps = torch.tensor([literal_softmax(cosines[i], tau_d, i) for i in range(b)])
        target = walk(steps.double(), start.double(), w)
        if mask_self:
            target = target - torch.diag(target.diagonal())
        return target / target.sum(1, keepdim=True)
    affinity = torch.zeros(b, b, dtype=torch.float64)
    for i in range(b):
        for j in range(b):
            affinity[i, j] = max(float(cosines[i, j]), 0.0) if i != j else 0.0
    degree = affinity.sum(1)
    for i in range(b):
        for j in range(b):
            affinity[i, j] /= math.sqrt(degree[i] * degree[j])
    diffused = walk(affinity, cosines, w)
    return torch.tensor([literal_softmax(diffused[i], tau, skip[i]) for i in range(b)], dtype=torch.float64)


def literal_kl(z, target, *, tau, mask_self):
    total = 0.0
    for i in range(len(z)):
        q = literal_softmax(z[i] @ z.T, tau, i if mask_self else None)
        total += sum(
            float(p) * math.log(float(p) / q_j) for p, q_j in zip(target[i], q, strict=True) if p > 0
        )
    return total / len(z)


@pytest.fixture(autouse=True)
def _float64_literals():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # the loops above make tensors of Python floats
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize(("form", "w", "tau", "tau_d"), SETTINGS)
def test_target_and_divergence_are_those_of_the_equations(form, w, tau, tau_d, mask_self):
    z, z_teacher = units(seed=1), units(seed=2, shift=0.3)
    settings = {"tau": tau, "w": w, "tau_d": tau_d, "form": form, "mask_self": mask_self}
    target = diffusion_target(z_teacher, **settings)
    torch.testing.assert_close(target, literal_target(z_teacher, **settings), rtol=1e-9, atol=1e-12)
    want = literal_kl(z, target, tau=tau, mask_self=mask_self)
    assert distillation_kl(z, target, tau=tau, mask_self=mask_self) == pytest.approx(want, rel=1e-10)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_psd_target_is_the_softmax_of_the_equation(tau, mask_self):
    z = units()
    want = [literal_softmax(z[i] @ z.T, tau, i if mask_self else None) for i in range(len(z))]
    got = similarity_target(z, tau=tau, mask_self=mask_self)
    torch.testing.assert_close(got, torch.tensor(want), rtol=1e-12, atol=0)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize(("form", "w", "tau", "tau_d"), SETTINGS)
def test_gradient_is_the_closed_form_and_reaches_the_student_only(form, w, tau, tau_d, mask_self):
    z, z_teacher = units(seed=1).requires_grad_(), units(seed=2).requires_grad_()
    target = diffusion_target(z_teacher, tau=tau, w=w, tau_d=tau_d, form=form, mask_self=mask_self)
    assert not target.requires_grad
    coefficient = ramp(3, 4, weight=75.0, tau=tau)
    loss = coefficient * distillation_kl(z, target.requires_grad_(), tau=tau, mask_self=mask_self)
    of_z, of_target, of_teacher = torch.autograd.grad(loss, [z, target, z_teacher], allow_unused=True)
    assert of_target is None
    assert of_teacher is None
    e = z.detach()
    difference = similarity_target(e, tau=tau, mask_self=mask_self) - target.detach()
    g = coefficient / (tau * len(e)) * difference
    torch.testing.assert_close(of_z, (g + g.T) @ e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("form", "w", "tau", "tau_d"), SETTINGS)
def test_rows_are_distributions_over_the_batch(form, w, tau, tau_d, dtype, mask_self):
    target = diffusion_target(
        units(b=40, dtype=dtype), tau=tau, w=w, tau_d=tau_d, form=form, mask_self=mask_self
    )
    assert target.dtype == dtype
    rounding = 20 * torch.finfo(dtype).eps
    torch.testing.assert_close(target.sum(1), torch.ones(40, dtype=dtype), rtol=rounding, atol=0)
    others = ~torch.eye(40, dtype=torch.bool)
    assert (target[others] > 0).all()
    assert (target.diagonal() == 0).all() if mask_self else (target.diagonal() > 0).all()


def test_transition_matrix_is_a_walk_that_never_stays():
    z = units()
    steps = transition_matrix(z @ z.T, tau_d=0.1)
    torch.testing.assert_close(steps.sum(1), torch.ones(12), rtol=1e-14, atol=0)
    assert (steps.diagonal() == 0).all()
    stationary = diffuse(steps, torch.ones(12, 1), w=0.9)  # rows sum to 1, so ones stay ones
    torch.testing.assert_close(stationary, torch.ones(12, 1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("form", ["softmax", "symmetric"])
def test_without_diffusion_it_is_psd_exactly(form, mask_self):
    z = units(dtype=torch.float32)
    psd = similarity_target(z, tau=0.7, mask_self=mask_self)
    assert torch.equal(diffusion_target(z, tau=0.7, w=0.0, form=form, mask_self=mask_self), psd)
    nearly = diffusion_target(z, tau=0.7, w=1e-6, form=form, mask_self=mask_self)  # by the solve
    torch.testing.assert_close(nearly, psd, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("form", ["softmax", "symmetric"])
def test_order_of_the_batch_does_not_matter(form):
    z, z_teacher = units(seed=1), units(seed=2)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(0))
    settings = {"tau": 0.5, "w": 0.9, "tau_d": 0.2, "form": form}
    target = diffusion_target(z_teacher, **settings)
    moved = diffusion_target(z_teacher[order], **settings)
    torch.testing.assert_close(moved, target[order][:, order], rtol=1e-11, atol=1e-14)
    loss, same = distillation_kl(z, target, tau=0.5), distillation_kl(z[order], moved, tau=0.5)
    torch.testing.assert_close(loss, same, rtol=1e-12, atol=0)


def test_rotating_student_or_teacher_changes_nothing():
    z, z_teacher = units(seed=1), units(seed=2)
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))[0]
    loss = distillation_kl(z, diffusion_target(z_teacher, tau=0.5, w=0.5), tau=0.5)
    turned = distillation_kl(z @ rotation, diffusion_target(z_teacher @ rotation.T, tau=0.5, w=0.5), tau=0.5)
    torch.testing.assert_close(turned, loss, rtol=1e-11, atol=0)


def test_divergence_is_zero_for_the_teacher_itself_and_positive_otherwise():
    z = units()
    target = similarity_target(z, tau=0.3)
    assert abs(float(distillation_kl(z, target, tau=0.3))) < 1e-15
    assert distillation_kl(units(seed=5), target, tau=0.3) > 1e-3


@pytest.mark.parametrize("form", ["softmax", "symmetric"])
def test_autocast_changes_nothing(form):
    z, z_teacher = units(b=32, e=16, seed=1, dtype=torch.float32), units(b=32, e=16, dtype=torch.float32)

    def value_and_gradient(enabled):
        leaf = z.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            target = diffusion_target(z_teacher, tau=1.0, w=0.5, tau_d=0.1, form=form)
            psd = similarity_target(z_teacher, tau=1.0)
            loss = distillation_kl(leaf, target, tau=1.0) + distillation_kl(leaf, psd, tau=1.0)
        return target, psd, loss.detach(), *torch.autograd.grad(loss, leaf)

    for off, on in zip(value_and_gradient(False), value_and_gradient(True), strict=True):
        assert on.dtype == torch.float32
        torch.testing.assert_close(on, off, rtol=1e-6, atol=0)


def test_half_precision_vectors_are_widened_first():
    z = units(dtype=torch.bfloat16)
    target = diffusion_target(z, tau=1.0, w=0.9, tau_d=0.1)
    assert target.dtype == torch.float32
    assert torch.equal(target, diffusion_target(z.float(), tau=1.0, w=0.9, tau_d=0.1))
    assert torch.equal(distillation_kl(z, target, tau=1.0), distillation_kl(z.float(), target, tau=1.0))


@pytest.mark.parametrize(("w", "tau", "tau_d"), [(0.99, 1.0, 0.005), (0.999, 0.2, 0.02), (0.999, 1.0, 1.0)])
def test_float32_is_close_to_float64_where_the_system_is_ill_conditioned(w, tau, tau_d):
    z, z_teacher = units(b=64, e=16, seed=1), units(b=64, e=16, seed=2)
    wide = distillation_kl(z, diffusion_target(z_teacher, tau=tau, w=w, tau_d=tau_d), tau=tau)
    target = diffusion_target(z_teacher.float(), tau=tau, w=w, tau_d=tau_d)
    narrow = distillation_kl(z.float(), target, tau=tau)
    assert narrow.double() == pytest.approx(wide.item(), rel=1e-4)


@pytest.mark.parametrize("mask_self", [False, True])
@pytest.mark.parametrize("form", ["softmax", "symmetric"])
@pytest.mark.parametrize("b", [1, 2, 3])
def test_tiny_batches_give_numbers(b, form, mask_self):
    z = units(b, dtype=torch.float32).requires_grad_()
    target = diffusion_target(
        units(b, seed=1, dtype=torch.float32), tau=0.1, w=0.9, form=form, mask_self=mask_self
    )
    torch.testing.assert_close(target.sum(1), torch.ones(b, dtype=torch.float32))
    loss = distillation_kl(z, target, tau=0.1, mask_self=mask_self)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, z)[0].isfinite().all()
    assert all(value.isfinite() for value in target_statistics(target, target).values())
    if b <= 1 + mask_self:
        assert abs(loss.item()) < 1e-6  # one candidate: nothing to learn


@pytest.mark.parametrize("form", ["softmax", "symmetric"])
def test_identical_images_have_a_uniform_target_and_no_gradient(form):
    z = units(1, dtype=torch.float32).repeat(6, 1).requires_grad_()
    target = diffusion_target(z, tau=0.5, w=0.9, tau_d=0.1, form=form)
    torch.testing.assert_close(target, torch.full((6, 6), 1 / 6, dtype=torch.float32))
    loss = distillation_kl(z, target, tau=0.5)
    assert abs(loss.item()) < 1e-6
    assert torch.autograd.grad(loss, z)[0].abs().max() < 1e-6


def test_small_temperatures_underflow_to_zero_and_not_to_nan():
    z = units(b=24, dtype=torch.float32).requires_grad_()
    z_teacher = units(b=24, seed=1, dtype=torch.float32)
    for mask_self in (False, True):
        target = diffusion_target(z_teacher, tau=0.005, w=0.5, tau_d=0.005, mask_self=mask_self)
        assert (target >= 0).all()
        assert (target == 0).any()
        loss = distillation_kl(z, target, tau=0.005, mask_self=mask_self)
        assert loss.isfinite()
        assert torch.autograd.grad(loss, z)[0].isfinite().all()


def test_rounding_below_zero_is_not_a_nan():
    """Where steps and start are nearly one-hot, the solve can leave entries of about -1e-20, which have no logarithm."""
    below = 0
    for seed in range(40):
        z = units(b=34, e=6, seed=seed, dtype=torch.float32)
        start = similarity_target(z, tau=0.005, mask_self=True)
        below += bool((diffuse(transition_matrix(z @ z.T, tau_d=0.005), start, w=0.999) < 0).any())
        target = diffusion_target(z, tau=0.005, w=0.999, tau_d=0.005, mask_self=True)
        assert (target >= 0).all()
        assert distillation_kl(z, target, tau=0.005, mask_self=True).isfinite()
    assert below  # or the batches above do not show it


@pytest.mark.parametrize("form", ["softmax", "symmetric"])
def test_what_is_not_a_number_stays_visible(form):
    z_teacher = units()
    z_teacher[3, 1] = math.nan
    target = diffusion_target(z_teacher, tau=1.0, w=0.5, form=form)
    assert distillation_kl(units(seed=1), target, tau=1.0).isnan()


def test_a_row_without_positive_similarity_keeps_its_own():
    z = torch.eye(5)[[0, 1, 0, 1, 2]] + 0.3 * torch.eye(5)[2]
    z[4] = -torch.eye(5)[2]
    z = F.normalize(z, dim=1)
    affinity = symmetric_affinity((z @ z.T).clamp(min=0))
    assert (affinity[4] == 0).all()
    assert (affinity[:, 4] == 0).all()
    target = diffusion_target(z, tau=0.5, w=0.9, form="symmetric")
    psd = similarity_target(z, tau=0.5)
    assert torch.equal(target[4], psd[4])
    assert not torch.allclose(target[:4], psd[:4], rtol=1e-3)


def test_clipped_affinity_has_eigenvalues_of_at_most_one():
    z = units(b=40, e=8)
    assert (z @ z.T).min() < -0.3
    eigenvalues = torch.linalg.eigvalsh(symmetric_affinity((z @ z.T).clamp(min=0)))
    assert eigenvalues[0] >= -1 - 1e-10
    assert eigenvalues[-1] == pytest.approx(1, abs=1e-10)


def test_without_clipping_a_negative_degree_is_not_a_nan():
    z = units(b=30, e=16)
    assert ((z @ z.T).sum(1) - 1 < 0).any()
    assert symmetric_affinity(z @ z.T).isfinite().all()


def test_nothing_waits_for_the_device():
    """Fake tensors have no values: whatever looks at one on the host raises."""
    with FakeTensorMode():
        z, z_teacher = torch.empty(8, 4, requires_grad=True), torch.empty(8, 4)
        for form in ("softmax", "symmetric"):
            target = diffusion_target(z_teacher, tau=1.0, w=0.5, form=form, mask_self=True)
            torch.autograd.grad(distillation_kl(z, target, tau=1.0, mask_self=True), z)
            target_statistics(target, similarity_target(z_teacher, tau=1.0))


def test_ramp():
    assert [ramp(epoch, 4, weight=10.0, tau=2.0) for epoch in range(4)] == [0.0, 10.0, 20.0, 30.0]


def test_statistics_of_a_degenerate_target():
    uniform, one_hot = torch.full((4, 4), 0.25), torch.eye(4)
    found = target_statistics(uniform, one_hot)
    assert float(found["target_entropy"]) == pytest.approx(1.0)
    assert float(found["target_self"]) == 0.25
    assert float(found["target_shift"]) == pytest.approx(math.sqrt(4 * 0.75**2 + 12 * 0.25**2) / 2)
    found = target_statistics(one_hot, one_hot)
    assert [float(value) for value in found.values()] == [0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"w": 1.0}, "^w is 1.0"),
        ({"w": 0.9999}, "singular"),
        ({"w": -0.1}, "^w is -0.1"),
        ({"w": math.nan}, "^w is nan"),
        ({"tau": 0.0}, "^tau is 0.0"),
        ({"tau": math.inf}, "^tau is inf"),
        ({"tau_d": -1.0}, "^tau_d is -1.0"),
        ({"batch_size": 2}, "^batch_size is 2: expected 3 or more"),
        ({"batch_size": 1, "w": None}, "^batch_size is 1: expected 2 or more"),
        ({"batch_size": 2, "w": None, "mask_self": True}, "^batch_size is 2: expected 3 or more"),
    ],
)
def test_meaningless_settings_are_refused_by_name(change, names):
    with pytest.raises(UserError, match=names):
        check_settings(**change)


def test_published_settings_are_accepted():
    check_settings(w=0.99, batch_size=112)
    check_settings(w=0.0, tau_d=0.005, batch_size=3)
    check_settings(w=0.999, batch_size=3)
    check_settings(w=None, batch_size=2)


def test_an_unknown_form_is_refused():
    with pytest.raises(UserError, match=r"unknown form 'symetric'.*did you mean 'symmetric'"):
        diffusion_target(units(), tau=1.0, w=0.5, form="symetric")
