"""RankMe: how many directions the features use, a measure of their quality that needs no labels."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


@torch.no_grad()
def rankme(features: Float[Tensor, "n d"]) -> float:
    """Return RankMe, the smooth rank of a feature matrix: 1 (all rows along one direction) to min(n, d).

    With singular values s it is exp(-sum p log p), p = s / sum(s) + 1e-7, in float64; nan if a feature is not finite.
    Use an n of several times d: then the value hardly depends on n. Source: RankMe (Garrido et al. 2023), equations
    1 and 2.
    """
    if not bool(torch.isfinite(features).all()):
        return math.nan
    values = torch.linalg.svdvals(features.double())
    p = values / values.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return float(torch.exp(-(p * p.log()).sum()))
