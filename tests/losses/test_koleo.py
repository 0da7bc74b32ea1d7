"""KoLeo against its definition, image by image."""

import math

import pytest
import torch

from glsd.losses import koleo_loss


def twin(features):
    total, count = torch.zeros((), dtype=torch.float64), 0
    for view in features:
        unit = [x / x.square().sum().sqrt() for x in view]
        for i, x in enumerate(unit):
            distances = [(x - y).square().sum().sqrt() for j, y in enumerate(unit) if j != i]
            total, count = total - (min(distances, key=float) + 1e-8).log(), count + 1
    return total / count


def test_equals_its_definition_with_gradient():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    got, expected = koleo_loss(features), twin(features)
    assert float(got) == pytest.approx(float(expected), abs=1e-12)
    (gradient,) = torch.autograd.grad(got, features)
    (literal,) = torch.autograd.grad(expected, features)
    torch.testing.assert_close(gradient, literal, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(koleo_loss, features)


def test_equal_features_have_a_finite_loss_and_no_gradient():
    features = torch.ones(1, 4, 3, requires_grad=True)
    loss = koleo_loss(features)
    assert float(loss) == pytest.approx(-math.log(1e-8), rel=1e-6)
    (gradient,) = torch.autograd.grad(loss, features)
    assert torch.equal(gradient, torch.zeros_like(features))


def test_it_spreads():
    """A few steps along the gradient move crowded features apart."""
    features = (
        torch.ones(1, 16, 8) + 0.1 * torch.randn(1, 16, 8, generator=torch.Generator().manual_seed(1))
    ).requires_grad_()
    before = float(koleo_loss(features.detach()))
    optimizer = torch.optim.SGD([features], lr=1.0)
    for _ in range(20):
        optimizer.zero_grad()
        koleo_loss(features).backward()
        optimizer.step()
    assert float(koleo_loss(features.detach())) < before - 1


def test_bfloat16_is_computed_in_float32():
    features = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
    assert koleo_loss(features.bfloat16()).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(koleo_loss(features), koleo_loss(features.clone()))
