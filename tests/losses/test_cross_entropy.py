"""prototype_ce against its equation written out row by row, and what must not change the result."""

import math
import shutil
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from glsd.geometry import needed_rows
from glsd.losses import cross_entropy as module
from glsd.losses.cross_entropy import prototype_ce, student_terms
from glsd.precision import product


def literal(
    student, teacher, student_prototypes, teacher_prototypes, index, weight, center, ts, tt
) -> Tensor:
    """sum_ij w_ij * -sum_k softmax((t - c)/tt)_k * log softmax(s/ts)_k, one entry at a time."""
    total = student.new_zeros(())
    for i in range(len(student)):
        logits = torch.stack([p @ student[i] for p in student_prototypes]) / ts
        log_q = logits - torch.log(torch.exp(logits).sum())
        for j in range(index.shape[1]):
            raw = torch.stack([p @ teacher[index[i, j]] for p in teacher_prototypes])
            exponential = torch.exp((raw - center) / tt)
            p = (exponential / exponential.sum()).detach()
            total = total - weight[i, j] * (p * log_q).sum()
    return total


def example(dtype=torch.float64, r=7, s=5, k=6, e=4, m=3, seed=0) -> dict:
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(dtype)

    return {
        "student": normal(r, e).requires_grad_(),
        "teacher": normal(s, e),
        "student_prototypes": normal(k, e).requires_grad_(),
        "teacher_prototypes": normal(k, e),
        "index": torch.randint(s, (r, m), generator=rng),
        "weight": torch.rand(r, m, generator=rng, dtype=torch.float64).to(dtype),
        "center": normal(k) * 0.1,
    }


TEMPS: dict[str, Any] = {"student_temp": 0.5, "teacher_temp": 0.3}


def gradients(inputs: dict, loss: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, [inputs["student"], inputs["student_prototypes"]]))


def needed_of(inputs, groups=1):
    """What the host plans for the entries with a weight."""
    return needed_rows(inputs["index"], inputs["weight"] > 0, len(inputs["teacher"]), groups)


