"""The projection head against a literal twin written from the specification, its start, its precision."""

import math
from typing import Any

import pytest
import torch

from glsd.errors import UserError
from glsd.models.heads import ProjectionHead, Prototypes


def make_head(in_dim: int = 10, **options: Any) -> ProjectionHead:
    sizes = {"num_prototypes": 5, "hidden_dim": 16, "bottleneck_dim": 4, "num_layers": 3}
    return ProjectionHead(
        in_dim, **{**sizes, "batch_norm": False, "trainable_gain": False, "seed": 0, **options}
    )


def literal_head(head: ProjectionHead, x: torch.Tensor) -> torch.Tensor:
    """Linear, (batch norm,) GELU by the error function, linear ..., length 1, cosine times gain."""
    state = dict(head.named_parameters())
    numbers = sorted({int(name.split(".")[1]) for name in state if name.startswith("mlp.")})
    for number in numbers:
        weight, bias = state[f"mlp.{number}.weight"], state[f"mlp.{number}.bias"]
        if weight.ndim == 2:
            if number:
                x = 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
            x = x @ weight.T + bias
        else:
            spread = ((x - x.mean(0)) ** 2).mean(0)
            x = (x - x.mean(0)) / torch.sqrt(spread + 1e-5) * weight + bias
    vectors = torch.stack([row / row.square().sum().sqrt() for row in x])
    direction, gain = state["prototypes.direction"], state["prototypes.gain"]
    columns = [
        gain[k] * (vectors @ direction[k]) / direction[k].square().sum().sqrt() for k in range(len(gain))
    ]
    return torch.stack(columns, dim=1)


def small_head(**options: Any) -> ProjectionHead:
    head = make_head(**{"num_prototypes": 11, "bottleneck_dim": 6, **options}).double()
    with torch.no_grad():  # leave the nearly linear region, give biases and gains a part
        for parameter in head.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
    return head


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4])
@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("trainable_gain", [False, True])
def test_head_equals_literal_twin(num_layers, batch_norm, trainable_gain):
    head = small_head(num_layers=num_layers, batch_norm=batch_norm, trainable_gain=trainable_gain)
    x = torch.randn(9, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    logits, expected = head.prototypes(head(x)), literal_head(head, x)
    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-12)
    upstream = torch.randn(logits.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    trained = [x, *(p for p in head.parameters() if p.requires_grad)]
    ours = torch.autograd.grad((logits * upstream).sum(), trained)
    theirs = torch.autograd.grad((expected * upstream).sum(), trained)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    assert head.prototypes.gain.requires_grad is trainable_gain


def test_start_follows_the_specification():
    head = make_head(300, num_prototypes=4096, hidden_dim=512, bottleneck_dim=256, seed=5)
    linears = [layer for layer in head.mlp if isinstance(layer, torch.nn.Linear)]
    assert len(linears) == 3
    for linear in linears:
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert linear.weight.abs().max() > 0.07  # not truncated at two standard deviations
        assert not linear.bias.any()
    direction = head.prototypes.direction
    assert direction.abs().max() <= 1 / 16
    assert direction.std().item() == pytest.approx(1 / 16 / math.sqrt(3), rel=0.02)  # uniform
    assert torch.equal(head.prototypes.gain, torch.ones(4096, 1))


def test_start_is_a_function_of_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = small_head(seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = small_head(seed=1).state_dict(), small_head(seed=2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["mlp.0.weight"], other["mlp.0.weight"])


def test_logits_are_cosines_with_the_gain_at_one():
    head = make_head(num_prototypes=50)
    vectors = head(torch.randn(20, 10))
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(20))
    torch.testing.assert_close(head.prototypes.weight().norm(dim=1), torch.ones(50))
    assert head.prototypes(vectors).abs().max() <= 1 + 1e-6


def test_zero_features_stay_finite():
    head = make_head()  # biases start at 0
    out = head(torch.zeros(3, 10))
    assert torch.equal(out, torch.zeros(3, 4))


def test_vectors_and_prototypes_are_float32_under_autocast():
    head = make_head()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert head.mlp(torch.randn(3, 10)).dtype == torch.bfloat16  # else this test says nothing
        vectors = head(torch.randn(3, 10))
        weight = head.prototypes.weight()
    assert vectors.dtype == weight.dtype == torch.float32
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(3))
    torch.testing.assert_close(weight.norm(dim=1), torch.ones(5))


def test_last_layer_is_called_prototypes():
    names = [name for name, _ in make_head().named_parameters() if "prototypes" in name]
    assert names == ["prototypes.direction", "prototypes.gain"]
    assert Prototypes(5, 4, trainable_gain=False).weight().shape == (5, 4)


@pytest.mark.parametrize("name", ["num_prototypes", "hidden_dim", "bottleneck_dim", "num_layers"])
def test_sizes_below_one_are_a_users_error(name):
    with pytest.raises(UserError, match=rf"^{name} is 0"):
        small_head(**{name: 0})
