"""One pass over every image of some shards, by worker processes: sizes, digests, a perceptual hash, or why it is broken."""

import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt64
from tqdm import tqdm

from glsd.data.decode import decode, read_header
from glsd.errors import BrokenImage, UserError
from glsd.packing.source import in_workers
from glsd.packing.write import read_sources, source_table
from glsd.shards.find import find_shards
from glsd.shards.remote import is_remote, shown
from glsd.shards.store import ShardSet, open_shards

IMAGES_AT_ONCE = 16  # images in a worker's batch
DIGEST_BYTES = 16  # of SHA-256: no two of 10^12 different files are expected to share one
HASH_SIDE = 32  # gray pixels per side of the picture that is hashed
HASH_BITS = 64
THUMB_SIDE = 12  # color pixels per side of the thumbnail
THUMBS_AT_ONCE = 1 << 15  # bounds the memory for their standard deviations
SPLIT = re.compile(r"([A-Za-z][\w-]*)=(.+)", re.DOTALL)
NO_DIGEST = bytes(DIGEST_BYTES)
UNNAMED = "shards"  # the split of shards without a name


class _Examined(NamedTuple):
    """One image as it was examined; the fields of Census."""

    width: int = 0
    height: int = 0
    size: int = 0
    file_digest: bytes = NO_DIGEST
    pixel_digest: bytes = NO_DIGEST
    code: int = 0
    thumb: np.ndarray | None = None
    bits: int = 8
    peak: int = 0
    reason: str = ""
    is_shard_fault: bool = False  # the reason is about the shard, not the image


@dataclass(kw_only=True)
class Census:
    """All images of all splits, one after the other."""

    splits: tuple[str, ...]
    shards: tuple[str, ...]  # paths
    faults: list[tuple[str, str, str]]  # split, path and reason of each unusable shard
    keys: list[str]
    split: Int64[np.ndarray, " n"]
    shard: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]  # -1 = none
    width: Int64[np.ndarray, " n"]  # pixels; 0 = unreadable, or in a faulty shard
    height: Int64[np.ndarray, " n"]
    size: Int64[np.ndarray, " n"]  # bytes of the image file; 0 = there is none
    file_digest: np.ndarray  # n items of DIGEST_BYTES
    pixel_digest: np.ndarray
    code: UInt64[np.ndarray, " n"]  # hash of the coarse structure
    thumb: UInt8[np.ndarray, "n t"]
    bits: Int64[np.ndarray, " n"]  # of a stored sample
    peak: Int64[np.ndarray, " n"]  # the brightest value of the decoded image, 0..255
    reasons: dict[int, str] = field(default_factory=dict)  # of unreadable images outside faulty shards
    sources: dict[Path, dict[str, str]] = field(
        default_factory=dict
    )  # table -> key -> file, as they are read
    unused: tuple[str, ...] = ()  # sentences about images of samples that are not used

    def __len__(self) -> int:
        return len(self.keys)

    def readable(self) -> Bool[np.ndarray, " n"]:
        """Return which images could be read."""
        return self.width > 0

    def rows(self, split: str) -> Int64[np.ndarray, " m"]:
        """Return the numbers of the images of a split."""
        return np.flatnonzero(self.split == self.splits.index(split))

    def place(self, number: int | np.integer) -> str:
        """Return the file that an image was packed from, if that is known, with its shard and key."""
        shard, key = self.shards[self.shard[number]], self.keys[number]
        inside = f"{os.path.basename(shown(shard))} {key}"
        if is_remote(shard):
            return inside
        table = source_table(shard)
        if table not in self.sources:
            self.sources[table] = read_sources(table)
        file = self.sources[table].get(key)
        return f"{file} ({inside})" if file else inside


def parse_splits(given: Sequence[str]) -> dict[str, list[str]]:
    """Return the patterns of each split from texts ``NAME=PATTERN``; all texts without name are one split.

    A path that begins like a name is written ``./NAME=...``, unless its folder exists.
    """
    splits: dict[str, list[str]] = {}
    for text in given:
        match = SPLIT.fullmatch(text)
        is_path = os.path.exists(text) or os.path.isdir(os.path.dirname(text))
        name, pattern = (match[1], match[2]) if match and not is_path else (UNNAMED, text)
        splits.setdefault(name, []).append(pattern)
    return splits


def take_census(splits: Mapping[str, Sequence[str]], *, workers: int) -> Census:
    """Read all images of the shards of each split. Raises UserError if a pattern matches no shard, and as in_workers does.

    A shard that is damaged, or does not fit its index, is a fault and is left out. Of a shard that fails while it is read,
    only keys and labels are kept.
    """
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
        unused=tuple(note for _, shards in sets for note in shards.unused_members()),
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
        bits=np.full(n, 8),
        peak=np.zeros(n, np.int64),
    )


def _read(census: Census, start: int, name: str, shards: ShardSet, workers: int, bar: tqdm) -> None:
    faulty: dict[int, str] = {}
    results = in_workers(_Examiner(shards), np.arange(len(shards)), workers=workers, at_once=IMAGES_AT_ONCE)
    for number, one in enumerate(results, start):
        bar.update()
        if one.is_shard_fault:
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
        census.bits[number], census.peak[number] = one.bits, one.peak
    for shard, reason in faulty.items():
        census.faults.append((name, census.shards[shard], reason))
        _forget(census, shard)


def _forget(census: Census, shard: int) -> None:
    """Forget the images of a faulty shard: how many were read before it failed depends on the workers."""
    rows = np.flatnonzero(census.shard == shard)
    census.width[rows] = census.height[rows] = census.size[rows] = 0
    for number in rows.tolist():
        census.reasons.pop(number, None)


class _Examiner:
    """Examines images by number. A shard that failed is not read again: it may take a server's time-out each time."""

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
            self._faults[shard] = _Examined(reason=str(error), is_shard_fault=True)
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
            width=width,
            height=height,
            pixel_digest=digest.digest()[:DIGEST_BYTES],
            code=code,
            thumb=thumb,
            bits=read_header(raw).bits,
            peak=int(pixels.max()),
        )


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """Return the rows and columns of the 64 lowest frequencies, without the mean."""
    rows, columns = np.divmod(np.arange(HASH_SIDE**2), HASH_SIDE)
    order = np.lexsort((rows, rows + columns))[1 : HASH_BITS + 1]
    return rows[order], columns[order]


ROWS, COLUMNS = _frequencies()


def fingerprint(rgb: UInt8[np.ndarray, "h w 3"]) -> tuple[int, UInt8[np.ndarray, " t"]]:
    """Return the perceptual hash of a picture and its thumbnail.

    Each bit of the hash tells whether one cosine coefficient of low frequency is above their median.
    """
    rgb = np.ascontiguousarray(rgb)
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[ROWS, COLUMNS]
    bits = np.packbits(low > np.median(low)).view(">u8")
    thumb = cv2.resize(rgb, (THUMB_SIDE, THUMB_SIDE), interpolation=cv2.INTER_AREA)
    return int(bits[0]), thumb.reshape(-1)


def contrast(thumbs: UInt8[np.ndarray, "n t"]) -> Float32[np.ndarray, " n"]:
    """Return the standard deviation of each thumbnail, in gray levels of 255."""
    parts = [thumbs[start : start + THUMBS_AT_ONCE] for start in range(0, len(thumbs), THUMBS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.float32), *(part.std(1, dtype=np.float32) for part in parts)])
