"""Position embeddings at another resolution, against a literal bicubic interpolation."""

import math

import pytest
import torch

from glsd.models.tokens import resample_pos_embed


def cubic(t: float, a: float = -0.75) -> float:
    t = abs(t)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    if t < 2:
        return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return 0.0


def literal_weights(size_in: int, size_out: int) -> torch.Tensor:
    """One axis: output i looks at input (i + 1/2) * in/out - 1/2, four neighbors, edges repeated."""
    weights = torch.zeros(size_out, size_in, dtype=torch.float64)
    for i in range(size_out):
        place = (i + 0.5) * size_in / size_out - 0.5
        first = math.floor(place) - 1
        for j in range(first, first + 4):
            weights[i, min(max(j, 0), size_in - 1)] += cubic(place - j)
    return weights


@pytest.mark.parametrize(
    ("grid_in", "grid_out"), [((14, 14), (6, 6)), ((4, 5), (7, 3)), ((3, 3), (1, 1)), ((28, 28), (29, 45))]
)
@pytest.mark.parametrize("num_prefix", [0, 1, 5])
def test_equals_literal_bicubic(grid_in, grid_out, num_prefix):
    torch.manual_seed(0)
    pos_embed = torch.randn(
        1, num_prefix + grid_in[0] * grid_in[1], 3, dtype=torch.float64, requires_grad=True
    )
    out = resample_pos_embed(pos_embed, num_prefix, grid_in, grid_out)
    rows, columns = literal_weights(grid_in[0], grid_out[0]), literal_weights(grid_in[1], grid_out[1])
    image = pos_embed[0, num_prefix:].reshape(*grid_in, 3)
    expected = torch.einsum("yi,xj,ijd->yxd", rows, columns, image).reshape(1, -1, 3)
    torch.testing.assert_close(out[:, num_prefix:], expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(out[:, :num_prefix], pos_embed[:, :num_prefix])
    upstream = torch.randn_like(out)
    (ours,) = torch.autograd.grad((out * upstream).sum(), pos_embed)
    (theirs,) = torch.autograd.grad((expected * upstream[:, num_prefix:]).sum(), pos_embed)
    torch.testing.assert_close(ours[:, num_prefix:], theirs[:, num_prefix:], rtol=1e-12, atol=1e-12)
    assert torch.equal(ours[:, :num_prefix], upstream[:, :num_prefix])


def test_native_grid_is_the_parameter_itself():
    pos_embed = torch.randn(1, 17, 4)
    assert resample_pos_embed(pos_embed, 1, (4, 4), (4, 4)) is pos_embed


def test_same_number_of_places_on_another_grid_is_resampled():
    pos_embed = torch.randn(1, 16, 4)
    assert not torch.equal(resample_pos_embed(pos_embed, 0, (4, 4), (2, 8)), pos_embed)


def test_half_precision_is_interpolated_in_float32():
    pos_embed = torch.randn(1, 16, 4).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = resample_pos_embed(pos_embed, 0, (4, 4), (3, 3))
    assert torch.equal(out, resample_pos_embed(pos_embed.float(), 0, (4, 4), (3, 3)).bfloat16())
