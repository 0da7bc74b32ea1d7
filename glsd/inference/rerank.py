"""Re-ranking what a search has found: a random walk over the candidates, from the query."""

import numpy as np
import torch
from jaxtyping import Float32, Float64, Int64

from glsd.errors import UserError, pick
from glsd.losses.obd_sd import diffuse, symmetric_affinity

CANDIDATES = 200  # of a query, which the walk may visit
LINKS = 10  # neighbors of a vector that the walk may step to
WALK = 0.99  # probability of a further step
POWER = 3  # of the cosines, as affinities


def diffusion(
    query: Float32[np.ndarray, " d"], candidates: Float32[np.ndarray, "c d"]
) -> Float64[np.ndarray, " c"]:
    """Return a score for each candidate: how much of a walk from the query is spent at it.

    query, candidates: of length 1. Affinities are cosines (negative ones are 0) to the third power, between vectors that are
    among each other's 10 nearest. The walk goes on with probability 0.99.
    Source: Iscen et al. (arXiv 1611.05113, sections 3 and 4), on the candidates of one query as in Yang et al. (arXiv 1811.10907).
    """
    everything = torch.from_numpy(np.concatenate([query[None], candidates])).double()
    cosines = (everything @ everything.T).clamp(min=0).fill_diagonal_(0)
    links = min(LINKS, len(cosines) - 1)
    lowest = cosines.topk(links, dim=1).values[:, -1:]
    near = cosines >= lowest
    affinity = torch.where(near & near.T, cosines**POWER, 0.0)
    # The query may be nobody's neighbor: it reaches its own nearest ones.
    affinity[0] = torch.where(near[0], cosines[0] ** POWER, 0.0)
    affinity[:, 0] = affinity[0]
    start = torch.zeros(len(cosines), 1, dtype=torch.float64)
    start[0] = 1
    return diffuse(symmetric_affinity(affinity), start, w=WALK)[1:, 0].numpy()


RERANKERS = {"diffusion": diffusion}


def reranked(
    kind: str,
    query: Float32[np.ndarray, "q d"],
    vectors: Float32[np.ndarray, "n d"],
    rows: Int64[np.ndarray, "q c"],
    k: int,
) -> Int64[np.ndarray, "q k"]:
    """Return the k best rows of each query's candidates in another order. rows: candidates, by descending cosine.

    Equal scores keep the order of the cosines. Raises UserError for an unknown kind.
    """
    score = pick(RERANKERS, kind, "rerank")
    if rows.shape[1] < k:
        raise UserError(f"k is {k}: expected at most {rows.shape[1]}, the number of candidates")
    found = [
        of_query[np.argsort(-score(vector, vectors[of_query]), kind="stable")[:k]]
        for vector, of_query in zip(query, rows, strict=True)
    ]
    return np.stack(found)
