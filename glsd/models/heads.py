"""The projection head, which maps features to bottleneck vectors of length 1, and its prototypes."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glsd.errors import UserError
from glsd.precision import widened


class Prototypes(nn.Module):
    """The last layer of a head: logit k = <vector, prototype k>, prototype = gain * direction / |direction|.

    With the gain frozen at 1 (the papers' norm_last_layer = true) and vectors of length 1, logits are cosines.
    Source: DINO (arXiv 2104.14294), weight normalization (arXiv 1602.07868).
    """

    def __init__(self, num_prototypes: int, dim: int, *, trainable_gain: bool):
        super().__init__()
        bound = dim**-0.5  # as a linear layer without bias
        self.direction = nn.Parameter(torch.empty(num_prototypes, dim).uniform_(-bound, bound))
        self.gain = nn.Parameter(torch.ones(num_prototypes, 1), requires_grad=trainable_gain)

    def weight(self) -> Float[Tensor, "k e"]:
        """Return the prototypes in float32 or better, as ``losses.cross_entropy.prototype_ce`` takes them."""
        with torch.autocast(self.direction.device.type, enabled=False):
            return widened(self.gain) * F.normalize(widened(self.direction), dim=1, eps=1e-12)

    def forward(self, vectors: Float[Tensor, "r e"]) -> Float[Tensor, "r k"]:
        """Return the logits of bottleneck vectors; for small r * k only, as training uses ``losses.cross_entropy.prototype_ce``."""
        weight = self.weight()
        return F.linear(vectors.to(weight.dtype), weight)


class ProjectionHead(nn.Module):
    """A small MLP whose output has length 1, and its prototypes.

    The MLP has num_layers linear layers, with GELU between them (after batch normalization if batch_norm). Weights start
    as N(0, 0.02), biases as 0. The start depends on ``seed`` alone and leaves the global random state untouched: give the
    global and the local head different seeds. Raises UserError for sizes below 1.
    Source: DINO (arXiv 2104.14294), projection head.
    """

    def __init__(
        self,
        in_dim: int,
        *,
        num_prototypes: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_layers: int,
        batch_norm: bool,
        trainable_gain: bool,
        seed: int,
    ):
        super().__init__()
        sizes = {
            "num_prototypes": num_prototypes,
            "hidden_dim": hidden_dim,
            "bottleneck_dim": bottleneck_dim,
            "num_layers": num_layers,
        }
        for name, value in sizes.items():
            if value < 1:
                raise UserError(f"{name} is {value}: expected at least 1")
        self.in_dim, self.bottleneck_dim, self.num_prototypes = in_dim, bottleneck_dim, num_prototypes
        with torch.random.fork_rng(devices=[]):  # built on the CPU: other devices draw nothing
            torch.default_generator.manual_seed(seed)
            self.mlp = _mlp(in_dim, hidden_dim, bottleneck_dim, num_layers, batch_norm)
            self.prototypes = Prototypes(num_prototypes, bottleneck_dim, trainable_gain=trainable_gain)

    def forward(self, features: Float[Tensor, "r d"]) -> Float[Tensor, "r e"]:
        """Return bottleneck vectors of length 1 (of a zero vector: zero) in float32 or better."""
        vectors = self.mlp(features)
        with torch.autocast(vectors.device.type, enabled=False):
            return F.normalize(widened(vectors), dim=1, eps=1e-12)


def _mlp(in_dim: int, hidden_dim: int, out_dim: int, num_layers: int, batch_norm: bool) -> nn.Sequential:
    dims = [in_dim] + [hidden_dim] * (num_layers - 1) + [out_dim]
    layers: list[nn.Module] = []
    for i in range(num_layers):
        linear = nn.Linear(dims[i], dims[i + 1])
        nn.init.normal_(linear.weight, std=0.02)
        nn.init.zeros_(linear.bias)
        layers.append(linear)
        if i < num_layers - 1:
            layers += [nn.BatchNorm1d(hidden_dim), nn.GELU()] if batch_norm else [nn.GELU()]
    return nn.Sequential(*layers)
