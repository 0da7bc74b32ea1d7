"""One forward of self-distillation: the student's views, their matches with the teacher's, the losses. What accelerate wraps."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Float32, Float64
from torch import Tensor, nn

from glsd.cluster import dist, fsdp
from glsd.geometry import patch_centers, squared_half_diagonals
from glsd.losses.center import sinkhorn_center
from glsd.losses.distill import (
    LocalLoss,
    Matches,
    global_loss,
    local_loss,
    match_views,
)
from glsd.losses.prototype_ce import PrototypeCE
from glsd.models.heads import ProjectionHead
from glsd.models.multicrop import MultiCrop, Views

NUM_GLOBAL = 2


@dataclass(frozen=True, kw_only=True)
class Pixels:
    """Augmented, normalized crops of b images on the training device; rows are view-major.

    The boxes stay on the CPU: the host then knows which patches match by place, and drops the others without waiting for
    the device. (A dataclass, because DDP would move the tensors of a tuple to its device.)
    """

    global_crops: Float32[Tensor, "gb 3 h w"]
    local_crops: Float32[Tensor, "lb 3 hl wl"]
    global_boxes: Float64[Tensor, "gb 4"]
    local_boxes: Float64[Tensor, "lb 4"]


class TeacherOutput(NamedTuple):
    """What the teacher contributes to one micro-batch; nothing of it needs a gradient."""

    views: Views
    global_prototypes: Float[Tensor, "k e"]
    local_prototypes: Float[Tensor, "k e"] | None
    global_center: Float[Tensor, " k"]
    local_center: Float[Tensor, " k"]
    temp: float


class Distilled(NamedTuple):
    """Losses and statistics of one micro-batch, all small; ``local`` is None without a local loss."""

    loss: Float[Tensor, ""]  # weighted total
    image: PrototypeCE
    patch: LocalLoss | None


class Distillation(nn.Module):
    """The student together with its losses, so that one DDP forward returns scalars and small statistics only.

    matching: 'geometric', 'similarity', 'both' or 'none'; global_weight None = 0.5 beside a local loss and 1 alone, as
    published; fuse: torch.compile what the losses do to logits; the other arguments as in losses.distill.
    Source: GLSD (arXiv 2207.14676), DINO (arXiv 2104.14294).
    """

    def __init__(
        self,
        student: MultiCrop,
        *,
        matching: str,
        global_weight: float | None = None,
        local_weight: float = 0.5,
        hinge: bool = True,
        hinge_factor: float = 1.0,
        local_mean: Literal["all", "accepted"] = "all",
        geometric_weight: float = 0.5,
        similarity_weight: float = 0.5,
        student_temp: float = 0.1,
        fuse: bool = False,
    ):
        super().__init__()
        self.student = student
        self.matching = matching
        alone = matching == "none"
        self.global_weight = (1.0 if alone else 0.5) if global_weight is None else global_weight
        self.local_weight = local_weight
        self.match_views = partial(
            match_views,
            "geometric" if matching == "none" else matching,
            hinge=hinge,
            hinge_factor=hinge_factor,
            geometric_weight=geometric_weight,
            similarity_weight=similarity_weight,
        )
        self.local_mean: Literal["all", "accepted"] = local_mean
        self.student_temp = student_temp
        self.fuse = fuse

    def forward(self, pixels: Pixels, teacher: TeacherOutput) -> Distilled:
        """Return the losses of one micro-batch."""
        b = len(pixels.global_crops) // NUM_GLOBAL
        views = self.student(pixels.global_crops, pixels.local_crops, num_images=b)
        image = global_loss(
            views.cls.unflatten(0, (-1, b)),
            teacher.views.cls.unflatten(0, (-1, b)),
            self.student.global_head.prototypes.weight(),
            teacher.global_prototypes,
            center=teacher.global_center,
            student_temp=self.student_temp,
            teacher_temp=teacher.temp,
            fuse=self.fuse,
        )
        total = self.global_weight * image.loss
        head, teacher_patches = self.student.local_head, teacher.views.global_patches
        if head is None or teacher_patches is None or teacher.local_prototypes is None:  # matching none
            return Distilled(total, image, None)
        patch = local_loss(
            _by_view([views.global_patches, views.local_patches], b),
            teacher_patches.unflatten(0, (-1, b)),
            head.prototypes.weight(),
            teacher.local_prototypes,
            matches=self.match(
                pixels, [views.global_features, views.local_features], teacher.views.global_features
            ),
            center=teacher.local_center,
            student_temp=self.student_temp,
            teacher_temp=teacher.temp,
            mean=self.local_mean,
            fuse=self.fuse,
        )
        return Distilled(total + self.local_weight * patch.loss, image, patch)

    @torch.no_grad()
    def match(
        self,
        pixels: Pixels,
        student_features: Sequence[Float[Tensor, "_ _ d"] | None],
        teacher_features: Float[Tensor, "gb n d"],
    ) -> Matches:
        """Return the matches of every pair of teacher and student view, by place and/or by backbone patch feature.

        student_features: of the global and of the local crops (None without any). With matching 'none', where only pictures
        ask, by place.
        """
        b = len(pixels.global_crops) // NUM_GLOBAL
        stride = self.student.backbone.stride
        resolutions = [(pixels.global_boxes, pixels.global_crops.shape[-1])]
        if len(pixels.local_boxes):
            resolutions.append((pixels.local_boxes, pixels.local_crops.shape[-1]))
        return self.match_views(
            centers=_by_view([patch_centers(boxes, size, stride) for boxes, size in resolutions], b),
            squared_halves=_by_view(
                [squared_half_diagonals(boxes, size, stride) for boxes, size in resolutions], b
            ),
            student_features=_by_view(student_features, b),
            teacher_features=teacher_features.unflatten(0, (-1, b)),
        )


def run_teacher(
    teacher: MultiCrop,
    global_crops: Float32[Tensor, "gb 3 h w"],
    *,
    centers: dict[str, Float[Tensor, " k"]],
    temp: float,
    sinkhorn_iterations: int | None = None,
) -> TeacherOutput:
    """Return the teacher's views of the global crops with the centers to use on them.

    sinkhorn_iterations: None takes ``centers``; a number replaces them by the Sinkhorn-Knopp centers of this micro-batch
    over all ranks.
    """
    with fsdp.without_gradients(teacher):
        views = teacher(global_crops, num_images=len(global_crops) // NUM_GLOBAL)

        def center(name: str, head: ProjectionHead, vectors: Float[Tensor, "r e"]) -> Float[Tensor, " k"]:
            if sinkhorn_iterations is None:
                return centers[name]
            return sinkhorn_center(
                vectors, head.prototypes.weight(), teacher_temp=temp, iterations=sinkhorn_iterations
            )

        local = teacher.local_head
        return TeacherOutput(
            views=views,
            global_prototypes=teacher.global_head.prototypes.weight(),
            local_prototypes=None if local is None else local.prototypes.weight(),
            global_center=center("global", teacher.global_head, views.cls),
            local_center=centers["local"]
            if local is None
            else center("local", local, _rows(views.global_patches)),
            temp=temp,
        )


def _rows(patches: Float[Tensor, "b n e"] | None) -> Float[Tensor, "r e"]:
    if patches is None:
        raise ValueError("a network with a local head gives patch vectors")
    return patches.flatten(0, 1)


def _by_view(groups: Sequence[Tensor | None], num_images: int) -> list[Tensor]:
    """Split the rows of each resolution into (views, images); a resolution without crops is left out."""
    return [group.unflatten(0, (-1, num_images)) for group in groups if group is not None]


def mean_values(outs: Sequence[Distilled], shares: Sequence[float]) -> dict[str, Float[Tensor, ""]]:
    """Return what the meters show of a step's micro-batches, by name; the mean over ranks is that of all images and patches.

    shares: how much each micro-batch counts, 1 in all per rank on average.
    """
    named = {
        "loss": [out.loss for out in outs],
        "global_loss": [out.image.loss for out in outs],
        "global_teacher_entropy": [out.image.teacher_entropy for out in outs],
    }
    patches = [out.patch for out in outs if out.patch]
    if patches:
        named["local_loss"] = [patch.loss for patch in patches]
        named["matched_share"] = [patch.matched_share for patch in patches]
    means = {name: _weighted(values, shares) for name, values in named.items()}
    if patches:
        # Every micro-batch of every rank uses another number of teacher patches: the mean is that over all of them.
        rows = torch.stack([torch.full_like(patch.teacher_entropy, patch.teacher_rows) for patch in patches])
        entropies = torch.stack([patch.teacher_entropy for patch in patches])
        means["local_teacher_entropy"] = (entropies * rows).sum() / dist.all_reduce_mean(rows.sum()).clamp(
            min=1
        )
    return means


def mean_logits(outs: Sequence[Distilled], shares: Sequence[float]) -> dict[str, Float[Tensor, " k"]]:
    """Return the teacher's mean raw logits of a step's micro-batches, for the centers of the same names; shares as above."""
    means = {"global": _weighted([out.image.teacher_mean for out in outs], shares)}
    if outs[0].patch is not None:
        means["local"] = _weighted([out.patch.teacher_mean for out in outs if out.patch], shares)
    return means


def _weighted(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value.detach() for value, share in zip(values, shares, strict=True)]).sum(0)
