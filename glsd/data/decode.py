"""From the bytes of one image file to uint8 RGB pixels, or to a reason why not."""

import io
import re
import struct
import warnings
import zlib

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

# Pillow's own hard limit, applied to every format: a few bytes of header may claim any size, and the memory for
# it would be taken before a single pixel is read.
MAX_PIXELS = 178_956_970

# What Pillow's and torchvision's decoders raise on damaged files, beside their own error types.
DECODE_ERRORS = (
    OSError,
    EOFError,
    SyntaxError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


class BrokenImage(Exception):
    """These bytes are not an image that can be used; the message is the reason, in a few words."""


def decode(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an image file as RGB, upright (EXIF orientation applied), channels last in memory.

    RGB and gray JPEG go through libjpeg-turbo, everything else that Pillow knows through Pillow. Gray is repeated;
    an alpha channel is dropped; 16-bit gray keeps its high byte; of an animation the first frame is taken.
    Raises BrokenImage for empty, truncated or unreadable files, and for those whose header claims more than
    MAX_PIXELS. Damage inside an otherwise complete JPEG stream cannot be told from noise and passes.
    """
    if not raw:
        raise BrokenImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns where it only guesses; here an image is readable or broken
            return _decode_jpeg(raw) if raw[:3] == b"\xff\xd8\xff" else _decode_other(raw)
    except DECODE_ERRORS as error:
        raise BrokenImage(_reason(error)) from error


def _decode_jpeg(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    header = JpegImagePlugin.JpegImageFile(io.BytesIO(raw))  # reads the header only
    _check_size(header)
    # libjpeg fills up with gray when zeros stand in for a lost end: insist on an end-of-image marker after the
    # last start of a scan (inside coded data the byte 0xff is followed by 0x00 or a restart marker, never by these).
    if raw.rfind(b"\xff\xd9") < raw.rfind(b"\xff\xda"):
        raise BrokenImage("truncated JPEG (no end-of-image marker)")
    if header.mode not in ("RGB", "L"):
        return _to_rgb(header)
    buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _decode_other(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    image = Image.open(io.BytesIO(raw))
    _check_size(image)
    return _to_rgb(image)


def _check_size(image: Image.Image) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def _to_rgb(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):
        # convert("RGB") would clip instead of scale, and turn every 16-bit image white.
        gray = np.asarray(image)
        if gray.dtype.kind == "f" or gray.min() < 0 or gray.max() > 65535:
            raise BrokenImage(f"pixels of {gray.dtype} outside 0..65535 or not integers")
        if gray.dtype != np.int32 or gray.max() > 255:
            gray = gray >> 8
        pixels = np.repeat(gray.astype(np.uint8)[:, :, None], 3, axis=2)
    else:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # torchvision puts its own source file and line before libjpeg's message.
    return f"unreadable: {re.sub(r'^decode_jpeg, .*?:[0-9]+, ', '', lines[0])[:200]}"
