"""The batch types that rooms hand to each other, and the letters of their shapes.

Shape letters in signatures: b images, v views, g global, l local, n patches, d backbone width, k prototypes,
e bottleneck or embedding width, h w pixels, c channels, m crops. Tensors of several views are (views, images, ...).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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


class NeededRows(NamedTuple):
    """The student and teacher patches that a match needs, image by image; the other rows cost the loss nothing."""

    rows: Int64[Tensor, " p"]  # of the b * r student patches
    columns: Int64[Tensor, " q"]  # of the b * g * n teacher patches
    index: Int64[Tensor, "p m"]  # type: ignore[assignment]  # into the q; shadows tuple.index on purpose
    row_ends: list[int]  # of each image, in rows
    column_ends: list[int]  # of each image, in columns


@dataclass(frozen=True)
class Match:
    """Which patch of each teacher view each student patch answers to, and how much that counts.

    The r student patches of an image are those of all its views, global views first. (A dataclass, because DDP would move
    the tensors of a tuple to its device.)
    """

    index: Int64[Tensor, "b r g"]  # teacher view * n + patch, within the image
    weight: Float[Tensor, "b r g"]  # 0 = rejected, or the view itself
    needed: NeededRows | None = None  # None = not known to the host

    def map(self, move: Callable[[Tensor], Tensor]) -> "Match":
        """Return the match with ``move`` applied to each tensor."""
        n = self.needed
        needed = n and n._replace(rows=move(n.rows), columns=move(n.columns), index=move(n.index))
        return Match(move(self.index), move(self.weight), needed)


@dataclass(frozen=True, kw_only=True)
class CropBatch:
    """One pretraining batch of b images, with g global and l local crops each.

    A box is ``x0 y0 x1 y1`` in source pixels at the outer pixel edges (a whole image is ``0 0 w h``); x0 > x1 means the
    crop was mirrored, so a flip is a swapped box. Boxes and ``*_photometric`` stay on the CPU: the work on the device is
    planned from them without waiting for it.
    """

    global_crops: UInt8[Tensor, "g b 3 h w"]
    local_crops: UInt8[Tensor, "l b 3 hl wl"]  # l may be 0
    global_boxes: Float64[Tensor, "g b 4"]
    local_boxes: Float64[Tensor, "l b 4"]
    global_photometric: Float32[Tensor, "g b f"]  # columns: PHOTOMETRIC_FIELDS
    local_photometric: Float32[Tensor, "l b f"]
    match: Match | None  # by place, where the boxes decide it
    indices: Int64[Tensor, " b"]  # dataset positions of the images really used
    keys: tuple[str, ...]
    broken: tuple[BrokenSample, ...] = ()

    def pin_memory(self) -> "CropBatch":
        """Return the batch with its device-bound tensors in pinned memory (called by the DataLoader)."""
        return self._map(lambda tensor: tensor.pin_memory())

    def to(self, device: torch.device) -> "CropBatch":
        """Return the batch with crops, match and indices on ``device``, copied asynchronously when pinned."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def _map(self, move: Callable[[Tensor], Tensor]) -> "CropBatch":
        moved: dict[str, Any] = {
            name: move(getattr(self, name)) for name in ("global_crops", "local_crops", "indices")
        }
        return replace(self, **moved, match=self.match and self.match.map(move))


@dataclass(frozen=True, kw_only=True)
class LabeledBatch:
    """Images for evaluation or metric learning; index -1 marks padding rows that must be dropped."""

    images: Float32[Tensor, "b 3 h w"]
    labels: Int64[Tensor, " b"]  # -1 = no label
    indices: Int64[Tensor, " b"]


@dataclass(frozen=True, kw_only=True)
class LabeledCrops:
    """One rank's share of a metric-learning batch: one random crop per image, class numbers as labels."""

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
