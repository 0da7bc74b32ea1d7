"""Resizing large photographs once, when they are packed, instead of in every epoch."""

import io
import warnings

import cv2
import numpy as np
from PIL import Image

from glsd.data.decode import DECODE_ERRORS, FORMATS, decode
from glsd.errors import BrokenImage

JPEG_QUALITY = 95  # with full color resolution (4:4:4): the second coding is hardly visible
LOSSY = ("JPEG", "MPO", "WEBP")
# An image of more than this many times the target size is averaged down to it first: faster, and Lanczos hides it.
PRE_SHRINK = 3


def shorten(raw: bytes, short_side: int) -> tuple[bytes, str, str] | None:
    """Resize an image file whose short side is longer than ``short_side`` pixels; return None for a smaller one.

    Returns (bytes, extension, original "{width}x{height}"). The pixels are those of ``decode`` (upright, RGB, no alpha),
    resized with Lanczos; the aspect ratio stays. A lossy original becomes a JPEG, a lossless one a PNG; gray stays gray. An
    RGB color profile is kept; EXIF, which may tell where a photograph was taken, is not. Raises BrokenImage if the image
    cannot be decoded.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(io.BytesIO(raw), formats=FORMATS) as header:
                kind, mode, profile = header.format, header.mode, header.info.get("icc_profile")
                size = header.size
        except DECODE_ERRORS as error:
            raise BrokenImage(str(error)) from error
    if min(size) <= short_side:
        return None
    pixels = decode(raw).permute(1, 2, 0).numpy()
    height, width = pixels.shape[:2]
    scale = short_side / min(height, width)
    target = max(short_side, round(width * scale)), max(short_side, round(height * scale))
    image = Image.fromarray(_resized(pixels, target))
    if mode == "L":
        image = image.getchannel(0)
    file = io.BytesIO()
    keep = {"icc_profile": profile} if profile and profile[16:20] == b"RGB " and image.mode == "RGB" else {}
    if kind in LOSSY:
        image.save(file, "JPEG", quality=JPEG_QUALITY, subsampling=0, **keep)
    else:
        image.save(file, "PNG", **keep)
    return file.getvalue(), "jpg" if kind in LOSSY else "png", f"{width}x{height}"


def _resized(pixels: np.ndarray, target: tuple[int, int]) -> np.ndarray:
    height, width = pixels.shape[:2]
    between = target[0] * PRE_SHRINK, target[1] * PRE_SHRINK
    if between[0] < width and between[1] < height:
        pixels = cv2.resize(np.ascontiguousarray(pixels), between, interpolation=cv2.INTER_AREA)
    return np.asarray(Image.fromarray(pixels).resize(target, Image.Resampling.LANCZOS))
