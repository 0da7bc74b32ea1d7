"""Endless batches of crops for pretraining: exact on resume, the same for any number of workers."""

import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Shaped
from torch import Tensor
from torch.utils.data import default_collate

from glsd.batches import NUM_GLOBAL, BrokenSample, CropBatch
from glsd.data.crops import CroppedSample, CropSpec, crop_sample
from glsd.data.order import (
    EpochOrder,
    epoch_length,
    epoch_samples,
    rank_positions,
)
from glsd.data.workers import make_loader
from glsd.errors import BrokenImage, UserError
from glsd.geometry import Stride, geometric_match
from glsd.rng import Stream, random_words
from glsd.shards.store import ShardSet

MAX_STAND_INS = 20


class MatchRule(NamedTuple):
    """How patches are matched by place: arguments of geometry.geometric_match."""

    stride: Stride
    hinge: bool
    hinge_factor: float


@dataclass(frozen=True, slots=True)
class PretrainSample:
    """The crops of one image, and its place in the data set."""

    crops: CroppedSample
    index: int
    key: str
    broken: tuple[BrokenSample, ...]  # the unreadable samples that it replaces


class PretrainDataset:
    """Cropped samples by (epoch, position).

    An unreadable sample is replaced by another one, drawn from (seed, epoch, position, attempt). The stand-in keeps the
    crops of the position. So each item is a function of the shards, the seed and (epoch, position) alone.
    """

    def __init__(self, shards: ShardSet, *, seed: int, window_shards: int, crop_spec: CropSpec):
        self.shards = shards
        self.seed = seed
        self.window_shards = window_shards
        self.crop_spec = crop_spec
        self._orders: OrderedDict[int, EpochOrder] = OrderedDict()
        self._announced: tuple[int, int] | None = None
        self._order(0)  # refuses a window_shards below 1 here, not in a worker

    def __getitem__(self, place: tuple[int, int]) -> PretrainSample:
        """Raises UserError if the sample and all its stand-ins are unreadable."""
        epoch, position = place
        if self.shards.has_remote:
            self._announce(epoch, position)
        unreadable: list[tuple[int, str, str]] = []
        for index in self._candidates(epoch, position):
            try:
                raw = self.shards.read(index)
                crops = crop_sample(raw, self.crop_spec, seed=self.seed, epoch=epoch, position=position)
            except BrokenImage as error:
                unreadable.append((index, self.shards.key(index), str(error)))
                continue
            broken = tuple(BrokenSample(epoch, position, *what, replaced_by=index) for what in unreadable)
            return PretrainSample(crops, index, self.shards.key(index), broken)
        raise self._all_unreadable(*unreadable[0])

    def _all_unreadable(self, index: int, key: str, reason: str) -> UserError:
        return UserError(
            f"sample {key!r} of shard {self.shards.shard_of(index)} cannot be read ({reason}), nor can any "
            f"of the {MAX_STAND_INS} drawn in its place: check the shards"
        )

    def _order(self, epoch: int) -> EpochOrder:
        if epoch not in self._orders:
            options: dict[str, Any] = {
                "window_shards": self.window_shards,
                "shard_weights": self.shards.shard_weights,
            }
            self._orders[epoch] = EpochOrder(self.shards.shard_sizes, seed=self.seed, epoch=epoch, **options)
            if len(self._orders) > 2:  # a batch may span two epochs, and prefetching looks at the next one
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def _announce(self, epoch: int, position: int) -> None:
        """Start the download of the remote shards of a new window and of the one after it."""
        order = self._order(epoch)
        window = order.window_of(position)
        if self._announced == (epoch, window):
            return
        self._announced = epoch, window
        last = window + 1 == order.num_windows
        after = self._order(epoch + 1).shards_of(0) if last else order.shards_of(window + 1)
        now = order.shards_of(window)
        # Every process starts at another shard, so that they download different ones at a time.
        first = os.getpid() % len(now)
        self.shards.prefetch([*now[first:], *now[:first], *after])

    def _candidates(self, epoch: int, position: int) -> Iterator[int]:
        order = self._order(epoch)
        yield order[position]
        stream = {"seed": self.seed, "stream": Stream.STAND_INS, "epoch": epoch, "part": position}
        words = random_words(MAX_STAND_INS, **stream)
        # First from the window's shards, which are already local. If all of these fail, from the whole epoch.
        window, whole = order.bounds(order.window_of(position)), range(len(order))
        for number, word in enumerate(words):
            places = window if number < MAX_STAND_INS // 2 else whole
            yield order[places[int(word) % len(places)]]


def pretrain_loader(
    shards: ShardSet,
    *,
    crop_spec: CropSpec,
    match_rule: MatchRule | None,
    seed: int,
    window_shards: int,
    consumed: int,
    batch_size: int,
    micro_batch: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[CropBatch]:
    """Return this rank's endless micro-batches from sample number ``consumed`` on.

    ``consumed`` counts samples over all epochs and ranks. ``batch_size`` is the global batch of an optimizer step,
    ``micro_batch`` the most images of one forward pass. Epochs hold whole batches (order.epoch_length).
    Raises UserError for sizes that do not fit together. While iterating it raises UserError for a missing shard, and for
    samples that cannot be replaced.
    """
    dataset = PretrainDataset(shards, seed=seed, window_shards=window_shards, crop_spec=crop_spec)
    shards.check_room(2 * window_shards, f"two windows (window_shards is {window_shards})")
    batches = rank_positions(
        consumed=consumed,
        epoch_length=epoch_length(epoch_samples(shards.shard_sizes, shards.shard_weights), batch_size),
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        micro_batch=micro_batch,
    )
    return make_loader(
        dataset,
        batches,
        collate=partial(collate, match_rule=match_rule),
        num_workers=num_workers,
        pin_memory=pin_memory,
    )


def collate(samples: list[PretrainSample], match_rule: MatchRule | None) -> CropBatch:
    """Return one batch, its patches matched by place if there is a rule."""
    crops = [sample.crops for sample in samples]
    boxes = _views([crop.boxes for crop in crops]).split([NUM_GLOBAL, len(crops[0].boxes) - NUM_GLOBAL])
    photometric = _views([crop.photometric for crop in crops])
    global_crops = _views([crop.global_crops for crop in crops])
    local_crops = _views([crop.local_crops for crop in crops])
    sizes = global_crops.shape[-1], local_crops.shape[-1]
    return CropBatch(
        global_crops=global_crops,
        local_crops=local_crops,
        global_boxes=boxes[0],
        local_boxes=boxes[1],
        global_photometric=photometric[:NUM_GLOBAL],
        local_photometric=photometric[NUM_GLOBAL:],
        match=match_rule and geometric_match(boxes, sizes, **match_rule._asdict()),
        indices=torch.tensor([sample.index for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        broken=tuple(broken for sample in samples for broken in sample.broken),
    )


def _views(per_image: list[Shaped[Tensor, "v ..."]]) -> Shaped[Tensor, "v b ..."]:
    """Return the views of all images, (views, images, ...)."""
    v, b = len(per_image[0]), len(per_image)
    if v == 0:
        return per_image[0].new_empty((0, b, *per_image[0].shape[1:]))
    # In a worker default_collate writes straight into shared memory, which saves a copy of every batch.
    return default_collate([image[view] for view in range(v) for image in per_image]).unflatten(0, (v, b))
