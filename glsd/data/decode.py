"""Decoding: the bytes of one image file to uint8 RGB pixels, at full or reduced size, or the reason why not.

A reduced image comes with a Grid: which source pixels each of its pixels stands for.
"""

import io
import math
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float64, UInt8
from PIL import Image, ImageOps, JpegImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from glsd.data.workers import single_threaded
from glsd.errors import BrokenImage, one_line

# Pillow's own limit, here for every format. A header of a few bytes may claim any size, and the memory for it is
# allocated before a single pixel is read.
MAX_PIXELS = 178_956_970
# The limit of JPEG. Pillow keeps a pointer for every row: one column of MAX_PIXELS took 6 GB.
MAX_SIDE = 65_535
# Encoders write about ten. libjpeg goes over the whole image for each: a megabyte can hold 90,000, half an hour of work.
MAX_SCANS = 100

# The formats we read, by Pillow's names (JPEG includes MPO, several images in one file). Pillow would recognize others
# by their bytes, whatever the file is called. One is EPS, which it hands to Ghostscript: a program that runs programs.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF")

# What Pillow, torchvision and OpenCV raise on damaged files.
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
# No length follows these: restarts, start of image, no marker at all.
NO_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
# Any marker, also after coded data, where 0x00 or a restart follows a 0xff that is no marker.
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
# torchvision and OpenCV put their own source file and line before the message.
LIBRARY_SOURCE = re.compile(r"^(decode_jpeg, .*?:[0-9]+, |OpenCV\(.*?\) .*?:[0-9]+: )")

# Side of an image / side of the reduced image -> OpenCV's flag.
REDUCTIONS = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
ORIENTATION = 0x0112  # the EXIF tag
# EXIF orientation -> swap rows and columns?; then, for the upright image: columns reversed?, rows reversed?
TURNS = {
    1: (False, False, False),
    2: (False, True, False),
    3: (False, True, True),
    4: (False, False, True),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}


