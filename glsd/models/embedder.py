"""The network of metric learning: a backbone and a linear layer that return one embedding per image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glsd.models.backbone import Backbone


class Embedder(nn.Module):
    """A network that maps images to raw embeddings: the backbone's pooled feature through one linear layer with bias.

    embed_dim: width e of the embedding; 0 = the pooled feature itself, without a layer. freeze_batch_norm: batch
    normalization uses its stored statistics in training mode, too, as in OBD-SD's released code; its weights and biases
    still learn. seed: the layer's start depends on it alone; the global random state stays untouched.

    Attributes: ``embed_dim`` is the width of the output (never 0), ``backbone`` and ``stride`` are those of the backbone.
    Parameter names begin with "backbone." or "head.". Source: OBD-SD (arXiv 2211.07566), whose layer starts as torch's
    linear layers: uniform within 1 / sqrt(d).
    """

    def __init__(self, backbone: Backbone, *, embed_dim: int, freeze_batch_norm: bool, seed: int):
        super().__init__()
        self.backbone = backbone
        self.embed_dim = embed_dim or backbone.embed_dim
        self.stride = backbone.stride
        self.freeze_batch_norm = freeze_batch_norm
        self.head: nn.Linear | None = None
        if embed_dim:
            with torch.random.fork_rng(devices=[]):  # built on the CPU: other devices draw nothing
                torch.default_generator.manual_seed(seed)
                self.head = nn.Linear(backbone.embed_dim, embed_dim)
        self.train(self.training)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Return embeddings of any length: cosines and MDR normalize them differently.

        Under autocast they may be in half precision: widen them before you normalize. Raises UserError if a side is not a
        multiple of the stride.
        """
        features, _ = self.backbone(images)
        return features if self.head is None else self.head(features.to(self.head.weight.dtype))

    def train(self, mode: bool = True) -> "Embedder":
        """Set training mode, but keep frozen batch normalization in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
