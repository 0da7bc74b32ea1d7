"""From folders of images to tar shards: the original bytes, a label each, an index beside each shard.

Beside the shards lie ``classes.json``, the class names in the order of their labels, and ``{prefix}-files.tsv``, the
key and the source file of every image, to find the file behind a key in a log.
"""

import glob
import io
import json
import os
import shutil
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from tqdm import tqdm
from webdataset import TarWriter

from glsd.contracts import UserError
from glsd.data.decode import FORMATS, BrokenImage, decode
from glsd.data.order import permutation
from glsd.data.shard_index import BLOCK, IMAGE_EXTENSIONS, build_index, index_path, write_index
from glsd.data.shards import CLASSES_FILE, SOURCES_SUFFIX, find_shards, read_classes

SHUFFLE_STREAM = 0x7061636B
SAMPLE_OVERHEAD = 4 * BLOCK  # image header, padding of the image, label header, label

Sample = tuple[bytes, str, int | None]  # bytes of the image file, its extension, its label


@dataclass(frozen=True, kw_only=True)
class PackSummary:
    """What was packed and what was left out."""

    num_images: int
    shards: tuple[Path, ...]
    classes: tuple[str, ...] = ()  # in the order of their labels; empty = no labels
    stray: str = (
        ""  # the first image outside the subfolders, if a few such images cost most images their labels
    )
    skipped: dict[str, int] = field(default_factory=dict)  # files that are no images, by extension
    unreadable: tuple[tuple[str, str], ...] = ()  # path and reason


def pack_folder(
    src: str | Path,
    dst: str | Path,
    *,
    prefix: str = "train",
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
    full_check: bool = False,
    classes: str | Path | None = None,
) -> PackSummary:
    """Pack all images below a folder, shuffled, into ``dst/{prefix}-{000000}.tar`` with an index beside each.

    If every image lies in some subfolder, the first-level subfolders are the classes, numbered in the order of
    ``classes`` (a classes.json of another packing) or else of ``dst/classes.json`` (of an earlier packing into
    the same folder) or else sorted; otherwise there are no labels. Hidden files are skipped. An image whose
    header cannot be read is left out and listed; ``full_check`` decodes every image. Raises UserError if ``src``
    holds no usable image or a class without number, or ``dst`` cannot be written or already has shards of that
    prefix.
    """
    src, dst = Path(src), Path(dst)
    paths, skipped = find_images(src)
    strays = [path for path in paths if len(path.parts) == 1]
    labels = {} if strays else _labels({path.parts[0] for path in paths}, dst, src, classes)
    if strays and classes is not None:
        raise UserError(f"--classes {classes}: {src / strays[0]} lies in no subfolder, so it has no class")
    unreadable: list[tuple[str, str]] = []
    sources: list[str] = []

    def samples() -> Iterator[Sample]:
        order = permutation(len(paths), seed=shuffle_seed, stream=SHUFFLE_STREAM)
        for number in tqdm(order, f"packing {src}", unit=" images", disable=None):
            path = paths[number]
            try:
                raw = (src / path).read_bytes()
                decode(raw) if full_check else image_extension(raw)
            except (OSError, BrokenImage) as error:
                unreadable.append((str(path), str(error)))
                continue
            sources.append(path.as_posix())
            yield raw, path.suffix[1:].lower(), labels[path.parts[0]] if labels else None

    with staging(dst, [prefix]) as work:
        names, count = write_shards(
            samples(), work, prefix, shard_megabytes, source=str(src), sources=sources
        )
        write_classes(work, tuple(labels))
    return PackSummary(
        num_images=count,
        shards=tuple(dst / name for name in names),
        classes=tuple(labels),
        stray=str(strays[0]) if 0 < len(strays) < len(paths) / 2 else "",
        skipped=skipped,
        unreadable=tuple(unreadable),
    )


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


def index_shards(patterns: str | Sequence[str]) -> int:
    """Write the index beside each shard anew and return their number of samples; UserError as open_shards."""
    total = 0
    for path in tqdm(find_shards(patterns), "indexing shards", disable=None):
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
    raise UserError(f"cannot read folder {error.filename}: {error.strerror}") from error


