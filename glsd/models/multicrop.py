"""One network over all crops of a batch: the backbone per resolution, each head once over the rows of all."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from glsd.models.backbone import Backbone
from glsd.models.heads import ProjectionHead


class Views(NamedTuple):
    """What a network says of the crops; rows are view-major (row = view * b + image), global views first.

    ``*_patches`` are None without a local head, ``local_*`` without local crops.
    """

    cls: Float[Tensor, "vb e"]  # bottleneck vectors of the global head, length 1
    global_patches: Float[Tensor, "gb n e"] | None  # bottleneck vectors of the local head, length 1
    local_patches: Float[Tensor, "lb nl e"] | None
    global_features: Float[Tensor, "gb n d"]  # backbone patch features: the input of the local head
    local_features: Float[Tensor, "lb nl d"] | None


class MultiCrop(nn.Module):
    """A backbone with a head on its global features and one on its patch features.

    local_head: None = no patch outputs; the same object as global_head = one shared head.
    """

    def __init__(self, backbone: Backbone, global_head: ProjectionHead, local_head: ProjectionHead | None):
        super().__init__()
        self.backbone = backbone
        self.global_head = global_head
        self.local_head = local_head

    def forward(
        self,
        global_crops: Float[Tensor, "gb 3 h w"],
        local_crops: Float[Tensor, "lb 3 hl wl"] | None = None,
        *,
        num_images: int,
    ) -> Views:
        """Return the views of g global and l local crops of ``num_images`` = b images each.

        Local crops may be None or empty. Crops of one size go through the backbone together, and a head sees
        all rows of its kind at once, so that batch normalization has the statistics of all views. Raises
        ValueError if the rows are not a multiple of b. Source: DINO (arXiv 2104.14294), multi-crop.
        """
        if local_crops is not None and local_crops.shape[0] == 0:
            local_crops = None
        for crops in (global_crops, local_crops):
            if crops is not None and crops.shape[0] % num_images:
                raise ValueError(f"{crops.shape[0]} crop rows are not a multiple of {num_images} images")
        cls_features, patch_features = self._features(global_crops, local_crops)
        cls = self.global_head(cls_features)
        patches: list[Tensor | None] = [None, None]
        if self.local_head is not None:
            rows = self.local_head(torch.cat([features.flatten(0, 1) for features in patch_features]))
            counts = [features.shape[0] * features.shape[1] for features in patch_features]
            for i, (part, features) in enumerate(zip(rows.split(counts), patch_features, strict=True)):
                patches[i] = part.unflatten(0, features.shape[:2])
        local_features = patch_features[1] if local_crops is not None else None
        return Views(cls, patches[0], patches[1], patch_features[0], local_features)

    def _features(self, global_crops: Tensor, local_crops: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Return the class features of all views and the patch features per resolution."""
        if local_crops is None:
            cls, patches = self.backbone(global_crops)
            return cls, [patches]
        if local_crops.shape[1:] == global_crops.shape[1:]:
            cls, patches = self.backbone(torch.cat([global_crops, local_crops]))
            return cls, list(patches.split([global_crops.shape[0], local_crops.shape[0]]))
        cls, patches = self.backbone(global_crops)
        local_cls, local_patches = self.backbone(local_crops)
        return torch.cat([cls, local_cls]), [patches, local_patches]
