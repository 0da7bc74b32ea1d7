"""Tar shards as one list of samples: each image is one ``pread`` away, and nothing is unpacked."""

import functools
import hashlib
import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from glsd.errors import BrokenImage, UserError, one_line
from glsd.shards.cache import ShardCache, check_digest
from glsd.shards.find import (
    HIDDEN,
    find_sources,
    shard_cache,
    shard_headers,
    unused_members,
)
from glsd.shards.index import (
    REBUILD,
    IndexHeader,
    ShardIndex,
    map_index,
)
from glsd.shards.labels import CLASSES_FILE, read_classes
from glsd.shards.prefetch import Prefetcher
from glsd.shards.remote import identity, is_remote, look_up, shown

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
        self._label_of: dict[int, Int64[np.ndarray, " c"]] = {}  # shard -> label of each of its own labels
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
        label = int(shard.index.label[row])
        label_of = self._label_of.get(self._shard_number(index))
        return label if label_of is None or label < 0 else int(label_of[label])

    def labels(self) -> Int64[np.ndarray, " n"]:
        """Return the labels of all samples, -1 where there is none."""
        # Copies, so that only one file is mapped at a time.
        parts = [map_index(header).label.copy() for header in self._headers]
        for number, label_of in self._label_of.items():
            parts[number] = np.where(parts[number] < 0, -1, label_of[parts[number]])
        return np.concatenate(parts)

    def renumber(self, names: Mapping[str, Sequence[str]], numbers: Mapping[str, int]) -> None:
        """Give the labels of each shard the ``numbers`` of their classes. names: by folder, in the order of its labels.

        Raises UserError for a label without name.
        """
        self._label_of = {}
        for shard, path in enumerate(self.paths):
            known = names[_folder(path)]
            largest = int(map_index(self._headers[shard]).label.max())
            if largest >= len(known):
                raise UserError(
                    f"shard {shown(path)} has the label {largest}, but the {CLASSES_FILE} beside it names only {len(known)} "
                    "classes: add the names, or remove that file if it belongs to other shards"
                )
            label_of = np.array([numbers[name] for name in known], dtype=np.int64)
            if not np.array_equal(label_of, np.arange(len(known))):
                self._label_of[shard] = label_of

    def unused_members(self) -> list[str]:
        """Return sentences about images of samples that are not used, if any."""
        return unused_members(self._headers)

    def check_labeled(self) -> None:
        """Raise UserError if a sample has no label."""
        missing = np.flatnonzero(self.labels() < 0)
        if len(missing):
            first = int(missing[0])
            raise UserError(
                f"shards: {len(missing)} of {len(self)} images have no label, first {self.key(first)} in "
                f"{self.shard_of(first)}: a label is a .cls member with a number or a name of classes.json (.json members are not "
                "read); pack a folder that has one subfolder per class, or a list with labels"
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


def number_together(sets: Mapping[str, ShardSet]) -> None:
    """Give the classes of all sets one numbering, by their names, so that equal labels are equal classes.

    The names are those of the classes.json beside the shards; their numbers are those of the first one, and new names follow.
    Without any names labels are compared as numbers. sets: by the key that the user gave each with, for messages.
    Raises UserError if some shards have class names and others only numbers, and for a label without name.
    """
    folders = {_folder(path): key for key, shards in sets.items() for path in shards.paths}
    names = {
        folder: read_classes(file)
        for folder in folders
        if _is_file(file := os.path.join(folder, CLASSES_FILE))
    }
    if not names:
        return
    named = next(iter(names))
    if unnamed := [folder for folder in folders if folder not in names]:
        file = shown(os.path.join(named, CLASSES_FILE))
        raise UserError(
            f"{folders[named]} has class names ({file}), but {folders[unnamed[0]]} in {shown(unnamed[0]) or '.'} has only numbers: "
            f"a label may not mean the same class in both; pack the latter again with --classes {file}, or copy that file "
            "beside its shards if their numbers count its names from 0"
        )
    numbers: dict[str, int] = {}
    for known in names.values():
        for name in known:
            numbers.setdefault(name, len(numbers))
    for shards in sets.values():
        shards.renumber(names, numbers)


def _folder(path: str) -> str:
    return path.rpartition("/")[0]


def _is_file(path: str) -> bool:
    return look_up([path], HIDDEN)[0] is not None if is_remote(path) else os.path.isfile(path)
