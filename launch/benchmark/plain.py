"""The textbook losses: all logits, then one softmax and one log-softmax for each pair of views.

DINO, EsViT and GLSD publish them so. They leave out the entropy of the teacher, which only our meters read.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from glsd.batches import Match
from glsd.losses.cross_entropy import PrototypeCE
from glsd.losses.distill import LocalLoss
from glsd.precision import widened


def plain_global_loss(
    student_cls: Tensor,
    teacher_cls: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    fuse: bool = False,
) -> PrototypeCE:
    """Return what losses.distill.global_loss does, pair by pair; arguments as there, never fused."""
    logits = student_cls @ student_prototypes.T / student_temp
    with torch.no_grad():
        teacher_logits = teacher_cls @ teacher_prototypes.T
        targets = ((widened(teacher_logits) - center) / teacher_temp).softmax(-1)
    total = logits.new_zeros((), dtype=targets.dtype)
    pairs = [(q, v) for q in range(len(teacher_cls)) for v in range(len(student_cls)) if v != q]
    for q, v in pairs:
        total = total - (targets[q] * F.log_softmax(widened(logits[v]), dim=-1)).sum(-1).mean()
    return filled(PrototypeCE, loss=total / len(pairs), teacher_mean=widened(teacher_logits).mean((0, 1)))


def plain_local_loss(
    student_patches: Sequence[Tensor],
    teacher_patches: Tensor,
    student_prototypes: Tensor,
    teacher_prototypes: Tensor,
    *,
    matches: Sequence[tuple[Match, float]],
    center: Tensor,
    student_temp: float,
    teacher_temp: float,
    mean: str = "all",
    fuse: bool = False,
) -> LocalLoss:
    """Return what losses.distill.local_loss does, pair by pair; arguments as there, mean 'all' only, never fused."""
    if mean != "all":
        raise ValueError("the textbook takes the mean over all student patches")
    views = [view for group in student_patches for view in group]
    rows = torch.cat([view.flatten(0, 1) for view in views]) @ student_prototypes.T / student_temp
    parts = rows.split([view.shape[:2].numel() for view in views])
    logits = [part.unflatten(0, view.shape[:2]) for part, view in zip(parts, views, strict=True)]
    with torch.no_grad():
        teacher_logits = teacher_patches @ teacher_prototypes.T
        targets = ((widened(teacher_logits) - center) / teacher_temp).softmax(-1)
    total = center.new_zeros(())
    image = torch.arange(teacher_patches.shape[1], device=center.device)[:, None]
    first, patches, num_pairs = 0, teacher_patches.shape[2], len(targets) * (len(views) - 1)
    for v, view in enumerate(views):
        for match, share in matches:
            index, weight = (of[:, first : first + view.shape[1]] for of in (match.index, match.weight))
            for q in range(len(targets)):
                if q != v:
                    matched = targets[q][image, index[..., q] - q * patches]
                    cross_entropy = -(matched * F.log_softmax(widened(logits[v]), dim=-1)).sum(-1)
                    total = total + share * (weight[..., q].to(cross_entropy) * cross_entropy).mean()
        first += view.shape[1]
    accepted = (matches[0][0].weight > 0).sum().to(center)
    return filled(
        LocalLoss,
        loss=total / num_pairs,
        teacher_mean=widened(teacher_logits).mean((0, 1, 2)),
        matched_share=accepted / (matches[0][0].weight.numel() - teacher_patches[..., 0].numel()),
    )


def filled(kind: Any, **known: Tensor) -> Any:
    """Return a result of ours whose other fields, statistics that the textbook does not take, are 0."""
    zero = known["loss"].detach().new_zeros(())
    return kind(**{name: known.get(name, zero) for name in kind._fields})
