"""The tokens of a timm network for images of any size, and the pooling of tokens to one vector per image."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from timm.models.efficientnet import EfficientNet
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from glsd.errors import UserError
from glsd.precision import wide_dtype, widened


def class_token(prefix: Float[Tensor, "b p d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return the class token, the first of the prefix tokens."""
    return prefix[:, 0]


def mean(prefix: Float[Tensor, "b p d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return the mean of the patch features in float32 or better."""
    return patches.mean(dim=1, dtype=wide_dtype(patches))


def mean_plus_max(prefix: Float[Tensor, "b p d"], patches: Float[Tensor, "b n d"]) -> Float[Tensor, "b d"]:
    """Return mean + maximum of the patch features in float32 or better; patches that tie for the maximum share its gradient.

    Source: OBD-SD (arXiv 2211.07566), "double" pooling of its 512-d networks; Proxy-Anchor (arXiv 2003.13911).
    """
    average = mean(prefix, patches)
    return average + patches.amax(dim=1).to(average.dtype)


POOLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cls": class_token,
    "mean": mean,
    "mean+max": mean_plus_max,
}


def resample_pos_embed(
    pos_embed: Float[Tensor, "1 n d"],
    num_prefix: int,
    grid_in: tuple[int, int],
    grid_out: tuple[int | torch.SymInt, int | torch.SymInt],
) -> Float[Tensor, "1 m d"]:
    """Resample a learned position embedding from grid ``grid_in`` (rows, columns) to ``grid_out``.

    num_prefix: leading entries without a place, which are copied. Bicubic in float32 or better, without antialiasing (timm's
    moves a 14x14 -> 6x6 embedding by up to two standard deviations). Source: DINO, without the 0.1 that its code adds.
    """
    if not torch.compiler.is_exporting() and grid_in == grid_out:  # an exported graph takes any grid
        return pos_embed
    prefix, places = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    image = widened(places.unflatten(1, grid_in).permute(0, 3, 1, 2))
    with torch.autocast(image.device.type, enabled=False):
        image = F.interpolate(image, size=grid_out, mode="bicubic", align_corners=False)  # type: ignore[arg-type]
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(prefix.dtype)], dim=1)


def _with_prefix_and_positions(net: Any, patches: Tensor) -> Tensor:
    """Prepend class and register tokens to patches (b rows columns d), and add the positions of that grid."""
    grid, tokens = (patches.shape[1], patches.shape[2]), patches.flatten(1, 2)
    num_prefix = 0 if net.no_embed_class else net.num_prefix_tokens
    positions = net.pos_embed
    if positions is not None:
        positions = resample_pos_embed(positions, num_prefix, net.patch_embed.grid_size, grid)
    if positions is not None and net.no_embed_class:
        tokens = tokens + positions
    prefix = [token for token in (net.cls_token, net.reg_token) if token is not None]
    tokens = torch.cat([*(token.expand(tokens.shape[0], -1, -1) for token in prefix), tokens], dim=1)
    if positions is not None and not net.no_embed_class:
        tokens = tokens + positions
    return net.pos_drop(tokens)


def _split(net: Any, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Normalize and split into prefix and patch tokens; depending on the network's pooling, one of the norms is the identity."""
    tokens = net.fc_norm(net.norm(tokens))
    return tokens[:, : net.num_prefix_tokens], tokens[:, net.num_prefix_tokens :]


def run_blocks(
    net: Any, tokens: Float[Tensor, "b n d"], arguments: Sequence[dict[str, Any]] | None = None
) -> Float[Tensor, "b n d"]:
    """Return the tokens after all blocks of ``net``; arguments: further arguments of each block, such as its rope."""
    checkpointing = net.grad_checkpointing and torch.is_grad_enabled()
    extras = arguments or [{}] * len(net.blocks)
    for block, extra in zip(net.blocks, extras, strict=True):
        # The reentrant kind cannot run a block twice (once a resolution) under DDP.
        if checkpointing:
            tokens = checkpoint(block, tokens, use_reentrant=False, **extra)
        else:
            tokens = block(tokens, **extra)
    return tokens


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


# timm network -> (prefix tokens, patch features), both after the final norm.
TOKENS: dict[type, Callable[[Any, Tensor], tuple[Tensor, Tensor]]] = {
    VisionTransformer: _vit_tokens,
    Eva: _eva_tokens,
    SwinTransformer: _swin_tokens,
    SwinTransformerV2: _swin_tokens,
    ResNet: _map_tokens,
    EfficientNet: _map_tokens,
}


def attention_of(net: Any, forward: Callable[[], Any]) -> Float[Tensor, "b a n"]:
    """Return the class token's attention to the patches in the last block of ``net`` while ``forward()`` runs, by head.

    Raises UserError for a network without a class token.
    """
    if getattr(net, "cls_token", None) is None:
        raise UserError(
            f"a {type(net).__name__} without class token has no attention of it: show another picture"
        )
    attention, kept = net.blocks[-1].attn, []
    was_fused, attention.fused_attn = attention.fused_attn, False  # the fused kernel never holds the shares
    handle = attention.attn_drop.register_forward_hook(lambda _, given, result: kept.append(given[0]))
    try:
        forward()
    finally:
        handle.remove()
        attention.fused_attn = was_fused
    return kept[-1][:, :, 0, net.num_prefix_tokens :].float()
