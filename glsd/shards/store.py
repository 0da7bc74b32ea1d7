"""Tar shards as one list of samples: each image is one ``pread`` away, and nothing is unpacked."""

import functools
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float64, Int64

from glsd.errors import BrokenImage, UserError, one_line
from glsd.shards.cache import ShardCache, check_digest
from glsd.shards.find import (
    HIDDEN,
    find_sources,
    shard_cache,
    shard_headers,
)
from glsd.shards.index import (
    REBUILD,
    IndexHeader,
    ShardIndex,
    map_index,
)
from glsd.shards.prefetch import Prefetcher
from glsd.shards.remote import identity, is_remote, look_up, read_all, shown

CLASSES_FILE = "classes.json"  # beside labeled shards: the class names, in the order of their labels
CHECKED_AT_START = (
    1000  # up to so many shards are compared with their indices at the start: about 0.1 ms each
)
MAX_IMAGE_BYTES = 1 << 30  # the largest image that decode.py accepts, uncompressed with 16 bits per color
MAX_OPEN_SHARDS = 64  # per process, two files each; a system allows 1,024 open files by default


class ShardSet:
    """The samples of all shards in the order given, numbered from 0.

    Opening costs one small read per shard. Each process opens or downloads a shard when it first reads from it, so a set
    can be passed to worker processes. Not thread-safe.
    """

    def __init__(
        self,
        paths: Sequence[str],
        headers: Sequence[IndexHeader],
        *,
        cache: ShardCache,
        weights: Float64[np.ndarray, " s"] | None = None,
    ):
        self.paths = tuple(paths)
        self.shard_sizes: Int64[np.ndarray, " s"] = np.array([h.count for h in headers], dtype=np.int64)
        self.shard_weights = weights  # how often an epoch reads each shard; None: once
        self._headers = tuple(headers)
        self._ends = np.cumsum(self.shard_sizes)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()
        self._cache = cache
        self._remote = {number for number, path in enumerate(paths) if is_remote(path)}
        self._read_ahead = -1
        self._prefetcher = Prefetcher(functools.partial(_fetch_one, cache, self.paths, self._headers))

    def __len__(self) -> int:
        return int(self._ends[-1])

    @property
    def has_remote(self) -> bool:
        """Whether a shard is read from a server."""
        return bool(self._remote)

    def read(self, index: int) -> bytes:
        """Return a sample's image file; BrokenImage if it has none or an empty one, UserError if its shard is damaged."""
        shard, row = self._locate(index)
        offset, size = int(shard.index.image_offset[row]), int(shard.index.image_size[row])
        if offset < 0:
            raise BrokenImage("no image member")
        if size == 0:
            raise BrokenImage("empty image member (0 bytes)")
        return shard.read(offset, size)

    def key(self, index: int) -> str:
        """Return a sample's name in its shard: the members' path up to the first dot of the last component."""
        shard, row = self._locate(index)
        start = int(shard.index.key_end[row - 1]) if row else 0
        name = shard.index.key_bytes[start : int(shard.index.key_end[row])]
        return name.tobytes().decode(errors="surrogateescape")

    def label(self, index: int) -> int:
        """Return a sample's label, -1 if it has none."""
        shard, row = self._locate(index)
        return int(shard.index.label[row])

    def labels(self) -> Int64[np.ndarray, " n"]:
        """Return the labels of all samples, -1 where there is none."""
        # Copies, so that only one file is mapped at a time.
        return np.concatenate([map_index(header).label.copy() for header in self._headers])

    def check_labeled(self) -> None:
        """Raise UserError if a sample has no label."""
        missing = np.flatnonzero(self.labels() < 0)
        if len(missing):
            first = int(missing[0])
            raise UserError(
                f"shards: {len(missing)} of {len(self)} images have no label, first {self.key(first)} in "
                f"{self.shard_of(first)}: pack a folder that has one subfolder per class, or a list with labels"
            )

    def shard_of(self, index: int) -> str:
        """Return the path or address of a sample's shard, for a message."""
        return shown(self.paths[self._shard_number(index)])

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sample counts and sizes, in order.

        With equal fingerprints an epoch has the same samples in the same order, also after the shards moved.
        """
        digest = hashlib.sha256()
        for path, header in zip(self.paths, self._headers, strict=True):
            digest.update(
                f"{os.path.basename(identity(path))}\0{header.count}\0{header.shard_bytes}\n".encode()
            )
        return digest.hexdigest()

    def digest(self) -> str:
        """Return a hash of the shards' places and of their content, as far as the indices tell it."""
        digest = hashlib.sha256()
        for path, header in zip(self.paths, self._headers, strict=True):
            digest.update(
                f"{_place(path)}\0{header.digest}\0{header.checksum}\n".encode(errors="surrogateescape")
            )
        return digest.hexdigest()

    def prefetch(self, numbers: Sequence[int]) -> None:
        """Download the remote ones of these shards in the background; replaces an earlier request."""
        if wanted := [number for number in numbers if number in self._remote]:
            self._prefetcher.want(wanted)

    def read_ahead(self, index: int) -> None:
        """Download the shard after this sample's in the background, for a reader that goes from first to last."""
        number = self._shard_number(index)
        if self._remote and number != self._read_ahead:
            self._read_ahead = number
            self.prefetch(range(number, min(number + 2, len(self.paths))))

    def check_room(self, num_shards: int, what: str) -> None:
        """Raise UserError if the largest ``num_shards`` remote shards do not fit into the cache together.

        what: the reader that needs so many at a time, for the message.
        """
        sizes = sorted((self._headers[number].shard_bytes for number in self._remote), reverse=True)
        self._cache.check_room(sum(sizes[:num_shards]), what)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # open files are not passed to other processes

    def _shard_number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def _locate(self, index: int) -> "tuple[_OpenShard, int]":
        number = self._shard_number(index)
        shard = self._open.get(number)
        if shard is None:
            cache = self._cache if number in self._remote else None
            check = len(self.paths) > CHECKED_AT_START
            shard = _OpenShard(self.paths[number], self._headers[number], cache, check=check)
            self._open[number] = shard
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return shard, index - int(self._ends[number] - self.shard_sizes[number])


