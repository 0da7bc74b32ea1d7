"""Losses on the pairs and triplets of a labeled batch."""

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from glsd.losses.mining import Triplets, mined_pairs, positives_and_negatives

# Under the square root of the margin loss's distances, as in its released code: the gradient stays finite at 0.
SQUARED_DISTANCE_FLOOR = 1e-8


def contrastive(
    z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, pos_margin: float, neg_margin: float
) -> Float[Tensor, ""]:
    """Return the mean of d - pos_margin over positives farther apart than that, plus the mean of neg_margin - d over
    negatives nearer than that; d: Euclidean distance, not squared.

    Source: contrastive loss as in pytorch-metric-learning (the original, Hadsell 2006, squares the terms).
    """
    distance = _distances(z)
    positive, negative = positives_and_negatives(labels)
    return _mean_of_positive(distance - pos_margin, positive) + _mean_of_positive(
        neg_margin - distance, negative
    )


def triplet_semihard(
    z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, margin: float
) -> Float[Tensor, ""]:
    """Return the mean of margin - (|a - n| - |a - p|) over all triplets where that difference lies between 0 and margin.

    Source: FaceNet (arXiv 1503.03832, sec. 3.2), over all such triplets.
    """
    distance = _distances(z)
    positive, negative = positives_and_negatives(labels)
    anchor, partner = positive.nonzero(as_tuple=True)
    gap = distance[anchor] - distance[anchor, partner][:, None]
    return _mean_of_positive(margin - gap, negative[anchor] & ~(gap <= 0))  # NaN stays visible


def _distances(z: Float[Tensor, "b e"]) -> Float[Tensor, "b b"]:
    """Return Euclidean distances from differences: from products those of near rows would lose their digits."""
    return torch.cdist(z, z, compute_mode="donot_use_mm_for_euclid_dist")


def _mean_of_positive(terms: Float[Tensor, "a b"], mask: Bool[Tensor, "a b"]) -> Float[Tensor, ""]:
    """Return the mean of the masked terms above 0, or 0 if there are none."""
    terms = torch.where(mask, terms, 0).relu()
    return terms.sum() / (terms > 0).sum().clamp(min=1)


def multi_similarity(
    z: Float[Tensor, "b e"],
    labels: Int[Tensor, " b"],
    *,
    alpha: float,
    beta: float,
    base: float,
    epsilon: float,
) -> Float[Tensor, ""]:
    """Return the mean over active rows of log(1 + sum exp(-alpha (s - base))) / alpha over the kept positives, plus
    log(1 + sum exp(beta (s - base))) / beta over the kept negatives; s: cosines of the unit vectors z.

    ``mined_pairs`` decides which pairs are kept. A row is active if it keeps positives and negatives. A very large epsilon
    turns the mining off.
    Source: multi-similarity (arXiv 1904.06627, eq. 11 to 13), averaged over active rows as in OBD-SD's released code.
    pytorch-metric-learning by default has beta 50, no mining, and averages over all rows.
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


def triplet_loss(z: Float[Tensor, "b e"], triplets: Triplets, *, margin: float) -> Float[Tensor, ""]:
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
    margin: float,
    nu: float,
    count: Literal["triplets", "pairs"],
) -> Float[Tensor, ""]:
    """Return the sum of max(0, d_ap - b + margin) + max(0, b - d_an + margin) over the triplets, divided by a count,
    plus nu times the sum of b over the triplets; b: the entry of beta of the anchor's class.

    count: "triplets" with a positive term, as the released code divides on a current torch, or "pairs": the positive terms,
    as pytorch-metric-learning and the released code on an old torch divide. At least 1.
    Source: margin loss (arXiv 1706.07567, sec. 4) as in OBD-SD's released code; pytorch-metric-learning divides nu, too.
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


def smooth_ap(z: Float[Tensor, "b e"], labels: Int[Tensor, " b"], *, temperature: float) -> Float[Tensor, ""]:
    """Return 1 - the smoothed average precision of every row as a query, averaged over the rows that have a positive.

    Classes may have any number of images, in any order. A query counts among its own positives, as in the released code, so
    every true rank is one higher. pytorch-metric-learning 2.9 agrees only if there are as many classes as images of each.
    Memory grows as the positive pairs times b. Waits for the device once, to count the pairs.
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
    # 1 - (rank among positives) / (rank among all); in this form it is exactly 0 without negatives.
    loss = negatives_ahead / (1 + positives_ahead + negatives_ahead)
    return (loss / size[query]).sum() / valid.sum().clamp(min=1)
