"""Resizing large photographs once, when they are packed, instead of in every epoch."""

import io

import cv2
import numpy as np
from PIL import Image

from glsd.data.decode import decode, read_header

JPEG_QUALITY = 95  # with full color resolution (4:4:4): the second coding is hardly visible
LOSSY = ("jpg", "webp")
MAX_PROFILE = 1 << 20  # bytes: many readers refuse a PNG with a larger color profile
# An image of more than this many times the target size is averaged down to it first: faster, and Lanczos hides it.
PRE_SHRINK = 3


def shorten(raw: bytes, short_side: int) -> tuple[bytes, str, str] | None:
    """Resize an image file whose short side is longer than ``short_side`` pixels; return None for a smaller one.

    Returns (bytes, extension, original "{width}x{height}"). The pixels are those of ``decode`` (upright, RGB, no alpha),
    resized with Lanczos; the aspect ratio stays. A lossy original becomes a JPEG, a lossless one a PNG; gray stays gray. An
    RGB color profile of at most MAX_PROFILE bytes is kept; EXIF, which may tell where a photograph was taken, is not.
    Raises BrokenImage if the image cannot be decoded.
    """
    header = read_header(raw)
    if min(header.height, header.width) <= short_side:
        return None
    pixels = decode(raw).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    target = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    image = Image.fromarray(_resized(pixels, target))
    if header.is_gray:
        image = image.getchannel(0)
    file = io.BytesIO()
    is_kept = header.profile[16:20] == b"RGB " and image.mode == "RGB" and len(header.profile) <= MAX_PROFILE
    keep = {"icc_profile": header.profile} if is_kept else {}
    if header.kind in LOSSY:
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, **keep)
    else:
        image.save(file, "PNG", **keep)
    return file.getvalue(), "jpg" if header.kind in LOSSY else "png", f"{width}x{height}"


def _resized(pixels: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    between = target[0] * PRE_SHRINK, target[1] * PRE_SHRINK
    if between[0] < width and between[1] < height:
        pixels = cv2.resize(np.ascontiguousarray(pixels), between, interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))
