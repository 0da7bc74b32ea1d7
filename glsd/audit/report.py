"""What is wrong with shards, one finding a topic: ok, a note, or to be fixed before training."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glsd.audit import NEAR_BITS, Finding, counted, have
from glsd.audit.census import HASH_BITS, UNNAMED, Census, contrast, take_census
from glsd.audit.duplicates import FLAT, contents_of, exact_duplicates, near_duplicates
from glsd.errors import UserError
from glsd.shards.index import index_path
from glsd.shards.labels import CLASSES_FILE, read_classes
from glsd.shards.remote import is_remote, shown

TINY = 32  # pixels of the short side: little is left to crop
HUGE = 50e6  # pixels: decoding takes a second and hundreds of megabytes
LONG = 5.0  # long side / short side
LARGE_SHORT_SIDE = 800  # pixels: with such a median, decoding is most of the work of training
UNEVEN_SHARDS = 2.0  # largest / median
UNEVEN_CLASSES = 10.0  # largest / smallest
DARK = 64  # of 255: an image of more than 8 bits that stays below leaves two bits unused
PERCENTILES = (0, 5, 50, 95, 100)


@dataclass(frozen=True, kw_only=True)
class SplitSummary:
    """One split in numbers."""

    name: str
    shards: int
    images: int  # with unreadable ones
    labels: int  # different labels
    total_bytes: int  # of the image files
    percentiles: dict[str, tuple[float, ...]]  # of width, height and kilobytes, at PERCENTILES


@dataclass(frozen=True, kw_only=True)
class Examination:
    """The result of an audit."""

    splits: tuple[SplitSummary, ...]
    findings: tuple[Finding, ...]

    @property
    def has_problems(self) -> bool:
        """Whether something must be fixed."""
        return any(finding.level == "FIX" for finding in self.findings)


def examine(
    splits: Mapping[str, Sequence[str]], *, near_bits: int = NEAR_BITS, workers: int = 0
) -> Examination:
    """Read and decode every image of some splits, each given by its patterns of shards.

    To be fixed: shards that are damaged or do not fit their index, unreadable images, images of more than 8 bits of which
    all in a split are nearly black, labels that only some images of a split have or that classes.json does not name,
    duplicates and near-duplicates between splits. near_bits: how many of the 64 bits of two hashes may differ for two
    images to be compared. Raises UserError for a pattern without match.
    """
    if not 0 <= near_bits <= HASH_BITS // 4:
        raise UserError(f"near_bits is {near_bits}: expected 0 (only equal hashes) to {HASH_BITS // 4}")
    census = take_census(splits, workers=workers)
    contents = contents_of(census)
    findings = [
        *_shards(census),
        *_unreadable(census),
        *(Finding("note", "unused", text) for text in census.unused),
        *_sizes(census),
        *_depths(census),
        *_labels(census),
        *_balance(census),
        *_keys(census),
        *exact_duplicates(census, contents),
        *near_duplicates(census, contents, max_bits=near_bits),
    ]
    return Examination(
        splits=tuple(_summary(census, name) for name in census.splits), findings=tuple(findings)
    )


def _summary(census: Census, name: str) -> SplitSummary:
    mine = census.rows(name)
    seen = mine[census.readable()[mine]]
    columns = {"width": census.width[seen], "height": census.height[seen], "KB": census.size[seen] / 1000}
    return SplitSummary(
        name=name,
        shards=len(np.unique(census.shard[mine])),
        images=len(mine),
        labels=len(set(census.label[mine]) - {-1}),
        total_bytes=int(census.size[mine].sum()),
        percentiles={
            column: tuple(np.percentile(values, PERCENTILES).tolist()) if len(values) else ()
            for column, values in columns.items()
        },
    )


def _shards(census: Census) -> Iterator[Finding]:
    count = len({*census.shards, *(path for _, path, _ in census.faults)})
    if census.faults:
        items = tuple((shown(path), reason) for _, path, reason in census.faults)
        yield Finding("FIX", "shards", f"{len(items):,} of {counted(count, 'shard')} cannot be used", items)
    bare = [path for path in census.shards if not is_remote(path) and not index_path(path).exists()]
    if bare:
        yield Finding(
            "note",
            "index",
            f"{len(bare):,} of {counted(count, 'shard')} have no index beside them, so that every machine scans them once: "
            "glsd pack index SHARDS",
        )
    elif not census.faults:
        yield Finding("ok", "shards", f"{have(count, 'shard')} an index")
    names = {os.path.basename(shown(path)).rpartition("-")[0] for path in census.shards} - {""}
    if census.splits == (UNNAMED,) and len(names) > 1:
        example = " ".join(f"{name}='.../{name}-*.tar'" for name in sorted(names)[:2])
        yield Finding(
            "note",
            "splits",
            f"the names of the shards suggest several splits: to look for leakage, name them: glsd audit {example}",
        )


def _unreadable(census: Census) -> Iterator[Finding]:
    # Images of faulty shards are reported as shards.
    seen = int(census.readable().sum()) + len(census.reasons)
    if census.reasons:
        items = tuple((census.place(number), reason) for number, reason in sorted(census.reasons.items()))
        yield Finding(
            "FIX", "unreadable", f"{len(items):,} of {counted(seen, 'image')} cannot be read", items
        )
    elif seen:
        yield Finding("ok", "unreadable", f"all {counted(seen, 'image')} can be read")


def _sizes(census: Census) -> Iterator[Finding]:
    rows = np.flatnonzero(census.readable())
    width, height = census.width[rows], census.height[rows]
    short, long = np.minimum(width, height), np.maximum(width, height)
    flat = contrast(census.thumb[rows]) < FLAT
    odd = (
        ("tiny", short < TINY, f"a short side below {TINY} pixels"),
        (
            "huge",
            width * height > HUGE,
            f"more than {HUGE / 1e6:.0f} megapixels: pack them with --short_side",
        ),
        ("long", long > LONG * short, f"one side more than {LONG:.0f} times as long as the other"),
        ("blank", flat, "nearly one color"),
    )
    for topic, those, what in odd:
        found = rows[those]
        items = tuple((census.place(n), f"{census.width[n]} x {census.height[n]}") for n in found)
        if items:
            yield Finding("note", topic, f"{have(len(items), 'image')} {what}", items)
    if len(rows) and np.median(short) > LARGE_SHORT_SIDE:
        yield Finding(
            "note",
            "large",
            f"the median short side is {np.median(short):.0f} pixels, more than crops of 224 need: images packed with "
            "--short_side 512 are read several times as fast",
        )
    elif len(rows) and not any(those.any() for _, those, _ in odd):
        yield Finding("ok", "sizes", "no image is tiny, huge, long or blank")


def _depths(census: Census) -> Iterator[Finding]:
    """Find images of more than 8 bits that stay nearly black, such as 12-bit values in files of 16 bits."""
    for name in census.splits:
        mine = census.rows(name)
        deep = mine[census.readable()[mine] & (census.bits[mine] > 8)]
        dark = deep[census.peak[deep] < DARK]
        if not len(dark):
            continue
        unused = 8 - np.ceil(np.log2(census.peak[dark] + 1)).astype(int)
        tops = [((int(census.peak[n]) + 1) << int(census.bits[n] - 8)) - 1 for n in dark]
        whites = [(1 << int(bits)) - 1 for bits in census.bits[dark]]
        items = tuple(
            (census.place(number), f"values up to {top} of {white}")
            for number, top, white in zip(dark, tops, whites, strict=True)
        )
        text = (
            f"{name}: {len(dark):,} of {len(deep):,} images of more than 8 bits are nearly black: values up to {max(tops)} of "
            f"{max(whites)}. If their white is there, multiply the values by {1 << int(unused.min())} before packing"
        )
        yield Finding("FIX" if len(dark) == len(deep) else "note", "range", text, items)


def _labels(census: Census) -> Iterator[Finding]:
    for name in census.splits:
        mine = census.rows(name)
        if not len(mine):
            continue
        labels = census.label[mine]
        without = mine[labels < 0]
        if len(without) == len(mine):
            yield Finding("ok", "labels", f"{name}: no image has a label, and pretraining needs none")
            continue
        if len(without):
            items = tuple((census.place(number), "no label") for number in without)
            yield Finding(
                "FIX",
                "labels",
                f"{name}: {len(without):,} of {len(mine):,} images have no label, the others have one",
                items,
            )
        yield from _unnamed(census, name, mine)
        counts = Counter(labels[labels >= 0].tolist())
        most, least = max(counts.values()), min(counts.values())
        single = sum(count == 1 for count in counts.values())
        text = f"{name}: {have(len(counts), 'class', 'classes')} {least:,} to {most:,} images"
        if single:
            text += f"; {have(single, 'class', 'classes')} one image, of no use to retrieval and class-balanced batches"
        yield Finding("note" if single or most > UNEVEN_CLASSES * least else "ok", "classes", text)


def _unnamed(census: Census, name: str, mine: np.ndarray) -> Iterator[Finding]:
    """Find labels that the classes.json beside the shards does not name."""
    for folder in sorted({os.path.dirname(census.shards[shard]) for shard in np.unique(census.shard[mine])}):
        file = Path(folder, CLASSES_FILE)
        if is_remote(folder) or not file.is_file():
            continue
        try:
            known = len(read_classes(file))
        except UserError as error:
            yield Finding("FIX", "labels", f"{name}: {error}")
            continue
        here = [os.path.dirname(census.shards[shard]) == folder for shard in census.shard[mine]]
        beyond = mine[np.array(here) & (census.label[mine] >= known)]
        if len(beyond):
            items = tuple((census.place(number), f"label {census.label[number]}") for number in beyond)
            text = f"{name}: {have(len(beyond), 'image')} a label that {file} does not name"
            yield Finding("FIX", "labels", text, items)


def _balance(census: Census) -> Iterator[Finding]:
    for name in census.splits:
        shards = census.shard[census.rows(name)]
        numbers, samples = np.unique(shards, return_counts=True)
        if len(numbers) < 2:
            continue
        weights = np.bincount(shards, census.size[census.rows(name)])[numbers]
        uneven = max(samples.max() / np.median(samples), weights.max() / max(1, np.median(weights)))
        text = (
            f"{name}: a shard holds {samples.min():,} to {samples.max():,} images, {weights.min() / 1e6:.1f} to "
            f"{weights.max() / 1e6:.1f} MB"
        )
        if uneven > UNEVEN_SHARDS:
            text += "; the shuffle window holds whole shards, so even ones mix better"
        yield Finding("note" if uneven > UNEVEN_SHARDS else "ok", "balance", text)


def _keys(census: Census) -> Iterator[Finding]:
    for name in census.splits:
        mine = census.rows(name)
        counts = Counter(census.keys[number] for number in mine)
        twice = [number for number in mine if counts[census.keys[number]] > 1]
        if twice:
            items = tuple((census.place(number), f"{counts[census.keys[number]]} times") for number in twice)
            yield Finding(
                "note",
                "keys",
                f"{name}: {counted(len({census.keys[n] for n in twice}), 'key')} come more than once, so a table of keys "
                "cannot tell the images apart",
                items,
            )
        elif len(mine):
            yield Finding("ok", "keys", f"{name}: every key is unique")
