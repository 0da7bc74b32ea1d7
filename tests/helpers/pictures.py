"""Small pictures, as files and as arrays."""

import io

import numpy as np
import torch
from PIL import Image


def picture(height: int = 60, width: int = 80, seed: int = 0) -> np.ndarray:
    """A smooth colored picture (h w 3): survives JPEG with small errors."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    return np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def as_array(pixels: torch.Tensor) -> np.ndarray:
    return pixels.permute(1, 2, 0).numpy()
