"""The same picture in other bytes: coded again, resized, a little brighter. By a 64-bit hash of its coarse structure, then by
a thumbnail in color, for many pictures share their structure without being the same.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt8, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

HASH_SIDE = 32  # gray pixels per side of what is hashed
THUMB_SIDE = 12  # colored ones of what is compared
BITS = 64
MAX_BITS = 6  # different bits of two hashes that may be one picture
# Measured on Caltech-101: coded again at quality 30 or halved in size, all pairs are found; of 18 million pairs of other
# files, 70 pass, which one takes for the same picture or a variant of it.
MIN_CORRELATION = 0.985  # of two thumbnails that are one picture
MAX_DIFFERENCE = 40.0  # root mean square of theirs, of 255: a fifth brighter is still the same
FLAT = 3.0  # standard deviation of a thumbnail, of 255: below it a hash is one of noise
TILE = 1024  # hashes compared at once with as many others
PAIRS_AT_ONCE = 1 << 15  # of thumbnails


def _frequencies() -> tuple[np.ndarray, np.ndarray]:
    """The rows and columns of the 64 lowest frequencies, without the mean."""
    rows, columns = np.divmod(np.arange(HASH_SIDE**2), HASH_SIDE)
    order = np.lexsort((rows, rows + columns))[1 : BITS + 1]
    return rows[order], columns[order]


ROWS, COLUMNS = _frequencies()


def fingerprint(rgb: UInt8[np.ndarray, "h w 3"]) -> tuple[int, UInt8[np.ndarray, " t"]]:
    """Return the hash of a picture and its thumbnail.

    A bit of the hash tells whether a cosine coefficient of low frequency is above the median of them all.
    """
    rgb = np.ascontiguousarray(rgb)
    gray = cv2.cvtColor(rgb, cv2.COLOR_RGB2GRAY)
    small = cv2.resize(gray, (HASH_SIDE, HASH_SIDE), interpolation=cv2.INTER_AREA)
    low = cv2.dct(small.astype(np.float32))[ROWS, COLUMNS]
    bits = np.packbits(low > np.median(low)).view(">u8")
    thumb = cv2.resize(rgb, (THUMB_SIDE, THUMB_SIDE), interpolation=cv2.INTER_AREA)
    return int(bits[0]), thumb.reshape(-1)


class NearDuplicates(NamedTuple):
    """Which of n pictures are the same."""

    group: Int64[np.ndarray, " n"]  # equal numbers = connected through pairs that are the same
    partner: Int64[
        np.ndarray, " n"
    ]  # a picture of another split that is the same as this one, -1 = there is none


def find_near_duplicates(
    hashes: UInt64[np.ndarray, " n"],
    thumbs: UInt8[np.ndarray, "n t"],
    splits: Int64[np.ndarray, " n"],
    contents: Int64[np.ndarray, " n"],
    *,
    max_bits: int = MAX_BITS,
) -> NearDuplicates:
    """Find the pairs whose hashes differ in at most ``max_bits`` bits and whose thumbnails agree.

    Two such hashes agree in one of max_bits + 1 bands of their bits, so only pictures that share a band are compared.
    Where hashes are spread evenly, that is some n^2 / 160 pairs: 7 s for 400,000 pictures, minutes for a few million, days for
    a hundred million.
    Pictures of one flat color are left alone. ``splits``: the split of each; ``contents``: equal numbers = the same pixels,
    which are never partners.
    """
    found = NearDuplicates(np.arange(len(hashes)), np.full(len(hashes), -1))
    usable = np.flatnonzero(contrast(thumbs) >= FLAT)
    edges = np.linspace(0, BITS, max_bits + 2).astype(int)
    bands = tqdm(pairwise(edges), "comparing hashes", max_bits + 1, unit=" bands", disable=None)
    for low, high in bands:
        mask = np.uint64((1 << int(high - low)) - 1)
        band = (hashes[usable] >> np.uint64(low)) & mask
        for bucket in _buckets(band):
            for one, other in _close_pairs(hashes, usable[bucket], max_bits):
                _take_pairs(
                    found,
                    thumbs,
                    (splits[one] != splits[other]) & (contents[one] != contents[other]),
                    one,
                    other,
                )
    return found


def contrast(thumbs: UInt8[np.ndarray, "n t"]) -> Float32[np.ndarray, " n"]:
    """Return the standard deviation of each thumbnail, of 255."""
    parts = [thumbs[start : start + PAIRS_AT_ONCE] for start in range(0, len(thumbs), PAIRS_AT_ONCE)]
    return np.concatenate([np.empty(0, np.float32), *(part.std(1, dtype=np.float32) for part in parts)])


def _buckets(band: UInt64[np.ndarray, " n"]) -> Iterator[Int64[np.ndarray, " b"]]:
    order = np.argsort(band, kind="stable")
    for bucket in np.split(order, np.flatnonzero(np.diff(band[order])) + 1):
        if len(bucket) > 1:
            yield bucket


def _close_pairs(
    hashes: UInt64[np.ndarray, " n"], rows: Int64[np.ndarray, " b"], max_bits: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(rows), TILE):
        one = rows[start : start + TILE]
        for again in range(start, len(rows), TILE):
            other = rows[again : again + TILE]
            close = np.bitwise_count(hashes[one][:, None] ^ hashes[other][None]) <= max_bits
            if start == again:
                close = np.triu(close, 1)
            left, right = np.nonzero(close)
            for part in range(0, len(left), PAIRS_AT_ONCE):
                chosen = slice(part, part + PAIRS_AT_ONCE)
                yield one[left[chosen]], other[right[chosen]]


def _take_pairs(
    found: NearDuplicates, thumbs: np.ndarray, apart: np.ndarray, one: np.ndarray, other: np.ndarray
) -> None:
    """Note the pairs whose thumbnails agree; those that would tell nothing new are not looked at.

    ``apart``: where the two may be partners.
    """
    leak = apart & ((found.partner[one] < 0) | (found.partner[other] < 0))
    new = leak | (found.group[one] != found.group[other])
    one, other, apart = one[new], other[new], apart[new]
    same = _agree(thumbs[one], thumbs[other])
    one, other, apart = one[same], other[same], apart[same]
    if not len(one):
        return
    found.partner[one[apart]] = other[apart]
    found.partner[other[apart]] = one[apart]
    numbers, ends = np.unique(np.concatenate([found.group[one], found.group[other]]), return_inverse=True)
    left, right = np.split(ends, 2)
    graph = coo_array((np.ones(len(left), bool), (left, right)), shape=(len(numbers), len(numbers)))
    _, parts = connected_components(graph, directed=False)
    first = np.full(parts.max() + 1, len(found.group))
    np.minimum.at(first, parts, numbers)
    renamed = np.arange(len(found.group))
    renamed[numbers] = first[parts]
    found.group[:] = renamed[found.group]


def _agree(one: UInt8[np.ndarray, "p t"], other: UInt8[np.ndarray, "p t"]) -> Bool[np.ndarray, " p"]:
    a, b = one.astype(np.float32), other.astype(np.float32)
    difference = np.sqrt(np.square(a - b).mean(1))
    a -= a.mean(1, keepdims=True)
    b -= b.mean(1, keepdims=True)
    scale = np.sqrt(np.square(a).sum(1) * np.square(b).sum(1))
    return ((a * b).sum(1) >= MIN_CORRELATION * scale) & (difference <= MAX_DIFFERENCE)
