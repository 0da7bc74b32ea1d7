"""What the rooms of the house hand to each other: the shape alphabet and the batch types.

Shape letters in signatures: b images, v views, g global, l local, n patches, d backbone width, k prototypes,
e bottleneck or embedding width, h w pixels, c channels, m crops. Rows of several views are view-major: row = view * b + image.
"""

from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Float64, Int64, UInt8
from torch import Tensor

NUM_GLOBAL = 2  # global crops of an image; the teacher sees them

# Columns of the photometric parameters of one crop. Every column has a value that means "leave as it is", so no apply
# flags are needed: brightness/contrast/saturation 1, hue 0, grayscale 0, blur_sigma 0, solarize 0.
# jitter_order is the index (0..23) of a permutation of (brightness, contrast, saturation, hue), lexicographic.
PHOTOMETRIC_FIELDS = (
    "brightness",
    "contrast",
    "saturation",
    "hue",
    "jitter_order",
    "grayscale",
    "blur_sigma",
    "solarize",
)


class BrokenSample(NamedTuple):
    """One sample that could not be read, and what stood in for it."""

    epoch: int
    position: int  # place in the epoch's order
    index: int  # type: ignore[assignment]  # dataset position of the broken sample; shadows tuple.index on purpose
    key: str
    reason: str
    replaced_by: int  # dataset position of the stand-in


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """One pretraining batch of b images, g global and l local crops each; crop rows are view-major.

    A box is ``x0 y0 x1 y1`` in source pixels at the outer pixel edges (a whole image is ``0 0 w h``); x0 > x1 means the
    crop was mirrored, so a flip is a swapped box. Boxes and ``*_photometric`` stay on the CPU: the work on the device is
    planned from them without waiting for it.
    """

    global_crops: UInt8[Tensor, "gb 3 h w"]
    local_crops: UInt8[Tensor, "lb 3 hl wl"]  # lb = 0 when there are no local crops
    global_boxes: Float64[Tensor, "gb 4"]
    local_boxes: Float64[Tensor, "lb 4"]
    global_photometric: Float32[Tensor, "gb f"]  # columns: PHOTOMETRIC_FIELDS
    local_photometric: Float32[Tensor, "lb f"]
    indices: Int64[Tensor, " b"]  # dataset positions of the images really used
    keys: tuple[str, ...]
    broken: tuple[BrokenSample, ...] = ()

    def pin_memory(self) -> "CropBatch":
        """Return the batch with its device-bound tensors in pinned memory (called by the DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "CropBatch":
        """Return the batch with crops and indices on ``device``, copied asynchronously when pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move) -> "CropBatch":
        host_only = ("global_photometric", "local_photometric", "global_boxes", "local_boxes")
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(
            self,
            **{k: move(v) for k, v in tensors.items() if isinstance(v, Tensor) and k not in host_only},
        )


class Match(NamedTuple):
    """For every student patch: which teacher patch of one teacher view it answers to, and how much that counts."""

    index: Int64[Tensor, "b n"]  # type: ignore[assignment]  # 0 .. n_teacher-1, within the same image
    weight: Float[Tensor, "b n"]  # 0 = rejected


@dataclass(frozen=True, kw_only=True)
class LabeledBatch:
    """Images for evaluation or metric learning; index -1 marks padding rows that must be dropped."""

    images: Float32[Tensor, "b 3 h w"]
    labels: Int64[Tensor, " b"]  # -1 = no label
    indices: Int64[Tensor, " b"]


@dataclass(frozen=True, kw_only=True)
class LabeledCrops:
    """One rank's share of a metric-learning batch: one random crop per image, class ranks as labels."""

    images: UInt8[Tensor, "b 3 h w"]
    labels: Int64[Tensor, " b"]  # 0 .. number of training classes - 1
    indices: Int64[Tensor, " b"]  # dataset positions of the images really used
    keys: tuple[str, ...]
    broken: tuple[BrokenSample, ...] = ()

    def pin_memory(self) -> "LabeledCrops":
        """Return the batch in pinned memory (called by the DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "LabeledCrops":
        """Return the batch on ``device``, copied asynchronously when pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move) -> "LabeledCrops":
        tensors = {name: move(getattr(self, name)) for name in ("images", "labels", "indices")}
        return replace(self, **tensors)
