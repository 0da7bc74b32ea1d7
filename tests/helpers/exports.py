"""Small networks of every kind with weights that matter: no bias, scale or statistic keeps its start."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from glsd.inference.model import Model
from launch.benchmark.export import noisy_model


class Kind(NamedTuple):
    """A network by timm's name, small, at a native size."""

    backbone: str
    size: int
    args: Mapping[str, Any]


KINDS = {
    "vit": Kind("vit_tiny_patch16_224", 32, {"patch_size": 8, "depth": 2, "embed_dim": 48, "num_heads": 3}),
    "registers": Kind("vit_small_patch14_reg4_dinov2", 42, {"depth": 2, "embed_dim": 48, "num_heads": 3}),
    "dinov3": Kind("vit_small_patch16_dinov3", 48, {"depth": 2, "embed_dim": 48, "num_heads": 2}),
    "swin": Kind("swin_tiny_patch4_window7_224", 64, {"depths": [1, 1, 1, 1], "embed_dim": 24}),
    "resnet": Kind("resnet50", 64, {"layers": [1, 1, 1, 1]}),
}


def small_model(
    kind: str | Kind, *, pool: str, embed_dim: int | None, resize: int | None = None, **more: Any
) -> Model:
    """The face of a network. embed_dim: None = a backbone, else that of an embedder; more: arguments of timm."""
    name, size, args = KINDS[kind] if isinstance(kind, str) else kind
    return noisy_model(name, size, {**args, **more}, pool=pool, embed_dim=embed_dim, resize=resize)
