"""Packing data sets that torchvision reads from the disk."""

import inspect
import io
import os
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from glsd.errors import BrokenImage, UserError, one_line, pick
from glsd.packing.labels import number_classes
from glsd.packing.source import FileReader, Source
from glsd.packing.write import PackSummary, pack_sources
from glsd.shards.labels import CLASSES_FILE


class _Layout(NamedTuple):
    """The attributes of a torchvision class that hold what is packed."""

    files: str = ""  # paths, or tuples that begin with one; empty = the set has only pixels
    labels: str = ""  # labels; empty = the second item of those tuples


# Sets of images with one class number each. Sets that unpack to a plain folder are packed as a folder. Sets whose class
# reads a pickle before it knows the checksum are left out.
TORCHVISION_SETS = {
    "CIFAR10": _Layout(labels="targets"),
    "CIFAR100": _Layout(labels="targets"),
    "Country211": _Layout("samples"),
    "DTD": _Layout("_image_files", "_labels"),
    "EuroSAT": _Layout("samples"),
    "FGVCAircraft": _Layout("_image_files", "_labels"),
    "FashionMNIST": _Layout(labels="targets"),
    "Flowers102": _Layout("_image_files", "_labels"),
    "Food101": _Layout("_image_files", "_labels"),
    "GTSRB": _Layout("_samples"),
    "Imagenette": _Layout("_samples"),
    "KMNIST": _Layout(labels="targets"),
    "MNIST": _Layout(labels="targets"),
    "OxfordIIITPet": _Layout("_images", "_labels"),
    "RenderedSST2": _Layout("_samples"),
    "STL10": _Layout(labels="labels"),
    "SUN397": _Layout("_image_files", "_labels"),
    "SVHN": _Layout(labels="labels"),
    "USPS": _Layout(labels="targets"),
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
    """Pack one of TORCHVISION_SETS from ``root``, where torchvision keeps it; ``settings`` as pack_sources.

    Image files are packed as they are; pixels (CIFAR, MNIST, ...) become PNG files. Labels and class names are the set's
    own, or the names are numbered as in pack_folder. split: as torchvision calls it, by default its first choice, mostly
    train, or all for a set without splits; it is also the default ``prefix``.
    Raises UserError for an unknown name or split and for a set that cannot be opened, and as pack_sources does.
    """
    layout = pick(TORCHVISION_SETS, name, "torchvision data set")
    from torchvision import datasets

    make = getattr(datasets, name)
    split, choice = _split(name, make, split)
    try:
        data = make(root=os.fspath(root), download=download, **choice)
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
            f"this version of torchvision lays out {name} differently: write a list and use glsd pack list"
        )
    labels, names = _numbered(labels, names, Path(dst), f"{name} ({split})", classes)
    source = Source(
        title=f"{name} ({split})",
        names=paths or [f"{name}/{split}#{number}" for number in range(count)],
        read=FileReader(Path(root), paths) if paths else PixelReader(data),
        labels=labels if max(labels) >= 0 else None,
        classes=tuple(names),
    )
    prefix = prefix or split
    return pack_sources({prefix: source}, dst, **settings)[prefix]


def _split(name: str, make: Any, split: str | None) -> tuple[str, dict[str, Any]]:
    """Return the split and the class's argument for it: split=..., train=True or False, or none."""
    accepted = inspect.signature(make).parameters
    if "split" in accepted:
        split = split or str(accepted["split"].default)
        return split, {"split": split}
    if "train" in accepted:
        split = split or "train"
        if split not in ("train", "test"):
            raise UserError(f"split {split!r} of {name}: expected train or test")
        return split, {"train": split == "train"}
    if split not in (None, "all"):
        raise UserError(f"split {split!r} of {name}: it has no splits; leave out --split")
    return "all", {}


def _class_names(data: Any) -> list[str]:
    """Return the class names in label order; none if the set has none, or one twice."""
    names = [
        ", ".join(row) if isinstance(row, tuple) else str(row) for row in getattr(data, "classes", None) or ()
    ]
    return names if len(set(names)) == len(names) else []


def _numbered(
    labels: list[int], names: list[str], dst: Path, title: str, classes: str | Path | None
) -> tuple[list[int], list[str]]:
    """Return labels and class names: the set's own, or as ``classes`` or an earlier packing numbers the names."""
    if not names:
        if classes is not None:
            raise UserError(f"--classes {classes}: {title} has no class names, only numbers")
        return labels, names
    if classes is None and not (dst / CLASSES_FILE).is_file():
        return labels, names
    numbers = number_classes(set(names), dst, title, classes)
    return [numbers[names[label]] if label >= 0 else -1 for label in labels], list(numbers)


class PixelReader:
    """Reads the images of a set that keeps pixels, as PNG files."""

    def __init__(self, data: Any):
        self._data = data

    def __call__(self, number: int) -> bytes:
        image = self._data[number][0]
        if not isinstance(image, Image.Image):
            raise BrokenImage(f"torchvision returned a {type(image).__name__}, no image")
        file = io.BytesIO()
        image.save(file, "PNG")
        return file.getvalue()
