"""Learned position embeddings at another resolution than the one they were made for."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glsd.precision import widened


def resample_pos_embed(
    pos_embed: Float[Tensor, "1 n d"],
    num_prefix: int,
    grid_in: tuple[int, int],
    grid_out: tuple[int, int],
) -> Float[Tensor, "1 m d"]:
    """Return the position embedding for grid ``grid_out`` (rows, columns), made from one for ``grid_in``.

    num_prefix: leading entries without a place (class token, registers), copied; the rest is row-major, so n
    = num_prefix + rows_in * columns_in. Bicubic, half-pixel centers, no antialiasing, scale exactly grid_out
    / grid_in; computed in float32 or better, same dtype as pos_embed. timm antialiases here, which moves a
    14x14 -> 6x6 embedding by up to two standard deviations. Raises ValueError if n does not fit grid_in.
    Source: DINO (arXiv 2104.14294), without the 0.1 that its code adds to the target grid.
    """
    if pos_embed.shape[1] != num_prefix + grid_in[0] * grid_in[1]:
        raise ValueError(
            f"{pos_embed.shape[1]} position embeddings are not {num_prefix} + {grid_in[0]}x{grid_in[1]}"
        )
    if grid_in == grid_out:
        return pos_embed
    prefix, places = pos_embed[:, :num_prefix], pos_embed[:, num_prefix:]
    image = widened(places.unflatten(1, grid_in).permute(0, 3, 1, 2))
    with torch.autocast(image.device.type, enabled=False):
        image = F.interpolate(image, size=grid_out, mode="bicubic", align_corners=False)
    return torch.cat([prefix, image.permute(0, 2, 3, 1).flatten(1, 2).to(prefix.dtype)], dim=1)
