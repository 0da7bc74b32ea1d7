"""Losses on pairs and triplets that pytorch-metric-learning has not, or computes differently from the published code."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glsd.losses.mining import Triplets, mined_pairs

# Inside the square root of the margin loss's distances, so that their gradient is finite at 0; as in the released code.
SQUARED_DISTANCE_FLOOR = 1e-8


def multi_similarity(
    z: Float[Tensor, "b e"],
    labels: Int[Tensor, " b"],
    *,
    alpha: int | float = 2,
    beta: int | float = 40,
    base: int | float = 0.5,
    epsilon: int | float = 0.1,
) -> Float[Tensor, ""]:
    """Return the mean over active rows of log(1 + sum exp(-alpha (s - base))) / alpha over the kept positives, plus
    log(1 + sum exp(beta (s - base))) / beta over the kept negatives, s being the products of the unit vectors z.

    Kept are the pairs of ``mined_pairs``; a row is active if it keeps some of both. Without an active row the result
    is a 0 that can be differentiated. A very large epsilon turns the mining off.
    Source: multi-similarity (arXiv 1904.06627, eq. 11 to 13), averaged over active rows as in OBD-SD's released code
    (pytorch-metric-learning: beta 50, no mining and all rows unless told otherwise; told so it is the same, but slower).
    """
    similarity = z @ z.T
    positive, negative = mined_pairs(similarity, labels, epsilon=epsilon)
    active = positive.any(dim=1) & negative.any(dim=1)
    pull = _log1p_sum_exp(-alpha * (similarity - base), positive) / alpha
    push = _log1p_sum_exp(beta * (similarity - base), negative) / beta
    return torch.where(active, pull + push, 0).sum() / active.sum().clamp(min=1)


def _log1p_sum_exp(x: Float[Tensor, "b b"], keep: Bool[Tensor, "b b"]) -> Float[Tensor, " b"]:
    """Return log(1 + sum exp(x)) over the kept entries of every row."""
    return torch.cat([x.masked_fill(~keep, -torch.inf), x.new_zeros(len(x), 1)], dim=1).logsumexp(dim=1)


def triplet_loss(
    z: Float[Tensor, "b e"], triplets: Triplets, *, margin: int | float = 0.2
) -> Float[Tensor, ""]:
    """Return the mean over all triplets of max(0, |a - p| - |a - n| + margin), distances not squared; 0 without triplets.

    Source: FaceNet (arXiv 1503.03832, eq. 3) with the plain distances and the mean of MDR's recipe (arXiv 2102.04223).
    """
    anchor = z[triplets.anchor]
    near = torch.nn.functional.pairwise_distance(anchor, z[triplets.positive])
    far = torch.nn.functional.pairwise_distance(anchor, z[triplets.negative])
    return (near - far + margin).relu().sum() / max(1, len(near))


def margin_loss(
    z: Float[Tensor, "b e"],
    labels: Int[Tensor, " b"],
    triplets: Triplets,
    beta: Float[Tensor, " c"],
    *,
    margin: int | float = 0.2,
    nu: int | float = 0,
    count: Literal["triplets", "pairs"] = "triplets",
) -> Float[Tensor, ""]:
    """Return the sum of max(0, d_ap - b + margin) + max(0, b - d_an + margin) over the triplets, divided by a count,
    plus nu times the sum of b over the triplets; b is the entry of beta of the anchor's class.

    count "triplets": how many have a positive term (what the released code divides by on a current torch); "pairs": how
    many terms are positive (what pytorch-metric-learning and the code on an old torch divide by). At least 1.
    Source: margin loss (arXiv 1706.07567, sec. 4) as in OBD-SD's released code; pytorch-metric-learning divides nu too.
    """
    anchor, boundary = z[triplets.anchor], beta.to(z.dtype)[labels[triplets.anchor]]
    near = ((anchor - z[triplets.positive]).square().sum(dim=1) + SQUARED_DISTANCE_FLOOR).sqrt()
    far = ((anchor - z[triplets.negative]).square().sum(dim=1) + SQUARED_DISTANCE_FLOOR).sqrt()
    pull, push = (near - boundary + margin).relu(), (boundary - far + margin).relu()
    if count == "triplets":
        divisor = ((pull > 0) | (push > 0)).sum()
    else:
        divisor = (pull > 0).sum() + (push > 0).sum()
    return (pull + push).sum() / divisor.clamp(min=1) + nu * boundary.sum()


def smooth_ap(
    z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, temperature: int | float = 0.01
) -> Float[Tensor, ""]:
    """Return 1 - the smoothed average precision of every row as a query, averaged over the rows that have a positive.

    Any number of images per class, in any order. As in the released code, a query is among its own positives, so every
    true rank is one higher. (pytorch-metric-learning 2.9 takes the images per class for the number of classes: its value is
    this one only where the two are equal.) Memory grows as the positive pairs times b. Waits for the device once (how
    many pairs there are).
    Source: Smooth-AP (arXiv 2007.12163, eq. 4 to 6).
    """
    same = labels[:, None] == labels
    size = same.sum(dim=1)
    valid = size > 1
    query, found = (same & valid[:, None]).nonzero(as_tuple=True)
    similarity = z @ z.T
    ahead = ((similarity[query] - similarity[query, found][:, None]) / temperature).sigmoid()
    itself = found[:, None] == torch.arange(len(z), device=z.device)
    positives_ahead = ahead.masked_fill(~same[query] | itself, 0).sum(dim=1)
    negatives_ahead = ahead.masked_fill(same[query], 0).sum(dim=1)
    # 1 - rank among positives / rank among all; so written it is exactly 0 when there is no negative.
    loss = negatives_ahead / (1 + positives_ahead + negatives_ahead)
    return (loss / size[query]).sum() / valid.sum().clamp(min=1)
