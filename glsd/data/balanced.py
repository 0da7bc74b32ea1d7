"""Batches of P classes x M images for metric learning: resume-exact, the same whatever the ranks and workers."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from glsd.batches import BrokenSample, LabeledCrops
from glsd.data.crops import random_crop, require
from glsd.data.workers import make_loader, raised
from glsd.errors import BrokenImage, UserError
from glsd.rng import Stream, permutation, random_words
from glsd.shards.store import ShardSet


@dataclass(frozen=True, eq=False)
class ClassGroups:
    """The images of every class. A class is known by its rank, 0 .. c-1 in the order of the labels."""

    labels: Int64[np.ndarray, " c"]  # ascending, as in the shards
    members: Int64[np.ndarray, " n"]  # dataset indices, class after class, ascending inside
    ends: Int64[np.ndarray, " c"]  # where the members of a class end

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def sizes(self) -> Int64[np.ndarray, " c"]:
        """Images per class."""
        return np.diff(self.ends, prepend=0)

    @property
    def indices(self) -> Int64[np.ndarray, " n"]:
        """The dataset indices of all images, ascending."""
        return np.sort(self.members)

    def images(self, rank: int) -> Int64[np.ndarray, " m"]:
        """Return the dataset indices of a class, ascending."""
        return self.members[self.ends[rank - 1] if rank else 0 : self.ends[rank]]


def class_groups(
    labels: Int64[np.ndarray, " n"],
    *,
    key_of: Callable[[int], str] = str,
    drop_lone: bool = False,
    chosen: Int64[np.ndarray, " k"] | None = None,
) -> ClassGroups:
    """Group a data set by label: all of it, or the classes whose labels are ``chosen``.

    labels: of all images, in their order. ``drop_lone`` leaves out classes of one image; without it they raise
    UserError, since nothing in the class could be found for that image. key_of: the name of an image in that
    message. UserError also for images without label and for a chosen label that no image has.
    """
    unlabeled = int((labels < 0).sum())
    if unlabeled:
        raise UserError(
            f"data.train_shards: {unlabeled} of {len(labels)} images have no label: pack a folder that has "
            "one subfolder per class"
        )
    if chosen is not None and not np.isin(chosen, labels).all():
        missing = chosen[~np.isin(chosen, labels)]
        raise UserError(f"data.train_shards: no image has the label {missing[0]} that was chosen")
    members = np.argsort(labels, kind="stable")
    distinct, sizes = np.unique(labels, return_counts=True)
    kept = np.ones(len(distinct), dtype=bool) if chosen is None else np.isin(distinct, chosen)
    lone = kept & (sizes == 1)
    if lone.any() and not drop_lone:
        label = distinct[lone][0]
        index = int(np.flatnonzero(labels == label)[0])
        others = f" ({lone.sum() - 1} other classes too)" if lone.sum() > 1 else ""
        raise UserError(
            f"data.train_shards: class {label} has one image, {key_of(index)} (number {index}){others}: no "
            "positive pair exists; add images, or leave such classes out with --data.drop_lone_classes true"
        )
    kept &= ~lone
    return ClassGroups(distinct[kept], members[np.repeat(kept, sizes)], np.cumsum(sizes[kept]))


def split_classes(groups: ClassGroups, share: float) -> tuple[ClassGroups, Int64[np.ndarray, " v"]]:
    """Return the groups to train on, and the dataset indices (ascending) of the held-out classes.

    The last ``share`` of the classes in the order of their labels is held out, rounded to whole classes; 0 holds
    out none. UserError unless both sides get a class.
    Source: validation protocol of Musgrave et al. (arXiv 2003.08505).
    """
    held_out = round(share * len(groups)) if 0 <= share < 1 else -1
    if held_out < 0 or held_out >= len(groups) or (share > 0 and not held_out):
        raise UserError(
            f"data.val_share is {share}: of {len(groups)} classes that holds out {max(held_out, 0)}; expected 0 "
            "(none) or a share below 1 that leaves at least one class on both sides"
        )
    kept = len(groups) - held_out
    end = int(groups.ends[kept - 1])
    train = ClassGroups(groups.labels[:kept], groups.members[:end], groups.ends[:kept])
    return train, np.sort(groups.members[end:])


def balanced_batch(
    groups: ClassGroups, *, seed: int, step: int, classes: int, images_per_class: int
) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Return the dataset indices and class ranks of the global batch of a step, class after class.

    A function of its arguments alone: ``classes`` are drawn without replacement, of each ``images_per_class``
    images, without replacement too if it has so many; otherwise all of them, repeated as evenly as can be.
    UserError for fewer classes than a batch needs.
    """
    if classes < 1 or images_per_class < 1:
        raise UserError(
            f"a batch of {classes} classes of {images_per_class} images (optim.batch_size / data.images_per_class, "
            "data.images_per_class): expected at least 1 of each"
        )
    if classes > len(groups):
        raise UserError(
            f"data.train_shards hold {len(groups)} classes, fewer than the {classes} = optim.batch_size / "
            "data.images_per_class classes of a batch: use a smaller optim.batch_size or more images per class"
        )
    ranks = permutation(len(groups), seed=seed, stream=Stream.BATCH_CLASSES, epoch=step)[:classes]
    drawn = []
    for rank in ranks.tolist():
        images = groups.images(rank)
        order = permutation(len(images), seed=seed, stream=Stream.BATCH_IMAGES, epoch=step, part=rank)
        drawn.append(np.resize(images[order], images_per_class))  # cut off, or repeated in turn
    return np.concatenate(drawn), np.repeat(ranks, images_per_class)