class Grid(NamedTuple):
    """The place of an image's pixels in the source image: pixel k covers ``reduction`` source pixels from left + k * reduction.

    Height and width are those of the source, in pixels. Left and top are 0, or negative where the first reduced pixel
    extends beyond the edge (as the last one may).
    """

    height: int
    width: int
    reduction: int = 1
    left: int = 0
    top: int = 0

    def snap(self, boxes: Float64[np.ndarray, "m 4"]) -> tuple[np.ndarray, np.ndarray]:
        """Return the nearest boxes (x0 y0 x1 y1) on whole reduced pixels, in source pixels and in reduced pixels."""
        if self.reduction == 1:
            return boxes, boxes
        start, end = np.array([self.left, self.top] * 2), np.array([self.width, self.height] * 2)
        first = -(start // self.reduction)  # leave out a pixel that extends beyond the edge
        last = (end - start) // self.reduction
        cells = np.clip(np.floor((boxes - start) / self.reduction + 0.5), first, last)
        return cells * self.reduction + start, cells


def decode(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an image file as RGB, upright (EXIF orientation applied), channels last in memory.

    RGB and gray JPEG files go through libjpeg-turbo, other FORMATS through Pillow. Gray is repeated and an alpha channel
    dropped. Gray of more than 8 bits is read as 0..65535 and keeps its high byte, so 12 bits in a 16-bit TIFF stay dark.
    The first frame of an animation is taken.
    Raises BrokenImage for empty, truncated or unreadable files, for float gray or gray beyond 16 bits, for more than
    MAX_PIXELS or MAX_SIDE in the header, and for a JPEG of more than MAX_SCANS. Damage inside a complete JPEG stream
    looks like noise and passes. Bytes after its end (a film, a depth map) are ignored.
    """
    return decode_reduced(raw, lambda height, width: 1)[0]


def decode_reduced(
    raw: bytes, reduction_of: Callable[[int, int], int]
) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    """Return the image as decode() does, perhaps at reduced size, and the place of its pixels in the source.

    reduction_of: from stored height and width in pixels (swapped in some EXIF orientations) to 1, 2, 4 or 8. Only RGB and
    gray JPEG files are reduced: libjpeg-turbo never computes the high frequencies. Raises BrokenImage as decode() does.
    """
    if not raw:
        raise BrokenImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where Pillow guesses: here an image is readable or broken
            if raw[:3] == b"\xff\xd8\xff":
                return _decode_jpeg(raw, reduction_of)
            return _whole(_decode_other(raw))
    except DECODE_ERRORS as error:
        raise BrokenImage(_reason(error)) from error


def _decode_jpeg(raw: bytes, reduction_of: Callable[[int, int], int]) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    header = JpegImagePlugin.JpegImageFile(io.BytesIO(raw))  # reads the header only
    _check_size(*header.size)
    # libjpeg fills the rest with gray where the data end, so we check for completeness.
    if not _has_end(raw):
        raise BrokenImage("truncated JPEG (no end-of-image marker)")
    # The exact count is slow, so it is made only if needed: the bytes also occur in a film after the image.
    if raw.count(START_OF_SCAN) > MAX_SCANS and _num_scans(raw) > MAX_SCANS:
        raise BrokenImage(f"JPEG of more than {MAX_SCANS} scans")
    if header.mode not in ("RGB", "L"):
        return _whole(to_rgb(header))
    orientation = _orientation(header)
    reduction = reduction_of(header.height, header.width)
    if reduction > 1:
        grid = upright_grid(header.height, header.width, reduction, orientation)
        return upright(_decode_jpeg_reduced(raw, reduction), orientation), grid
    buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    return _whole(upright(decode_image(buffer, mode=ImageReadMode.RGB), orientation))


def _orientation(header: Image.Image) -> int:
    """Return the EXIF orientation of a JPEG; 1 without EXIF data or with damaged ones.

    Full-size and reduced images need the same reader. torchvision takes the first EXIF segment, whatever it holds, and
    Pillow's getexif() also follows XMP: the same photograph would be upright in one and not in the other.
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


def upright(image: UInt8[Tensor, "3 h w"], orientation: int) -> UInt8[Tensor, "3 h2 w2"]:
    """Return the image upright, from its EXIF orientation (1..8; any other number means upright already)."""
    is_swapped, columns, rows = TURNS.get(orientation, TURNS[1])
    image = image.transpose(1, 2) if is_swapped else image
    backwards = [axis for axis, is_reversed in ((1, rows), (2, columns)) if is_reversed]
    return image.flip(backwards) if backwards else image


def upright_grid(height: int, width: int, reduction: int, orientation: int) -> Grid:
    """Return the grid of an image of ``height`` x ``width`` stored pixels that was reduced, then made upright."""
    is_swapped, columns, rows = TURNS.get(orientation, TURNS[1])
    if is_swapped:
        height, width = width, height

    def start(length: int, is_reversed: bool) -> int:
        return length - math.ceil(length / reduction) * reduction if is_reversed else 0

    return Grid(height, width, reduction, left=start(width, columns), top=start(height, rows))


def _whole(image: UInt8[Tensor, "3 h w"]) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    return image, Grid(height=image.shape[1], width=image.shape[2])


def _has_end(raw: bytes) -> bool:
    """Tell whether an end-of-image marker follows the scans of a JPEG.

    A thumbnail in an earlier segment has its own end, and anything may follow the end of the image. So go from segment to
    segment to the first scan, and search from there. Coded data cannot contain a start or end of image: 0x00 or a restart
    marker follows each byte 0xff in them. Source: ITU-T T.81, annex B.
    """
    place = 2
    while (place := raw.find(b"\xff", place)) >= 0 and place + 4 <= len(raw):
        marker = raw[place + 1]
        if marker == SCAN:
            end = raw.find(END_OF_IMAGE, place)
            return end >= 0 and raw.find(START_OF_IMAGE, place, end) < 0
        if marker == END:
            return False
        if marker == 0xFF:  # any number of these may precede a marker
            place += 1
        elif marker in NO_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(raw[place + 2 : place + 4])
    return False


def _num_scans(raw: bytes) -> int:
    """Return the number of scans that libjpeg would read, from segment to segment to the end of the image."""
    place, scans = 2, 0
    while (found := MARKER.search(raw, place)) and found[1] != END_OF_IMAGE[1:]:
        scans += found[1] == START_OF_SCAN[1:]
        place = found.end()
        if found[1][0] not in NO_LENGTH:
            place += int.from_bytes(raw[place : place + 2])
    return scans


def _decode_other(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    # Pillow allocates the canvas of an animated WebP two or three times when it opens the file.
    if raw[:4] == b"RIFF" and raw[8:16] == b"WEBPVP8X":
        _check_size(*(1 + int.from_bytes(raw[place : place + 3], "little") for place in (24, 27)))
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    _check_size(*image.size)
    return to_rgb(image)


def _check_size(width: int, height: int) -> None:
    if max(width, height) > MAX_SIDE:
        raise BrokenImage(f"{width} x {height} pixels: a side is over the limit of {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def to_rgb(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    ImageOps.exif_transpose(image, in_place=True)  # without in_place it copies even an upright image
    if image.mode.startswith(("I", "F")):
        # convert("RGB") would clip instead of scale: every 16-bit image would turn white.
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
    return f"unreadable: {LIBRARY_SOURCE.sub('', one_line(error))[:200]}"
