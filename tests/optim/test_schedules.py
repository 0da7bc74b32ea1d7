"""Schedules against numpy's linspace and a literal cosine."""

import math

import numpy as np
import pytest

from glsd.errors import UserError
from glsd.optim import check_schedule, cosine, teacher_temp


def literal_cosine(base, final, total, warmup):
    k = np.arange(total - warmup)
    falling = final + (base - final) / 2 * (1 + np.cos(np.pi * k / max(len(k), 1)))
    return np.concatenate([np.linspace(0.0, base, warmup), falling])


@pytest.mark.parametrize(
    ("base", "final", "total", "warmup"),
    [
        (5e-4, 1e-6, 100, 10),
        (0.04, 0.4, 33, 0),
        (0.996, 1.0, 7, 0),
        (1e-3, 1e-5, 9, 1),
        (1.0, 0.0, 5, 5),
        (1.0, 0.5, 1, 0),
    ],
)
def test_cosine_equals_its_literal_twin(base, final, total, warmup):
    ours = [
        cosine(step, base=base, final=final, total_steps=total, warmup_steps=warmup) for step in range(total)
    ]
    np.testing.assert_allclose(ours, literal_cosine(base, final, total, warmup), rtol=1e-12, atol=1e-18)


def test_cosine_landmarks():
    values = [cosine(s, base=1.0, final=0.1, total_steps=20, warmup_steps=5) for s in range(20)]
    assert values[0] == 0.0
    assert values[4] == values[5] == 1.0
    assert values == [*sorted(values[:5]), *sorted(values[5:], reverse=True)]
    assert values[-1] > 0.1


@pytest.mark.parametrize("step", [-1, 20])
def test_cosine_refuses_steps_outside(step):
    with pytest.raises(ValueError, match="outside"):
        cosine(step, base=1.0, final=0.1, total_steps=20)


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_teacher_temp_equals_its_literal_twin(warmup):
    literal = np.concatenate([np.linspace(0.04, 0.07, warmup), np.full(40 - warmup, 0.07)])
    ours = [teacher_temp(e, warmup_temp=0.04, temp=0.07, warmup_epochs=warmup) for e in range(40)]
    np.testing.assert_allclose(ours, literal, rtol=1e-12)
    assert math.isclose(ours[-1], 0.07)


@pytest.mark.parametrize(
    ("total", "warmup", "words"),
    [
        (5, 10, "^warmup_epochs is 10 but epochs is only 5"),
        (0, 0, "^epochs is 0"),
        (5, -1, "^warmup_epochs is -1"),
    ],
)
def test_check_schedule_names_its_arguments(total, warmup, words):
    with pytest.raises(UserError, match=words):
        check_schedule(epochs=total, warmup_epochs=warmup)


def test_check_schedule_accepts_a_warmup_of_the_whole_run():
    check_schedule(epochs=5, warmup_epochs=5)
