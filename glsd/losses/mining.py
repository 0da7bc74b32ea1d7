"""Which pairs and triplets of a labeled batch count: drawn as a function of a seed, the global random state left alone."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor


class Triplets(NamedTuple):
    """Rows of the batch: triplet i is anchor[i], positive[i] of the same class and negative[i] of another one."""

    anchor: Int64[Tensor, " t"]
    positive: Int64[Tensor, " t"]
    negative: Int64[Tensor, " t"]


def positives_and_negatives(
    labels: Int[Tensor, " b"],
) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
    """Return who is a positive (same class, not itself) and who a negative (another class) of every row."""
    same = labels[:, None] == labels
    itself = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    return same & ~itself, ~same


@torch.no_grad()
def mined_pairs(
    similarity: Float[Tensor, "b b"], labels: Int[Tensor, " b"], *, epsilon: int | float
) -> tuple[Bool[Tensor, "b b"], Bool[Tensor, "b b"]]:
    """Return the positives no more than epsilon above the hardest negative, and the negatives as near the hardest positive.

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
    z: Float[Tensor, "b e"],
    labels: Int[Tensor, " b"],
    *,
    lower: int | float = 0.5,
    upper: int | float | None = None,
) -> Float[Tensor, "b b"]:
    """Return for every anchor (row) the probability of drawing each negative, inverse to how common its distance is.

    z is scaled to unit length here (a copy). w = D^(2-e) (1 - D^2/4)^((3-e)/2) with distances below ``lower``
    counted as ``lower``. With ``upper``, farther negatives are never drawn, unless an anchor has no nearer one: then
    all its negatives are equally likely. Without it, nearly opposite vectors are what a high-dimensional anchor
    draws most. Rows sum to 1, those of anchors without negatives are 0. In float32 or better.
    Source: distance-weighted sampling (arXiv 1706.07567, sec. 4); upper 1.4 as in RKD and MDR, none as in OBD-SD.
    """
    with torch.autocast(z.device.type, enabled=False):
        unit = F.normalize(z.to(torch.promote_types(z.dtype, torch.float32)), dim=1)
        width = unit.shape[1]
        squared = 2 - 2 * unit @ unit.T
        _, negative = positives_and_negatives(labels)
        allowed = negative if upper is None else negative & (squared < upper**2)
        uniform = ~allowed.any(dim=1, keepdim=True)
        # log(1 - D^2/4) is -inf for opposite vectors: stop one rounding step before.
        quarter = (squared.clamp(min=lower**2) / 4).clamp(max=1 - torch.finfo(unit.dtype).eps)
        log_weight = -(width - 2) / 2 * (4 * quarter).log() - (width - 3) / 2 * torch.log1p(-quarter)
        log_weight = log_weight.masked_fill(uniform, 0)
        allowed = torch.where(uniform, negative, allowed)
        probability = log_weight.masked_fill(~allowed, -torch.inf).softmax(dim=1)
        return probability.masked_fill(~allowed, 0)  # also the NaN of a row that has no negative


def triplet_per_pair(
    z: Float[Tensor, "b e"],
    labels: Int[Tensor, " b"],
    *,
    seed: int,
    lower: int | float = 0.5,
    upper: int | float | None = 1.4,
) -> Triplets:
    """Return all ordered positive pairs, each with one negative drawn from ``distance_weights``.

    The draw depends on seed, z, labels and the kind of device alone. Waits for the device once (how many pairs there are).
    Source: RKD (arXiv 1904.05068) and MDR (arXiv 2102.04223), released recipes.
    """
    positive, negative = positives_and_negatives(labels)
    anchor, partner = (positive & negative.any(dim=1, keepdim=True)).nonzero(as_tuple=True)
    weights = distance_weights(z, labels, lower=lower, upper=upper)
    return Triplets(anchor, partner, _draw(weights[anchor], _generator(seed, z.device)))


def triplet_per_anchor(
    z: Float[Tensor, "b e"],
    labels: Int[Tensor, " b"],
    *,
    seed: int,
    lower: int | float = 0.5,
    upper: int | float | None = None,
) -> Triplets:
    """Return one triplet per row that has a positive and a negative: any positive, a negative from ``distance_weights``.

    The draw depends on seed, z, labels and the kind of device alone. Waits for the device once (how many rows there are).
    Source: the sampler of OBD-SD's released margin loss (arXiv 2211.07566), without an upper cut-off.
    """
    positive, negative = positives_and_negatives(labels)
    (anchor,) = (positive.any(dim=1) & negative.any(dim=1)).nonzero(as_tuple=True)
    generator = _generator(seed, z.device)
    partner = _draw(positive[anchor].to(torch.float32), generator)
    weights = distance_weights(z, labels, lower=lower, upper=upper)
    return Triplets(anchor, partner, _draw(weights[anchor], generator))


def _generator(seed: int, device: torch.device) -> torch.Generator:
    return torch.Generator(device).manual_seed(seed)


def _draw(weights: Float[Tensor, "t b"], generator: torch.Generator) -> Int64[Tensor, " t"]:
    """Return one column per row, drawn in proportion to its weight: the first of exponential clocks of these rates to ring.

    Unlike torch.multinomial it does not stop the device when an embedding is NaN: the loss shows it instead.
    """
    clocks = torch.empty_like(weights).exponential_(generator=generator)
    return (weights / clocks).argmax(dim=1) if len(weights) else weights.new_zeros(0, dtype=torch.int64)
