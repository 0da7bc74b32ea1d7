"""One network over all crops of a batch: the backbone per resolution, each head once over the rows of all."""

from typing import NamedTuple

from einops import pack, rearrange, unpack
from jaxtyping import Float
from torch import Tensor, nn

from glsd.models.backbone import Backbone
from glsd.models.heads import ProjectionHead


class Views(NamedTuple):
    """What a network says of the crops: bottleneck vectors of length 1, and the prototypes they meet.

    The lists have one entry per resolution, global views first. ``patches`` is empty without a local head. ``image`` has the
    backbone's image features of the global views.
    """

    image: Float[Tensor, "g b d"]
    cls: Float[Tensor, "v b e"]
    cls_prototypes: Float[Tensor, "k e"]
    patches: list[Float[Tensor, "_ b _ e"]]
    patch_prototypes: Float[Tensor, "k e"] | None
    features: list[Float[Tensor, "_ b _ d"]]  # backbone patch features: the input of the local head


class MultiCrop(nn.Module):
    """A backbone with a head on its global features and one on its patch features.

    A head sees all rows of its kind at once, so that batch normalization has the statistics of all views.

    local_head: None = no patch outputs; the same object as global_head = one shared head.
    """

    def __init__(self, backbone: Backbone, global_head: ProjectionHead, local_head: ProjectionHead | None):
        super().__init__()
        self.backbone = backbone
        self.global_head = global_head
        self.local_head = local_head

    def forward(
        self,
        global_crops: Float[Tensor, "g b 3 h w"],
        local_crops: Float[Tensor, "l b 3 hl wl"] | None = None,
    ) -> Views:
        """Return the views of all crops; local_crops may be None or empty. Source: DINO (arXiv 2104.14294), multi-crop."""
        resolutions = [crops for crops in (global_crops, local_crops) if crops is not None and len(crops)]
        cls, features = zip(*map(self._backbone_views, resolutions), strict=True)
        vectors = rearrange(
            self.global_head(pack(cls, "* d")[0]), "(v b) e -> v b e", b=global_crops.shape[1]
        )
        prototypes = self.global_head.prototypes.weight()
        if self.local_head is None:
            return Views(cls[0], vectors, prototypes, [], None, list(features))
        rows, shapes = pack(features, "* d")
        patches = unpack(self.local_head(rows), shapes, "* e")
        local_prototypes = self.local_head.prototypes.weight()
        return Views(cls[0], vectors, prototypes, patches, local_prototypes, list(features))

    def _backbone_views(self, crops: Float[Tensor, "v b 3 h w"]) -> tuple[Tensor, Tensor]:
        """Return class features (v b d) and patch features (v b n d) of the crops of one resolution."""
        cls, patches = self.backbone(crops.flatten(0, 1))
        return cls.unflatten(0, crops.shape[:2]), patches.unflatten(0, crops.shape[:2])
