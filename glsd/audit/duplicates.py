"""Duplicates and near-duplicates: inside a split a waste, between splits a measurement that means nothing.

Near-duplicates are the same picture in other bytes: coded again, resized, a little brighter. They agree in a 64-bit hash of
the coarse structure, and then in a color thumbnail, because many pictures share their structure.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, UInt8, UInt64
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from tqdm import tqdm

from glsd.audit import Finding, counted, have
from glsd.audit.census import HASH_BITS, Census, contrast

# Measured on Caltech-101: all photographs that were coded again at quality 30 or halved in size are found. Of 18 million
# pairs of different files 70 pass, which look like the same picture or a variant of it.
MIN_CORRELATION = 0.985  # of two thumbnails of one picture
MAX_DIFFERENCE = 40.0  # their root mean square difference, of 255: a fifth brighter is still the same
FLAT = 3.0  # standard deviation of a thumbnail, of 255: the hash of a flatter picture is noise
TILE = 1024  # hashes that are compared with as many others at once
PAIRS_AT_ONCE = 1 << 15  # thumbnails that are compared at once


def contents_of(census: Census) -> Int64[np.ndarray, " n"]:
    """Return a number for each image; images of equal pixels have the same number, unreadable ones -1."""
    contents = np.full(len(census), -1)
    readable = np.flatnonzero(census.readable())
    _, contents[readable] = np.unique(census.pixel_digest[readable], return_inverse=True)
    return contents


def exact_duplicates(census: Census, contents: Int64[np.ndarray, " n"]) -> Iterator[Finding]:
    """Find images of equal pixels. contents: from contents_of."""
    rows = np.flatnonzero(contents >= 0)
    order = rows[np.lexsort((rows, contents[rows]))]
    first = _first_of_run(contents[order])
    for name in census.splits:
        mine = order[census.split[order] == census.splits.index(name)]
        if len(mine):
            yield _copies_inside(census, contents, name, mine)
    if len(census.splits) < 2:
        return
    shared = np.flatnonzero(census.split[order] != census.split[order[first]])
    leaks = order[shared]
    items = tuple(
        (f"{_named(census, a)}", f"= {_named(census, b)}")
        for a, b in zip(leaks, order[first[shared]], strict=True)
    )
    if items:
        yield Finding("FIX", "leakage", f"{have(len(items), 'image')} an equal one in another split", items)
    else:
        yield Finding("ok", "leakage", "no image is in two splits")


def _first_of_run(values: np.ndarray) -> np.ndarray:
    """Return for each place of a sorted array the place where its run of equal values begins."""
    begins = np.r_[True, values[1:] != values[:-1]] if len(values) else np.empty(0, bool)
    return np.flatnonzero(begins)[np.cumsum(begins) - 1] if len(values) else np.empty(0, np.int64)


def _copies_inside(census: Census, contents: np.ndarray, name: str, mine: np.ndarray) -> Finding:
    first = _first_of_run(contents[mine])
    again = np.flatnonzero(first != np.arange(len(mine)))
    if not len(again):
        return Finding("ok", "duplicates", f"{name}: every image is unique")
    copies, originals = mine[again], mine[first[again]]
    same_bytes = int((census.file_digest[copies] == census.file_digest[originals]).sum())
    labels = census.label[copies], census.label[originals]
    num_relabeled = int(((labels[0] != labels[1]) & (labels[0] >= 0) & (labels[1] >= 0)).sum())
    text = (
        f"{name}: {len(copies):,} of {len(mine):,} images are copies of another ({same_bytes:,} bit for bit)"
    )
    if num_relabeled:
        text += f", {num_relabeled:,} with another label"
    pairs = zip(copies, originals, strict=True)
    return Finding(
        "note", "duplicates", text, tuple((census.place(a), f"= {census.place(b)}") for a, b in pairs)
    )


def near_duplicates(census: Census, contents: Int64[np.ndarray, " n"], *, max_bits: int) -> Iterator[Finding]:
    """Find images of the same picture with other pixels. contents: from contents_of."""
    rows = np.flatnonzero(contents >= 0)
    both = contents[rows] * len(census.splits) + census.split[rows]
    units = rows[np.unique(both, return_index=True)[1]]  # one of each content and split
    found = find_near_duplicates(
        census.code[units], census.thumb[units], census.split[units], contents[units], max_bits=max_bits
    )
    for name in census.splits:
        mine = np.flatnonzero(census.split[units] == census.splits.index(name))
        if len(mine):
            yield _near_duplicates_inside(census, name, units[mine], found.group[mine])
    if len(census.splits) < 2:
        return
    leaks = np.flatnonzero(found.partner >= 0)
    items = [(units[leak], units[found.partner[leak]]) for leak in leaks]
    if not items:
        yield Finding("ok", "near leakage", "no image has a near-duplicate in another split")
        return
    counts = [int((census.split[units[leaks]] == number).sum()) for number in range(len(census.splits))]
    shares = " and ".join(
        f"{count:,} of {len(census.rows(name)):,} images of {name}"
        for name, count in zip(census.splits, counts, strict=True)
        if count
    )
    yield Finding(
        "FIX",
        "near leakage",
        f"{shares} have a near-duplicate in another split",
        tuple((_named(census, a), f"~ {_named(census, b)}") for a, b in items),
    )


def _near_duplicates_inside(census: Census, name: str, units: np.ndarray, groups: np.ndarray) -> Finding:
    order = np.lexsort((units, groups))
    first = _first_of_run(groups[order])
    again = np.flatnonzero(first != np.arange(len(order)))
    if not len(again):
        return Finding("ok", "near duplicates", f"{name}: no image has a near-duplicate")
    items = [(units[order[place]], units[order[first[place]]]) for place in again]
    groups_text = counted(len(set(first[again])), "group")
    text = f"{name}: {len(again):,} of {len(units):,} images are near-duplicates ({groups_text})"
    return Finding(
        "note", "near duplicates", text, tuple((census.place(a), f"~ {census.place(b)}") for a, b in items)
    )


def _named(census: Census, number: int | np.integer) -> str:
    return f"{census.splits[census.split[number]]}: {census.place(number)}"


class NearDuplicates(NamedTuple):
    """Which of n pictures are near-duplicates."""

    group: Int64[np.ndarray, " n"]  # equal numbers = connected by pairs of near-duplicates
    partner: Int64[np.ndarray, " n"]  # a near-duplicate in another split; -1 = none


def find_near_duplicates(
    hashes: UInt64[np.ndarray, " n"],
    thumbs: UInt8[np.ndarray, "n t"],
    splits: Int64[np.ndarray, " n"],
    contents: Int64[np.ndarray, " n"],
    *,
    max_bits: int,
) -> NearDuplicates:
    """Find the pairs whose hashes differ in at most ``max_bits`` bits and whose thumbnails agree.

    splits: the split of each picture. contents: equal numbers = equal pixels, which are never partners. Pictures of one
    flat color are left out.
    Two such hashes agree in one of max_bits + 1 bands of their bits, so only pictures that share a band are compared. With
    evenly spread hashes these are about n^2 / 160 pairs: 7 s for 400,000 pictures, minutes for a few million, days for a
    hundred million.
    """
    found = NearDuplicates(np.arange(len(hashes)), np.full(len(hashes), -1))
    usable = np.flatnonzero(contrast(thumbs) >= FLAT)
    edges = np.linspace(0, HASH_BITS, max_bits + 2).astype(int)
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
    """Note the pairs whose thumbnails agree, without looking at pairs that would add nothing.

    apart: which pairs may be partners.
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