def _fetch_one(cache: ShardCache, paths: Sequence[str], headers: Sequence[IndexHeader], number: int) -> None:
    cache.fetch(paths[number], headers[number], wait=False)


class _OpenShard:
    """One shard's mapped index and, once it is read from, its open file.

    cache: of a remote shard, None for a local one. check: compare the content with the index at the first read.
    """

    def __init__(self, path: str, header: IndexHeader, cache: ShardCache | None, *, check: bool):
        self.path = path
        self.index: ShardIndex = map_index(header)
        self._header = header
        self._cache = cache
        self._check = check
        self._fd: int | None = None

    def read(self, offset: int, size: int) -> bytes:
        if not 0 <= size <= self.index.shard_bytes - offset:
            raise UserError(f"index of shard {shown(self.path)} is damaged: {REBUILD}")
        if size > MAX_IMAGE_BYTES:
            raise BrokenImage(f"image member of {size} bytes: at most {MAX_IMAGE_BYTES} are read")
        if self._cache is not None:
            return self._cache.read(self.path, self._header, offset, size)
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
                if self._check:
                    check_digest(self.path, self.path, self._header)
            raw = os.pread(self._fd, size, offset)
        except OSError as error:
            raise UserError(f"cannot read shard {self.path}: {one_line(error)}") from error
        if len(raw) < size:
            raise UserError(
                f"shard {self.path} ends before byte {offset + size}: it was truncated while in use"
            )
        return raw

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


def open_shards(patterns: str | Sequence[str], *, weights: Sequence[float] = ()) -> ShardSet:
    """Open the shards that brace patterns and globs of local paths and addresses name, in that order (globs sorted).

    The index of a shard is the file ``<shard>.index`` beside it. A local tar without one is scanned once; its index is
    kept in ``$GLSD_CACHE/index`` (``~/.cache/glsd/index`` by default), never beside the user's data. A shard must have the
    size and the content that its index was made for. Content is compared at three places: at the start for local shards,
    at the first read for remote ones and very long lists.

    weights: how often an epoch reads the shards of each pattern, once by default; 0.5 reads half of their samples. Raises
    UserError for a pattern without match, a pipe, and a shard that is named twice, missing, damaged or not that of its
    index, or is remote and has no index.
    """
    sources = find_sources(patterns)
    per_shard = None
    if len(weights):
        if (
            len(weights) != len(sources)
            or not all(0 <= weight < 1e6 for weight in weights)
            or not any(weights)
        ):
            raise UserError(
                f"weights is {list(weights)}: expected one number >= 0 for each of the {len(sources)} shard patterns, and "
                "not all 0"
            )
        per_shard = np.repeat(np.array(weights, dtype=np.float64), [len(paths) for paths in sources])
    paths = [path for source in sources for path in source]
    headers = shard_headers(paths)
    if len(paths) <= CHECKED_AT_START:
        for path, header in zip(paths, headers, strict=True):
            if not is_remote(path):
                check_digest(path, path, header)
    return ShardSet(paths, headers, cache=shard_cache(), weights=per_shard)


def check_disjoint(one: ShardSet, other: ShardSet, *, names: tuple[str, str]) -> None:
    """Raise UserError if a shard is in both sets, also under another name; names: of the sets, for the message."""
    real = {_place(path) for path in one.paths}
    shared = [path for path in other.paths if _place(path) in real]
    if shared:
        raise UserError(
            f"{names[0]} and {names[1]} have {len(shared)} shards in common, such as {shown(shared[0])}: an image would be "
            "compared with itself; name different shards"
        )


def _place(path: str) -> str:
    return identity(path) if is_remote(path) else os.path.realpath(path)


def check_same_classes(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError if the classes.json files beside the shards of two sets differ."""
    folders = dict.fromkeys(path.rpartition("/")[0] for path in (*one.paths, *other.paths))
    files = [file for folder in folders if _is_file(file := os.path.join(folder, CLASSES_FILE))]
    for file in files[1:]:
        if read_classes(file) != read_classes(files[0]):
            raise UserError(
                f"{shown(files[0])} and {shown(file)} number different classes: a label would not mean the same in both sets; "
                f"pack one of them again with --classes {shown(files[0])}"
            )


def _is_file(path: str) -> bool:
    return look_up([path], HIDDEN)[0] is not None if is_remote(path) else os.path.isfile(path)


def read_classes(file: str | Path) -> list[str]:
    """Return the class names of a classes.json, in the order of their labels; UserError if it is not such a list."""
    try:
        names = json.loads(read_all(str(file)) if is_remote(str(file)) else Path(file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise UserError(
            f"cannot read {shown(str(file))} ({error}): expected a JSON list of class names"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'{shown(str(file))} is not a list of class names: expected JSON such as ["cat", "dog"]'
        )
    if len(set(names)) < len(names):
        raise UserError(
            f"{shown(str(file))} names a class twice: expected each name once, in the order of the labels"
        )
    return names
