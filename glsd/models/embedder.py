"""The network of metric learning: a backbone and a linear layer that give one embedding per image."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from glsd.errors import UserError
from glsd.models.backbone import Backbone


class Embedder(nn.Module):
    """Images -> raw embeddings: the backbone's pooled feature, through one linear layer with bias.

    embed_dim: width e of the embedding, 0 = the pooled feature itself, without a layer. freeze_batch_norm:
    batch normalization keeps to its stored statistics in training mode as well (as in the released code of
    OBD-SD); only the statistics are frozen, its weights and biases still learn. Nothing happens to
    networks without batch normalization. seed: the layer's start is a function of it alone, and the global
    random state stays as it was.

    Attributes: ``embed_dim`` width of the output (also where 0 was given), ``backbone``, ``stride``. Parameter
    names begin with "backbone." or "head.". Raises UserError for a negative width. Source: OBD-SD (arXiv
    2211.07566), whose layer starts as torch's linear layers do: weights and biases uniform within
    1 / sqrt(d), Kaiming's bound for a negative slope of sqrt(5).
    """

    def __init__(self, backbone: Backbone, *, embed_dim: int, freeze_batch_norm: bool = False, seed: int = 0):
        super().__init__()
        if embed_dim < 0:
            raise UserError(
                f"model.embed_dim is {embed_dim}: expected 1 or more, or 0 for the pooled feature itself"
            )
        self.backbone = backbone
        self.embed_dim = embed_dim or backbone.embed_dim
        self.stride = backbone.stride
        self.freeze_batch_norm = freeze_batch_norm
        self.head: nn.Linear | None = None
        if embed_dim:
            with torch.random.fork_rng(devices=[]):  # made on the CPU: no other generator is touched
                torch.default_generator.manual_seed(seed)
                self.head = nn.Linear(backbone.embed_dim, embed_dim)
        self.train(self.training)

    def forward(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b e"]:
        """Return embeddings of any length, not normalized: cosine and MDR scale them in different ways.

        Under autocast they may be in half precision: make them float32 before they are normalized. Raises
        UserError if a side is not a multiple of the stride.
        """
        features, _ = self.backbone(images)
        return features if self.head is None else self.head(features.to(self.head.weight.dtype))

    def train(self, mode: bool = True) -> "Embedder":
        """Set training mode, but leave frozen batch normalization in evaluation mode."""
        super().train(mode)
        if self.freeze_batch_norm:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self
