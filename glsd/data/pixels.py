"""From stored to upright pixels: the limits of size, the EXIF orientation, and the grid of a reduced image."""

import math
import struct
import zlib
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image
from torch import Tensor

from glsd.errors import BrokenImage

# Pillow's own limit, here for every format. A header of a few bytes may claim any size, and the memory for it is
# allocated before a single pixel is read.
MAX_PIXELS = 178_956_970
# The limit of JPEG. Pillow keeps a pointer for every row: one column of MAX_PIXELS took 6 GB.
MAX_SIDE = 65_535

# What Pillow, torchvision, OpenCV and tifffile raise on damaged files.
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


def check_size(width: int, height: int) -> None:
    """Raise BrokenImage for an image that would take too much memory. Called before any is allocated."""
    if max(width, height) > MAX_SIDE:
        raise BrokenImage(f"{width} x {height} pixels: a side is over the limit of {MAX_SIDE}")
    if width * height > MAX_PIXELS:
        raise BrokenImage(f"{width} x {height} pixels are more than the limit of {MAX_PIXELS}")


def exif_orientation(exif: bytes) -> int:
    """Return the orientation that EXIF data name; 1 where they name none or are damaged.

    Every format and size needs the same reader. torchvision takes the first EXIF segment, whatever it holds, and Pillow's
    getexif() also follows XMP: the same photograph would be upright in one and not in the other.
    """
    entries = Image.Exif()
    try:
        entries.load(exif)
        orientation = entries.get(ORIENTATION, 1)
    except DECODE_ERRORS:
        return 1
    return orientation if isinstance(orientation, int) else 1


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
