"""One forward of self-distillation: the student's views, the losses against the teacher's. The module that accelerate wraps."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn

from glsd.batches import Match
from glsd.cluster import dist, fsdp
from glsd.config.pretrain import LossConfig
from glsd.losses.center import sinkhorn_center
from glsd.losses.cross_entropy import PrototypeCE
from glsd.losses.distill import LocalLoss, global_loss, local_loss, similarity_match
from glsd.losses.koleo import koleo_loss
from glsd.models.multicrop import MultiCrop, Views


class Targets(NamedTuple):
    """The teacher's views of one micro-batch, with the centers and the temperature of its distributions."""

    views: Views
    centers: dict[str, Float[Tensor, " k"]]  # 'global', 'local'
    temp: float


class Losses(NamedTuple):
    """Losses and statistics of one micro-batch, all small."""

    total: Float[Tensor, ""]  # weighted sum
    image: PrototypeCE
    patch: LocalLoss | None  # None without a local loss
    koleo: Float[Tensor, ""] | None  # None with weight 0


class Distillation(nn.Module):
    """The student together with its losses, so that one DDP forward returns scalars and small statistics only.

    matching: 'geometric', 'similarity', 'both' or 'none'; loss: its global_weight None means 0.5 beside a local loss and 1
    alone, as published; fuse: torch.compile what the losses do to logits.
    Source: GLSD (arXiv 2207.14676), DINO (arXiv 2104.14294).
    """

    def __init__(self, student: MultiCrop, loss: LossConfig, *, matching: str, fuse: bool):
        super().__init__()
        self.student, self.loss, self.matching, self.fuse = student, loss, matching, fuse
        alone = 1.0 if matching == "none" else 0.5
        self.global_weight = alone if loss.global_weight is None else loss.global_weight

    def forward(
        self,
        global_crops: Float32[Tensor, "g b 3 h w"],
        local_crops: Float32[Tensor, "l b 3 hl wl"],
        match: Match | None,
        targets: Targets,
    ) -> Losses:
        """Return the losses of one micro-batch; ``match``: by place, where the matching asks for it."""
        views, teacher = self.student(global_crops, local_crops), targets.views

        def softmax(name: str) -> dict[str, Any]:
            temps = {"student_temp": self.loss.student_temp, "teacher_temp": targets.temp}
            return {"center": targets.centers[name], "fuse": self.fuse, **temps}

        prototypes = views.cls_prototypes, teacher.cls_prototypes
        image = global_loss(views.cls, teacher.cls, *prototypes, **softmax("global"))
        total, patch, koleo = self.global_weight * image.loss, None, None
        if views.patch_prototypes is not None and teacher.patch_prototypes is not None:
            matches = self.weighted_matches(match, views, teacher)
            prototypes = views.patch_prototypes, teacher.patch_prototypes
            options = {"matches": matches, "mean": self.loss.local_mean, **softmax("local")}
            patch = local_loss(views.patches, teacher.patches[0], *prototypes, **options)
            total = total + self.loss.local_weight * patch.loss
        if self.loss.koleo_weight:
            koleo = koleo_loss(views.image)
            total = total + self.loss.koleo_weight * koleo
        return Losses(total, image, patch, koleo)

    def weighted_matches(
        self, match: Match | None, views: Views, teacher: Views
    ) -> list[tuple[Match, float]]:
        """Return the matches that the local loss uses, each with its weight: by place, by backbone feature, or both."""
        both = self.matching == "both"
        matches = [] if match is None else [(match, self.loss.geometric_weight if both else 1.0)]
        if self.matching in ("similarity", "both"):
            found = similarity_match(views.features, teacher.features[0])
            matches.append((found, self.loss.similarity_weight if both else 1.0))
        return matches


def run_teacher(
    teacher: MultiCrop,
    global_crops: Float32[Tensor, "g b 3 h w"],
    centers: dict[str, Float[Tensor, " k"]],
    temp: float,
    sinkhorn_iterations: int | None,
) -> Targets:
    """Return the teacher's views of the global crops with the centers to use on them.

    A number of sinkhorn_iterations replaces ``centers`` by the Sinkhorn-Knopp centers of this micro-batch over all ranks.
    """
    with fsdp.without_gradients(teacher):
        views = teacher(global_crops)
        if sinkhorn_iterations is not None:
            options: dict[str, Any] = {"teacher_temp": temp, "iterations": sinkhorn_iterations}
            centers = {"global": sinkhorn_center(views.cls.flatten(0, 1), views.cls_prototypes, **options)}
            if views.patch_prototypes is not None:
                vectors = views.patches[0].flatten(0, 2)
                centers["local"] = sinkhorn_center(vectors, views.patch_prototypes, **options)
    return Targets(views, centers, temp)


def step_values(losses: Sequence[Losses], shares: Sequence[float]) -> dict[str, Float[Tensor, ""]]:
    """Return what the meters show of a step's micro-batches; ``shares``: how much each counts, see Plan."""
    values = {
        "loss": _mean([each.total for each in losses], shares),
        "global_loss": _mean([each.image.loss for each in losses], shares),
        "global_teacher_entropy": _mean([each.image.teacher_entropy for each in losses], shares),
    }
    if patches := [each.patch for each in losses if each.patch]:
        values["local_loss"] = _mean([patch.loss for patch in patches], shares)
        values["matched_share"] = _mean([patch.matched_share for patch in patches], shares)
        # Micro-batches and ranks use different numbers of teacher patches: the mean is over all of these.
        rows = torch.stack([torch.full_like(patch.teacher_entropy, patch.teacher_rows) for patch in patches])
        total = (torch.stack([patch.teacher_entropy for patch in patches]) * rows).sum()
        values["local_teacher_entropy"] = total / dist.all_reduce_mean(rows.sum()).clamp(min=1)
    if koleo := [each.koleo for each in losses if each.koleo is not None]:
        values["koleo_loss"] = _mean(koleo, shares)
    return values


def mean_logits(losses: Sequence[Losses], shares: Sequence[float]) -> dict[str, Float[Tensor, " k"]]:
    """Return the teacher's mean raw logits of a step over all ranks, for the centers of the same names; shares as above."""
    means = {"global": _mean([each.image.teacher_mean for each in losses], shares)}
    if patches := [each.patch for each in losses if each.patch]:
        means["local"] = _mean([patch.teacher_mean for patch in patches], shares)
    return {name: dist.all_reduce_mean(mean) for name, mean in means.items()}


def _mean(values: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    return torch.stack([share * value.detach() for value, share in zip(values, shares, strict=True)]).sum(0)