@pytest.mark.parametrize("rows", [64, 2])  # student rows at a time
@pytest.mark.parametrize("m", [1, 3])
@pytest.mark.parametrize("planned", [True, False])
def test_equals_the_equation(monkeypatch, rows, m, planned):
    monkeypatch.setattr(module, "MIN_ROWS", rows)
    monkeypatch.setattr(module, "memory_budget", lambda device: 0)
    inputs = example(m=m)
    result = prototype_ce(**inputs, **TEMPS, needed=needed_of(inputs) if planned else None)
    expected = literal(**inputs, ts=TEMPS["student_temp"], tt=TEMPS["teacher_temp"])
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(gradients(inputs, result.loss), gradients(inputs, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def plain(student, teacher, student_prototypes, teacher_prototypes, index, weight, center, ts, tt) -> Tensor:
    """The same with all logits at once."""
    log_q = torch.log_softmax(student @ student_prototypes.T / ts, 1)
    p = torch.softmax((teacher @ teacher_prototypes.T - center) / tt, 1).detach()
    return -sum((weight[:, j, None] * p[index[:, j]] * log_q).sum() for j in range(index.shape[1]))


def images(b=5, r=30, s=20, k=48, e=8, m=2, seed=0) -> dict:
    """Rows of b images that point into the teacher rows of the same image; many entries weigh nothing."""
    inputs = example(r=b * r, s=b * s, k=k, e=e, m=m, seed=seed)
    rng = torch.Generator().manual_seed(seed + 1)
    local = torch.randint(s // 2, (b, r, m), generator=rng)  # the second half is never pointed to
    inputs["index"] = (local + s * torch.arange(b)[:, None, None]).flatten(0, 1)
    inputs["weight"] *= torch.rand(b * r, m, generator=rng) < 0.4
    return inputs


@pytest.mark.parametrize("budget", [0, 48 * 8 * 4 * 25, 2**24])  # one image, two images, all at a time
@pytest.mark.parametrize("planned", [True, False])
def test_groups_rejected_and_unmatched_rows(monkeypatch, budget, planned):
    monkeypatch.setattr(module, "MIN_ROWS", 7)
    monkeypatch.setattr(module, "memory_budget", lambda device: budget)
    inputs = images()
    needed = needed_of(inputs, 5) if planned else None
    result = prototype_ce(**inputs, **TEMPS, groups=5, needed=needed)
    expected = plain(**inputs, ts=TEMPS["student_temp"], tt=TEMPS["teacher_temp"])
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(gradients(inputs, result.loss), gradients(inputs, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-13)


def test_only_needed_rows_are_multiplied(monkeypatch):
    inputs = images()
    seen: dict[int, int] = {}

    def counted(a, b, *, out=None):
        if b.shape[1] == 48:  # logits
            seen[b.data_ptr()] = seen.get(b.data_ptr(), 0) + len(a)
        return product(a, b, out=out)

    monkeypatch.setattr(module, "product", counted)
    prototype_ce(**inputs, **TEMPS, groups=5, needed=needed_of(inputs, 5))
    kept = inputs["weight"] > 0
    assert seen[inputs["student_prototypes"].data_ptr()] == int(kept.any(1).sum()) < 150
    used = len(inputs["index"][kept].unique())
    assert seen[inputs["teacher_prototypes"].data_ptr()] == used < 50
    assert prototype_ce(**inputs, **TEMPS, groups=5, needed=needed_of(inputs, 5)).teacher_rows == used


@pytest.mark.parametrize("planned", [True, False])
def test_nothing_kept(planned):
    inputs = images()
    inputs["weight"] *= 0
    result = prototype_ce(**inputs, **TEMPS, groups=5, needed=needed_of(inputs, 5) if planned else None)
    assert result.loss == 0
    assert all(gradient.abs().max() == 0 for gradient in gradients(inputs, result.loss))
    assert result.teacher_mean.abs().max() > 0  # the center follows all rows


def test_rows_that_do_not_divide_into_the_groups():
    with pytest.raises(ValueError, match="7 rows do not divide into 2 groups"):
        prototype_ce(**example(), **TEMPS, groups=2)


def test_without_gradients_nothing_is_kept():
    inputs = images()
    with torch.no_grad():
        result = prototype_ce(**inputs, **TEMPS, groups=5)
    assert not result.loss.requires_grad
    torch.testing.assert_close(result.loss, prototype_ce(**inputs, **TEMPS, groups=5).loss, rtol=0, atol=0)


def test_frozen_prototypes_and_a_scaled_loss():
    inputs = images()
    both = gradients(inputs, 3 * prototype_ce(**inputs, **TEMPS, groups=5).loss)
    frozen = {**inputs, "student_prototypes": inputs["student_prototypes"].detach()}
    loss = prototype_ce(**frozen, **TEMPS, groups=5).loss
    torch.testing.assert_close(
        3 * torch.autograd.grad(loss, inputs["student"])[0], both[0], rtol=1e-12, atol=1e-15
    )


def test_gradient_against_finite_differences():
    inputs = example(r=3, s=2, k=4, e=3, m=2)
    fixed = {k: v for k, v in inputs.items() if k not in ("student", "student_prototypes")}
    variables = [inputs["student"].detach(), inputs["student_prototypes"].detach()]
    found = gradients(inputs, prototype_ce(**inputs, **TEMPS).loss)
    for i, gradient in enumerate(found):
        for place in range(gradient.numel()):
            ends = []
            for step in (1e-6, -1e-6):
                moved = [variable.clone() for variable in variables]
                moved[i].view(-1)[place] += step
                named = {"student": moved[0], "student_prototypes": moved[1]}
                ends.append(prototype_ce(**named, **fixed, **TEMPS).loss)
            slope = (ends[0] - ends[1]) / 2e-6
            torch.testing.assert_close(gradient.view(-1)[place], slope, rtol=1e-6, atol=1e-8)


def test_gradients_can_be_taken_once():
    """They are scaled where they lie; a second time is an error, not a wrong number."""
    inputs = example()
    loss = prototype_ce(**inputs, **TEMPS).loss
    torch.autograd.grad(2 * loss, inputs["student"], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, inputs["student"])


def test_teacher_statistics():
    """The mean is that of all rows, the entropy that of the rows in use."""
    inputs = example(s=9)
    inputs["index"] = torch.arange(9).repeat(3)[:21].view(7, 3)
    result = prototype_ce(**inputs, **TEMPS)
    raw = inputs["teacher"] @ inputs["teacher_prototypes"].T
    torch.testing.assert_close(result.teacher_mean, raw.mean(0))
    p = torch.softmax((raw - inputs["center"]) / TEMPS["teacher_temp"], 1)
    torch.testing.assert_close(result.teacher_entropy, torch.special.entr(p).sum(1).mean())


def test_entropy_is_ln_k_when_uniform_and_zero_when_sharp():
    inputs = example()
    flat = prototype_ce(
        **{**inputs, "teacher_prototypes": torch.zeros(6, 4).double(), "center": torch.zeros(6).double()},
        **TEMPS,
    )
    assert flat.teacher_entropy.item() == pytest.approx(math.log(6), rel=1e-12)
    sharp = prototype_ce(**inputs, student_temp=0.5, teacher_temp=1e-5)
    assert sharp.teacher_entropy.item() == pytest.approx(0, abs=1e-9)


def test_no_gradient_to_the_teacher_center_and_weights():
    inputs = example()
    watched = [
        inputs[name].requires_grad_() for name in ("teacher", "teacher_prototypes", "center", "weight")
    ]
    result = prototype_ce(**inputs, **TEMPS)
    assert torch.autograd.grad(result.loss, watched, allow_unused=True) == (None,) * 4
    assert not result.teacher_mean.requires_grad
    assert not result.teacher_entropy.requires_grad


def test_the_center_absorbs_a_shift_of_all_teacher_logits():
    """A shift d_k of logit k of every row is undone by the same shift of the center."""
    inputs = example(e=6)
    identity = torch.eye(6).double()
    shift = torch.randn(6, generator=torch.Generator().manual_seed(1)).double()
    a = prototype_ce(**{**inputs, "teacher_prototypes": identity}, **TEMPS)
    moved = {
        "teacher_prototypes": identity,
        "teacher": inputs["teacher"] + shift,
        "center": inputs["center"] + shift,
    }
    b = prototype_ce(**{**inputs, **moved}, **TEMPS)
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.teacher_mean + shift, b.teacher_mean)


def test_permuting_rows_permutes_gradients():
    inputs = example()
    order = torch.tensor([3, 1, 6, 0, 2, 5, 4])
    permuted = {**inputs, **{k: inputs[k][order] for k in ("student", "index", "weight")}}
    a, b = prototype_ce(**inputs, **TEMPS).loss, prototype_ce(**permuted, **TEMPS).loss
    torch.testing.assert_close(a, b)
    torch.testing.assert_close(gradients(inputs, a)[0], gradients(inputs, b)[0])


def test_weight_zero_leaves_a_row_out():
    inputs = example()
    inputs["weight"][2] = 0
    gradient = gradients(inputs, prototype_ce(**inputs, **TEMPS).loss)[0]
    assert gradient[2].abs().max() == 0
    assert gradient[3].abs().max() > 0


def rounded(inputs: dict) -> dict:
    """What the operands of the logits' products are under bfloat16 autocast, in float64."""
    scales = {"student": TEMPS["student_temp"], "teacher": TEMPS["teacher_temp"]}
    return {
        name: ((value / scales.get(name, 1)).bfloat16().double() * scales.get(name, 1)).detach()
        if name in ("student", "teacher", "student_prototypes", "teacher_prototypes")
        else (value.double() if value.is_floating_point() else value)
        for name, value in inputs.items()
    }


def test_autocast_rounds_the_operands_and_nothing_else():
    """With operands rounded by hand, float64 gives the same loss; a bfloat16 softmax would be off by percents."""
    inputs = example(torch.float32, r=40, s=30, k=64, e=8)
    reference = prototype_ce(**rounded(inputs), **TEMPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = prototype_ce(**inputs, **TEMPS)
    assert {x.dtype for x in result[:3]} == {torch.float32}
    assert result.loss.item() == pytest.approx(reference.loss.item(), rel=1e-6)
    exact = prototype_ce(**inputs, **TEMPS)
    assert result.loss.item() == pytest.approx(exact.loss.item(), rel=5e-3)
    for got, want in zip(gradients(inputs, result.loss), gradients(inputs, exact.loss), strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


def test_float64_is_not_rounded_by_autocast():
    inputs = example()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = prototype_ce(**inputs, **TEMPS)
    torch.testing.assert_close(result.loss, prototype_ce(**inputs, **TEMPS).loss, rtol=0, atol=0)


def test_half_precision_vectors_multiply_in_their_dtype_and_reduce_in_float32():
    inputs = example(torch.float32, k=64, e=8)
    half = {**inputs, "student": inputs["student"].bfloat16(), "teacher": inputs["teacher"].bfloat16()}
    result = prototype_ce(**half, **TEMPS)
    assert {x.dtype for x in result[:3]} == {torch.float32}
    assert result.loss.item() == pytest.approx(prototype_ce(**inputs, **TEMPS).loss.item(), rel=0.03)


def test_nothing_of_rows_times_prototypes_is_kept_or_made(monkeypatch):
    """Neither for the backward pass nor in between: no tensor of the pass is as large as half the logits."""
    inputs = example(torch.float32, r=1000, s=1000, k=64, e=4)
    inputs["index"] = torch.arange(1000)[:, None].expand(-1, 3).contiguous()
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            sizes.extend(t.numel() for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor))
            return result

    monkeypatch.setattr(module, "memory_budget", lambda device: 0)
    with Watch():
        loss = prototype_ce(**inputs, **TEMPS, groups=10).loss
        gradients(inputs, loss)
    assert len(sizes) > 100
    assert max(sizes) <= 100 * 64  # the teacher rows of one group


@pytest.mark.slow
def test_fused_terms_are_the_plain_ones():
    """The compiled path of GPUs, on the CPU."""
    if not shutil.which("g++"):
        pytest.skip("no g++: torch.compile needs a compiler on the CPU")
    rng = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(20, 300, generator=rng) * 5, torch.rand(9, 300, generator=rng)
    targets /= targets.sum(1, keepdim=True)
    index, share = torch.randint(9, (20, 2), generator=rng), torch.full((20, 2), 0.5)
    for rows in (20, 13):  # another number of rows
        plain_terms = student_terms(logits[:rows].clone(), targets, index[:rows], share[:rows])
        fused = module._fused_terms()(logits[:rows].clone(), targets, index[:rows], share[:rows])
        torch.testing.assert_close(fused, plain_terms, rtol=1e-5, atol=1e-6)
    sharp = (torch.softmax(logits, 1), torch.log_softmax(logits, 1))
    literal_loss = -(0.5 * (targets[index[:, 0]] + targets[index[:, 1]]) * sharp[1]).sum(1)
    losses, of_logits = student_terms(logits, targets, index, share)
    torch.testing.assert_close(losses, literal_loss, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        of_logits, sharp[0] - 0.5 * (targets[index[:, 0]] + targets[index[:, 1]]), rtol=1e-5, atol=1e-6
    )
