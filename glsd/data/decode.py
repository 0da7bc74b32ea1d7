"""From the bytes of one image file to uint8 RGB pixels, or to a reason why not."""

import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from glsd.data.opencv import single_threaded
from glsd.data.reduced import (
    REDUCTIONS,
    Grid,
    turned,
    upright_grid,
)
from glsd.errors import BrokenImage, one_line

# Pillow's own hard limit, applied to every format: a few bytes of header may claim any size, and the memory for
# it would be taken before a single pixel is read.
MAX_PIXELS = 178_956_970
# What JPEG can say. Pillow keeps a pointer for every row: one column of MAX_PIXELS took 6 GB.
MAX_SIDE = 65_535
# Encoders write about ten. Each makes libjpeg go over the whole image: a megabyte can hold 90,000, for half an hour.
MAX_SCANS = 100

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
    cv2.error,
)


# Second bytes of JPEG markers.
END, SCAN = 0xD9, 0xDA
ALONE = frozenset(
    (0x00, 0x01, *range(0xD0, 0xD9))
)  # no length follows: restarts, start of image, no marker at all
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
# Behind coded data too, in which 0x00 and restarts follow a 0xff.
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# torchvision and OpenCV put their own source file and line before the message.
OWN_PLACES = re.compile(r"^(decode_jpeg, .*?:[0-9]+, |OpenCV\(.*?\) .*?:[0-9]+: )")
ORIENTATION = 0x0112  # the EXIF tag


def decode(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an image file as RGB, upright (EXIF orientation applied), channels last in memory.

    RGB and gray JPEG go through libjpeg-turbo, the other FORMATS through Pillow. Gray is repeated; an alpha channel is
    dropped; gray of more than 8 bits is read as 0..65535 and keeps the high byte of those 16 bits, whatever its values
    are (12 bits in a 16-bit TIFF stay dark); of an animation the first frame is taken.
    Raises BrokenImage for empty, truncated or unreadable files, for float gray or gray beyond 16 bits, and for those
    whose header claims more than MAX_PIXELS or MAX_SIDE, or a JPEG of more than MAX_SCANS. Damage inside an otherwise
    complete JPEG stream cannot be told from noise and passes; what follows its end (a film, a depth map) is ignored.
    """
    return decode_reduced(raw, lambda height, width: 1)[0]


def decode_reduced(
    raw: bytes, reduction_of: Callable[[int, int], int]
) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    """Return what decode() does, or a reduced image, and where its pixels lie in the whole one.

    reduction_of: from height and width in pixels (of a rotated image perhaps exchanged) to 1, 2, 4 or 8. Only RGB and
    gray JPEG are reduced, by libjpeg-turbo: from a block of 8 x 8 it makes 8 / reduction pixels a side out of the
    block's low frequencies, without ever computing the others: see choose_reduction() for what that costs.
    Raises BrokenImage as decode() does.
    """
    if not raw:
        raise BrokenImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns where it only guesses; here an image is readable or broken
            if raw[:3] == b"\xff\xd8\xff":
                return _decode_jpeg(raw, reduction_of)
            return _whole(_decode_other(raw))
    except DECODE_ERRORS as error:
        raise BrokenImage(_reason(error)) from error


def _decode_jpeg(raw: bytes, reduction_of: Callable[[int, int], int]) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    header = JpegImagePlugin.JpegImageFile(io.BytesIO(raw))  # reads the header only
    _check_size(*header.size)
    # libjpeg fills up with gray where the data end, so completeness is ours to check.
    if not _has_end(raw):
        raise BrokenImage("truncated JPEG (no end-of-image marker)")
    # Counted with care only where there may be too many: those bytes also stand in a film behind the image.
    if raw.count(START_OF_SCAN) > MAX_SCANS and _num_scans(raw) > MAX_SCANS:
        raise BrokenImage(f"JPEG of more than {MAX_SCANS} scans")
    if header.mode not in ("RGB", "L"):
        return _whole(_to_rgb(header))
    orientation = _orientation(header)
    reduction = reduction_of(header.height, header.width)
    if reduction > 1:
        grid = upright_grid(header.height, header.width, reduction, orientation)
        return turned(_decode_jpeg_reduced(raw, reduction), orientation), grid
    buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return _whole(turned(decode_image(buffer, mode=ImageReadMode.RGB), orientation))


def _orientation(header: Image.Image) -> int:
    """The orientation that the EXIF data of a JPEG ask for; 1 without EXIF or where they are damaged.

    One reader for whole and reduced images: torchvision's own takes the first segment of the kind, whatever it holds, and
    Pillow's getexif() obeys XMP too, so the same photograph would be upright or not.
    """
    exif = Image.Exif()
    try:
        exif.load(header.info.get("exif", b""))
        orientation = exif.get(ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


def _decode_jpeg_reduced(raw: bytes, reduction: int) -> UInt8[Tensor, "3 h w"]:
    flags = REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    with single_threaded():
        pixels = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), flags)
        if pixels is None:
            raise BrokenImage("unreadable: libjpeg-turbo cannot decode it at a reduced size")
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _whole(image: UInt8[Tensor, "3 h w"]) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    return image, Grid(height=image.shape[1], width=image.shape[2])


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
            end = raw.find(END_OF_IMAGE, place)
            return end >= 0 and raw.find(START_OF_IMAGE, place, end) < 0
        if marker == END:
            return False
        if marker == 0xFF:  # any number of them may stand before a marker
            place += 1
        elif marker in ALONE:
            place += 2
        else:
            place += 2 + int.from_bytes(raw[place + 2 : place + 4])
    return False


def _num_scans(raw: bytes) -> int:
    """Count the scans as libjpeg meets them, segment by segment to the end of the image."""
    place, scans = 2, 0
    while (found := MARKER.search(raw, place)) and found[1] != END_OF_IMAGE[1:]:
        scans += found[1] == START_OF_SCAN[1:]
        place = found.end()
        if found[1][0] not in ALONE:
            place += int.from_bytes(raw[place : place + 2])
    return scans


def _decode_other(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    # Opening an animated WebP takes memory for its canvas, two or three times.
    if raw[:4] == b"RIFF" and raw[8:16] == b"WEBPVP8X":
        _check_size(*(1 + int.from_bytes(raw[place : place + 3], "little") for place in (24, 27)))
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    _check_size(*image.size)
    return _to_rgb(image)


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise BrokenImage(f"{width} x {height} pixels: a side is over the limit of {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def _to_rgb(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    ImageOps.exif_transpose(image, in_place=True)  # a copy otherwise, even of an upright one
    if image.mode.startswith(("I", "F")):
        # convert("RGB") would clip instead of scale, and turn every 16-bit image white.
        gray = np.asarray(image)
        if gray.dtype.kind == "f" or gray.min() < 0 or gray.max() > 65535:
            raise BrokenImage(f"pixels of {gray.dtype} outside 0..65535 or not integers")
        pixels = np.repeat((gray >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    else:
        pixels = np.array(image if image.mode == "RGB" else image.convert("RGB"))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image of a known format"
    return f"unreadable: {OWN_PLACES.sub('', one_line(error))[:200]}"
