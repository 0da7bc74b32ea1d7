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

# Formats we mean to read, as Pillow calls them (JPEG includes its MPO, several in one file). Others it would take from
# the bytes whatever the file is called, among them EPS, which it hands to Ghostscript: a program that runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")

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


# Second bytes of JPEG markers.
END, SCAN = 0xD9, 0xDA
ALONE = frozenset(
    (0x00, 0x01, *range(0xD0, 0xD9))
)  # no length follows: restarts, start of image, no marker at all
START_OR_END = re.compile(rb"\xff[\xd8\xd9]")


class BrokenImage(Exception):
    """These bytes are not an image that can be used; the message is the reason, in a few words."""


def decode(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an image file as RGB, upright (EXIF orientation applied), channels last in memory.

    RGB and gray JPEG go through libjpeg-turbo, the other FORMATS through Pillow. Gray is repeated; an alpha channel is
    dropped; gray of more than 8 bits is read as 0..65535 and keeps the high byte of those 16 bits, whatever its values
    are (12 bits in a 16-bit TIFF stay dark); of an animation the first frame is taken.
    Raises BrokenImage for empty, truncated or unreadable files, for float gray or gray beyond 16 bits, and for those
    whose header claims more than MAX_PIXELS. Damage inside an otherwise complete JPEG stream cannot be told from noise
    and passes; what follows its end (a film, a depth map) is ignored.
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
    # libjpeg fills up with gray where the data end, so completeness is ours to check.
    if not _has_end(raw):
        raise BrokenImage("truncated JPEG (no end-of-image marker)")
    if header.mode not in ("RGB", "L"):
        return _to_rgb(header)
    buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return decode_image(buffer, mode=ImageReadMode.RGB, apply_exif_orientation=True)


def _has_end(raw: bytes) -> bool:
    """Tell whether the scans of a JPEG are followed by its end-of-image marker.

    A thumbnail in an earlier segment has an end of its own, and anything may follow the file's: so go from segment to
    segment to the first scan, and look from there. Coded data cannot imitate a start or end of image: a byte 0xff in
    them is followed by 0x00 or a restart marker. Source: ITU-T T.81, annex B.
    """
    place = 2
    while (place := raw.find(b"\xff", place)) >= 0 and place + 4 <= len(raw):
        marker = raw[place + 1]
        if marker == SCAN:
            found = START_OR_END.search(raw, place)
            return found is not None and found[0][1] == END
        if marker == END:
            return False
        if marker == 0xFF:  # any number of them may stand before a marker
            place += 1
        elif marker in ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(raw[place + 2 : place + 4])
    return False


def _decode_other(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
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
        pixels = np.repeat((gray >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    else:
        pixels = np.array(image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # torchvision puts its own source file and line before libjpeg's message.
    return f"unreadable: {re.sub(r'^decode_jpeg, .*?:[0-9]+, ', '', lines[0])[:200]}"
