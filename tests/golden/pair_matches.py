"""Matches of pairs of views (q, v), put together to a Match, and taken apart again."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glsd.batches import Match

Pairs = dict[
    tuple[int, int], tuple[Tensor, Tensor]
]  # index and weight (images, patches) of teacher q and student v


def joined(pairs: Mapping[tuple[int, int], tuple[Tensor, Tensor]], num_patches: int) -> Match:
    """Return the Match of single pairs; num_patches: of a teacher view."""
    views, teachers = 1 + max(v for _, v in pairs), 1 + max(q for q, _ in pairs)
    index, weight = [], []
    for v in range(views):
        like = next(pair for (_, other), pair in pairs.items() if other == v)
        nothing = torch.zeros_like(like[0]), torch.zeros_like(like[1])
        found = [pairs.get((q, v), nothing) for q in range(teachers)]
        index.append(torch.stack([q * num_patches + chosen for q, (chosen, _) in enumerate(found)], 2))
        weight.append(torch.stack([each for _, each in found], 2))
    return Match(torch.cat(index, 1), torch.cat(weight, 1))


def apart(match: Match, patches: Sequence[int]) -> Pairs:
    """Return index and weight (float64) of each pair of different views; patches: of each student view, a teacher view's first."""
    teachers = match.index.shape[2]
    views = zip(match.index.split(list(patches), 1), match.weight.split(list(patches), 1), strict=True)
    return {
        (q, v): (index[..., q] - q * patches[0], weight[..., q].double())
        for v, (index, weight) in enumerate(views)
        for q in range(teachers)
        if q != v
    }
