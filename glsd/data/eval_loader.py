"""Labeled batches for evaluation: every image exactly once over all ranks, as many batches on each."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import InterpolationMode, functional

from glsd.batches import LabeledBatch
from glsd.data.decode import decode
from glsd.data.photometric import normalize
from glsd.data.workers import make_loader, raised
from glsd.errors import BrokenImage, UserError
from glsd.shards.store import ShardSet

# Of the part that is resized: only the center is used, and a 1 x 100000 image must not become gigabytes.
MAX_ASPECT = 8
PADDING = -1


@dataclass(frozen=True, slots=True)
class BrokenImageRecord:
    """One image that could not be read, left out of the evaluation."""

    index: int
    key: str
    reason: str


class EvalLoader:
    """One rank's batches of a labeled set; can be iterated any number of times. ``len`` counts batches.

    An unreadable image comes as a row with index -1 and is listed in ``broken`` (of the latest iteration,
    this rank's only).
    """

    def __init__(self, dataset: "_EvalDataset", indices: np.ndarray, *, batch_size: int, num_workers: int):
        self.num_images = int((indices >= 0).sum())  # of this rank
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
        for batch, broken in raised(loader):
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
    """Return one rank's loader over the images of a set, or over ``limit`` of them spread evenly (0 = all).

    chosen: the dataset indices of a part of the set, ascending; the rest is as if it were not there.

    The short side is resized to ``resize`` pixels (bicubic, antialiased), a square of ``crop`` is cut from
    the center and normalized with the mean and deviation of ImageNet. Rank r of R takes images r, r+R, ...;
    each rank yields the same number of rows, the missing ones padded with index -1 and label -1. Raises
    UserError for sizes that cannot be. Source: evaluation protocol of DINO (arXiv 2104.14294), there 256 and
    224.
    """
    if not 1 <= crop <= resize:
        raise UserError(f"crop {crop} of images resized to {resize}: expected 1 <= crop <= resize")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: expected at least 1")
    if limit < 0:
        raise UserError(f"limit is {limit}: expected 0 (all images) or more")
    among = np.arange(len(shards)) if chosen is None else chosen
    rows = rank_indices(len(among), rank=rank, world_size=world_size, limit=limit)
    indices = np.append(among, PADDING)[rows]  # row -1 is padding, and picks the last: padding
    dataset = _EvalDataset(shards, resize=resize, crop=crop)
    return EvalLoader(dataset, indices, batch_size=batch_size, num_workers=num_workers)


def rank_indices(num_images: int, *, rank: int, world_size: int, limit: int = 0) -> Int64[np.ndarray, " n"]:
    """Return the images of one rank, padded with -1 so that every rank has as many."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world_size")
    count = min(limit, num_images) if limit else num_images
    chosen = np.arange(count) * num_images // count
    rows = -(-count // world_size)
    padded = np.full(rows * world_size, PADDING)
    padded[:count] = chosen
    return padded[rank::world_size]


@dataclass(frozen=True, slots=True)
class _EvalSample:
    image: UInt8[Tensor, "3 h w"]
    label: int
    index: int
    broken: BrokenImageRecord | None


class _EvalDataset(Dataset):
    def __init__(self, shards: ShardSet, *, resize: int, crop: int):
        self.shards = shards
        self.resize = resize
        self.crop = crop

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

    def __getitems__(self, indices: list[int]) -> list[_EvalSample] | UserError:
        try:
            return [self[index] for index in indices]
        except UserError as error:  # as a value: the DataLoader would wrap it into a traceback
            return error


def center_square(image: UInt8[Tensor, "3 h w"], *, resize_to: int, crop: int) -> UInt8[Tensor, "3 s s"]:
    """Return the center square of ``crop`` pixels of an image resized to a short side of ``resize_to``."""
    height, width = image.shape[1:]
    longest = MAX_ASPECT * min(height, width)
    if max(height, width) > longest:
        image = functional.center_crop(image, [min(height, longest), min(width, longest)])
    resized = functional.resize(image, [resize_to], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return functional.center_crop(resized, [crop, crop])


def _collate(
    samples: list[_EvalSample] | UserError,
) -> tuple[LabeledBatch, list[BrokenImageRecord]] | UserError:
    if isinstance(samples, UserError):
        return samples
    batch = LabeledBatch(
        images=normalize(torch.stack([sample.image for sample in samples])),
        labels=torch.tensor([sample.label for sample in samples]),
        indices=torch.tensor([sample.index for sample in samples]),
    )
    return batch, [sample.broken for sample in samples if sample.broken is not None]
