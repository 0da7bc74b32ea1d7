"""prototype_ce against its equation written out row by row, and what must not change the result."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from glsd.losses import prototype_ce as module
from glsd.losses.prototype_ce import prototype_ce


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


@pytest.mark.parametrize("block", [64, 2])
@pytest.mark.parametrize("m", [1, 3])
def test_equals_the_equation(monkeypatch, block, m):
    monkeypatch.setattr(module, "MIN_ROWS", block)
    inputs = example(m=m)
    result = prototype_ce(**inputs, **TEMPS)
    expected = literal(**inputs, ts=TEMPS["student_temp"], tt=TEMPS["teacher_temp"])
    torch.testing.assert_close(result.loss, expected, rtol=1e-12, atol=0)
    for got, want in zip(gradients(inputs, result.loss), gradients(inputs, expected), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


def test_gradient_against_finite_differences():
    inputs = example(r=3, s=2, k=4, e=3, m=2)
    fixed = {k: v for k, v in inputs.items() if k not in ("student", "student_prototypes")}

    def loss(student, prototypes):
        return prototype_ce(student=student, student_prototypes=prototypes, **fixed, **TEMPS).loss

    assert torch.autograd.gradcheck(loss, (inputs["student"], inputs["student_prototypes"]))


def test_teacher_statistics():
    inputs = example(s=9)
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


def test_no_gradient_to_the_teacher_centre_and_weights():
    inputs = example()
    watched = [
        inputs[name].requires_grad_() for name in ("teacher", "teacher_prototypes", "center", "weight")
    ]
    result = prototype_ce(**inputs, **TEMPS)
    assert torch.autograd.grad(result.loss, watched, allow_unused=True) == (None,) * 4
    assert not result.teacher_mean.requires_grad
    assert not result.teacher_entropy.requires_grad


def test_the_centre_absorbs_a_shift_of_all_teacher_logits():
    """A shift d_k of logit k of every row is undone by the same shift of the centre."""
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


def test_softmax_stays_float32_under_autocast():
    """Logits far apart: bfloat16 softmax would be off by percents; vectors in float32 must not be touched."""
    inputs = example(torch.float32, k=64, e=8)
    reference = prototype_ce(
        **{k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}, **TEMPS
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = prototype_ce(**inputs, **TEMPS)
    assert {x.dtype for x in result} == {torch.float32}
    assert result.loss.item() == pytest.approx(reference.loss.item(), rel=1e-5)


def test_half_precision_vectors_multiply_in_their_dtype_and_reduce_in_float32():
    inputs = example(torch.float32, k=64, e=8)
    half = {**inputs, "student": inputs["student"].bfloat16(), "teacher": inputs["teacher"].bfloat16()}
    result = prototype_ce(**half, **TEMPS)
    assert {x.dtype for x in result} == {torch.float32}
    assert result.loss.item() == pytest.approx(prototype_ce(**inputs, **TEMPS).loss.item(), rel=0.03)


def test_blocks_bound_the_memory_kept_for_the_backward_pass(monkeypatch):
    """What autograd saves must not hold a (rows x k) array of the student."""
    monkeypatch.setattr(module, "BLOCK_LOGITS", 64 * 100)
    inputs = example(torch.float32, r=1000, s=10, k=64, e=4)
    saved: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        prototype_ce(**inputs, **TEMPS)
    assert saved
    assert sum(saved) < 1000 * 64
