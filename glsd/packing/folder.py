"""Packing all images below a folder, whose subfolders are the classes."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from glsd.errors import UserError, one_line
from glsd.packing.labels import number_classes
from glsd.packing.source import FileReader, Source
from glsd.packing.write import PackSummary, pack_sources
from glsd.shards.index import IMAGE_EXTENSIONS

# Names of folders that are splits rather than classes -> the split.
SPLITS = {
    **dict.fromkeys(("train", "training", "trn"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val"),
    **dict.fromkeys(("test", "testing", "tst"), "test"),
}
LINKS_SHOWN = 3


def pack_folder(
    src: str | Path,
    dst: str | Path,
    *,
    prefix: str = "train",
    classes: str | Path | None = None,
    **settings: Any,
) -> PackSummary:
    """Pack all images below a folder; ``settings`` as pack_sources.

    The subfolders of ``src`` are the classes, if no image lies outside them; otherwise there are no labels. classes: the
    classes.json that numbers them, by default that of an earlier packing into ``dst``, or else they are sorted. Hidden
    files are skipped. Raises UserError if ``src`` holds no image, a class without number, two classes that share a folder
    through a link, or splits such as train and val in place of classes, and as pack_sources does.
    """
    src, dst = Path(src), Path(dst)
    found = find_images(src)
    paths = found.images
    strays = [path for path in paths if len(path.parts) == 1]
    if strays and classes is not None:
        raise UserError(f"--classes {classes}: {src / strays[0]} lies in no subfolder, so it has no class")
    if not strays:
        _check_one_class_each(src, found)
        if classes is None:
            _refuse_splits(src, paths)
    numbers = {} if strays else number_classes({path.parts[0] for path in paths}, dst, str(src), classes)
    names = [path.as_posix() for path in paths]
    source = Source(
        title=str(src),
        names=names,
        read=FileReader(src, names),
        labels=[numbers[path.parts[0]] for path in paths] if numbers else None,
        classes=tuple(numbers),
    )
    summary = pack_sources({prefix: source}, dst, **settings)[prefix]
    stray = str(strays[0]) if 0 < len(strays) < len(paths) / 2 else ""
    return replace(summary, stray=stray, skipped=found.skipped, notes=tuple(_notes(src, found, not strays)))


class FoundImages(NamedTuple):
    """What lies below a folder; paths are relative to it."""

    images: list[Path]  # sorted
    skipped: dict[str, int]  # the number of other files by extension
    again: list[tuple[Path, Path]]  # folders that are links to another one, which came first


def find_images(src: Path) -> FoundImages:
    """Return the images below a folder. Links to folders are followed, and each folder is visited once.

    Raises UserError if there is no image.
    """
    if not src.is_dir():
        raise UserError(
            f"{src} is not a folder" if src.exists() else f"folder {src} does not exist: check the path"
        )
    images: list[Path] = []
    skipped: Counter[str] = Counter()
    again: list[tuple[Path, Path]] = []
    visited: dict[str, Path] = {}
    for name, subfolders, files in os.walk(src, followlinks=True, onerror=_unreadable_folder):
        folder, real = Path(name).relative_to(src), os.path.realpath(name)
        if real in visited:
            again.append((folder, visited[real]))
            subfolders.clear()
            continue
        visited[real] = folder
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for file in files:
            suffix = os.path.splitext(file)[1].lower()
            if suffix[1:] in IMAGE_EXTENSIONS and not file.startswith("."):
                images.append(folder / file)
            else:
                skipped[suffix or "(none)"] += 1
    if not images:
        seen = f"none of its {sum(skipped.values())} files is one" if skipped else "it is empty"
        raise UserError(f"no images in {src}: {seen}; expected {', '.join(sorted(IMAGE_EXTENSIONS))}")
    return FoundImages(
        sorted(images, key=lambda path: path.as_posix()),
        dict(sorted(skipped.items(), key=lambda kind: (-kind[1], kind[0]))),
        again,
    )


def _unreadable_folder(error: OSError) -> None:
    raise UserError(f"cannot read folder {error.filename}: {one_line(error)}") from error


def _check_one_class_each(src: Path, found: FoundImages) -> None:
    """Raise UserError if images would have two classes, because a folder in one class is a link into another."""
    for folder, first in found.again:
        if not first.parts or folder.parts[0] == first.parts[0]:
            continue
        if any(first in path.parents for path in found.images):
            raise UserError(
                f"{src / folder} and {src / first} are one folder (a link), but lie in two classes, {folder.parts[0]!r} and "
                f"{first.parts[0]!r}: remove the link that is not meant"
            )


def _refuse_splits(src: Path, paths: Sequence[Path]) -> None:
    """Raise UserError if the subfolders are splits, such as train and val of ImageNet, and no classes."""
    folders = sorted({path.parts[0] for path in paths})
    splits = {name: SPLITS[name.lower()] for name in folders if name.lower() in SPLITS}
    is_nested = all(len(path.parts) > 2 for path in paths if path.parts[0] in splits)
    if len(set(splits.values())) < 2 and not (splits and len(splits) == len(folders) and is_nested):
        return
    commands = "; ".join(f"glsd pack {src / name} DST --prefix {name}" for name in splits)
    raise UserError(
        f"the subfolders of {src} are splits, not classes ({', '.join(splits)}): pack each split into the same folder DST: "
        f"{commands} (if they are classes, list all of them in a JSON file and name it with --classes)"
    )


def _notes(src: Path, found: FoundImages, labeled: bool) -> Iterator[str]:
    if found.again:
        links = ", ".join(f"{folder} = {first}" for folder, first in found.again[:LINKS_SHOWN])
        more = f" and {len(found.again) - LINKS_SHOWN} more" if len(found.again) > LINKS_SHOWN else ""
        yield f"left out folders that are links to a folder packed already: {links}{more}"
    roots = {path.parts[0] for path in found.images}
    below = {path.parts[1] for path in found.images if len(path.parts) > 2}
    if labeled and len(roots) == 1 and len(below) > 1:
        (only,) = roots
        yield f"all images have one class, {only!r}: if its subfolders are the classes, pack {src / only}"
