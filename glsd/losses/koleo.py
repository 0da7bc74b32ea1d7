"""KoLeo: a term that spreads the features of a batch, by the distance of each to its nearest neighbor."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glsd.cluster import dist
from glsd.precision import widened

EPSILON = 1e-8  # added to a distance: equal features have no infinite loss


def koleo_loss(features: Float[Tensor, "v b d"]) -> Float[Tensor, ""]:
    """Return the mean over views and images of -ln(distance to the nearest image of the same view), on the unit sphere.

    features: image features of any length. The images of all ranks are neighbors; every rank must have as many, at least two
    in all. Which image is nearest is decided without gradient; the distance has one to both ends. Computed in float32 or better.
    Source: Sablayrolles et al. (arXiv 1806.03198, eq. 2), as DINOv2 uses it (arXiv 2304.07193, section 4).
    """
    with torch.autocast(features.device.type, enabled=False):
        by_image = F.normalize(widened(features), dim=2).transpose(0, 1)
        views = dist.gather_with_grad(by_image.flatten(1)).unflatten(1, by_image.shape[1:]).transpose(0, 1)
        with torch.no_grad():
            cosines = views @ views.mT
            cosines.diagonal(dim1=1, dim2=2).fill_(-torch.inf)
            nearest = cosines.argmax(2)
        others = views.gather(1, nearest[:, :, None].expand_as(views))
        return -(torch.linalg.vector_norm(views - others, dim=2) + EPSILON).log().mean()
