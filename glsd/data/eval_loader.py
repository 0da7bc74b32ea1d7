"""Labeled batches for evaluation: every image exactly once over all ranks, as many batches on each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from glsd.batches import LabeledBatch
from glsd.data.decode import decode
from glsd.data.order import check_rank
from glsd.data.photometric import normalize
from glsd.data.transform import Sizes, center_square, check_sizes
from glsd.data.workers import make_loader
from glsd.errors import BrokenImage, UserError
from glsd.shards.store import ShardSet

PADDING = -1


@dataclass(frozen=True, slots=True)
class BrokenImageRecord:
    """One unreadable image, left out of the evaluation."""

    index: int
    key: str
    reason: str


class EvalLoader:
    """One rank's batches of a labeled set, for any number of iterations; ``len`` counts batches.

    An unreadable image is a row with index -1. ``broken`` lists this rank's unreadable images of the latest iteration.
    """

    def __init__(self, dataset: "_EvalDataset", indices: np.ndarray, *, batch_size: int, num_workers: int):
        self.broken: list[BrokenImageRecord] = []
        self._dataset = dataset
        self._batches = [
            indices[start : start + batch_size].tolist() for start in range(0, len(indices), batch_size)
        ]
        self._num_workers = num_workers

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[LabeledBatch]:
        self.broken.clear()
        loader = make_loader(
            self._dataset, self._batches, collate=_collate, num_workers=self._num_workers, pin_memory=False
        )
        for batch, broken in loader:
            self.broken += broken
            yield batch


def eval_loader(
    shards: ShardSet,
    *,
    resize: int,
    crop: int,
    batch_size: int,
    rank: int,
    world_size: int,
    num_workers: int,
    limit: int = 0,
    chosen: Int64[np.ndarray, " c"] | None = None,
) -> EvalLoader:
    """Return one rank's loader over the images of a set, or over ``limit`` of them, spread evenly over the classes (0 = all).

    chosen: dataset indices, ascending; None = the whole set. The short side is resized to ``resize`` pixels (bicubic,
    antialiased). A square of ``crop`` pixels is cut from the center and normalized with the mean and deviation of
    ImageNet. Rank r of R takes images r, r+R, ...; every rank yields the same number of rows, padded with index and label
    -1. Raises UserError for sizes out of range.
    Source: evaluation protocol of DINO (arXiv 2104.14294), with 256 and 224 pixels there.
    """
    check_sizes(Sizes(resize, crop))
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: expected at least 1")
    if limit < 0:
        raise UserError(f"limit is {limit}: expected 0 (all images) or more")
    images = np.arange(len(shards)) if chosen is None else chosen
    if limit:
        images = images[evenly_spread(shards.labels()[images], limit)]
    rows = rank_indices(len(images), rank=rank, world_size=world_size)
    indices = np.append(images, PADDING)[rows]  # row -1 is padding and picks the last entry: PADDING
    dataset = _EvalDataset(shards, resize, crop)
    return EvalLoader(dataset, indices, batch_size=batch_size, num_workers=num_workers)


def evenly_spread(labels: Int64[np.ndarray, " n"], limit: int) -> Int64[np.ndarray, " m"]:
    """Return ``limit`` places of a set, ascending: each class keeps its share, and its images are spread over the set.

    All places if there are no more. A set without labels is one class.
    """
    count = min(limit, len(labels))
    by_class = np.argsort(labels, kind="stable")
    return np.sort(by_class[np.arange(count) * len(labels) // count]) if count else by_class[:0]


def rank_indices(num_images: int, *, rank: int, world_size: int) -> Int64[np.ndarray, " n"]:
    """Return the images of one rank, padded with -1 so that every rank has the same number."""
    check_rank(rank, world_size)
    rows = -(-num_images // world_size)
    padded = np.full(rows * world_size, PADDING)
    padded[:num_images] = np.arange(num_images)
    return padded[rank::world_size]


@dataclass(frozen=True, slots=True)
class _EvalSample:
    image: UInt8[Tensor, "3 h w"]
    label: int
    index: int
    broken: BrokenImageRecord | None


@dataclass(frozen=True, slots=True)
class _EvalDataset:
    shards: ShardSet
    resize: int
    crop: int

    def __getitem__(self, index: int) -> _EvalSample:
        broken = None
        if index != PADDING:
            self.shards.read_ahead(index)
            try:
                image = center_square(decode(self.shards.read(index)), resize_to=self.resize, crop=self.crop)
                return _EvalSample(image, self.shards.label(index), index, None)
            except BrokenImage as error:
                broken = BrokenImageRecord(index, self.shards.key(index), str(error))
        empty = torch.zeros(3, self.crop, self.crop, dtype=torch.uint8)
        return _EvalSample(empty, -1, PADDING, broken)


def _collate(samples: list[_EvalSample]) -> tuple[LabeledBatch, list[BrokenImageRecord]]:
    batch = LabeledBatch(
        images=normalize(torch.stack([sample.image for sample in samples])),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
    )
    return batch, [sample.broken for sample in samples if sample.broken is not None]
