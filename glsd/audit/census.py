"""Every image of some shards read and decoded once, by worker processes: its size, what identifies it, or why it is broken."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from tqdm import tqdm

from glsd.audit.near_duplicates import THUMB_SIDE, fingerprint
from glsd.data.decode import decode
from glsd.errors import BrokenImage, UserError
from glsd.packing.source import in_workers
from glsd.shards.addresses import shown
from glsd.shards.find import find_shards
from glsd.shards.store import ShardSet, open_shards

IMAGES_AT_ONCE = 16
DIGEST_BYTES = 16  # of SHA-256: two other files with the same are not to be expected among 10^12
SPLIT = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)
NO_DIGEST = bytes(DIGEST_BYTES)
UNNAMED = "shards"


class _Examined(NamedTuple):
    width: int = 0
    height: int = 0
    size: int = 0
    file_digest: bytes = NO_DIGEST
    pixel_digest: bytes = NO_DIGEST
    code: int = 0
    thumb: np.ndarray | None = None
    reason: str = ""
    shard_fault: bool = False  # the reason is one of the shard, not of the image


@dataclass(kw_only=True)
class Census:
    """What is known of all images of all splits, one after the other."""

    splits: tuple[str, ...]
    shards: tuple[str, ...]  # paths
    faults: list[tuple[str, str, str]]  # split, path and reason of the shards that cannot be used
    keys: list[str]
    split: Int64[np.ndarray, " n"]
    shard: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]  # -1 = none
    width: Int64[np.ndarray, " n"]  # pixels; 0 where it could not be read, and in all of a faulty shard
    height: Int64[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]  # bytes of the image file; 0 where there is none
    file_digest: np.ndarray  # n times DIGEST_BYTES
    pixel_digest: np.ndarray
    code: UInt64[np.ndarray, " n"]
    thumb: UInt8[np.ndarray, "n t"]
    reasons: dict[int, str] = field(default_factory=dict)  # of what cannot be read, but in faulty shards

    def __len__(self) -> int:
        return len(self.keys)

    def readable(self) -> Bool[np.ndarray, " n"]:
        """Tell which images could be read."""
        return self.width > 0

    def of(self, split: str) -> Int64[np.ndarray, " m"]:
        """Return the numbers of a split's images."""
        return np.flatnonzero(self.split == self.splits.index(split))

    def place(self, number: int | np.integer) -> str:
        """Return where an image is: its shard and key."""
        return f"{os.path.basename(shown(self.shards[self.shard[number]]))} {self.keys[number]}"


