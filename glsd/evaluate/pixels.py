"""The pixels themselves as features: what a network has to beat."""

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from glsd.data.photometric import MEAN, STD
from glsd.errors import UserError

NAME = "pixels"
SIDE = 16  # pixels of the small image, unless the name says another number


class Pixels(nn.Module):
    """Makes a small image of an image, by the mean of areas, and returns its numbers in 0..1."""

    def __init__(self, side: int):
        super().__init__()
        self.side, self.embed_dim, self.stride = side, 3 * side * side, 1

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n 3"]]:
        """Return the numbers of the small images, and its pixels one by one. images: normalized, as for a network."""
        mean, std = (images.new_tensor(numbers)[:, None, None] for numbers in (MEAN, STD))
        small = F.interpolate(images * std + mean, size=(self.side, self.side), mode="area")
        return small.flatten(1), small.flatten(2).mT


def named_pixels(name: str) -> Pixels | None:
    """Return the pixels that 'pixels' or 'pixels:SIDE' names; None for another name. Raises UserError for a bad side."""
    word, _, side = name.partition(":")
    if word != NAME:
        return None
    if not ((side.isascii() and side.isdecimal()) or not side) or (side and not 1 <= int(side) <= 224):
        raise UserError(f"model {name!r}: expected pixels, or pixels:SIDE with a side of 1 to 224")
    return Pixels(int(side or SIDE))


def check_unchosen(settings: Mapping[str, Any]) -> None:
    """Raise UserError for the first setting that chooses a network, of which pixels have none."""
    for name, value in settings.items():
        if value:
            raise UserError(f"{name} chooses a network, and model pixels has none: leave it out")


def centered(
    train: Float[Tensor, "n d"], val: Float[Tensor, "q d"]
) -> tuple[Float[Tensor, "n d"], Float[Tensor, "q d"]]:
    """Return both sets without the mean of the train set, which most of the cosine of two pictures is made of."""
    mean = train.double().mean(0)
    return (train.double() - mean).float(), (val.double() - mean).float()
