"""Clipping against a loop over the formula."""

import pytest
import torch
from torch.nn import Parameter

from glsd.optim import CLIPPERS, clip_global, clip_per_parameter


def make_parameters(dtype=torch.float64) -> list[Parameter]:
    generator = torch.Generator().manual_seed(0)
    parameters = []
    for shape, scale in (((4, 5), 3.0), ((7,), 0.01), ((2, 3, 2), 1.0), ((), 10.0), ((3,), 0.0)):
        parameter = Parameter(torch.zeros(shape, dtype=dtype))
        parameter.grad = scale * torch.randn(shape, dtype=dtype, generator=generator)
        parameters.append(parameter)
    parameters.insert(2, Parameter(torch.zeros(3)))  # has no gradient
    return parameters


def grads_of(parameters: list[Parameter]) -> list[torch.Tensor]:
    return [p.grad.clone() for p in parameters if p.grad is not None]


def test_per_parameter_equals_the_formula():
    parameters = make_parameters()
    before = grads_of(parameters)
    norms = clip_per_parameter(parameters, 3.0)
    literal = torch.stack([(g**2).sum().sqrt() for g in before])
    torch.testing.assert_close(norms, literal, rtol=1e-12, atol=0)
    assert (literal > 3.0).any()
    assert (literal < 3.0).any()
    for after, g, norm in zip(grads_of(parameters), before, literal, strict=True):
        torch.testing.assert_close(after, g * min(1.0, 3.0 / (float(norm) + 1e-6)), rtol=1e-12, atol=0)


def test_global_equals_torch():
    parameters, twin = make_parameters(), make_parameters()
    norms = clip_global(parameters, 3.0)
    total = torch.nn.utils.clip_grad_norm_(twin, 3.0)
    torch.testing.assert_close(torch.linalg.vector_norm(norms), total, rtol=1e-12, atol=0)
    for ours, theirs in zip(grads_of(parameters), grads_of(twin), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("clip", CLIPPERS.values())
def test_zero_only_measures_and_small_gradients_stay_bitwise(clip):
    for max_norm in (0.0, 1e9):
        parameters = make_parameters()
        before = grads_of(parameters)
        norms = clip(parameters, max_norm)
        assert all(torch.equal(a, b) for a, b in zip(grads_of(parameters), before, strict=True))
        assert norms.shape == (5,)


@pytest.mark.parametrize("clip", CLIPPERS.values())
def test_nothing_to_clip_and_generators(clip):
    assert clip([Parameter(torch.zeros(3))], 3.0).shape == (0,)
    assert clip((p for p in make_parameters()), 3.0).shape == (5,)


@pytest.mark.parametrize("clip", CLIPPERS.values())
def test_it_does_not_wait_for_the_device(clip):
    parameter = Parameter(torch.zeros(3, 2, device="meta"))
    parameter.grad = torch.ones_like(parameter)  # a meta tensor has no value to wait for
    assert clip([parameter], 1.0).shape == (1,)


def test_norms_of_half_precision_gradients_are_float32():
    parameter = Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    parameter.grad = torch.ones_like(parameter)
    norms = clip_per_parameter([parameter], 1.0)
    assert norms.dtype == torch.float32
    torch.testing.assert_close(norms[0], torch.tensor(100_000.0).sqrt())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_one_call_for_all_parameters_is_bitwise_one_call_each(dtype):
    parameters, twin = make_parameters(dtype), make_parameters(dtype)
    norms = clip_per_parameter(parameters, 3.0)
    scales = (3.0 / (norms + 1e-6)).clamp(max=1.0)
    for grad, scale in zip((p.grad for p in twin if p.grad is not None), scales, strict=True):
        grad.mul_(scale)
    assert all(torch.equal(*pair) for pair in zip(grads_of(parameters), grads_of(twin), strict=True))
