"""MDR, the multi-level distance regularizer: it pulls pairwise distances to a few learned levels.

A training step with the raw network outputs f of the global batch: e = mean_normalize(f), distances = pairwise_distances(e),
stats = observe(stats, distances), loss = ranking(e) + weight * mdr_loss(distances, levels, stats) + penalty *
level_penalty(levels). Nothing here waits for the device. Source: MDR (arXiv 2102.04223) and its released code.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from glsd.precision import wide_dtype, widened

# Rounding gives coinciding points squared distances up to this share of their squared norms (about the center).
COINCIDE = 1e-14
# A batch whose distances deviate less than this, relative to their mean, has no usable deviation.
LEAST_DEVIATION = 1e-6


class MdrStatistics(NamedTuple):
    """Running mean and deviation of the pairwise distances, 0-d tensors on the device, in float64 if it has that."""

    mean: Float[Tensor, ""]
    std: Float[Tensor, ""]
    num_updates: Int64[Tensor, ""]


def initial_statistics(device: torch.device | str = "cpu") -> MdrStatistics:
    """Return the statistics before the first batch."""
    device = torch.device(device)
    zero = torch.zeros((), dtype=_exact_dtype(device), device=device)
    return MdrStatistics(zero, zero + 1, torch.zeros((), dtype=torch.int64, device=device))


@torch.no_grad()
def observe(
    stats: MdrStatistics, distances: Float[Tensor, "b b"], *, momentum: float, include_diagonal: bool
) -> MdrStatistics:
    """Return the statistics after one more batch: the first batch sets them, later ones move them by 1 - momentum.

    include_diagonal: mean and unbiased deviation are over the whole matrix with its b zeros (as released), otherwise over
    the b (b-1) pairs. Call it once a step, before mdr_loss, with the distances of the global batch. A batch without a
    deviation (one image, equal images, values that are not finite) changes nothing. No gradient.
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
    """Return the Euclidean distances of all pairs of rows, in float32 or better; the diagonal is 0.

    Computed by one float64 product of the rows about their mean, so that near duplicates far from the origin keep their
    digits. Coinciding points have distance 0 and no gradient; MDR (arXiv 2102.04223) clamps d^2 at 1e-12 instead.
    """
    wide = wide_dtype(e)
    with torch.autocast(e.device.type, enabled=False):
        exact = e.to(_exact_dtype(e.device))
        # A common shift changes no distance, so its gradient is zero: a constant will do.
        exact = exact - exact.detach().mean(dim=0)
        product = exact @ exact.T
        norms = product.diagonal()
        norms = norms[:, None] + norms
        squared = torch.sub(norms, product, alpha=2)
        apart = ~(squared <= COINCIDE * norms)  # NaN stays visible
        apart.fill_diagonal_(False)
        # The inner where keeps the infinite slope of the root at 0 out of the backward pass.
        return torch.where(apart, torch.where(apart, squared.to(wide), 1.0).sqrt(), 0.0)


def mean_normalize(f: Float[Tensor, "b e"]) -> Float[Tensor, "b e"]:
    """Return f divided by the mean distance of its b (b-1) pairs; the gradient flows through that mean.

    In float32 or better. One image, or equal ones, have no mean distance and are returned as they are.
    Source: MDR (arXiv 2102.04223, section 3.1) and its released code, where it replaces the L2 normalization.
    """
    pairs = _pairs(pairwise_distances(f))
    mean = pairs.sum() / max(pairs.numel(), 1)
    return f.to(pairs.dtype) / torch.where(mean > 0, mean, 1.0)


def mdr_loss(
    distances: Float[Tensor, "b b"], levels: Float[Tensor, " l"], stats: MdrStatistics
) -> Float[Tensor, ""]:
    """Return the mean over all ordered pairs of |z - the nearest level|, z = (distance - mean) / std.

    Of equally near levels the first counts. Gradients reach distances and levels, not stats. Zero, with zero gradients, if
    all distances are 0 (one image, equal images) or before the first ``observe``. Source: MDR (arXiv 2102.04223).
    """
    wide = wide_dtype(distances)
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
    return widened(levels).square().sum()


def _pairs(distances: Float[Tensor, "b b"]) -> Float[Tensor, "_ b"]:
    """Return the b (b-1) entries off the diagonal as a view: b of them follow each diagonal entry but the last."""
    b = len(distances)
    return distances.flatten()[:-1].view(b - 1, b + 1)[:, 1:]


def _exact_dtype(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
