"""The one writer of tar shards: every packing command ends here, and resumes here after a kill.

Beside the shards lie an index of each, ``classes.json`` (class names in label order) and ``{prefix}-files.tsv`` (the source
file of each key).
"""

import io
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from glsd.errors import UserError
from glsd.files import flush
from glsd.packing import SHARD_MEGABYTES
from glsd.packing.source import Loaded, Source, load_images, reading_order, source_digest
from glsd.packing.staging import Progress, Staging, append, staged
from glsd.shards.find import SOURCES_SUFFIX, find_shards, index_remote
from glsd.shards.index import BLOCK, build_index, index_path, write_index
from glsd.shards.labels import CLASSES_FILE, read_classes
from glsd.shards.remote import is_remote
from glsd.shards.store import open_shards

# Of the cells of the table of source files; the backslash comes first.
ESCAPES = {r"\\": "\\", r"\t": "\t", r"\n": "\n", r"\r": "\r"}
ESCAPE = re.compile(r"\\[\\tnr]")
SAMPLE_OVERHEAD = 4 * BLOCK  # image header, padding of the image, label header, label

Sample = tuple[bytes, str, int | None]  # bytes of the image file, its extension, its label


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What was packed into the shards of one prefix, and what was left out."""

    num_images: int
    shards: tuple[Path, ...]
    num_classes: int = 0  # different labels
    classes: tuple[str, ...] = ()  # class names in label order; empty = labels have no names
    unreadable: tuple[tuple[str, str], ...] = ()  # source file and reason of each image that was left out
    num_resized: int = 0  # images whose short side was longer than short_side
    num_resumed: int = 0  # shards that an interrupted packing had finished
    skipped: dict[str, int] = field(default_factory=dict)  # files that are no images, by extension
    stray: str = ""  # first of a few images outside the subfolders, which cost the others their labels
    notes: tuple[str, ...] = ()  # sentences about what the user may not expect


def pack_sources(
    sources: Mapping[str, Source],
    dst: str | Path,
    *,
    shard_megabytes: int = SHARD_MEGABYTES,
    shuffle_seed: int = 0,
    full_check: bool = False,
    short_side: int | None = None,
    workers: int = 0,
    unreadable_hint: str | None = None,
) -> dict[str, PackSummary]:
    """Pack the images of each source, shuffled, into ``dst/{prefix}-{000000}.tar``, with an index beside each shard.

    Image files are packed bit for bit, except for images whose short side is longer than ``short_side`` pixels, which are
    resized (resize.py). An image without a readable header is left out and listed; ``full_check`` decodes every image.
    With ``unreadable_hint`` such an image is an error instead, which ends with the hint. The number of ``workers``
    (processes; 0: this one) does not change the result. After a kill, the same call resumes after the finished shards and
    ends with the same files. All sources have the same classes.
    Raises UserError if a source has no usable image, labels contradict the classes or an earlier packing into ``dst``, and
    what staged and in_workers raise.
    """
    dst = Path(dst)
    if short_side is not None and short_side < 1:
        raise UserError(f"short_side is {short_side}: expected a number of pixels of at least 1, such as 512")
    classes = tuple(next(iter(sources.values())).classes)
    _check_classes(sources, classes, dst)
    settings = {
        "prefixes": list(sources),
        "shard_megabytes": shard_megabytes,
        "shuffle_seed": shuffle_seed,
        "full_check": full_check,
        "short_side": short_side,
        "source": ", ".join(source.title for source in sources.values()),
        "images": [source_digest(source) for source in sources.values()],
    }
    with staged(dst, list(sources), settings=settings, classes=classes) as staging:
        num_resumed = {prefix: len(done.shards) for prefix, done in staging.progress.items()}
        for prefix, source in sources.items():
            done = staging.progress[prefix]
            if unreadable_hint is not None:
                _refuse_unreadable(source, done.unreadable, unreadable_hint)
            if not done.is_complete:
                images = load_images(
                    source,
                    reading_order(source, shuffle_seed)[done.next_place :],
                    full_check=full_check,
                    short_side=short_side,
                    workers=workers,
                )
                images = _watched(images, source, done.next_place, unreadable_hint)
                _write_shards(staging, prefix, images, shard_megabytes, source, short_side is not None)
    return {
        prefix: _summary(source, staging.progress[prefix], dst, num_resumed[prefix])
        for prefix, source in sources.items()
    }


def pack_samples(
    samples: Iterable[Sample],
    dst: str | Path,
    *,
    prefix: str = "train",
    shard_megabytes: int = SHARD_MEGABYTES,
    classes: Sequence[str] = (),
) -> PackSummary:
    """Pack (image bytes, extension, label or None) in the given order, unchecked, without a table of source files.

    An interrupted call keeps nothing. Raises UserError if there is no sample, and what staged raises.
    """
    images = (
        Loaded(number, raw, extension, -1 if label is None else label)
        for number, (raw, extension, label) in enumerate(samples)
    )
    with staged(Path(dst), [prefix], settings=None, classes=classes) as staging:
        _write_shards(staging, prefix, images, shard_megabytes, source=None, has_sizes=False)
    done = staging.progress[prefix]
    shards = tuple(Path(dst, name) for name in done.shards)
    return PackSummary(num_images=done.num_images, shards=shards, classes=tuple(classes))


def index_shards(patterns: str | Sequence[str], *, upload: bool = False, image: str = "") -> int:
    """Write the index beside each shard anew and return their number of samples.

    The index of a remote shard is kept on this machine; with ``upload`` it is written beside the shard. image: as in
    build_index. Raises UserError as find_shards and build_index do.
    """
    total = 0
    image = image.removeprefix(".").lower()
    for path in tqdm(find_shards(patterns), "indexing shards", disable=None):
        if is_remote(path):
            total += index_remote(path, upload=upload, image=image)
            continue
        index = build_index(path, image=image)
        write_index(index, index_path(path), shard_name=os.path.basename(path))
        total += len(index)
    return total


def _check_classes(sources: Mapping[str, Source], classes: Sequence[str], dst: Path) -> None:
    """Raise UserError unless a label means the same class everywhere, also in an earlier packing into ``dst``."""
    name, count = next(iter(Counter(classes).most_common(1)), ("", 0))
    if count > 1:
        raise UserError(f"two classes have the name {name!r}: expected each name once")
    for source in sources.values():
        if source.labels is None:
            continue
        if classes and (largest := max(source.labels, default=-1)) >= len(classes):
            raise UserError(
                f"{source.title}: label {largest} has no name: only {len(classes)} classes are named"
            )
        earlier = dst / CLASSES_FILE
        if os.path.isfile(earlier) and read_classes(earlier) != list(classes):
            raise UserError(
                f"{earlier} of an earlier packing numbers other classes: pack into another folder"
            )
        if classes and not os.path.isfile(earlier) and (shard := _labeled_shard(dst, tuple(sources))):
            raise UserError(
                f"{source.title} has class names, but the labels of {shard}, of an earlier packing, are numbers without names: "
                "a label would not mean one class in both; pack into another folder"
            )


def _labeled_shard(folder: Path, prefixes: Sequence[str]) -> str | None:
    """Return the first shard in a folder that has a label; those of ``prefixes`` are refused by staged."""
    own = re.compile(rf"({'|'.join(map(re.escape, prefixes))})-[0-9].*|\..*", re.DOTALL)
    names = sorted(os.listdir(folder)) if os.path.isdir(folder) else []
    shards = (str(folder / name) for name in names if name.endswith(".tar") and not own.fullmatch(name))
    return next((shard for shard in shards if open_shards(shard).labels().max() >= 0), None)


def _watched(images: Iterator[Loaded], source: Source, first: int, hint: str | None) -> Iterator[Loaded]:
    """Yield the images under a progress bar; with a hint, UserError for one that cannot be read."""
    title = f"packing {source.title}"
    with tqdm(images, title, len(source.names), initial=first, unit=" images", disable=None) as bar:
        for image in bar:
            if image.reason and hint is not None:
                _refuse_unreadable(source, [(image.number, image.reason)], hint)
            yield image


def _refuse_unreadable(source: Source, unreadable: Sequence[tuple[int, str]], hint: str) -> None:
    for number, reason in unreadable:
        raise UserError(f"{source.names[number]} cannot be read ({reason}): {hint}")


def _write_shards(
    staging: Staging,
    prefix: str,
    images: Iterable[Loaded],
    shard_megabytes: int,
    source: Source | None,
    has_sizes: bool,
) -> None:
    """Write the rest of the shards of a prefix from ``images``, which start at its ``next_place``.

    A shard ends before the image that would make it larger than ``shard_megabytes``. source: names the files in the table,
    None = no table. has_sizes: the table has a column with the original sizes of resized images.
    """
    if shard_megabytes < 1:
        raise UserError(f"shard_megabytes is {shard_megabytes}: expected at least 1")
    done = staging.progress[prefix]
    left_out: list[tuple[int, int, str]] = []  # place, number, reason; of images behind the last shard

    def readable() -> Iterator[tuple[int, Loaded]]:
        for place, image in enumerate(images, done.next_place):
            if image.reason:
                left_out.append((place, image.number, image.reason))
            else:
                yield place, image

    rows = readable()
    row = next(rows, None)
    while row is not None:
        path = staging.folder / f"{prefix}-{len(done.shards):06d}.tar"
        shard: list[tuple[int, Loaded]] = []
        size = 0
        with open(path, "wb") as file:
            with tarfile.open(fileobj=file, mode="w|") as tar:
                while row is not None and (not size or size + len(row[1].raw) <= shard_megabytes * 2**20):
                    _add_sample(tar, done.num_images + len(shard), row[1])
                    size += len(row[1].raw) + SAMPLE_OVERHEAD
                    shard.append((row[0], row[1]._replace(raw=b"")))
                    row = next(rows, None)
            flush(file)
        # It also makes the names of both files in the folder durable.
        write_index(build_index(path), index_path(path), shard_name=path.name)
        following = shard[-1][0] + 1
        staging.note(
            prefix,
            shard=path.name,
            images=len(shard),
            next=following,
            table_bytes=_append_table(staging, prefix, [image for _, image in shard], source, has_sizes),
            resized=sum(bool(image.original_size) for _, image in shard),
            unreadable=[gone[1:] for gone in left_out if gone[0] < following],
        )
        left_out[:] = [gone for gone in left_out if gone[0] >= following]
    if not done.shards:
        first = f"; {source.names[left_out[0][1]]}: {left_out[0][2]}" if source and left_out else ""
        raise UserError(f"no usable image in {source.title if source else 'the samples'}{first}")
    staging.note(prefix, unreadable=[gone[1:] for gone in left_out])


def _add_sample(tar: tarfile.TarFile, number: int, image: Loaded) -> None:
    """Add the members of a sample; their headers are those that webdataset writes."""
    label = {} if image.label < 0 else {"cls": b"%d" % image.label}
    for extension, content in sorted({image.extension: image.raw, **label}.items()):
        member = tarfile.TarInfo(f"{_sample_key(number)}.{extension}")
        member.size, member.mode = len(content), 0o444
        member.uname = member.gname = "bigdata"
        tar.addfile(member, io.BytesIO(content))


def _append_table(
    staging: Staging, prefix: str, images: Sequence[Loaded], source: Source | None, has_sizes: bool
) -> int:
    """Append the images of one shard to the table of source files and return its length in bytes."""
    if source is None:
        return 0
    done = staging.progress[prefix]
    rows = [] if done.shards else [("key", "file", "resized_from")]
    rows += [
        (_sample_key(key), source.names[image.number], image.original_size)
        for key, image in enumerate(images, done.num_images)
    ]
    data = b"".join(_table_row(*row[: 3 if has_sizes else 2]) for row in rows)
    return append(staging.folder / f"{prefix}{SOURCES_SUFFIX}", data)


def _sample_key(number: int) -> str:
    """Return the name of a sample inside its shard."""
    return f"{number:08d}"


def _table_row(*cells: str) -> bytes:
    r"""Return a tab-separated line; a tab, line end or backslash inside a cell becomes \t, \n, \r or \\."""
    return ("\t".join(map(_escaped, cells)) + "\n").encode("utf-8", "surrogateescape")


def _escaped(cell: str) -> str:
    for escape, character in ESCAPES.items():
        cell = cell.replace(character, escape)
    return cell


def source_table(shard: str) -> Path:
    """Return where the table of source files of a packed shard would be."""
    folder, name = os.path.split(shard)
    return Path(folder, f"{name.rpartition('-')[0]}{SOURCES_SUFFIX}")


def read_sources(table: Path) -> dict[str, str]:
    """Return the source file of each key, nothing if there is no table."""
    if not table.is_file():
        return {}
    lines = table.read_bytes().decode("utf-8", "surrogateescape").split("\n")[1:]
    cells = [line.split("\t") for line in lines]
    return {row[0]: ESCAPE.sub(lambda match: ESCAPES[match[0]], row[1]) for row in cells if len(row) > 1}


def _summary(source: Source, done: Progress, dst: Path, num_resumed: int) -> PackSummary:
    gone = dict(done.unreadable)
    labels = source.labels if source.labels is not None else ()
    return PackSummary(
        num_images=done.num_images,
        shards=tuple(dst / name for name in done.shards),
        num_classes=len({label for number, label in enumerate(labels) if label >= 0 and number not in gone}),
        classes=tuple(source.classes),
        unreadable=tuple((source.names[number], reason) for number, reason in done.unreadable),
        num_resized=done.num_resized,
        num_resumed=num_resumed,
    )
