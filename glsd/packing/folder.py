"""From folders of images to tar shards: the original bytes, a label each, an index beside each shard.

Beside the shards lie ``classes.json``, the class names in the order of their labels, and ``{prefix}-files.tsv``, the
key and the source file of every image, to find the file behind a key in a log.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from glsd.errors import UserError, one_line
from glsd.packing.resize import check_short_side
from glsd.packing.resume import Packing, resumable_staging
from glsd.packing.retrieval_files import check_regular
from glsd.packing.source import (
    Source,
    load_images,
    reading_order,
    source_digest,
)
from glsd.packing.write import (
    Sample,
    staging,
    write_classes,
    write_shards,
)
from glsd.shards.addresses import is_remote
from glsd.shards.find import find_shards, index_remote
from glsd.shards.index import (
    IMAGE_EXTENSIONS,
    build_index,
    index_path,
    write_index,
)
from glsd.shards.store import CLASSES_FILE, read_classes


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What was packed and what was left out."""

    num_images: int
    shards: tuple[Path, ...]
    classes: tuple[str, ...] = ()  # in the order of their labels; empty = they have no names
    labeled: bool = False
    stray: str = (
        ""  # the first image outside the subfolders, if a few such images cost most images their labels
    )
    skipped: dict[str, int] = field(default_factory=dict)  # files that are no images, by extension
    unreadable: tuple[tuple[str, str], ...] = ()  # path and reason
    resized: int = 0  # images that were larger than short_side
    resumed: int = 0  # shards that an interrupted packing had finished


def pack_folder(
    src: str | Path,
    dst: str | Path,
    *,
    prefix: str = "train",
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
    full_check: bool = False,
    classes: str | Path | None = None,
    short_side: int | None = None,
    workers: int = 0,
) -> PackSummary:
    """Pack all images below a folder, shuffled, into ``dst/{prefix}-{000000}.tar`` with an index beside each.

    If every image lies in some subfolder, the first-level subfolders are the classes, numbered in the order of
    ``classes`` (a classes.json of another packing) or else of ``dst/classes.json`` (of an earlier packing into
    the same folder) or else sorted; otherwise there are no labels. Hidden files are skipped. The rest as pack_source.
    Raises UserError if ``src`` holds no usable image or a class without number, and as pack_source does.
    """
    src, dst = Path(src), Path(dst)
    paths, skipped = find_images(src)
    strays = [path for path in paths if len(path.parts) == 1]
    if strays and classes is not None:
        raise UserError(f"--classes {classes}: {src / strays[0]} lies in no subfolder, so it has no class")
    numbers = {} if strays else number_classes({path.parts[0] for path in paths}, dst, src, classes)
    names = [path.as_posix() for path in paths]
    source = Source(
        title=str(src),
        names=names,
        read=FileReader(src, names),
        labels=[numbers[path.parts[0]] for path in paths] if numbers else None,
        classes=tuple(numbers),
    )
    return pack_source(
        source,
        dst,
        prefix=prefix,
        shard_megabytes=shard_megabytes,
        shuffle_seed=shuffle_seed,
        full_check=full_check,
        short_side=short_side,
        workers=workers,
        stray=str(strays[0]) if 0 < len(strays) < len(paths) / 2 else "",
        skipped=skipped,
    )


def pack_source(
    source: Source,
    dst: str | Path,
    *,
    prefix: str,
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
    full_check: bool = False,
    short_side: int | None = None,
    workers: int = 0,
    **seen: Any,
) -> PackSummary:
    """Pack the images of a source, shuffled, into ``dst/{prefix}-{000000}.tar`` with an index beside each.

    The bytes are packed as they are; with ``short_side`` (pixels), an image whose short side is longer is made smaller
    (see pack_resize.shorten). An image whose header cannot be read is left out and listed; ``full_check`` decodes every
    image. The result does not depend on the number of ``workers`` (processes; 0: this one). Killed, the same call goes
    on after the shards that were finished, with the same result. ``seen`` goes into the summary. Raises UserError if
    there is no usable image, ``dst`` cannot be written, is packed into by another process or already has shards of that
    prefix, and if it holds an unfinished packing with other settings.
    """
    dst = Path(dst)
    check_short_side(short_side)
    order = reading_order(source, shuffle_seed)
    settings = {
        "prefix": prefix,
        "shard_megabytes": shard_megabytes,
        "shuffle_seed": shuffle_seed,
        "full_check": full_check,
        "short_side": short_side,
        "source": source.title,
        "images": source_digest(source),
    }
    with resumable_staging(dst, prefix, settings) as packing:
        done = packing.progress
        resumed = len(done.shards)
        if not done.complete:
            images = load_images(
                source, order[done.next :], full_check=full_check, short_side=short_side, workers=workers
            )
            bar = tqdm(
                images, f"packing {source.title}", len(order), initial=done.next, unit=" images", disable=None
            )
            _write(packing, bar, source, shard_megabytes, short_side is not None)
    return PackSummary(
        num_images=done.num_images,
        shards=tuple(dst / name for name in done.shards),
        classes=tuple(source.classes),
        labeled=source.labels is not None,
        unreadable=tuple(done.unreadable),
        resized=done.resized,
        resumed=resumed,
        **seen,
    )


