"""Photographs of many megapixels made as small as training needs them, once, instead of in every epoch."""

import io
import warnings

import cv2
import numpy as np
from PIL import Image

from glsd.data.decode import DECODE_ERRORS, FORMATS, decode
from glsd.errors import BrokenImage, UserError

JPEG_QUALITY = 95  # with color as fine as brightness (4:4:4): the second coding costs next to nothing visible
LOSSY = ("JPEG", "MPO", "WEBP")
PRE_SHRINK = (
    3  # times the target: what is larger is first averaged down to it, which Lanczos cannot tell afterwards
)


def check_short_side(short_side: int | None) -> None:
    """Raise UserError unless it is None or at least 1."""
    if short_side is not None and short_side < 1:
        raise UserError(f"short_side is {short_side}: expected a number of pixels of at least 1, such as 512")


def shorten(raw: bytes, short_side: int) -> tuple[bytes, str, str] | None:
    """Return (bytes, extension, "width x height" before) of an image made smaller, or None if it is small enough.

    The pixels are those of ``decode`` (upright, RGB, no alpha), resized with Lanczos; the aspect ratio stays. A lossy
    original becomes a JPEG of JPEG_QUALITY, a lossless one a PNG, gray stays gray. An RGB color profile is kept as it is;
    EXIF, which holds the place of a photograph, is not. Raises BrokenImage if it cannot be decoded.
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