def image_extension(raw: bytes) -> str:
    """Return the extension that suits the bytes of an image file; BrokenImage if their header is of none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow warns of large images long before it refuses them
            with Image.open(io.BytesIO(raw), formats=FORMATS) as image:
                kind = str(image.format).lower()
    except Image.UnidentifiedImageError as error:
        raise BrokenImage("not an image of a known format" if raw else "empty file (0 bytes)") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise BrokenImage(str(error)) from error
    return "jpg" if kind in ("jpeg", "mpo") else kind


def _labels(found: set[str], dst: Path, src: Path, classes: str | Path | None) -> dict[str, int]:
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


@contextmanager
def staging(dst: Path, prefixes: Sequence[str]) -> Iterator[Path]:
    """Give a hidden folder inside ``dst`` whose files are moved up at the end: half a packing never looks whole.

    Raises UserError if ``dst`` cannot be written or has shards of one of the prefixes.
    """
    for prefix in prefixes:
        if not prefix or "/" in prefix or prefix.startswith("."):
            raise UserError(f"prefix {prefix!r}: expected the beginning of a file name, such as train")
    work = dst / f".{prefixes[0]}.packing"
    try:
        dst.mkdir(parents=True, exist_ok=True)
        old = [path for prefix in prefixes for path in sorted(dst.glob(f"{glob.escape(prefix)}-[0-9]*.tar"))]
        if old:
            raise UserError(f"{dst} already has {old[0].name}: choose another prefix or an empty folder")
        work.mkdir()
    except FileExistsError as error:
        if not dst.is_dir():
            raise UserError(f"cannot write to {dst}: it is not a folder") from error
        raise UserError(
            f"{work} was left by an interrupted packing, or one is running: delete it and start again"
        ) from error
    except OSError as error:
        raise UserError(f"cannot write to {dst}: {error.strerror or error}") from error
    try:
        yield work
        # Indices first: a shard is there only when its index is.
        for path in sorted(work.iterdir(), key=lambda path: path.suffix == ".tar"):
            os.replace(path, dst / path.name)
    except OSError as error:
        raise UserError(f"cannot write to {dst}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def write_shards(
    samples: Iterable[Sample],
    work: Path,
    prefix: str,
    shard_megabytes: int,
    *,
    source: str,
    sources: Sequence[str] = (),
) -> tuple[list[str], int]:
    """Write shards, their indices and the table of ``sources``; return the shards' names and the number of samples.

    ``sources`` is read at the end, so that ``samples`` may fill it. Raises UserError if there is no sample, naming
    ``source``; OSError is for ``staging`` to name.
    """
    if shard_megabytes < 1:
        raise UserError(f"shard_megabytes is {shard_megabytes}: expected at least 1")
    names, count = _fill(samples, work, prefix, shard_megabytes * 2**20)
    if not count:
        raise UserError(f"no usable image in {source}: nothing was packed")
    if sources:
        rows = (f"{_key(number)}\t{_escaped(path)}\n" for number, path in enumerate(sources))
        table = work / f"{prefix}{SOURCES_SUFFIX}"
        with open(table, "w", encoding="utf-8", errors="surrogateescape") as file:
            file.writelines(["key\tfile\n", *rows])
    return names, count


def write_classes(work: Path, classes: Sequence[str]) -> None:
    """Write classes.json, unless there are none."""
    if classes:
        (work / CLASSES_FILE).write_text(json.dumps(list(classes), indent=1) + "\n")


def _key(number: int) -> str:
    return f"{number:08d}"


def _escaped(path: str) -> str:
    for character, escape in (("\\", r"\\"), ("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r")):
        path = path.replace(character, escape)
    return path


def _fill(samples: Iterable[Sample], folder: Path, prefix: str, shard_bytes: int) -> tuple[list[str], int]:
    names: list[str] = []
    count = 0
    rows = iter(samples)
    sample = next(rows, None)
    while sample is not None:
        path = folder / f"{prefix}-{len(names):06d}.tar"
        with open(path, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                size = 0
                while sample is not None and (not size or size + len(sample[0]) <= shard_bytes):
                    raw, extension, label = sample
                    members = {extension: raw} if label is None else {extension: raw, "cls": b"%d" % label}
                    tar.write({"__key__": _key(count), **members})
                    size += len(raw) + SAMPLE_OVERHEAD
                    count += 1
                    sample = next(rows, None)
            file.flush()
            os.fsync(file.fileno())
        write_index(build_index(path), index_path(path), shard_name=path.name)
        names.append(path.name)
    return names, count
