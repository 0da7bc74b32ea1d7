"""From images to the tokens of a timm network, and from tokens to one vector per image."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from glsd.models.blocks import run_blocks
from glsd.models.pos_embed import resample_pos_embed
from glsd.precision import wide_dtype


def class_token(prefix: Float[Tensor, "b p d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return the first of the tokens before the patches."""
    return prefix[:, 0]


def mean(prefix: Float[Tensor, "b p d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return the mean of the patch features, taken in float32 or better."""
    return patches.mean(dim=1, dtype=wide_dtype(patches))


def mean_plus_max(prefix: Float[Tensor, "b p d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return mean + maximum of the patch features in float32 or better; patches that tie for it share the gradient.

    Source: OBD-SD (arXiv 2211.07566), "double" pooling of its 512-d networks; Proxy-Anchor (arXiv 2003.13911).
    """
    average = mean(prefix, patches)
    return average + patches.amax(dim=1).to(average.dtype)


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": class_token,
    "mean": mean,
    "mean+max": mean_plus_max,
}


def _with_prefix_and_positions(net: Any, patches: Tensor) -> Tensor:
    """Put class and register tokens before patches (b rows columns d), add the positions of that grid."""
    grid = (patches.shape[1], patches.shape[2])
    tokens = patches.flatten(1, 2)
    num_prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    positions = None
    if net.pos_embed is not None:
        positions = resample_pos_embed(net.pos_embed, num_prefix, net.patch_embed.grid_size, grid)
    if positions is not None and net.no_embed_class:
        tokens = tokens + positions
    prefix = [
        token.expand(len(tokens), -1, -1) for token in (net.cls_token, net.reg_token) if token is not None
    ]
    tokens = torch.cat([*prefix, tokens], dim=1)
    if positions is not None and not net.no_embed_class:
        tokens = tokens + positions
    return net.pos_drop(tokens)


def _split(net: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize and split; one of the two norms is the identity, depending on how the network pools."""
    tokens = net.fc_norm(net.norm(tokens))
    return tokens[:, : net.num_prefix_tokens], tokens[:, net.num_prefix_tokens :]


def _vit_tokens(net: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = _with_prefix_and_positions(net, net.patch_embed(images))
    return _split(net, run_blocks(net, net.norm_pre(tokens)))


def _eva_tokens(net: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    patches = net.patch_embed(images)
    rotation = None if net.rope is None else net.rope.get_embed(shape=patches.shape[1:3])
    tokens = net.norm_pre(_with_prefix_and_positions(net, patches))
    ropes = rotation if net.rope_mixed and rotation is not None else [rotation] * len(net.blocks)
    return _split(net, run_blocks(net, tokens, [{"rope": rope} for rope in ropes]))


def _swin_tokens(net: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = net.forward_features(images).flatten(1, 2)
    return tokens[:, :0], tokens


def _map_tokens(net: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    tokens = net.forward_features(images).flatten(2).transpose(1, 2)
    return tokens[:, :0], tokens


# How each of timm's modules gives (tokens before the patches, patch features), both after the final norm.
TOKENS: dict[type, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    VisionTransformer: _vit_tokens,
    Eva: _eva_tokens,
    SwinTransformer: _swin_tokens,
    SwinTransformerV2: _swin_tokens,
    ResNet: _map_tokens,
    EfficientNet: _map_tokens,
}
