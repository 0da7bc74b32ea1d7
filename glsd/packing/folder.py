"""Packing all images below a folder, whose subfolders are the classes."""

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from glsd.errors import UserError, one_line
from glsd.packing.source import FileReader, Source
from glsd.packing.write import PackSummary, pack_sources
from glsd.shards.index import IMAGE_EXTENSIONS
from glsd.shards.store import CLASSES_FILE, read_classes


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
    files are skipped. Raises UserError if ``src`` holds no image or a class without number, and as pack_sources does.
    """
    src, dst = Path(src), Path(dst)
    paths, skipped = find_images(src)
    strays = [path for path in paths if len(path.parts) == 1]
    if strays and classes is not None:
        raise UserError(f"--classes {classes}: {src / strays[0]} lies in no subfolder, so it has no class")
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
    return replace(summary, stray=stray, skipped=skipped)


def find_images(src: Path) -> tuple[list[Path], dict[str, int]]:
    """Return the images below a folder, sorted, relative to it, and the number of other files by extension.

    Links to folders are followed, and each folder is visited once. Raises UserError if there is no image.
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


def number_classes(found: set[str], dst: Path, title: str, classes: str | Path | None) -> dict[str, int]:
    """Return the label of each class name: as in ``classes``, else as in ``dst/classes.json``, else sorted.

    Raises UserError for a class that the file lacks.
    """
    file = Path(classes) if classes is not None else dst / CLASSES_FILE
    if classes is None and not file.is_file():
        return {name: label for label, name in enumerate(sorted(found))}
    names = read_classes(file)
    if new := sorted(found - set(names)):
        raise UserError(
            f"{title} has the class {new[0]!r}, which {file} lacks: leave it out, or, to use it, pack all sets anew, first the "
            "one with all classes, so that a label means the same class in each"
        )
    return {name: label for label, name in enumerate(names)}
