"""From one image to its crops: what is drawn for each crop, and the one resize that cuts it.

A crop is the pixels inside a box of the source image, resized to a square; its colors are changed later, on
the training device (photometric.py), from numbers that are drawn here.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from glsd.batches import PHOTOMETRIC_FIELDS
from glsd.data.decode import decode_reduced
from glsd.data.opencv import single_threaded
from glsd.data.reduced import choose_reduction
from glsd.errors import UserError
from glsd.rng import Stream, uniforms

NUM_GLOBAL = 2
NUM_TRIES = 10  # draws of a box before the centerd fallback
ASPECT = (3 / 4, 4 / 3)  # width / height of a box
LOG_ASPECT = (math.log(ASPECT[0]), math.log(ASPECT[1]))
BLUR_SIGMA = (0.1, 2.0)  # pixels of the resized crop

# One uniform number per decision and crop. A decision always reads its own column, so no setting moves the
# numbers of another.
DECISIONS = ("x", "y", "flip", "jitter", "blur", *PHOTOMETRIC_FIELDS)
DRAWS = {name: column for column, name in enumerate(DECISIONS)}
AREA_DRAWS = slice(len(DRAWS), len(DRAWS) + NUM_TRIES)
ASPECT_DRAWS = slice(AREA_DRAWS.stop, AREA_DRAWS.stop + NUM_TRIES)
NUM_DRAWS = ASPECT_DRAWS.stop


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """Which crops are cut and how they are changed; the two global crops and the local ones have their own rates.

    Sizes in pixels, scales as shares of the image's area, ``*_prob`` as shares of crops. ``jitter`` holds the
    strengths of brightness, contrast, saturation (factor within 1 +- strength, never below 0) and hue (shift
    within +- strength turns). ``blur_prob`` and ``solarize_prob``: first global, second global, every local crop.
    A wrong value raises UserError naming ``data.<key>``.
    """

    global_size: int = 224
    local_size: int = 96
    num_local: int = 8
    global_scale: tuple[float, float] = (0.4, 1.0)
    local_scale: tuple[float, float] = (0.05, 0.4)
    jitter_prob: float = 0.8
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    grayscale_prob: float = 0.2
    blur_prob: tuple[float, float, float] = (1.0, 0.1, 0.5)
    solarize_prob: tuple[float, float, float] = (0.0, 0.2, 0.0)
    flip_prob: float = 0.5

    def __post_init__(self) -> None:
        for key in ("global_size", "local_size"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "a size of at least 1 pixel")
        require(self.num_local >= 0, "num_local", self.num_local, "0 or more")
        for key in ("global_scale", "local_scale"):
            scale = getattr(self, key)
            ok = 0 < scale[0] <= scale[1] <= 1
            require(ok, key, scale, "two shares of the area with 0 < smallest <= largest <= 1")
        for key in ("jitter_prob", "grayscale_prob", "flip_prob"):
            require(0 <= getattr(self, key) <= 1, key, getattr(self, key), "a probability between 0 and 1")
        for key in ("blur_prob", "solarize_prob"):
            rates = getattr(self, key)
            ok = all(0 <= rate <= 1 for rate in rates)
            require(ok, key, rates, "three probabilities: first global, second global, local crops")
        ok = all(0 <= v < math.inf for v in self.jitter) and self.jitter[3] <= 0.5
        require(ok, "jitter", self.jitter, "four strengths >= 0 (hue: at most 0.5)")

    @property
    def num_crops(self) -> int:
        """Crops per image, the global ones first."""
        return NUM_GLOBAL + self.num_local


class CropPlan(NamedTuple):
    """What was drawn for the crops of one image, global crops first."""

    boxes: Float64[Tensor, "m 4"]  # x0 y0 x1 y1 in source pixels at the outer pixel edges; x0 > x1 = mirrored
    photometric: Float32[Tensor, "m f"]  # columns: PHOTOMETRIC_FIELDS


class CroppedSample(NamedTuple):
    """The crops of one image and how they were made, global crops first."""

    global_crops: UInt8[Tensor, "g 3 h w"]
    local_crops: UInt8[Tensor, "l 3 hl wl"]
    boxes: Float64[Tensor, "m 4"]
    photometric: Float32[Tensor, "m f"]


def crop_sample(raw: bytes, spec: CropSpec, *, seed: int, epoch: int, position: int) -> CroppedSample:
    """Decode one image file and cut its crops; a function of its arguments alone.

    A JPEG that is large for the crops asked for (choose_reduction: from 2.2 megapixels on by default) is decoded at a
    half, a quarter or an eighth of its size. Its boxes, drawn as ever, move to the nearest edges of reduced pixels:
    the boxes returned are those that were cut, in pixels of the source image.
    Raises BrokenImage if the bytes are no usable image.
    """
    wanted = [(spec.global_scale[0], spec.global_size)]
    if spec.num_local:
        wanted.append((spec.local_scale[0], spec.local_size))
    image, grid = decode_reduced(raw, lambda height, width: choose_reduction(height, width, wanted, ASPECT))
    plan = draw(spec, height=grid.height, width=grid.width, seed=seed, epoch=epoch, position=position)
    boxes, cells = grid.snap(plan.boxes.numpy())
    return CroppedSample(
        global_crops=cut(image, torch.from_numpy(cells[:NUM_GLOBAL]), spec.global_size),
        local_crops=cut(image, torch.from_numpy(cells[NUM_GLOBAL:]), spec.local_size),
        boxes=torch.from_numpy(boxes),
        photometric=plan.photometric,
    )


def draw(spec: CropSpec, *, height: int, width: int, seed: int, epoch: int, position: int) -> CropPlan:
    """Return box and photometric parameters of every crop of a ``height`` x ``width`` image.

    The numbers depend on (seed, epoch, position) alone, not on what was drawn before or in which process. A box
    covers a share of the area uniform in the scale, with an aspect log-uniform in 3/4 .. 4/3, in whole pixels, at
    a uniform place; after ten tries that do not fit it is the largest centerd box within the aspect limits.
    Source: augmentation of DINO (arXiv 2104.14294) and GLSD (arXiv 2207.14676).
    """
    u = crop_uniforms(spec.num_crops, seed=seed, epoch=epoch, position=position)
    scales = np.array([spec.global_scale] * NUM_GLOBAL + [spec.local_scale] * spec.num_local)
    boxes = torch.from_numpy(_boxes(scales, spec.flip_prob, u, height=height, width=width))
    return CropPlan(boxes, torch.from_numpy(_photometric_parameters(spec, u)))


def random_crop(
    raw: bytes,
    *,
    size: int,
    scale: tuple[float, float],
    flip_prob: float,
    seed: int,
    stream: int,
    epoch: int,
    position: int,
) -> UInt8[Tensor, "3 s s"]:
    """Decode one image file and cut a single random resized crop, drawn and cut as those of pretraining.

    Its numbers depend on (seed, stream, epoch, position) alone. Raises BrokenImage if the bytes are no usable
    image.
    """
    wanted = [(scale[0], size)]
    image, grid = decode_reduced(raw, lambda height, width: choose_reduction(height, width, wanted, ASPECT))
    u = crop_uniforms(1, seed=seed, epoch=epoch, position=position, stream=stream)
    boxes = _boxes(np.array([scale]), flip_prob, u, height=grid.height, width=grid.width)
    return cut(image, torch.from_numpy(grid.snap(boxes)[1]), size)[0]


def crop_uniforms(
    num_crops: int, *, seed: int, epoch: int, position: int, stream: int = Stream.CROPS
) -> Float64[np.ndarray, "m u"]:
    """Return the NUM_DRAWS uniform numbers of every crop of one image."""
    u = uniforms(num_crops * NUM_DRAWS, seed=seed, stream=stream, epoch=epoch, part=position)
    return u.reshape(num_crops, NUM_DRAWS)


def cut(image: UInt8[Tensor, "3 h w"], boxes: Float[Tensor, "m 4"], size: int) -> UInt8[Tensor, "m 3 s s"]:
    """Return the pixels of every box resized to a square (bicubic, antialiased), mirrored if x0 > x1.

    Boxes lie on whole pixels inside the image. Channels-last images are fast: decode returns them so.
    """
    crops = np.empty((len(boxes), 3, size, size), dtype=np.uint8)
    pixels = image.permute(1, 2, 0).numpy()[None]
    with single_threaded():
        for crop, (x0, y0, x1, y1) in zip(crops, boxes.long().tolist(), strict=True):
            # A copy of the box that is plainly channels last in memory: the resize is twice as slow on a part of it.
            region = np.ascontiguousarray(pixels[:, y0:y1, min(x0, x1) : max(x0, x1)])
            rows = torch.from_numpy(region).permute(0, 3, 1, 2)
            resized = F.interpolate(rows, (size, size), mode="bicubic", antialias=True)
            square = resized.permute(0, 2, 3, 1).numpy()[0]
            cv2.split(cv2.flip(square, 1) if x0 > x1 else square, list(crop))
    return torch.from_numpy(crops)


def _boxes(scales: np.ndarray, flip_prob: float, u: np.ndarray, *, height: int, width: int) -> np.ndarray:
    low, high = scales.T[:, :, None]  # one row a crop
    area = height * width * (low + (high - low) * u[:, AREA_DRAWS])
    aspect = np.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * u[:, ASPECT_DRAWS])
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    fits = (np.minimum(w, h) >= 1) & (w <= width) & (h <= height)
    first = fits.argmax(axis=1)  # the first 0 too where none fits
    rows = np.arange(len(u))
    w, h = w[rows, first], h[rows, first]
    x = np.floor(u[:, DRAWS["x"]] * (width - w + 1))
    y = np.floor(u[:, DRAWS["y"]] * (height - h + 1))
    for row in np.flatnonzero(~fits[rows, first]):
        w[row] = min(width, max(1, round(height * ASPECT[1])))
        h[row] = min(height, max(1, round(width / ASPECT[0])))
        x[row], y[row] = (width - w[row]) // 2, (height - h[row]) // 2
    boxes = np.array([x, y, x + w, y + h])
    flipped = u[:, DRAWS["flip"]] < flip_prob
    boxes[:, flipped] = boxes[[2, 1, 0, 3]][:, flipped]
    return boxes.T.copy()


def _photometric_parameters(spec: CropSpec, u: np.ndarray) -> np.ndarray:
    parameters = np.zeros((len(u), len(PHOTOMETRIC_FIELDS)))
    columns = dict(zip(PHOTOMETRIC_FIELDS, parameters.T, strict=True))
    kinds = np.minimum(np.arange(len(u)), NUM_GLOBAL)
    unjittered = u[:, DRAWS["jitter"]] >= spec.jitter_prob
    for name, strength in zip(("brightness", "contrast", "saturation"), spec.jitter[:3], strict=True):
        low, high = max(0.0, 1 - strength), 1 + strength
        columns[name][:] = low + (high - low) * u[:, DRAWS[name]]
        columns[name][unjittered] = 1.0
    columns["hue"][:] = spec.jitter[3] * (2 * u[:, DRAWS["hue"]] - 1)
    columns["jitter_order"][:] = np.floor(24 * u[:, DRAWS["jitter_order"]])
    columns["hue"][unjittered] = columns["jitter_order"][unjittered] = 0.0
    columns["grayscale"][:] = u[:, DRAWS["grayscale"]] < spec.grayscale_prob
    low, high = BLUR_SIGMA
    columns["blur_sigma"][:] = low + (high - low) * u[:, DRAWS["blur_sigma"]]
    columns["blur_sigma"][u[:, DRAWS["blur"]] >= np.take(spec.blur_prob, kinds)] = 0.0
    columns["solarize"][:] = u[:, DRAWS["solarize"]] < np.take(spec.solarize_prob, kinds)
    return parameters.astype(np.float32)


def require(ok: bool, key: str, value: object, expected: str) -> None:
    """Raise UserError naming ``data.<key>`` unless ``ok``."""
    if not ok:
        raise UserError(f"data.{key} is {value!r}: expected {expected}")
