"""Packing data sets that torchvision knows how to read from the disk."""

import inspect
import io
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torchvision.datasets as library
from PIL import Image

from glsd.errors import BrokenImage, UserError, one_line, pick
from glsd.packing.folder import (
    FileReader,
    PackSummary,
    number_classes,
    pack_source,
)
from glsd.packing.source import Source
from glsd.shards.store import CLASSES_FILE


class _Set(NamedTuple):
    """Where a torchvision class keeps what we need."""

    make: Any
    files: str = ""  # attribute with the paths, or with tuples that begin with one; empty = pixels only
    labels: str = ""  # attribute with the labels; empty = the second of those tuples


# Sets of images with one class number each. Not those that are a plain folder once they are unpacked (pack.py FOLDER), nor
# those whose class has to read a file that could hold a program before its checksum is known.
TORCHVISION_SETS = {
    "CIFAR10": _Set(library.CIFAR10, labels="targets"),
    "CIFAR100": _Set(library.CIFAR100, labels="targets"),
    "Country211": _Set(library.Country211, "samples"),
    "DTD": _Set(library.DTD, "_image_files", "_labels"),
    "EuroSAT": _Set(library.EuroSAT, "samples"),
    "FGVCAircraft": _Set(library.FGVCAircraft, "_image_files", "_labels"),
    "FashionMNIST": _Set(library.FashionMNIST, labels="targets"),
    "Flowers102": _Set(library.Flowers102, "_image_files", "_labels"),
    "Food101": _Set(library.Food101, "_image_files", "_labels"),
    "GTSRB": _Set(library.GTSRB, "_samples"),
    "Imagenette": _Set(library.Imagenette, "_samples"),
    "KMNIST": _Set(library.KMNIST, labels="targets"),
    "MNIST": _Set(library.MNIST, labels="targets"),
    "OxfordIIITPet": _Set(library.OxfordIIITPet, "_images", "_labels"),
    "RenderedSST2": _Set(library.RenderedSST2, "_samples"),
    "STL10": _Set(library.STL10, labels="labels"),
    "SUN397": _Set(library.SUN397, "_image_files", "_labels"),
    "SVHN": _Set(library.SVHN, labels="labels"),
    "USPS": _Set(library.USPS, labels="targets"),
}
LIBRARY_ERRORS = (RuntimeError, OSError, ValueError, LookupError, EOFError, ImportError, zipfile.BadZipFile)


def pack_torchvision(
    name: str,
    root: str | Path,
    dst: str | Path,
    *,
    split: str | None = None,
    prefix: str | None = None,
    download: bool = False,
    classes: str | Path | None = None,
    **settings: Any,
) -> PackSummary:
    """Pack one of TORCHVISION_SETS from ``root``, where torchvision keeps it; ``settings`` as pack_source.

    Where the set consists of image files they are packed as they are, otherwise (CIFAR, MNIST, ...) the pixels become PNG
    files. Class names are kept, where the set has some; labels are the set's own. ``split``: as torchvision calls it
    (default: its first choice, mostly train; a set without splits is all), also the default of ``prefix``. Raises
    UserError for a name or split that is unknown, for a set that is not in ``root`` or cannot be read, and as pack_source.
    """
    layout = pick(TORCHVISION_SETS, name, "torchvision data set")
    split, choice = _split(name, layout, split)
    try:
        data = layout.make(root=os.fspath(root), download=download, **choice)
        count = len(data)
    except LIBRARY_ERRORS as error:
        hint = "" if download else "; check the folder, or add --download"
        raise UserError(f"torchvision cannot open {name} in {root}: {one_line(str(error))}{hint}") from error
    rows = list(getattr(data, layout.files, ())) if layout.files else []
    paths = [os.path.relpath(row[0] if isinstance(row, tuple) else row, root) for row in rows]
    found = getattr(data, layout.labels, ()) if layout.labels else [row[1] for row in rows]
    labels = np.asarray(found, dtype=np.int64).tolist()
    names = _class_names(data)
    if len(labels) != count or len(paths) not in (0, count) or (names and max(labels) >= len(names)):
        raise UserError(
            f"this torchvision lays out {name} in another way than expected: write a list and use pack.py list"
        )
    labels, names = _numbered(labels, names, Path(dst), f"{name} ({split})", classes)
    source = Source(
        title=f"{name} ({split})",
        names=paths or [f"{name}/{split}#{number}" for number in range(count)],
        read=FileReader(Path(root), paths) if paths else PixelReader(data),
        labels=labels if max(labels) >= 0 else None,
        classes=tuple(names),
    )
    return pack_source(source, dst, prefix=prefix or split, **settings)


def _split(name: str, layout: _Set, split: str | None) -> tuple[str, dict[str, Any]]:
    """The split to take and how to say so to the class, which calls it split, train = yes or no, or has none."""
    accepted = inspect.signature(layout.make).parameters
    if "split" in accepted:
        split = split or str(accepted["split"].default)
        return split, {"split": split}
    if "train" in accepted:
        split = split or "train"
        if split not in ("train", "test"):
            raise UserError(f"split {split!r} of {name}: expected train or test")
        return split, {"train": split == "train"}
    if split not in (None, "all"):
        raise UserError(f"split {split!r} of {name}: it has no splits; leave --split away")
    return "all", {}


def _class_names(data: Any) -> list[str]:
    """The names of the classes in the order of the set's labels; none if it has none, or one twice."""
    names = [
        ", ".join(row) if isinstance(row, tuple) else str(row) for row in getattr(data, "classes", None) or ()
    ]
    return names if len(set(names)) == len(names) else []


def _numbered(
    labels: list[int], names: list[str], dst: Path, title: str, classes: str | Path | None
) -> tuple[list[int], list[str]]:
    """Labels and names as the set has them, or as an earlier packing numbered the names."""
    if not names:
        if classes is not None:
            raise UserError(f"--classes {classes}: {title} has no class names, only numbers")
        return labels, names
    if classes is None and not (dst / CLASSES_FILE).is_file():
        return labels, names
    numbers = number_classes(set(names), dst, Path(title), classes)
    return [numbers[names[label]] if label >= 0 else -1 for label in labels], list(numbers)


class PixelReader:
    """Gives the images of a set that keeps pixels as PNG files, which lose nothing."""

    def __init__(self, data: Any):
        self._data = data

    def __call__(self, number: int) -> bytes:
        image = self._data[number][0]
        if not isinstance(image, Image.Image):
            raise BrokenImage(f"torchvision gives no image but a {type(image).__name__}")
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
