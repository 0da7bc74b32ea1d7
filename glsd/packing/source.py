"""Images that are still to be read, wherever they come from; reading, checking and resizing them in worker processes, in order."""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from PIL import Image

from glsd.data.decode import FORMATS, decode
from glsd.data.workers import make_loader
from glsd.errors import BrokenImage, UserError
from glsd.packing.resize import shorten
from glsd.rng import Stream, permutation
from glsd.shards.index import IMAGE_EXTENSIONS

IMAGES_AT_ONCE = (
    2  # handed to a worker at a time, which is given two such rounds: the images held in memory stay few
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Images numbered from 0, each with a name and perhaps a label, and how to read one."""

    title: str  # what to call it in messages
    names: Sequence[str]  # for the table of sources
    read: Callable[[int], bytes]  # raises OSError, BrokenImage; goes to worker processes
    labels: Sequence[int] | None = None
    classes: Sequence[str] = ()  # in the order of their labels; empty = they have no names
    runs: Sequence[
        int
    ] = ()  # lengths of the runs of images that are best read together; empty = any order is as good


class Loaded(NamedTuple):
    """One image that was read, or why it could not be."""

    number: int
    raw: bytes = b""
    extension: str = ""
    was: str = ""  # width x height of a larger original
    reason: str = ""  # why it is left out


def reading_order(source: Source, seed: int) -> Int64[np.ndarray, " n"]:
    """Return a random order of the images, a function of the seed; runs are shuffled, and the images inside each."""
    if not source.runs:
        return permutation(len(source.names), seed=seed, stream=Stream.PACK)
    lengths = np.asarray(source.runs, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    runs = permutation(len(lengths), seed=seed, stream=Stream.PACK)
    parts = [
        starts[run] + permutation(int(lengths[run]), seed=seed, stream=Stream.PACK, part=int(run) + 1)
        for run in runs
    ]
    return np.concatenate(parts)


def source_digest(source: Source) -> str:
    """Return a hash of what is to be packed: names and labels in their order, and the names of the classes."""
    digest = hashlib.sha256(repr((list(source.classes), list(source.runs))).encode())
    labels = source.labels if source.labels is not None else [None] * len(source.names)
    for name, label in zip(source.names, labels, strict=True):
        digest.update(f"{name}\0{label}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def load_images(
    source: Source, order: Int64[np.ndarray, " n"], *, full_check: bool, short_side: int | None, workers: int
) -> Iterator[Loaded]:
    """Yield the images in the order given, however many worker processes read them (0: this one does)."""
    task = _Task(source.names, source.read, full_check, short_side)
    if workers < 0:
        raise UserError(f"workers is {workers}: expected 0 (read in this process) or more")
    yield from in_workers(task, order, workers=workers, at_once=IMAGES_AT_ONCE)


def in_workers(task: Any, numbers: Int64[np.ndarray, " n"], *, workers: int, at_once: int) -> Iterator:
    """Yield ``task[number]`` for each number, in order; a UserError that it returns is raised here.

    Raises UserError if a worker process dies, as it does when the memory is full.
    """
    if not workers:
        results: Iterable = (task[int(number)] for number in numbers)
    else:
        results = _from_processes(task, numbers, workers, at_once)
    for result in results:
        if isinstance(result, UserError):
            raise result
        yield result


def _from_processes(task: Any, numbers: Int64[np.ndarray, " n"], workers: int, at_once: int) -> Iterator:
    batches = _Batches(numbers, at_once)
    loader = make_loader(task, batches, collate=list, num_workers=workers, pin_memory=False)
    rounds = iter(loader)
    while True:
        try:
            batch = next(rounds, None)
        except RuntimeError as error:
            if "DataLoader worker (pid" not in str(error):
                raise  # a bug of ours in a worker
            raise UserError(
                "a worker process died, perhaps for want of memory (the system's log says): try again with fewer --workers"
            ) from error
        if batch is None:
            return
        yield from batch


class _Batches:
    """Lists of at most ``size`` numbers; an object, because the loader asks for an iterator once."""

    def __init__(self, numbers: Int64[np.ndarray, " n"], size: int):
        self._numbers, self._size = numbers, size

    def __iter__(self) -> Iterator[list[int]]:
        for start in range(0, len(self._numbers), self._size):
            yield self._numbers[start : start + self._size].tolist()


@dataclass(frozen=True)
class _Task:
    names: Sequence[str]
    read: Callable[[int], bytes]
    full_check: bool
    short_side: int | None

    def __getitem__(self, number: int) -> Loaded | UserError:
        try:
            raw, was = self.read(number), ""
            extension = image_extension(raw)
            smaller = shorten(raw, self.short_side) if self.short_side else None
            if smaller:
                raw, extension, was = smaller
            else:
                if self.full_check:
                    decode(raw)
                given = os.path.splitext(self.names[number])[1][1:].lower()
                extension = given if given in IMAGE_EXTENSIONS else extension
        except (OSError, BrokenImage) as error:
            return Loaded(number, reason=str(error))
        except UserError as error:
            return error
        return Loaded(number, raw, extension, was)


def image_extension(raw: bytes) -> str:
    """Return the extension that suits the bytes of an image file; BrokenImage if their header is of none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images long before it refuses them
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                kind = str(image.format).lower()
    except Image.UnidentifiedImageError as error:
        raise BrokenImage("not an image of a known format" if raw else "empty file (0 bytes)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(str(error)) from error
    return "jpg" if kind in ("jpeg", "mpo") else kind
