"""Pictures that are there more than once: inside a split a waste, in two splits a measurement that means nothing."""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Int64

from glsd.audit.census import Census
from glsd.audit.finding import Finding, some
from glsd.audit.near_duplicates import find_near_duplicates


def contents_of(census: Census) -> Int64[np.ndarray, " n"]:
    """Return a number for each image, equal where the pixels are; -1 where it cannot be read."""
    contents = np.full(len(census), -1)
    readable = np.flatnonzero(census.readable())
    _, contents[readable] = np.unique(census.pixel_digest[readable], return_inverse=True)
    return contents


def exact_duplicates(census: Census, contents: Int64[np.ndarray, " n"]) -> Iterator[Finding]:
    """Find images of the same pixels: a note inside a split, to be fixed between splits."""
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
        yield Finding("FIX", "leakage", f"{some(len(items), 'image')} of one split also in another", items)
    else:
        yield Finding("ok", "leakage", "no image is in two splits")


def _first_of_run(values: np.ndarray) -> np.ndarray:
    """For each place of a sorted array, the place where its run of equal values begins."""
    begins = np.r_[True, values[1:] != values[:-1]] if len(values) else np.empty(0, bool)
    return np.flatnonzero(begins)[np.cumsum(begins) - 1] if len(values) else np.empty(0, np.int64)


def _copies_inside(census: Census, contents: np.ndarray, name: str, mine: np.ndarray) -> Finding:
    first = _first_of_run(contents[mine])
    again = np.flatnonzero(first != np.arange(len(mine)))
    if not len(again):
        return Finding("ok", "duplicates", f"{name}: every image once")
    copies, originals = mine[again], mine[first[again]]
    same_bytes = int((census.file_digest[copies] == census.file_digest[originals]).sum())
    labels = census.label[copies], census.label[originals]
    torn = int(((labels[0] != labels[1]) & (labels[0] >= 0) & (labels[1] >= 0)).sum())
    text = f"{name}: {some(len(copies), 'image')} of {len(mine):,} are copies of another ({same_bytes:,} to the byte)"
    if torn:
        text += f", {torn:,} of them with another label"
    pairs = zip(copies, originals, strict=True)
    return Finding(
        "note", "duplicates", text, tuple((census.place(a), f"= {census.place(b)}") for a, b in pairs)
    )


def near_duplicates(census: Census, contents: Int64[np.ndarray, " n"], *, max_bits: int) -> Iterator[Finding]:
    """Find images that show the same but are no copies: a note inside a split, to be fixed between splits."""
    rows = np.flatnonzero(contents >= 0)
    both = contents[rows] * len(census.splits) + census.split[rows]
    units = rows[np.unique(both, return_index=True)[1]]  # one of each content and split
    found = find_near_duplicates(
        census.code[units], census.thumb[units], census.split[units], contents[units], max_bits=max_bits
    )
    for name in census.splits:
        mine = np.flatnonzero(census.split[units] == census.splits.index(name))
        if len(mine):
            yield _alike_inside(census, name, units[mine], found.group[mine])
    if len(census.splits) < 2:
        return
    leaks = np.flatnonzero(found.partner >= 0)
    items = [(units[leak], units[found.partner[leak]]) for leak in leaks]
    if not items:
        yield Finding("ok", "near leakage", "no image of one split is nearly one of another")
        return
    counts = ", ".join(
        f"{int((census.split[units[leaks]] == number).sum()):,} of {len(census.of(name)):,} in {name}"
        for number, name in enumerate(census.splits)
    )
    yield Finding(
        "FIX",
        "near leakage",
        f"images of one split that are nearly one of another: {counts}",
        tuple((_named(census, a), f"~ {_named(census, b)}") for a, b in items),
    )


def _alike_inside(census: Census, name: str, units: np.ndarray, groups: np.ndarray) -> Finding:
    order = np.lexsort((units, groups))
    first = _first_of_run(groups[order])
    again = np.flatnonzero(first != np.arange(len(order)))
    if not len(again):
        return Finding("ok", "near duplicates", f"{name}: none")
    items = [(units[order[place]], units[order[first[place]]]) for place in again]
    text = f"{name}: {some(len(again), 'image')} of {len(units):,} nearly as another, in {some(len(set(first[again])), 'group')}"
    return Finding(
        "note", "near duplicates", text, tuple((census.place(a), f"~ {census.place(b)}") for a, b in items)
    )


def _named(census: Census, number: int | np.integer) -> str:
    return f"{census.splits[census.split[number]]}: {census.place(number)}"
