"""MDR, the multi-level distance regularizer: pairwise distances gather around a few learned levels.

A training step: e = mean_normalize(f), distances = pairwise_distances(e), stats = observe(stats, distances), then
loss = ranking(e) + weight * mdr_loss(distances, levels, stats) + penalty * level_penalty(levels). f are raw network outputs of the
whole batch of all ranks. Nothing here waits for the device. Source: MDR (arXiv 2102.04223) and its released code.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

# Squared distances below this share of the squared norms (about the center) are what rounding makes of coinciding points.
COINCIDE = 1e-14
# A batch whose distances deviate less than this relative to their mean has no deviation to measure in.
LEAST_DEVIATION = 1e-6


class MdrStatistics(NamedTuple):
    """Running mean and deviation of the pairwise distances, 0-d tensors on the device (float64 where it has that)."""

    mean: Float[Tensor, ""]
    std: Float[Tensor, ""]
    num_updates: Int64[Tensor, ""]


def initial_statistics(device: torch.device | str = "cpu") -> MdrStatistics:
    """Return the statistics before the first batch, which sets them."""
    device = torch.device(device)
    zero = torch.zeros((), dtype=_exact_dtype(device), device=device)
    return MdrStatistics(zero, zero + 1, torch.zeros((), dtype=torch.int64, device=device))


@torch.no_grad()
def observe(
    stats: MdrStatistics,
    distances: Float[Tensor, "b b"],
    *,
    momentum: float = 0.9,
    include_diagonal: bool = True,
) -> MdrStatistics:
    """Return the statistics after one more batch: the first sets them, later ones move them by 1 - momentum.

    Mean and unbiased deviation are over the whole matrix with its b zeros (as released), without include_diagonal over the
    b (b-1) pairs. To be called once per step, before mdr_loss, with the distances of the whole batch of all ranks. A batch
    that has no deviation (one image, equal images, numbers that are not finite) changes nothing. No gradient.
    Source: MDR (arXiv 2102.04223), its released code.
    """
    values = (distances.flatten() if include_diagonal else _pairs(distances)).to(stats.mean.dtype)
    count = max(values.numel(), 1)
    mean = values.sum() / count
    std = ((values - mean).square().sum() / max(count - 1, 1)).sqrt()
    usable = std > LEAST_DEVIATION * mean  # false for NaN, and for 0 > 0
    first = stats.num_updates == 0

    def moved(old: Tensor, new: Tensor) -> Tensor:
        return torch.where(usable, torch.where(first, new, momentum * old + (1 - momentum) * new), old)

    return MdrStatistics(moved(stats.mean, mean), moved(stats.std, std), stats.num_updates + usable)


def pairwise_distances(e: Float[Tensor, "b e"]) -> Float[Tensor, "b b"]:
    """Return the Euclidean distances of all pairs of rows, in float32 or better, in the units of e; the diagonal is 0.

    By one product of the rows about their mean, in float64, so that near duplicates far from the origin keep their digits.
    Coinciding points have distance 0 and no gradient. Source: MDR (arXiv 2102.04223), which clamps d^2 at 1e-12 instead.
    """
    wide = torch.promote_types(e.dtype, torch.float32)
    with torch.autocast(e.device.type, enabled=False):
        exact = e.to(_exact_dtype(e.device))
        # A common shift changes no distance, so its gradient is zero: a constant will do.
        exact = exact - exact.detach().mean(dim=0)
        product = exact @ exact.T
        norms = product.diagonal()
        norms = norms[:, None] + norms
        squared = torch.sub(norms, product, alpha=2)
        apart = ~(squared <= COINCIDE * norms)  # so that what is not a number stays visible
        apart.fill_diagonal_(False)
        # The inner where keeps the infinite slope of the root at 0 out of the backward pass.
        return torch.where(apart, torch.where(apart, squared.to(wide), 1.0).sqrt(), 0.0)


def mean_normalize(f: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
    """Return f divided by the mean distance of its b (b-1) pairs; the gradient flows through that mean.

    float32 or better. One image, or equal ones, have no mean distance: they are returned as they are.
    Source: MDR (arXiv 2102.04223, section 3.1) and its released code: it takes the place of the L2 normalization.
    """
    pairs = _pairs(pairwise_distances(f))
    mean = pairs.sum() / max(pairs.numel(), 1)
    return f.to(pairs.dtype) / torch.where(mean > 0, mean, 1.0)


def mdr_loss(
    distances: Float[Tensor, "b b"], levels: Float[Tensor, " l"], stats: MdrStatistics
) -> Float[Tensor, ""]:
    """Return the mean over all ordered pairs of |z - the nearest level|, z = (distance - mean) / std.

    Of equally near levels the first counts. Gradients reach distances and levels, not stats. Zero, with zero gradients, if
    all distances are 0 (one image, equal images) or nothing was observed yet. Source: MDR (arXiv 2102.04223).
    """
    wide = torch.promote_types(distances.dtype, torch.float32)
    with torch.autocast(distances.device.type, enabled=False):
        pairs = _pairs(distances).to(wide)
        z = (pairs - stats.mean.to(wide)) / stats.std.to(wide)
        first, *others = levels.to(wide).unbind()
        nearest = (z - first).abs()
        for level in others:
            gap = (z - level).abs()
            nearest = torch.where(gap < nearest, gap, nearest)
        counts = (pairs > 0).any() & (stats.num_updates > 0)
        return nearest.sum() * counts / max(nearest.numel(), 1)


def level_penalty(levels: Float[Tensor, " l"]) -> Float[Tensor, ""]:
    """Return the sum of the squared levels. Source: released code of MDR (arXiv 2102.04223)."""
    return levels.to(torch.promote_types(levels.dtype, torch.float32)).square().sum()


def _pairs(distances: Float[Tensor, "b b"]) -> Float[Tensor, "_ b"]:
    """Return the b (b-1) entries off the diagonal, as a view: after a diagonal entry come b that are not."""
    b = len(distances)
    return distances.flatten()[:-1].view(b - 1, b + 1)[:, 1:]


def _exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
