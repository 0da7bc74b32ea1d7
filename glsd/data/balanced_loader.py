"""Endless class-balanced batches for metric learning: exact on resume, the same for any number of ranks and workers."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor
from torch.utils.data import default_collate

from glsd.batches import BrokenSample, LabeledCrops
from glsd.data.balanced import ClassGroups, balanced_batch, rank_slots
from glsd.data.crops import random_crop
from glsd.data.workers import make_loader
from glsd.errors import BrokenImage, UserError
from glsd.rng import Stream, random_words
from glsd.shards.store import ShardSet


@dataclass(frozen=True, slots=True)
class LabeledSample:
    """The crop of one image, with its class and its place in the data set."""

    image: UInt8[Tensor, "3 h w"]
    label: int  # class number
    index: int
    key: str
    broken: tuple[BrokenSample, ...]  # the unreadable samples that it replaces


@dataclass(eq=False, kw_only=True)
class BalancedDataset:
    """Cropped, labeled samples by (step, slot of the global batch); each is a function of these and the seed alone.

    An unreadable image is replaced by another one of its class, drawn from (seed, step, slot). Images that are not in the
    batch come first. The stand-in gets the crop of the slot.
    """

    shards: ShardSet
    groups: ClassGroups
    size: int
    scale: tuple[float, float]
    flip_prob: float
    seed: int
    classes: int
    images_per_class: int

    def __post_init__(self) -> None:
        self._latest_step = -1

    def __getitem__(self, place: tuple[int, int]) -> LabeledSample:
        """Raises UserError if no image of the class can be read."""
        step, slot = place
        label = int(self._batch(step)[1][slot])
        unreadable: list[tuple[int, str, str]] = []
        for index in self._candidates(step, slot):
            try:
                image = random_crop(
                    self.shards.read(index),
                    size=self.size,
                    scale=self.scale,
                    flip_prob=self.flip_prob,
                    seed=self.seed,
                    step=step,
                    slot=slot,
                )
            except BrokenImage as error:
                unreadable.append((index, self.shards.key(index), str(error)))
                continue
            broken = tuple(BrokenSample(step, slot, *what, replaced_by=index) for what in unreadable)
            return LabeledSample(image, label, index, self.shards.key(index), broken)
        index, key, reason = unreadable[0]
        raise UserError(
            f"sample {key!r} of shard {self.shards.shard_of(index)} cannot be read ({reason}), nor can any other of "
            f"the {len(unreadable)} images of its class {self.groups.labels[label]}: check the shards"
        )

    def _batch(self, step: int) -> tuple[np.ndarray, np.ndarray]:
        if self._latest_step != step:
            p, m = self.classes, self.images_per_class
            self._latest = balanced_batch(
                self.groups, seed=self.seed, step=step, classes=p, images_per_class=m
            )
            self._latest_step = step
        return self._latest

    def _candidates(self, step: int, slot: int) -> Iterator[int]:
        indices, labels = self._batch(step)
        yield int(indices[slot])
        images = self.groups.images(int(labels[slot]))
        others = images[images != indices[slot]]
        words = random_words(
            len(others), seed=self.seed, stream=Stream.BATCH_STAND_INS, epoch=step, part=slot
        )
        yield from others[np.lexsort((words, np.isin(others, indices)))].tolist()


def balanced_loader(
    shards: ShardSet,
    groups: ClassGroups,
    *,
    size: int,
    scale: tuple[float, float],
    flip_prob: float,
    seed: int,
    classes: int,
    images_per_class: int,
    first_step: int,
    rank: int,
    world_size: int,
    num_workers: int,
    pin_memory: bool,
) -> Iterator[LabeledCrops]:
    """Return this rank's endless batches from step ``first_step`` on: its share of balanced_batch(), as crops.

    Rank r of R takes the r-th of R contiguous parts, so gathering in rank order gives the batch of one process. Each image
    gives one random resized crop of ``size`` pixels, with a share of the area uniform in ``scale``. In the records of
    broken samples ``epoch`` is the step and ``position`` the slot in the global batch.
    Raises UserError for a batch that does not divide over the ranks. While iterating it raises UserError for a missing
    shard, and for a class without a readable image.
    """
    slots = rank_slots(classes * images_per_class, rank=rank, world_size=world_size)
    shards.check_room(len(shards.paths), "the training shards, which every batch reads from,")
    dataset = BalancedDataset(
        shards=shards,
        groups=groups,
        size=size,
        scale=scale,
        flip_prob=flip_prob,
        seed=seed,
        classes=classes,
        images_per_class=images_per_class,
    )
    places = _places(first_step, slots)
    return make_loader(dataset, places, collate=collate, num_workers=num_workers, pin_memory=pin_memory)


def collate(samples: list[LabeledSample]) -> LabeledCrops:
    """Return one batch in the order of its slots."""
    return LabeledCrops(
        # In a worker default_collate writes straight into shared memory, which saves a copy of every batch.
        images=default_collate([sample.image for sample in samples]),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
        keys=tuple(sample.key for sample in samples),
        broken=tuple(broken for sample in samples for broken in sample.broken),
    )


def _places(step: int, slots: range) -> Iterator[list[tuple[int, int]]]:
    while True:
        yield [(step, slot) for slot in slots]
        step += 1
