"""Which teacher patch a student patch answers to: the nearest in the source image or the most similar one."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glsd.contracts import Match


@torch.no_grad()
def geometric(
    student_centers: Float[Tensor, "b n 2"],
    teacher_centers: Float[Tensor, "b t 2"],
    *,
    student_half: Float[Tensor, " b"],
    teacher_half: Float[Tensor, " b"],
    hinge: bool = True,
    hinge_factor: float = 1.0,
) -> Match:
    """Return the teacher patch nearest to every student patch, by their centres in the source image.

    *_centers: x, y in source pixels; *_half: squared half diagonal of a patch cell, in squared source pixels.
    With hinge the weight is 1 where the distance is smaller than hinge_factor times the larger half diagonal
    (strictly) and 0 elsewhere, without it 1 everywhere. Equal distances: the lowest index. Several student
    patches may share a teacher patch. In the dtype of the centres.
    Source: GLSD (arXiv 2207.14676), rejection threshold as in its published code.
    """
    # Differences, not the expansion |s|^2 - 2st + |t|^2: that one loses the digits that decide ties and the
    # threshold.
    dx = student_centers[:, :, None, 0] - teacher_centers[:, None, :, 0]
    dy = student_centers[:, :, None, 1] - teacher_centers[:, None, :, 1]
    distance, index = dx.square().add_(dy.square()).min(dim=2)
    if not hinge:
        return Match(index, torch.ones_like(distance))
    limit = hinge_factor**2 * torch.maximum(student_half, teacher_half)
    return Match(index, (distance < limit[:, None]).to(distance.dtype))


@torch.no_grad()
def similarity(student_features: Float[Tensor, "b n d"], teacher_features: Float[Tensor, "b t d"]) -> Match:
    """Return the teacher patch with the largest cosine to every student patch's backbone feature; weight 1.

    Norms are clamped at 1e-12; float32 or better; equal cosines: the lowest index; no gradient.
    Source: EsViT (arXiv 2106.09785), region-level task.
    """
    wide = torch.promote_types(student_features.dtype, torch.float32)
    with torch.autocast(student_features.device.type, enabled=False):
        student = F.normalize(student_features.to(wide), dim=2, eps=1e-12)
        teacher = F.normalize(teacher_features.to(wide), dim=2, eps=1e-12)
        cosine, index = (student @ teacher.transpose(1, 2)).max(dim=2)
    return Match(index, torch.ones_like(cosine))
