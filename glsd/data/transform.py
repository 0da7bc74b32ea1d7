"""The transform of evaluation and inference: resize the short side, cut a square from the center, normalize."""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, UInt8
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

from glsd.data.decode import from_pillow
from glsd.data.photometric import normalize
from glsd.errors import BrokenImage, UserError

# Longer images are cut to this aspect before the resize: only the center is used, and 1 x 100000 must not become gigabytes.
MAX_ASPECT = 8
RESIZE_TO_CROP = 256 / 224  # the margin around the center crop in DINO's protocol (arXiv 2104.14294)


class Sizes(NamedTuple):
    """Preprocessing in pixels: resize the short side, then cut a square from the center."""

    resize: int
    crop: int


def choose_sizes(native: int, *, crop: int | None = None, resize: int | None = None) -> Sizes:
    """Return the configured sizes; the default crop is ``native``, with the protocol's margin around it."""
    crop = native if crop is None else crop
    return Sizes(round(crop * RESIZE_TO_CROP) if resize is None else resize, crop)


def check_sizes(sizes: Sizes) -> None:
    """Raise UserError unless the crop fits into the resized image."""
    if not 1 <= sizes.crop <= sizes.resize:
        raise UserError(
            f"crop {sizes.crop} of images resized to {sizes.resize}: expected 1 <= crop <= resize"
        )


def center_square(image: UInt8[Tensor, "3 h w"], *, resize_to: int, crop: int) -> UInt8[Tensor, "3 s s"]:
    """Return the center square of ``crop`` pixels of an image resized to a short side of ``resize_to``."""
    height, width = image.shape[1:]
    longest = MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        image = functional.center_crop(image, [min(height, longest), min(width, longest)])
    resized = functional.resize(image, [resize_to], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(resized, [crop, crop])


class EvalTransform:
    """A picture -> the input of a network, exactly as ``glsd evaluate`` makes it.

    resize: short side in pixels, bicubic and antialiased. crop: side of the square cut from the center. The result is
    normalized with ImageNet's mean and deviation, as in training. Raises UserError for a crop that does not fit.
    Source: evaluation protocol of DINO (arXiv 2104.14294).
    """

    def __init__(self, *, resize: int, crop: int):
        self.resize, self.crop = resize, crop
        check_sizes(Sizes(resize, crop))

    def __call__(self, image: Any) -> Float32[Tensor, "3 s s"]:
        """Return the input (3, crop, crop) for a Pillow image, an array (h, w, 3) or a tensor (3, h, w), both uint8 RGB."""
        return normalize(self.square(image)[None])[0]

    def square(self, image: Any) -> UInt8[Tensor, "3 s s"]:
        """Return the square before it is normalized. Raises UserError for another kind, shape or type of image."""
        return center_square(as_pixels(image), resize_to=self.resize, crop=self.crop)

    def __repr__(self) -> str:
        return f"EvalTransform(resize={self.resize}, crop={self.crop})"


def as_pixels(image: Any) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of a Pillow image, an array (h, w, 3) or a tensor (3, h, w), which must be uint8 RGB."""
    if isinstance(image, Image.Image):
        try:
            return from_pillow(image)
        except BrokenImage as problem:
            raise UserError(f"an image cannot be used: {problem}") from problem
    if isinstance(image, np.ndarray):
        if image.ndim == 3 and image.shape[2] == 3 and image.dtype == np.uint8:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    elif isinstance(image, Tensor):
        if image.ndim == 3 and image.shape[0] == 3 and image.dtype == torch.uint8:
            return image.cpu()
    else:
        raise UserError(
            f"an image is a {type(image).__name__}: expected a Pillow image, an array or a tensor"
        )
    raise UserError(
        f"an image is {image.dtype} of shape {tuple(image.shape)}: expected uint8 RGB, (h, w, 3) as an array or (3, h, w) "
        "as a tensor"
    )
