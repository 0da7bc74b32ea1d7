"""Class-balanced sampling for metric learning: which images make up a batch of P classes x M images."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int64

from glsd.data.order import check_rank
from glsd.errors import UserError
from glsd.rng import Stream, permutation


@dataclass(frozen=True, eq=False)
class ClassGroups:
    """The images of every class. Classes are numbered 0 .. c-1 in the order of their labels."""

    labels: Int64[np.ndarray, " c"]  # ascending, as in the shards
    members: Int64[np.ndarray, " n"]  # dataset indices, class after class, ascending inside
    ends: Int64[np.ndarray, " c"]  # where the members of a class end

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, number: int) -> Int64[np.ndarray, " m"]:
        """Return the dataset indices of a class, ascending."""
        return self.members[self.ends[number - 1] if number else 0 : self.ends[number]]


def class_groups(
    labels: Int64[np.ndarray, " n"], *, key_of: Callable[[int], str], drop_lone: bool
) -> ClassGroups:
    """Group the images of a data set by label.

    A class of one image raises UserError, since it has no positive pair; ``drop_lone`` leaves such classes out. key_of:
    the sample name of a dataset index, for the message.
    """
    members = np.argsort(labels, kind="stable")
    distinct, sizes = np.unique(labels, return_counts=True)
    lone = sizes == 1
    if lone.any() and not drop_lone:
        index = int(members[np.repeat(lone, sizes)][0])
        raise UserError(
            f"labels: {lone.sum()} of {len(lone)} classes have one image and so no positive pair (first: class "
            f"{labels[index]}, image {key_of(index)}): add images, or leave such classes out with drop_lone true"
        )
    return ClassGroups(distinct[~lone], members[np.repeat(~lone, sizes)], np.cumsum(sizes[~lone]))


def split_classes(groups: ClassGroups, val_share: float) -> tuple[ClassGroups, Int64[np.ndarray, " v"]]:
    """Return the groups to train on, and the dataset indices (ascending) of the held-out classes.

    The last ``val_share`` of the classes in the order of their labels is held out, rounded to whole classes; 0 holds out
    none. Raises UserError unless both sides get a class.
    Source: validation protocol of Musgrave et al. (arXiv 2003.08505).
    """
    held_out = round(val_share * len(groups)) if 0 <= val_share < 1 else -1
    if held_out < 0 or held_out >= len(groups) or (val_share > 0 and not held_out):
        raise UserError(
            f"val_share is {val_share}: it holds out {max(held_out, 0)} of {len(groups)} classes; expected 0 (none) or a "
            "share below 1 that leaves at least one class on both sides"
        )
    kept = len(groups) - held_out
    end = int(groups.ends[kept - 1])
    train = ClassGroups(groups.labels[:kept], groups.members[:end], groups.ends[:kept])
    return train, np.sort(groups.members[end:])


def balanced_batch(
    groups: ClassGroups, *, seed: int, step: int, classes: int, images_per_class: int
) -> tuple[Int64[np.ndarray, " b"], Int64[np.ndarray, " b"]]:
    """Return the dataset indices and class numbers of the global batch of a step, class after class.

    A function of its arguments alone. ``classes`` distinct classes are drawn, and ``images_per_class`` distinct images of
    each. A smaller class gives all its images, repeated as evenly as possible.
    """
    numbers = permutation(len(groups), seed=seed, stream=Stream.BATCH_CLASSES, epoch=step)[:classes]
    drawn = []
    for number in numbers.tolist():
        images = groups.images(number)
        order = permutation(len(images), seed=seed, stream=Stream.BATCH_IMAGES, epoch=step, part=number)
        drawn.append(np.resize(images[order], images_per_class))  # cut off, or repeated from the start
    return np.concatenate(drawn), np.repeat(numbers, images_per_class)


def rank_slots(batch_size: int, *, rank: int, world_size: int) -> range:
    """Return the contiguous part of the global batch that one rank reads; UserError if ranks cannot have equal parts."""
    check_rank(rank, world_size)
    if batch_size % world_size:
        raise UserError(f"batch_size {batch_size} does not divide over {world_size} ranks")
    share = batch_size // world_size
    return range(rank * share, (rank + 1) * share)
