"""Large photographs decoded at a fraction of their size: by how much, and which source pixels a reduced pixel stands for."""

import math
from collections.abc import Iterable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float64, UInt8
from torch import Tensor

# Side of an image over side of the reduced one -> how OpenCV calls it.
REDUCTIONS = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
# Smaller images are decoded whole: little would be won, and most data sets stay as they are to the last bit.
LARGE = 2_000_000  # pixels
# A box keeps at least this many reduced pixels along each side per pixel of its crop.
MARGIN = 1.5

# EXIF orientation -> axes exchanged; then, of the upright image: columns reversed, rows reversed.
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
    """Where the pixels of an image lie in the source image: pixel k covers left + k * reduction and ``reduction`` on.

    Height and width are those of the source, in pixels. Left and top are 0, or negative where the first reduced pixel
    hangs over the edge (as the last one may).
    """

    height: int
    width: int
    reduction: int = 1
    left: int = 0
    top: int = 0

    def snap(
        self, boxes: Float64[np.ndarray, "m 4"]
    ) -> tuple[Float64[np.ndarray, "m 4"], Float64[np.ndarray, "m 4"]]:
        """Return the nearest boxes (x0 y0 x1 y1, source pixels) that lie on whole reduced pixels, and the same in those."""
        if self.reduction == 1:
            return boxes, boxes
        start, end = np.array([self.left, self.top] * 2), np.array([self.width, self.height] * 2)
        first = -(start // self.reduction)  # a pixel that hangs over the edge stands for less than it should
        last = (end - start) // self.reduction
        cells = np.clip(np.floor((boxes - start) / self.reduction + 0.5), first, last)
        return cells * self.reduction + start, cells


def choose_reduction(
    height: int, width: int, wanted: Iterable[tuple[float, int]], aspect: tuple[float, float]
) -> int:
    """Return the largest of 8, 4, 2, 1 that leaves every box MARGIN times as many pixels a side as its crop has; 1 below LARGE.

    wanted: (smallest share of the area, size of the crop in pixels) of each kind of crop; aspect: limits of width /
    height of a box. So the choice depends on the size of the image and the settings, not on what is drawn.

    What it costs, measured on 12 megapixels against crops of the whole image: 0.2 to 0.3 of 255 levels on average (PSNR
    54 dB) on a smooth made photograph, 0.5 where a crop has just MARGIN pixels (51 dB); 2 to 4 levels (35 to 38 dB) on
    the worst we could draw, white lines one pixel high. What it saves there: 37 instead of 102 ms an image.
    """
    if height * width < LARGE:
        return 1
    narrowest = min(aspect[0], 1 / aspect[1])
    room = min(
        min(math.sqrt(share * height * width * narrowest), height, width) / size for share, size in wanted
    )
    return max((reduction for reduction in REDUCTIONS if room >= MARGIN * reduction), default=1)


def turned(image: UInt8[Tensor, "3 h w"], orientation: int) -> UInt8[Tensor, "3 h2 w2"]:
    """Return pixels stored in an EXIF orientation (1..8; anything else counts as upright) the right way up."""
    exchanged, columns, rows = TURNS.get(orientation, TURNS[1])
    upright = image.transpose(1, 2) if exchanged else image
    backwards = [axis for axis, is_reversed in ((1, rows), (2, columns)) if is_reversed]
    return upright.flip(backwards) if backwards else upright


def upright_grid(height: int, width: int, reduction: int, orientation: int) -> Grid:
    """Return the grid of an image of ``height`` x ``width`` stored pixels that was reduced, then turned upright."""
    exchanged, columns, rows = TURNS.get(orientation, TURNS[1])
    if exchanged:
        height, width = width, height

    def start(length: int, is_reversed: bool) -> int:
        return length - math.ceil(length / reduction) * reduction if is_reversed else 0

    return Grid(height, width, reduction, left=start(width, columns), top=start(height, rows))
