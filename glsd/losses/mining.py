"""Mining and sampling of pairs and triplets in a labeled batch.

Draws are a function of a given seed; the global random state stays untouched.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from glsd.precision import widened

# Distance-weighted sampling counts nearer negatives as this far away.
NEAR_CUTOFF = 0.5
# RKD's and MDR's recipes never draw farther negatives.
FAR_CUTOFF = 1.4


class Triplets(NamedTuple):
    """Rows of the batch: triplet i is anchor[i], positive[i] of the same class and negative[i] of another one."""

    anchor: Int64[Tensor, " t"]
    positive: Int64[Tensor, " t"]
    negative: Int64[Tensor, " t"]


def positives_and_negatives(
    labels: Int[Tensor, " b"],
) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
    """Return masks of every row's positives (its class without itself) and negatives (other classes)."""
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same


@torch.no_grad()
def mined_pairs(
    similarity: Float[Tensor, "b b"], labels: Int[Tensor, " b"], *, epsilon: float
) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
    """Return masks of the positives at most epsilon above the hardest negative, and of the negatives at most epsilon
    below the hardest positive.

    A row without positives or without negatives keeps none of either.
    Source: multi-similarity (arXiv 1904.06627, eq. 11 and 12).
    """
    positive, negative = positives_and_negatives(labels)
    nearest_negative = similarity.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
    farthest_positive = similarity.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
    kept_positive = positive & (similarity - epsilon < nearest_negative)
    kept_negative = negative & (similarity + epsilon > farthest_positive)
    return kept_positive, kept_negative


@torch.no_grad()
def distance_weights(
    z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, upper: float | None
) -> Float[Tensor, "b b"]:
    """Return for every anchor (row) the probability of drawing each negative, inverse to how common its distance is.

    Computed in float32 or better on copies of z of unit length. w = D^(2-e) (1 - D^2/4)^((3-e)/2); distances D below
    NEAR_CUTOFF count as NEAR_CUTOFF. Negatives farther than ``upper`` are never drawn, unless the anchor has no nearer
    one: then all are equally likely. With upper None, high-dimensional anchors mostly draw nearly opposite vectors.
    Rows sum to 1; those of anchors without negatives are 0.
    Source: distance-weighted sampling (arXiv 1706.07567, sec. 4).
    """
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(widened(z), dim=1)
        width = unit.shape[1]
        squared = 2 - 2 * unit @ unit.T
        _, negative = positives_and_negatives(labels)
        allowed = negative if upper is None else negative & (squared < upper**2)
        uniform = ~allowed.any(dim=1, keepdim=True)
        # log(1 - D^2/4) is -inf for opposite vectors: stop one rounding step before.
        quarter = (squared.clamp(min=NEAR_CUTOFF**2) / 4).clamp(max=1 - torch.finfo(unit.dtype).eps)
        log_weight = -(width - 2) / 2 * (4 * quarter).log() - (width - 3) / 2 * torch.log1p(-quarter)
        log_weight = log_weight.masked_fill(uniform, 0)
        allowed = torch.where(uniform, negative, allowed)
        probability = log_weight.masked_fill(~allowed, -torch.inf).softmax(dim=1)
        return probability.masked_fill(~allowed, 0)  # also the NaN of a row that has no negative


def triplet_per_pair(z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, seed: int) -> Triplets:
    """Return all ordered positive pairs, each with one negative drawn from ``distance_weights`` up to FAR_CUTOFF.

    The draw depends on seed, z, labels and the kind of device alone. Waits for the device once, to count the pairs.
    Source: RKD (arXiv 1904.05068) and MDR (arXiv 2102.04223), released recipes.
    """
    positive, negative = positives_and_negatives(labels)
    anchor, partner = (positive & negative.any(dim=1, keepdim=True)).nonzero(as_tuple=True)
    weights = distance_weights(z, labels, upper=FAR_CUTOFF)
    return Triplets(anchor, partner, _draw(weights[anchor], _generator(seed, z.device)))


def triplet_per_anchor(z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, seed: int) -> Triplets:
    """Return one triplet per row that has positives and negatives: any positive, a negative from ``distance_weights``.

    The draw depends on seed, z, labels and the kind of device alone. Waits for the device once, to count the rows.
    Source: the sampler of OBD-SD's released margin loss (arXiv 2211.07566), without an upper cutoff.
    """
    positive, negative = positives_and_negatives(labels)
    (anchor,) = (positive.any(dim=1) & negative.any(dim=1)).nonzero(as_tuple=True)
    generator = _generator(seed, z.device)
    partner = _draw(positive[anchor].to(torch.float32), generator)
    weights = distance_weights(z, labels, upper=None)
    return Triplets(anchor, partner, _draw(weights[anchor], generator))


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _draw(weights: Float[Tensor, "t b"], generator: torch.Generator) -> Int64[Tensor, " t"]:
    """Return one column per row, drawn in proportion to its weight: the first of exponential clocks of these rates to ring.

    Unlike torch.multinomial it does not stop the device when an embedding is NaN: the loss shows it instead.
    """
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / clocks).argmax(dim=1) if len(weights) else weights.new_zeros(0, dtype=torch.int64)
