"""A set of images to pack, and reading, checking and resizing them in worker processes."""

import errno
import hashlib
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from glsd.data.decode import decode, read_header
from glsd.data.workers import make_loader, raised
from glsd.errors import BrokenImage, UserError
from glsd.packing.resize import shorten
from glsd.rng import Stream, permutation
from glsd.shards.index import IMAGE_EXTENSIONS

# Images in a worker's batch. Each worker holds two batches, so few images are in memory.
IMAGES_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images to pack, numbered from 0."""

    title: str  # what messages call it
    names: Sequence[str]  # where each image comes from, for the table of source files
    read: Callable[[int], bytes]  # goes to worker processes; raises OSError, BrokenImage or UserError
    labels: Sequence[int] | None = None  # -1 = none
    classes: Sequence[str] = ()  # class names in label order; empty = labels have no names
    groups: Sequence[int] = ()  # sizes of consecutive groups that are read together; empty = no groups
    keeps_extensions: bool = True  # those of names that end like an image file; otherwise the bytes decide


class Loaded(NamedTuple):
    """One image that was read, or the reason why not."""

    number: int  # in the source
    raw: bytes = b""
    extension: str = ""
    label: int = -1  # -1 = none
    original_size: str = ""  # "width x height" before it was resized; empty = not resized
    reason: str = ""  # why it is left out; empty = it was read


class FileReader:
    """Reads files below a folder, by number."""

    def __init__(self, root: Path, names: Sequence[str]):
        self._root, self._names = root, names

    def __call__(self, number: int) -> bytes:
        path = self._root / self._names[number]
        check_regular(path)
        return path.read_bytes()


def check_regular(file: Path) -> None:
    """Raise OSError for a missing file, a device, a folder and a pipe, which could block for ever."""
    if not stat.S_ISREG(os.stat(file).st_mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(file))


def reading_order(source: Source, seed: int) -> Int64[np.ndarray, " n"]:
    """Return the shuffled image numbers, a function of the seed. Groups are shuffled, then the images in each."""
    if not source.groups:
        return permutation(len(source.names), seed=seed, stream=Stream.PACK)
    sizes = np.asarray(source.groups, dtype=np.int64)
    starts = np.cumsum(sizes) - sizes
    parts = [
        starts[group] + permutation(int(sizes[group]), seed=seed, stream=Stream.PACK, part=int(group) + 1)
        for group in permutation(len(sizes), seed=seed, stream=Stream.PACK)
    ]
    return np.concatenate(parts)


def source_digest(source: Source) -> str:
    """Return a hash of the names, labels, classes and groups of a source."""
    digest = hashlib.sha256(repr((list(source.classes), list(source.groups))).encode())
    labels = source.labels if source.labels is not None else [None] * len(source.names)
    for name, label in zip(source.names, labels, strict=True):
        digest.update(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def load_images(
    source: Source,
    numbers: Int64[np.ndarray, " n"],
    *,
    full_check: bool,
    short_side: int | None,
    workers: int,
) -> Iterator[Loaded]:
    """Yield the images in the order of ``numbers``; the number of worker processes does not change them.

    Raises what in_workers raises.
    """
    task = _Task(source, full_check, short_side)
    yield from in_workers(task, numbers, workers=workers, at_once=IMAGES_AT_ONCE)


def in_workers(task: Any, numbers: Int64[np.ndarray, " n"], *, workers: int, at_once: int) -> Iterator:
    """Yield ``task[number]`` for each number, in order, computed by worker processes (0: by this process).

    Raises UserError where the task returns one, for a negative number of workers, and if a worker process dies.
    """
    if workers < 0:
        raise UserError(f"workers is {workers}: expected 0 (read in this process) or more")
    if workers:
        yield from raised(_from_processes(task, numbers, workers, at_once))
    else:
        yield from raised(task[int(number)] for number in numbers)


def _from_processes(task: Any, numbers: Int64[np.ndarray, " n"], workers: int, at_once: int) -> Iterator:
    batches = _Batches(numbers, at_once)
    rounds = iter(make_loader(task, batches, collate=list, num_workers=workers, pin_memory=False))
    while True:
        try:
            batch = next(rounds, None)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise  # a bug of ours in a worker
            raise UserError(
                "a worker process died, perhaps because memory ran out (see the system log): "
                "try again with fewer --workers"
            ) from error
        if batch is None:
            return
        yield from batch


class _Batches:
    """Lists of at most ``size`` numbers. The loader needs an iterable, not a generator."""

    def __init__(self, numbers: Int64[np.ndarray, " n"], size: int):
        self._numbers, self._size = numbers, size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._numbers), self._size):
            yield self._numbers[start : start + self._size].tolist()


@dataclass(frozen=True)
class _Task:
    source: Source
    full_check: bool
    short_side: int | None

    def __getitem__(self, number: int) -> Loaded | UserError:
        source = self.source
        label = source.labels[number] if source.labels is not None else -1
        try:
            raw = source.read(number)
            extension = read_header(raw).kind
            if self.short_side and (smaller := shorten(raw, self.short_side)):
                return Loaded(number, smaller[0], smaller[1], label, smaller[2])
            if self.full_check:
                decode(raw)
        except (OSError, BrokenImage) as error:
            return Loaded(number, reason=str(error))
        except UserError as error:
            return error
        given = os.path.splitext(source.names[number])[1][1:].lower()
        if source.keeps_extensions and given in IMAGE_EXTENSIONS:
            extension = given
        return Loaded(number, raw, extension, label)
