"""Tar shards as one long list of samples: any image is one ``pread`` away, nothing is unpacked."""

import glob
import hashlib
import json
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from braceexpand import braceexpand
from jaxtyping import Int64
from tqdm import tqdm

from glsd.contracts import UserError
from glsd.data.decode import BrokenImage
from glsd.data.shard_index import (
    REBUILD,
    SUFFIX,
    VERSION,
    IndexHeader,
    ShardIndex,
    build_index,
    index_path,
    map_index,
    marks_digest,
    read_header,
    write_index,
)

CLASSES_FILE = "classes.json"  # beside labelled shards: the class names, in the order of their labels
SOURCES_SUFFIX = "-files.tsv"  # beside packed shards: which file a key comes from
MAX_OPEN_SHARDS = 64  # per process, two files each; a system allows 1,024 open files by default


class ShardSet:
    """The samples of all shards in the order given, numbered from 0.

    Opening costs a few small reads per shard; files are opened where and when they are read, so a set can be
    handed to worker processes. Not for several threads at once.
    """

    def __init__(self, paths: Sequence[str], headers: Sequence[IndexHeader]):
        self.paths = tuple(paths)
        self.shard_sizes: Int64[np.ndarray, " s"] = np.array([h.count for h in headers], dtype=np.int64)
        self._headers = tuple(headers)
        self._ends = np.cumsum(self.shard_sizes)
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int) -> bytes:
        """Return the bytes of a sample's image file.

        Raises BrokenImage if the sample has no image or an empty one, UserError if its shard vanished or
        shrank.
        """
        shard, row = self._locate(index)
        offset, size = int(shard.index.image_offset[row]), int(shard.index.image_size[row])
        if offset < 0:
            raise BrokenImage("no image member")
        if size == 0:
            raise BrokenImage("empty image member (0 bytes)")
        return shard.read(offset, size)

    def key(self, index: int) -> str:
        """Return a sample's name inside its shard."""
        shard, row = self._locate(index)
        return shard.index.key(row)

    def label(self, index: int) -> int:
        """Return a sample's label, -1 if it has none."""
        shard, row = self._locate(index)
        return int(shard.index.label[row])

    def labels(self) -> Int64[np.ndarray, " n"]:
        """Return the labels of all samples, -1 where there is none."""
        # Copies, so that no more than one file is mapped at a time.
        return np.concatenate([map_index(header).label.copy() for header in self._headers])

    def shard_of(self, index: int) -> str:
        """Return the path of the shard that holds a sample."""
        return self.paths[self._shard_number(index)]

    def fingerprint(self) -> str:
        """Return a hash of the shards' names, sample counts and sizes, in order.

        Equal fingerprints mean that an epoch's order still means the same samples, wherever the folder is
        now.
        """
        digest = hashlib.sha256()
        for path, header in zip(self.paths, self._headers, strict=True):
            digest.update(f"{os.path.basename(path)}\0{header.count}\0{header.shard_bytes}\n".encode())
        return digest.hexdigest()

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_open": OrderedDict()}  # open files stay in their process

    def _shard_number(self, index: int) -> int:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return int(np.searchsorted(self._ends, index, side="right"))

    def _locate(self, index: int) -> "tuple[_OpenShard, int]":
        number = self._shard_number(index)
        shard = self._open.get(number)
        if shard is None:
            shard = self._open[number] = _OpenShard(self.paths[number], self._headers[number])
            if len(self._open) > MAX_OPEN_SHARDS:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(number)
        return shard, index - int(self._ends[number] - self.shard_sizes[number])


class _OpenShard:
    """One shard's mapped index and, once it is read from, its open file."""

    def __init__(self, path: str, header: IndexHeader):
        self.path = path
        self.index: ShardIndex = map_index(header)
        self._fd: int | None = None

    def read(self, offset: int, size: int) -> bytes:
        if not 0 <= size <= self.index.shard_bytes - offset:
            raise UserError(f"index of shard {self.path} is damaged: {REBUILD}")
        try:
            if self._fd is None:
                self._fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            raw = os.pread(self._fd, size, offset)
        except OSError as error:
            raise UserError(f"cannot read shard {self.path}: {error.strerror or error}") from error
        if len(raw) < size:
            raise UserError(f"shard {self.path} ends before byte {offset + size}: it was cut while in use")
        return raw

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def __del__(self) -> None:
        if getattr(self, "_fd", None) is not None:
            self.close()


def open_shards(patterns: str | Sequence[str], *, cache_dir: Path | None = None) -> ShardSet:
    """Open the shards that brace patterns and globs of local paths name, in that order (globs sorted).

    The index of a shard is its sidecar ``<shard>.index`` if there is one; otherwise the tar is scanned once
    and the index is kept in ``cache_dir`` (default ``$GLSD_CACHE/index``, or ``~/.cache/glsd/index``), never
    beside the user's data. Raises UserError for a pattern without match, a remote or piped address, a shard
    named twice, and a shard that is missing, truncated, damaged, or of another size or content than its index says
    (compared at three places: times of files say nothing about copies).
    """
    paths = find_shards(patterns)
    cache = cache_dir if cache_dir is not None else default_cache_dir()
    headers = [_header(path, cache) for path in tqdm(paths, "indexing shards", delay=2, disable=None)]
    return ShardSet(paths, headers)


