"""The global and the local loss: which rows of student and teacher are compared, and how much each counts.

A pair (q, v) is teacher view q and student view v != q. The teacher sees the first g views (the global crops), the student
all of them, so views 0 .. g-1 of both are the same crops.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from glsd.batches import Match
from glsd.cluster import dist
from glsd.errors import UserError
from glsd.geometry import Stride, geometric_match, needed_rows
from glsd.losses.cross_entropy import PrototypeCE, prototype_ce
from glsd.losses.match import similarity


class LocalLoss(NamedTuple):
    """A PrototypeCE of patch rows, and how many patches found a partner."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, " k"]
    teacher_entropy: Float[Tensor, ""]
    teacher_rows: int
    matched_share: Float[Tensor, ""]  # share of student patches that the first match accepts, over all pairs


def global_loss(
    student_cls: Float[Tensor, "v b e"],
    teacher_cls: Float[Tensor, "g b e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    **softmax: Any,
) -> PrototypeCE:
    """Return the mean over pairs (q, v) and images of the cross-entropy of their image-level vectors.

    softmax: center, student_temp, teacher_temp and fuse, as in prototype_ce. Source: DINO (arXiv 2104.14294, eq. 3).
    """
    (v, b, _), g, device = student_cls.shape, len(teacher_cls), student_cls.device
    # Student row (image, view) meets all teacher rows of its image but that of the same view.
    index = torch.arange(b * g, device=device).view(b, 1, g).expand(b, v, g)
    weight = (1 - torch.eye(v, g, device=device, dtype=softmax["center"].dtype)) / (g * (v - 1) * b)
    rows = rearrange(student_cls, "v b e -> (b v) e"), rearrange(teacher_cls, "g b e -> (b g) e")
    entries: dict[str, Any] = {"index": index.flatten(0, 1), "weight": weight.repeat(b, 1), "groups": b}
    return prototype_ce(rows[0], rows[1], student_prototypes, teacher_prototypes, **entries, **softmax)


def local_loss(
    student_patches: Sequence[Float[Tensor, "_ b _ e"]],
    teacher_patches: Float[Tensor, "g b n e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    *,
    matches: Sequence[tuple[Match, float]],
    mean: Literal["all", "accepted"] = "all",
    **softmax: Any,
) -> LocalLoss:
    """Return the mean over pairs (q, v) of the weighted mean cross-entropy of matched patches.

    student_patches: (views, images, patches, e) per resolution, global views first; matches: each with its weight.
    mean 'all' divides by all student patches of a view, so that rejected ones weaken the loss (as published); 'accepted' by
    those with a match, over all ranks (a pair without any counts as 0). softmax: as in global_loss. Source: GLSD.
    """
    dtype = softmax["center"].dtype
    student = torch.cat([rearrange(patches, "v b n e -> b (v n) e") for patches in student_patches], 1)
    teacher = rearrange(teacher_patches, "g b n e -> b (g n) e")
    weights = [share * _mean_weights(match, student_patches, mean, dtype) for match, share in matches]
    first_row = torch.arange(len(teacher), device=student.device)[:, None, None] * teacher.shape[1]
    index = (first_row + torch.cat([match.index for match, _ in matches], 2)).flatten(0, 1)
    weight = torch.cat(weights, 2).flatten(0, 1)
    needed = matches[0][0].needed if len(matches) == 1 else None
    if needed is None and index.device.type == "cpu":  # elsewhere the host would wait for the device
        needed = needed_rows(index, weight > 0, teacher[..., 0].numel(), len(teacher))
    rows = student.flatten(0, 1), teacher.flatten(0, 1)
    entries: dict[str, Any] = {"index": index, "weight": weight, "needed": needed, "groups": len(teacher)}
    result = prototype_ce(rows[0], rows[1], student_prototypes, teacher_prototypes, **entries, **softmax)
    accepted = matches[0][0].weight > 0
    num_entries = accepted.numel() - teacher_patches[..., 0].numel()  # a view is not matched with itself
    return LocalLoss(*result, accepted.sum().to(dtype) / num_entries)


def patch_loss(
    student_patches: Sequence[Float[Tensor, "_ b _ e"]],
    teacher_patches: Float[Tensor, "g b n e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    *,
    center: Float[Tensor, " k"],
    boxes: Sequence[Float[Tensor, "_ b 4"]] | None = None,
    crop_sizes: Sequence[int] = (),
    stride: Stride = 16,
    features: tuple[Sequence[Float[Tensor, "_ b _ d"]], Float[Tensor, "g b n d"]] | None = None,
    hinge: bool = True,
    hinge_factor: float = 1.0,
    mean: Literal["all", "accepted"] = "all",
    student_temp: float = 0.1,
    teacher_temp: float = 0.04,
) -> LocalLoss:
    """Return the local loss of a training loop of your own: matching and cross-entropy in one call.

    *_patches: bottleneck vectors of length 1, (views, images, patches, e); the student's one entry per resolution, global
    views first; the teacher's of the global views. *_prototypes: rows of length 1. center: ``ema_center`` of the results'
    ``teacher_mean``, zeros at the start.
    Give ``boxes`` (views, images, 4) per resolution, x0 y0 x1 y1 in source pixels, x0 > x1 if mirrored, with the side of the
    crops in pixels, to match patches by place; hinge and hinge_factor as in geometry.geometric_match. Or give ``features``,
    the backbone's patch features of student and teacher, to match by similarity. With both the two losses have equal shares.
    Raises UserError if neither is given. Source: GLSD (arXiv 2207.14676).
    """
    found = []
    if boxes is not None:
        place: dict[str, Any] = {"stride": stride, "hinge": hinge, "hinge_factor": hinge_factor}
        found.append(geometric_match([part.cpu() for part in boxes], crop_sizes, **place))
    if features is not None:
        found.append(similarity_match(*features))
    if not found:
        raise UserError("patch_loss: give boxes (match by place), features (match by similarity) or both")
    device = teacher_patches.device
    matches = [(match.map(lambda tensor: tensor.to(device)), 1 / len(found)) for match in found]
    softmax: dict[str, Any] = {"center": center, "student_temp": student_temp, "teacher_temp": teacher_temp}
    vectors = student_patches, teacher_patches, student_prototypes, teacher_prototypes
    return local_loss(*vectors, matches=matches, mean=mean, **softmax)


def _mean_weights(
    match: Match, student_patches: Sequence[Float[Tensor, "_ b _ e"]], mean: str, dtype: torch.dtype
) -> Float[Tensor, "b r g"]:
    """Return the match's weights divided by the patches that each pair's mean is over, and by the number of pairs."""
    b, _, g = match.weight.shape
    weight = match.weight.to(dtype)
    patches = [part.shape[2] for part in student_patches for _ in part]  # of each view
    pairs = g * (len(patches) - 1)
    if mean == "all":
        return weight * torch.cat([weight.new_full((n, 1), 1 / (b * n * pairs)) for n in patches])
    accepted = torch.stack([view.gt(0).sum((0, 1)) for view in weight.split(patches, 1)]).to(dtype)
    counts = dist.all_reduce_mean(accepted)  # over ranks, as the gradients are
    scale = 1 / (torch.where(counts > 0, counts, 1) * pairs)
    return weight * torch.cat([row.expand(n, g) for row, n in zip(scale, patches, strict=True)])


def similarity_match(
    student_features: Sequence[Float[Tensor, "_ b _ d"]], teacher_features: Float[Tensor, "g b n d"]
) -> Match:
    """Return the most similar patch of every teacher view for each student patch; arguments as in local_loss."""
    student = [view for resolution in student_features for view in resolution]
    n = teacher_features.shape[2]
    # One pair at a time: the cosines of all would take gigabytes.
    index = [
        torch.stack([q * n + similarity(view, teacher) for q, teacher in enumerate(teacher_features)], 2)
        for view in student
    ]
    other = 1 - torch.eye(len(student), len(teacher_features), device=teacher_features.device)
    weight = [row.expand_as(part) for row, part in zip(other, index, strict=True)]
    return Match(torch.cat(index, 1), torch.cat(weight, 1))
