"""The global and the local loss: which rows of student and teacher are compared, and how much each counts.

A pair (q, v) is teacher view q and student view v != q. The teacher sees the first g views (the global
crops), the student all of them, so views 0 .. g-1 of both are the same crops.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from glsd.batches import Match
from glsd.cluster import dist
from glsd.errors import UserError, pick
from glsd.losses.match import geometric, similarity
from glsd.losses.prototype_ce import PrototypeCE, prototype_ce
from glsd.losses.row_plan import send

# For every pair (q, v) the matches of all matchers in use, with the matcher's share already in the weight.
Matches = dict[tuple[int, int], tuple[Match, ...]]

MATCHINGS = {
    "geometric": ("geometric",),
    "similarity": ("similarity",),
    "both": ("geometric", "similarity"),
}


class LocalLoss(NamedTuple):
    """What PrototypeCE says of patch rows, and how many patches found a partner."""

    loss: Float[Tensor, ""]
    teacher_mean: Float[Tensor, " k"]
    teacher_entropy: Float[Tensor, ""]
    teacher_rows: int
    matched_share: Float[
        Tensor, ""
    ]  # share of student patches that the first matcher gave a weight, over all pairs


def view_pairs(num_teacher_views: int, num_student_views: int) -> list[tuple[int, int]]:
    """Return all pairs (q, v), v != q; UserError if there is none, that is for a single crop."""
    pairs = [(q, v) for q in range(num_teacher_views) for v in range(num_student_views) if v != q]
    if not pairs:
        raise UserError(
            "self-distillation compares crops of one image: at least 2 per image are needed, got 1"
        )
    return pairs


def global_loss(
    student_cls: Float[Tensor, "v b e"],
    teacher_cls: Float[Tensor, "g b e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    *,
    center: Float[Tensor, " k"],
    student_temp: float,
    teacher_temp: float,
    fuse: bool = False,
) -> PrototypeCE:
    """Return the mean over pairs (q, v) and images of the cross-entropy of their image-level vectors.

    Source: DINO (arXiv 2104.14294, eq. 3), divided by the number of pairs as in its published code.
    """
    num_views, num_images, _ = student_cls.shape
    num_teacher_views = len(teacher_cls)
    pairs = view_pairs(num_teacher_views, num_views)
    device = student_cls.device
    # Row by row (image, view): entry (b, v, q) points to teacher view q of the same image.
    image = torch.arange(num_images, device=device)[:, None, None]
    teacher_view = torch.arange(num_teacher_views, device=device)
    student_view = torch.arange(num_views, device=device)[:, None]
    index = (image * num_teacher_views + teacher_view).expand(-1, num_views, -1)
    other_view = (teacher_view != student_view).to(center.dtype).expand(num_images, -1, -1)
    return prototype_ce(
        student_cls.transpose(0, 1).flatten(0, 1),
        teacher_cls.transpose(0, 1).flatten(0, 1),
        student_prototypes,
        teacher_prototypes,
        index=index.flatten(0, 1),
        weight=other_view.flatten(0, 1) / (len(pairs) * num_images),
        groups=num_images,
        center=center,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        fuse=fuse,
    )


def local_loss(
    student_patches: Sequence[Float[Tensor, "_ b _ e"]],
    teacher_patches: Float[Tensor, "g b n e"],
    student_prototypes: Float[Tensor, "k e"],
    teacher_prototypes: Float[Tensor, "k e"],
    *,
    matches: Matches,
    center: Float[Tensor, " k"],
    student_temp: float,
    teacher_temp: float,
    mean: Literal["all", "accepted"] = "all",
    fuse: bool = False,
) -> LocalLoss:
    """Return the mean over pairs (q, v) of the weighted mean cross-entropy of matched patches.

    student_patches: one entry (views, b, patches, e) per resolution, global views first; matches: from
    match_views, one entry per pair. mean 'all' divides by all student patches of a view, so that rejected
    ones weaken the loss (as published); 'accepted' by those with a weight above 0, counted over the batches of
    all ranks so that their number changes nothing (a pair without any counts as 0).
    Source: GLSD (arXiv 2207.14676).
    """
    index, weight, kept, accepted = _entries(
        sum(map(len, student_patches)),
        matches,
        num_teacher=teacher_patches.shape[2],
        counts=_accepted_per_match(matches, teacher_patches.device) if mean == "accepted" else None,
        dtype=center.dtype,
    )
    # Image by image: an image's student patches meet its own teacher patches only.
    student = torch.cat([patches.transpose(0, 1).flatten(1, 2) for patches in student_patches], dim=1)
    teacher = teacher_patches.transpose(0, 1).flatten(1, 2)  # (b, g * n, e)
    first_row = torch.arange(len(teacher), device=index.device)[:, None, None] * teacher.shape[1]
    result = prototype_ce(
        student.flatten(0, 1),
        teacher.flatten(0, 1),
        student_prototypes,
        teacher_prototypes,
        index=(first_row + index).flatten(0, 1),
        weight=weight.flatten(0, 1),
        kept=kept.flatten(0, 1),
        groups=len(teacher),
        center=center,
        student_temp=student_temp,
        teacher_temp=teacher_temp,
        fuse=fuse,
    )
    return LocalLoss(*result, send(accepted, center.device))


def _entries(
    num_student_views: int,
    matches: Matches,
    *,
    num_teacher: int,
    counts: dict[tuple[int, int], list[Float[Tensor, ""]]] | None,
    dtype: torch.dtype,
) -> tuple[Int64[Tensor, "b r m"], Float[Tensor, "b r m"], Bool[Tensor, "b r m"], Float[Tensor, ""]]:
    """Return, for the patches of all student views of an image, teacher rows (of the image), weights, whether they count at all,
    and the share that the first matcher accepted.

    Everything is where the matches are; the weights, with ``counts``, where those are.
    """
    num_views = 1 + max(q for q, _ in matches)
    num_kinds = max(map(len, matches.values()))
    # With both matchers the one by feature lies on the device, and all go there.
    places = [match.index.device for kinds in matches.values() for match in kinds]
    device = next((place for place in places if place.type != "cpu"), places[0])
    index, weight, kept, accepted = [], [], [], []
    for v in range(num_student_views):
        columns, shares, gates = [], [], []
        for q in range(num_views):
            for kind, match in enumerate(matches.get((q, v), ())):
                match_weight = send(match.weight, device)
                columns.append(q * num_teacher + send(match.index, device))
                gates.append(match_weight > 0)
                if counts is None:
                    share = match_weight / match_weight.numel()
                else:
                    share = send(match_weight, counts[q, v][kind].device) / counts[q, v][kind]
                shares.append((share / len(matches)).to(dtype))
            if (q, v) in matches:
                accepted.append(gates[-len(matches[q, v])].flatten())
        # A global view has one teacher view less than a local one: fill up with entries that weigh nothing.
        for _ in range(num_views * num_kinds - len(columns)):
            columns.append(torch.zeros_like(columns[0]))
            shares.append(torch.zeros_like(shares[0]))
            gates.append(torch.zeros_like(gates[0]))
        index.append(torch.stack(columns, dim=2))
        weight.append(torch.stack(shares, dim=2))
        kept.append(torch.stack(gates, dim=2))
    accepted_share = torch.cat(accepted).to(dtype).mean()
    return torch.cat(index, 1), torch.cat(weight, 1), torch.cat(kept, 1), accepted_share


def _accepted_per_match(
    matches: Matches, device: torch.device
) -> dict[tuple[int, int], list[Float[Tensor, ""]]]:
    """Return how many patches each match accepted, as the mean over ranks (the gradients are averaged over them too)."""
    own = [send((match.weight > 0).sum().float(), device) for kinds in matches.values() for match in kinds]
    counts = iter(dist.all_reduce_mean(torch.stack(own)).unbind())
    return {
        pair: [torch.where(count > 0, count, 1.0) for count in (next(counts) for _ in kinds)]
        for pair, kinds in matches.items()
    }


def match_views(
    matching: str,
    *,
    centers: Sequence[Float[Tensor, "_ b _ 2"]] = (),
    squared_halves: Sequence[Float[Tensor, "_ b"]] = (),
    student_features: Sequence[Float[Tensor, "_ b _ d"]] = (),
    teacher_features: Float[Tensor, "g b n d"] | None = None,
    hinge: bool = True,
    hinge_factor: float = 1.0,
    geometric_weight: float = 0.5,
    similarity_weight: float = 0.5,
) -> Matches:
    """Return the matches of every pair (q, v), by place ('geometric'), by feature ('similarity') or by both.

    Sequences have one entry per resolution, as in local_loss; the first one holds the views that the teacher
    sees too. 'geometric' needs centers (geometry.patch_centers) and squared_halves
    (geometry.squared_half_diagonals), 'similarity' the patch features of both backbones. 'both' gives every
    student patch two matches, weighted geometric_weight and similarity_weight. Raises UserError for another
    matching.
    """
    kinds = pick(MATCHINGS, matching, "matching")
    shares = (geometric_weight, similarity_weight) if matching == "both" else (1.0,)
    center = [view for group in centers for view in group]
    half = [view for group in squared_halves for view in group]
    student = [view for group in student_features for view in group]
    teacher = [] if teacher_features is None else list(teacher_features)

    def match(kind: str, q: int, v: int) -> Match:
        if kind == "similarity":
            return similarity(student[v], teacher[q])
        return geometric(
            center[v],
            center[q],
            student_half=half[v],
            teacher_half=half[q],
            hinge=hinge,
            hinge_factor=hinge_factor,
        )

    num_teacher_views = len(centers[0]) if "geometric" in kinds else len(teacher)
    num_student_views = len(center) if "geometric" in kinds else len(student)
    matches: Matches = {}
    for q, v in view_pairs(num_teacher_views, num_student_views):
        found = [match(kind, q, v) for kind in kinds]
        matches[q, v] = tuple(
            Match(index, share * weight) for (index, weight), share in zip(found, shares, strict=True)
        )
    return matches