def default_cache_dir() -> Path:
    """Return where the indices of shards without sidecar are kept."""
    return Path(os.environ.get("GLSD_CACHE") or Path.home() / ".cache" / "glsd") / "index"


def find_shards(patterns: str | Sequence[str]) -> list[str]:
    """Return the local files that brace patterns and globs name; UserError for none or for one twice."""
    given = [patterns] if isinstance(patterns, str) else list(patterns)
    if not any(given):
        raise UserError("no shards given: expected a pattern such as 'shards/train-{000000..000146}.tar'")
    paths = [path for pattern in given for path in _expand(pattern)]
    seen: dict[str, str] = {}
    for path in paths:
        real = os.path.realpath(path)
        if real in seen:
            raise UserError(f"shard {path} is named twice (also as {seen[real]}): remove one pattern")
        seen[real] = path
    return paths


def _expand(pattern: str) -> list[str]:
    if pattern.startswith("pipe:") or "://" in pattern:
        raise UserError(f"shards {pattern!r}: only local files can be read: copy them here first")
    pattern = os.path.expanduser(pattern)
    if os.path.isdir(pattern):
        raise UserError(f"shards {pattern!r} is a folder: name its files, e.g. '{pattern.rstrip('/')}/*.tar'")
    if os.path.isfile(pattern):
        return [pattern]
    try:
        names = list(braceexpand(pattern))
    except ValueError as error:
        raise UserError(f"shards {pattern!r}: unbalanced braces") from error
    paths = []
    for name in names:
        found = [name] if os.path.isfile(name) else sorted(filter(os.path.isfile, glob.glob(name)))
        if not found:
            part = "" if name == pattern else f" (of the pattern {pattern!r})"
            raise UserError(f"no shard matches {name!r}{part}: check the path and the range")
        paths += [path for path in found if not path.endswith((SUFFIX, SOURCES_SUFFIX))]
    return paths


def _header(path: str, cache_dir: Path) -> IndexHeader:
    try:
        status = os.stat(path)
    except OSError as error:
        raise UserError(f"cannot read shard {path}: {error.strerror or error}") from error
    sidecar = index_path(path)
    if not sidecar.exists():
        identity = f"{VERSION}\0{os.path.abspath(path)}\0{status.st_size}\0{status.st_mtime_ns}"
        name = hashlib.sha256(os.fsencode(identity)).hexdigest()[:32]
        sidecar = cache_dir / f"{name}{SUFFIX}"
        if not sidecar.exists():
            write_index(build_index(path), sidecar, shard_name=os.path.basename(path))
    header = read_header(sidecar)
    if header.shard_bytes != status.st_size:
        raise UserError(
            f"shard {path} has {status.st_size} bytes but {header.shard_bytes} by its index {sidecar}: it is "
            f"truncated or was replaced; restore it, or {REBUILD}"
        )
    if marks_digest(path, header.marks) != header.digest:
        raise UserError(
            f"shard {path} is not the one that its index {sidecar} was made for: restore it, or {REBUILD}"
        )
    return header


def check_disjoint(one: ShardSet, other: ShardSet, *, names: tuple[str, str]) -> None:
    """Raise UserError if a shard is in both sets, also under another name; ``names``: what to call the sets."""
    real = {os.path.realpath(path): path for path in one.paths}
    shared = [path for path in other.paths if os.path.realpath(path) in real]
    if shared:
        raise UserError(
            f"{names[0]} and {names[1]} have {len(shared)} shards in common, as {shared[0]}: an image would be measured "
            "against itself; name different shards"
        )


def check_same_classes(one: ShardSet, other: ShardSet) -> None:
    """Raise UserError if classes.json files beside the shards of two sets give labels different meanings."""
    folders = dict.fromkeys(os.path.dirname(path) for path in (*one.paths, *other.paths))
    files = [file for folder in folders if (file := Path(folder, CLASSES_FILE)).is_file()]
    for file in files[1:]:
        if read_classes(file) != read_classes(files[0]):
            raise UserError(
                f"{files[0]} and {file} number different classes: a label would not mean the same in both sets; pack one "
                f"of them anew with --classes {files[0]}"
            )


def read_classes(file: Path) -> list[str]:
    """Return the class names of a classes.json, in the order of their labels; UserError if it is no such list."""
    try:
        names = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested deeply
        raise UserError(f"cannot read {file} ({error}): expected a JSON list of class names") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(f'{file} is no list of class names: expected JSON such as ["cat", "dog"]')
    if len(set(names)) < len(names):
        raise UserError(f"{file} names a class twice: expected each name once, in the order of the labels")
    return names
