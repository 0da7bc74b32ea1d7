"""The crops of one image: their random boxes and color parameters, and the one resize that cuts each crop.

A crop holds the pixels inside a box of the source image, resized to a square. The colors change later, on the training
device (photometric.py), by parameters that are drawn here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Float64, UInt8
from torch import Tensor

from glsd.batches import NUM_GLOBAL, PHOTOMETRIC_FIELDS
from glsd.data.decode import decode_reduced
from glsd.data.jpeg import REDUCTIONS
from glsd.data.workers import single_threaded
from glsd.errors import UserError
from glsd.rng import Stream, uniforms

NUM_TRIES = 10  # draws of a box before the centered fallback
ASPECT = (3 / 4, 4 / 3)  # width / height of a box
LOG_ASPECT = (math.log(ASPECT[0]), math.log(ASPECT[1]))

# Images below this size are decoded at full size: a reduced decode would save little.
LARGE = 2_000_000  # pixels
# A reduced image keeps at least this many pixels along each side of a box per pixel of its crop.
MARGIN = 1.5

# One uniform number per decision and crop. A decision always reads its own column, so no setting changes the
# numbers of another.
DECISIONS = ("x", "y", "flip", "jitter", "blur", *PHOTOMETRIC_FIELDS)
DRAWS = {name: column for column, name in enumerate(DECISIONS)}
AREA_DRAWS = slice(len(DRAWS), len(DRAWS) + NUM_TRIES)
ASPECT_DRAWS = slice(AREA_DRAWS.stop, AREA_DRAWS.stop + NUM_TRIES)
NUM_DRAWS = ASPECT_DRAWS.stop


@dataclass(frozen=True, kw_only=True)
class CropSpec:
    """The crops of an image: sizes, areas and augmentation rates of the global and the local crops.

    Raises UserError for a value out of range.
    """

    global_size: int  # pixels
    local_size: int
    num_local: int
    global_scale: tuple[float, float]  # share of the image's area, smallest and largest
    local_scale: tuple[float, float]
    jitter_prob: float
    # Strengths: brightness, contrast and saturation multiply by 1 +- strength (never below 0); hue turns by +- strength.
    jitter: tuple[float, float, float, float]
    grayscale_prob: float
    blur_prob: tuple[float, float, float]  # first global crop, second global crop, every local crop
    blur_sigma: tuple[float, float]  # pixels of the resized crop, smallest and largest
    solarize_prob: tuple[float, float, float]
    flip_prob: float

    @classmethod
    def of(cls, settings: object) -> "CropSpec":
        """Return the crops of an object that has the attributes of a CropSpec, such as the data part of a configuration."""
        return cls(**{field.name: getattr(settings, field.name) for field in fields(cls)})

    def __post_init__(self) -> None:
        for name in ("global_size", "local_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1 pixel")
        require(self.num_local >= 0, "num_local", self.num_local, "0 or more")
        for name in ("global_scale", "local_scale"):
            scale = getattr(self, name)
            ok = 0 < scale[0] <= scale[1] <= 1
            require(ok, name, scale, "two shares of the area with 0 < smallest <= largest <= 1")
        for name in ("jitter_prob", "grayscale_prob", "flip_prob"):
            require(0 <= getattr(self, name) <= 1, name, getattr(self, name), "a probability between 0 and 1")
        for name in ("blur_prob", "solarize_prob"):
            rates = getattr(self, name)
            ok = all(0 <= rate <= 1 for rate in rates)
            require(ok, name, rates, "three probabilities: first global, second global, local crops")
        ok = 0 < self.blur_sigma[0] <= self.blur_sigma[1] < math.inf
        require(ok, "blur_sigma", self.blur_sigma, "two numbers of pixels with 0 < smallest <= largest")
        ok = all(0 <= v < math.inf for v in self.jitter) and self.jitter[3] <= 0.5
        require(ok, "jitter", self.jitter, "four strengths >= 0 (hue: at most 0.5)")


class CropPlan(NamedTuple):
    """The random parameters of the crops of one image, global crops first."""

    boxes: Float64[Tensor, "m 4"]  # x0 y0 x1 y1 in source pixels at the outer pixel edges; x0 > x1 = mirrored
    photometric: Float32[Tensor, "m f"]  # columns: PHOTOMETRIC_FIELDS


class CroppedSample(NamedTuple):
    """The crops of one image and their parameters, global crops first."""

    global_crops: UInt8[Tensor, "g 3 h w"]
    local_crops: UInt8[Tensor, "l 3 hl wl"]
    boxes: Float64[Tensor, "m 4"]
    photometric: Float32[Tensor, "m f"]


def crop_sample(raw: bytes, spec: CropSpec, *, seed: int, epoch: int, position: int) -> CroppedSample:
    """Decode one image file and cut its crops; a function of its arguments alone.

    A JPEG that is large for its crops is decoded at reduced size (choose_reduction), and its boxes move to the nearest
    edges of reduced pixels. Boxes are in source pixels. Raises BrokenImage if the bytes are not a usable image.
    """
    wanted = [(spec.global_scale[0], spec.global_size)]
    if spec.num_local:
        wanted.append((spec.local_scale[0], spec.local_size))
    image, grid = decode_reduced(raw, lambda height, width: choose_reduction(height, width, wanted))
    plan = draw(spec, height=grid.height, width=grid.width, seed=seed, epoch=epoch, position=position)
    boxes, cells = grid.snap(plan.boxes.numpy())
    return CroppedSample(
        global_crops=cut(image, torch.from_numpy(cells[:NUM_GLOBAL]), spec.global_size),
        local_crops=cut(image, torch.from_numpy(cells[NUM_GLOBAL:]), spec.local_size),
        boxes=torch.from_numpy(boxes),
        photometric=plan.photometric,
    )


def draw(spec: CropSpec, *, height: int, width: int, seed: int, epoch: int, position: int) -> CropPlan:
    """Return random boxes and photometric parameters for every crop of a ``height`` x ``width`` image.

    A box has whole pixels and a uniform place. Its share of the area is uniform in the scale, its aspect ratio log-uniform
    in 3/4 .. 4/3. After ten boxes that do not fit, it is the largest centered box within the aspect limits (DINO, GLSD).
    """
    scales = np.array([spec.global_scale] * NUM_GLOBAL + [spec.local_scale] * spec.num_local)
    u = crop_uniforms(len(scales), seed=seed, stream=Stream.CROPS, epoch=epoch, position=position)
    boxes = torch.from_numpy(_boxes(scales, spec.flip_prob, u, height=height, width=width))
    return CropPlan(boxes, torch.from_numpy(_photometric_parameters(spec, u)))


def random_crop(
    raw: bytes, *, size: int, scale: tuple[float, float], flip_prob: float, seed: int, step: int, slot: int
) -> UInt8[Tensor, "3 s s"]:
    """Decode one image file and return its random resized crop for a slot of a metric-learning batch.

    The box is drawn and cut as for pretraining, from (seed, step, slot). Raises BrokenImage if the bytes are not a usable
    image.
    """
    image, grid = decode_reduced(
        raw, lambda height, width: choose_reduction(height, width, [(scale[0], size)])
    )
    u = crop_uniforms(1, seed=seed, stream=Stream.BATCH_CROPS, epoch=step, position=slot)
    boxes = _boxes(np.array([scale]), flip_prob, u, height=grid.height, width=grid.width)
    return cut(image, torch.from_numpy(grid.snap(boxes)[1]), size)[0]


def choose_reduction(height: int, width: int, wanted: Sequence[tuple[float, int]]) -> int:
    """Return the largest of 8, 4, 2, 1 that leaves every box MARGIN times as many pixels a side as its crop has.

    Images below LARGE get 1. wanted: (smallest share of the area, size of the crop in pixels) of each kind of crop. So the
    choice depends on the size of the image and the settings, not on the boxes drawn.

    Cost, measured at 12 megapixels against crops of the full-size image: 0.2 to 0.3 of 255 levels on average (PSNR 54 dB)
    on a smooth synthetic photograph, 0.5 (51 dB) where a box has only MARGIN pixels. The worst case we could draw, white
    lines one pixel high, costs 2 to 4 levels (35 to 38 dB). Gain: 37 instead of 102 ms an image.
    """
    if height * width < LARGE:
        return 1
    narrowest = min(ASPECT[0], 1 / ASPECT[1])
    room = min(
        min(math.sqrt(share * height * width * narrowest), height, width) / size for share, size in wanted
    )
    return max((reduction for reduction in REDUCTIONS if room >= MARGIN * reduction), default=1)


def crop_uniforms(
    num_crops: int, *, seed: int, stream: Stream, epoch: int, position: int
) -> Float64[np.ndarray, "m u"]:
    """Return the NUM_DRAWS uniform numbers of every crop of one image."""
    u = uniforms(num_crops * NUM_DRAWS, seed=seed, stream=stream, epoch=epoch, part=position)
    return u.reshape(num_crops, NUM_DRAWS)


def cut(image: UInt8[Tensor, "3 h w"], boxes: Float[Tensor, "m 4"], size: int) -> UInt8[Tensor, "m 3 s s"]:
    """Return the pixels of every box (whole pixels) resized to a square (bicubic, antialiased), mirrored if x0 > x1."""
    crops = np.empty((len(boxes), 3, size, size), dtype=np.uint8)
    pixels = image.permute(1, 2, 0).numpy()[None]
    with single_threaded():
        for crop, (x0, y0, x1, y1) in zip(crops, boxes.long().tolist(), strict=True):
            # Copy the box: the resize is twice as slow on a view of the larger image.
            region = np.ascontiguousarray(pixels[:, y0:y1, min(x0, x1) : max(x0, x1)])
            rows = torch.from_numpy(region).permute(0, 3, 1, 2)
            resized = F.interpolate(rows, (size, size), mode="bicubic", antialias=True)
            square = resized.permute(0, 2, 3, 1).numpy()[0]
            cv2.split(cv2.flip(square, 1) if x0 > x1 else square, list(crop))
    return torch.from_numpy(crops)


def _boxes(scales: np.ndarray, flip_prob: float, u: np.ndarray, *, height: int, width: int) -> np.ndarray:
    low, high = scales.T[:, :, None]  # one row per crop
    area = height * width * (low + (high - low) * u[:, AREA_DRAWS])
    aspect = np.exp(LOG_ASPECT[0] + (LOG_ASPECT[1] - LOG_ASPECT[0]) * u[:, ASPECT_DRAWS])
    w = np.rint(np.sqrt(area * aspect))
    h = np.rint(np.sqrt(area / aspect))
    fits = (np.minimum(w, h) >= 1) & (w <= width) & (h <= height)
    first = fits.argmax(axis=1)  # 0 if none fits
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
    low, high = spec.blur_sigma
    columns["blur_sigma"][:] = low + (high - low) * u[:, DRAWS["blur_sigma"]]
    columns["blur_sigma"][u[:, DRAWS["blur"]] >= np.take(spec.blur_prob, kinds)] = 0.0
    columns["solarize"][:] = u[:, DRAWS["solarize"]] < np.take(spec.solarize_prob, kinds)
    return parameters.astype(np.float32)


def require(ok: bool, name: str, value: object, expected: str) -> None:
    """Raise UserError that names an argument unless ``ok``."""
    if not ok:
        raise UserError(f"{name} is {value!r}: expected {expected}")
