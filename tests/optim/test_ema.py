"""The teacher's average."""

import copy

import pytest
import torch
from torch import nn

from glsd.optim import ema_update


def move(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    ema_update(dict(teacher.named_parameters()), dict(student.named_parameters()), momentum)


def network(width: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width)).double()


def test_ema_equals_the_formula_on_parameters_and_leaves_buffers():
    torch.manual_seed(0)
    teacher, student = network(), network()
    student(torch.randn(8, 4, dtype=torch.float64))  # moves the student's running statistics
    before = copy.deepcopy(teacher.state_dict())
    move(teacher, student, 0.9)
    for name, moved in teacher.named_parameters():
        literal = 0.9 * before[name] + (1 - 0.9) * student.get_parameter(name)
        torch.testing.assert_close(moved, literal, rtol=1e-14, atol=0)
    for name, buffer in teacher.named_buffers():
        assert torch.equal(buffer, before[name])


def test_momentum_one_changes_no_bit_and_zero_copies():
    teacher, student = network(), network()
    before = copy.deepcopy(teacher.state_dict())
    move(teacher, student, 1.0)
    assert all(torch.equal(teacher.state_dict()[name], before[name]) for name in before)
    move(teacher, student, 0.0)
    assert all(torch.equal(p, student.get_parameter(n)) for n, p in teacher.named_parameters())


def test_the_teacher_may_require_no_gradient_and_the_student_keeps_its_graph():
    teacher, student = network().requires_grad_(False), network()
    loss = student(torch.randn(8, 4, dtype=torch.float64)).sum()
    move(teacher, student, 0.5)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())


def test_it_does_not_wait_for_the_device():
    move(network().to("meta"), network().to("meta"), 0.9)  # a meta tensor has no value to wait for


def test_two_different_networks_are_refused():
    with pytest.raises(RuntimeError):
        move(network(5), network(3), 0.9)
    with pytest.raises(KeyError):
        move(nn.Sequential(*network(), nn.Linear(3, 1)), network(), 0.9)