def parse_splits(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the patterns of each split from texts ``NAME=PATTERN``; those without name are one split of their own.

    A path with such a beginning is written ``./NAME=...``.
    """
    splits: dict[str, list[str]] = {}
    for text in given:
        match = SPLIT.fullmatch(text)
        name, pattern = (match[1], match[2]) if match and not os.path.exists(text) else (UNNAMED, text)
        splits.setdefault(name, []).append(pattern)
    return splits


def take_census(splits: Mapping[str, Sequence[str]], *, workers: int) -> Census:
    """Read all images of the splits' shards; UserError if a pattern names none.

    A shard that is damaged, or not what its index says, is a fault of the census and is left out; of one that fails while
    it is read, only keys and labels are kept.
    """
    if workers < 0:
        raise UserError(f"workers is {workers}: expected 0 (read in this process) or more")
    faults: list[tuple[str, str, str]] = []
    sets: list[tuple[str, ShardSet]] = []
    found = {name: find_shards(patterns) for name, patterns in splits.items()}
    for name, paths in found.items():
        good = [path for path in paths if _usable(path, name, faults)]
        if good:
            sets.append((name, open_shards(good)))
    census = _empty(tuple(splits), sets, faults)
    total = len(census)
    with tqdm(total=total, desc="examining", unit=" images", disable=None) as bar:
        start = 0
        for name, shards in sets:
            _read(census, start, name, shards, workers, bar)
            start += len(shards)
    return census


def _usable(path: str, name: str, faults: list[tuple[str, str, str]]) -> bool:
    try:
        open_shards(path)
    except UserError as error:
        faults.append((name, path, str(error)))
        return False
    return True


def _empty(splits: tuple[str, ...], sets: list[tuple[str, ShardSet]], faults: list) -> Census:
    paths = [path for _, shards in sets for path in shards.paths]
    sizes = [int(size) for _, shards in sets for size in shards.shard_sizes]
    n = sum(sizes)
    whose = [splits.index(name) for name, shards in sets for _ in shards.paths]
    return Census(
        splits=splits,
        shards=tuple(paths),
        faults=faults,
        keys=[shards.key(i) for _, shards in sets for i in range(len(shards))],
        split=np.repeat(np.array(whose, dtype=np.int64), sizes),
        shard=np.repeat(np.arange(len(paths)), sizes),
        label=np.concatenate([np.empty(0, np.int64), *(shards.labels() for _, shards in sets)]),
        width=np.zeros(n, np.int64),
        height=np.zeros(n, np.int64),
        size=np.zeros(n, np.int64),
        file_digest=np.zeros(n, f"V{DIGEST_BYTES}"),
        pixel_digest=np.zeros(n, f"V{DIGEST_BYTES}"),
        code=np.zeros(n, np.uint64),
        thumb=np.zeros((n, 3 * THUMB_SIDE**2), np.uint8),
    )


def _read(census: Census, start: int, name: str, shards: ShardSet, workers: int, bar: tqdm) -> None:
    faulty: dict[int, str] = {}
    results = in_workers(_Examiner(shards), np.arange(len(shards)), workers=workers, at_once=IMAGES_AT_ONCE)
    for number, one in enumerate(results, start):
        bar.update()
        if one.shard_fault:
            faulty.setdefault(int(census.shard[number]), one.reason)
            continue
        census.size[number] = one.size
        census.file_digest[number] = one.file_digest
        if one.reason:
            census.reasons[number] = one.reason
            continue
        census.width[number], census.height[number] = one.width, one.height
        census.pixel_digest[number] = one.pixel_digest
        census.code[number] = one.code
        census.thumb[number] = one.thumb
    for shard, reason in faulty.items():
        census.faults.append((name, census.shards[shard], reason))
        _forget(census, shard)


def _forget(census: Census, shard: int) -> None:
    """Leave out what could be read of a faulty shard, which depends on who read first."""
    rows = np.flatnonzero(census.shard == shard)
    census.width[rows] = census.height[rows] = census.size[rows] = 0
    for number in rows.tolist():
        census.reasons.pop(number, None)


class _Examiner:
    """Examines images by number; a shard that failed is not tried again, for that may take as long as a server's silence."""

    def __init__(self, shards: ShardSet):
        self._shards = shards
        self._ends = np.cumsum(shards.shard_sizes)
        self._faults: dict[int, _Examined] = {}

    def __getitem__(self, number: int) -> _Examined:
        shard = int(np.searchsorted(self._ends, number, side="right"))
        if shard in self._faults:
            return self._faults[shard]
        try:
            raw = self._shards.read(number)
        except BrokenImage as error:
            return _Examined(reason=str(error))
        except UserError as error:
            self._faults[shard] = _Examined(reason=str(error), shard_fault=True)
            return self._faults[shard]
        broken = _Examined(size=len(raw), file_digest=hashlib.sha256(raw).digest()[:DIGEST_BYTES])
        try:
            pixels = np.ascontiguousarray(decode(raw).permute(1, 2, 0).numpy())
        except BrokenImage as error:
            return broken._replace(reason=str(error))
        height, width = pixels.shape[:2]
        digest = hashlib.sha256(repr(pixels.shape).encode())
        digest.update(pixels.data)
        code, thumb = fingerprint(pixels)
        return broken._replace(
            width=width, height=height, pixel_digest=digest.digest()[:DIGEST_BYTES], code=code, thumb=thumb
        )