@dataclass(frozen=True, slots=True)
class LabeledSample:
    """The crop of one image, and which image of which class that was."""

    image: UInt8[Tensor, "3 h w"]
    label: int  # class rank
    index: int
    key: str
    broken: tuple[BrokenSample, ...]  # the samples that could not be read in its place


@dataclass(eq=False, kw_only=True)
class BalancedDataset(Dataset):
    """Cropped, labeled samples by (step, slot in the global batch); each a function of that and the seed alone.

    An image that cannot be read is replaced by another one of its class, drawn from (seed, step, slot), if
    possible one that is not in the batch; the stand-in gets the crop of the slot.
    """

    shards: ShardSet
    groups: ClassGroups
    size: int
    scale: tuple[float, float]
    flip_prob: float
    seed: int
    classes: int
    images_per_class: int
    first_step: int

    def __post_init__(self) -> None:
        require(self.size >= 1, "crop", self.size, "a size of at least 1 pixel")
        ok = 0 < self.scale[0] <= self.scale[1] <= 1
        require(ok, "scale", self.scale, "two shares of the area with 0 < smallest <= largest <= 1")
        require(0 <= self.flip_prob <= 1, "flip_prob", self.flip_prob, "a probability between 0 and 1")
        self._latest_step = -1
        self._batch(self.first_step)  # refuses too few classes now, not in a worker

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
                    stream=Stream.BATCH_CROPS,
                    epoch=step,
                    position=slot,
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

    def __getitems__(self, places: Sequence[tuple[int, int]]) -> list[LabeledSample] | UserError:
        """Return a batch of samples, or the UserError as a value: the DataLoader would wrap it otherwise."""
        try:
            return [self[place] for place in places]
        except UserError as error:
            return error

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
    """Return this rank's endless batches from step ``first_step`` on: its share of balanced_batch, as crops.

    Rank r of R takes the r-th of R contiguous parts, so gathering in rank order gives the batch of one process.
    One random resized crop an image: ``size`` pixels, a share of the area uniform in ``scale``. In the records of
    broken samples ``epoch`` is the step and ``position`` the slot in the global batch. Raises UserError for
    settings that cannot be, and while iterating for a shard that vanished or a class of which nothing can be
    read.
    """
    slots = rank_slots(classes * images_per_class, rank=rank, world_size=world_size)
    shards.check_room(len(shards.paths), "the training shards, of which each batch reads anywhere,")
    dataset = BalancedDataset(
        shards=shards,
        groups=groups,
        size=size,
        scale=scale,
        flip_prob=flip_prob,
        seed=seed,
        classes=classes,
        images_per_class=images_per_class,
        first_step=first_step,
    )
    return raised(
        make_loader(
            dataset,
            _places(first_step, slots),
            collate=collate,
            num_workers=num_workers,
            pin_memory=pin_memory,
        )
    )


def rank_slots(batch_size: int, *, rank: int, world_size: int) -> range:
    """Return the contiguous part of the global batch that is one rank's; UserError if the parts are not equal."""
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world_size")
    if batch_size % world_size:
        raise UserError(f"optim.batch_size {batch_size} does not divide over {world_size} processes")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)


def collate(samples: list[LabeledSample] | UserError) -> LabeledCrops | UserError:
    """Return one batch in the order of its slots."""
    if isinstance(samples, UserError):
        return samples
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
