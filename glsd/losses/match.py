"""Which teacher patch a student patch answers to: the nearest in the source image or the most similar one.

One pair of views at a time, for positions and features of any origin; geometry.geometric_match does it for whole crops.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from glsd.precision import widened


@torch.no_grad()
def geometric(
    student_centers: Float[Tensor, "*b n 2"],
    teacher_centers: Float[Tensor, "*b t 2"],
    *,
    student_half: Float[Tensor, "*b"],
    teacher_half: Float[Tensor, "*b"],
    hinge: bool = True,
    hinge_factor: float = 1.0,
) -> tuple[Int64[Tensor, "*b n"], Float[Tensor, "*b n"]]:
    """Return index and weight of the teacher patch nearest to every student patch, by their centers in the source image.

    *_centers: x, y in source pixels; *_half: squared half diagonal of a patch cell, in squared source pixels. With hinge
    the weight is 1 where the distance is smaller than hinge_factor times the larger half diagonal (strictly) and 0
    elsewhere, without it 1 everywhere. Equal distances: the lowest index. In the dtype of the centers.
    Source: GLSD (arXiv 2207.14676), rejection threshold as in its published code.
    """
    # Differences, not the expansion |s|^2 - 2st + |t|^2: that one loses the digits that decide ties and the threshold.
    difference = student_centers[..., :, None, :] - teacher_centers[..., None, :, :]
    distance, index = difference.square().sum(-1).min(-1)
    if not hinge:
        return index, torch.ones_like(distance)
    limit = hinge_factor**2 * torch.maximum(student_half, teacher_half)
    return index, (distance < limit[..., None]).to(distance.dtype)


@torch.no_grad()
def similarity(
    student_features: Float[Tensor, "*b n d"], teacher_features: Float[Tensor, "*b t d"]
) -> Int64[Tensor, "*b n"]:
    """Return the teacher patch with the largest cosine to every student patch's backbone feature.

    Norms are clamped at 1e-12; float32 or better; equal cosines: the lowest index.
    Source: EsViT (arXiv 2106.09785), region-level task.
    """
    with torch.autocast(student_features.device.type, enabled=False):
        student = F.normalize(widened(student_features), dim=-1, eps=1e-12)
        teacher = F.normalize(widened(teacher_features), dim=-1, eps=1e-12)
        return (student @ teacher.transpose(-1, -2)).argmax(-1)