def _write(packing: Packing, bar: tqdm, source: Source, shard_megabytes: int, note_sizes: bool) -> None:
    with bar:
        left_out = packing.write(iter(bar), source.names, source.labels, shard_megabytes, note_sizes)
    if not packing.progress.shards:
        first = f" ({left_out[0][0]}: {left_out[0][1]})" if left_out else ""
        raise UserError(f"no usable image in {source.title}: nothing was packed{first}")
    write_classes(packing.work, source.classes)
    packing.finish(left_out)


class FileReader:
    """Reads the image files below a folder, by number."""

    def __init__(self, root: Path, names: Sequence[str]):
        self._root, self._names = root, names

    def __call__(self, number: int) -> bytes:
        path = self._root / self._names[number]
        check_regular(path)
        return path.read_bytes()


def pack_samples(
    samples: Iterable[Sample],
    dst: str | Path,
    *,
    prefix: str = "train",
    shard_megabytes: int = 256,
    classes: Sequence[str] = (),
) -> PackSummary:
    """Pack (image bytes, extension, label or None) in the order given, unchecked; the rest as pack_folder."""
    dst = Path(dst)
    with staging(dst, [prefix]) as work:
        names, count = write_shards(samples, work, prefix, shard_megabytes, source="input")
        write_classes(work, tuple(classes))
    return PackSummary(num_images=count, shards=tuple(dst / name for name in names), classes=tuple(classes))


def index_shards(patterns: str | Sequence[str], *, upload: bool = False) -> int:
    """Write the index beside each shard anew and return their number of samples.

    Of a remote shard, the index is kept on this machine, or with ``upload`` written beside it. UserError as open_shards.
    """
    total = 0
    for path in tqdm(find_shards(patterns), "indexing shards", disable=None):
        if is_remote(path):
            total += index_remote(path, upload=upload)
            continue
        index = build_index(path)
        write_index(index, index_path(path), shard_name=os.path.basename(path))
        total += len(index)
    return total


def find_images(src: Path) -> tuple[list[Path], dict[str, int]]:
    """Return the images below a folder, sorted, relative to it, and the number of other files by extension.

    Links to folders are followed, each folder is visited once. Raises UserError if there is no image.
    """
    if not src.is_dir():
        raise UserError(
            f"{src} is not a folder" if src.exists() else f"folder {src} does not exist: check the path"
        )
    paths: list[Path] = []
    skipped: Counter[str] = Counter()
    visited: set[str] = set()
    for folder, subfolders, files in os.walk(src, followlinks=True, onerror=_unreadable_folder):
        real = os.path.realpath(folder)
        if real in visited:
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in files:
            suffix = os.path.splitext(name)[1].lower()
            if suffix[1:] in IMAGE_EXTENSIONS and not name.startswith("."):
                paths.append(Path(folder, name).relative_to(src))
            else:
                skipped[suffix or "(none)"] += 1
    if not paths:
        found = f"none of its {sum(skipped.values())} files is one" if skipped else "it is empty"
        raise UserError(f"no images in {src}: {found}; expected {', '.join(sorted(IMAGE_EXTENSIONS))}")
    return sorted(paths, key=lambda path: path.as_posix()), dict(skipped.most_common())


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"cannot read folder {error.filename}: {one_line(error)}") from error


def number_classes(found: set[str], dst: Path, src: Path, classes: str | Path | None) -> dict[str, int]:
    """The label of each class name, as ``classes`` or an earlier packing into ``dst`` gave them."""
    earlier = dst / CLASSES_FILE
    file = Path(classes) if classes is not None else earlier
    if classes is None and not earlier.is_file():
        return {name: label for label, name in enumerate(sorted(found))}
    names = read_classes(file)
    if earlier.is_file() and read_classes(earlier) != names:
        raise UserError(f"{file} and {earlier} of an earlier packing differ: pack into another folder")
    if new := sorted(found - set(names)):
        raise UserError(
            f"{src} has the class {new[0]!r}, which {file} lacks: leave it out, or, to use it, pack all sets anew, first the "
            "one with all classes, so that a label means the same class in each"
        )
    return {name: label for label, name in enumerate(names)}
