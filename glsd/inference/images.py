"""What a user may hand over as images: folders, list files, shards, paths, pictures or arrays."""

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from glsd.data.decode import decode
from glsd.data.transform import as_pixels
from glsd.errors import BrokenImage, UserError, one_line
from glsd.files import expand
from glsd.packing.folder import find_images
from glsd.packing.labels import number_labels
from glsd.packing.lists import PARQUET, SEPARATORS, declared_classes, list_columns, read_lists
from glsd.packing.source import FileReader, check_regular
from glsd.shards.labels import CLASSES_FILE, read_classes
from glsd.shards.remote import identity, is_remote, shown
from glsd.shards.store import ShardSet, open_shards

LISTS = (*SEPARATORS, *PARQUET)  # ends of the names of list files


class Images(NamedTuple):
    """Images by number, with the name of each.

    ``pixels(number)`` returns uint8 RGB (3, h, w) and raises BrokenImage for an image that cannot be read. It goes to worker
    processes. ``labels`` are the class names, or the numbers as text where classes have no names.
    """

    title: str  # what messages call them
    names: Sequence[str]
    pixels: Callable[[int], Tensor]
    labels: Sequence[str | None] | None = None  # None = the source has none
    place: Mapping[str, Any] | None = None  # where they are, for ``open_again``; None = in memory


def as_images(
    images: Any,
    *,
    path_column: str = "path",
    label_column: str | None = None,
    root: str | Path | None = None,
) -> Images:
    """Return the images that ``images`` means.

    Images stay as they are. A folder means every image file below it, sorted by path. A name that ends in .csv, .tsv or
    .parquet means a list of images. A text that ends in .tar, or that is an address, means shards (brace pattern or glob).
    Another text or path means one image file. A list holds several folders, several list files, several shards, or paths,
    Pillow images, arrays (h, w, 3) or tensors (3, h, w), both uint8 RGB. path_column, label_column, root: of list files, as
    ``pack_list`` takes them; label_column None = "label" if there is such a column. Raises UserError for anything else, and for
    a path that does not exist.
    """
    if isinstance(images, Images):
        return images
    if isinstance(images, str | Path | Image.Image) or (
        isinstance(images, np.ndarray | Tensor) and images.ndim == 3
    ):
        images = [images]
    if not isinstance(images, Sequence | np.ndarray | Tensor):
        raise UserError(
            f"images are a {type(images).__name__}: expected a folder, shards, or a list of paths, Pillow images or arrays"
        )
    if not len(images):
        raise UserError("no images: the list is empty")
    kinds = {_kind_of(image) for image in images}
    if len(kinds) > 1 and not kinds <= {"file", "picture"}:
        shown_kinds = " and ".join(sorted(f"{kind}s" for kind in kinds))
        raise UserError(f"images are {shown_kinds}: give one kind, such as one folder that holds them all")
    if kinds == {"folder"}:
        return _folders([Path(image) for image in images])
    if kinds == {"list"}:
        return _lists([Path(image) for image in images], path_column, label_column, root)
    if kinds == {"shard"}:
        return from_shards([str(image) for image in images])
    return _given(images, kinds == {"file"})


def open_again(place: Mapping[str, Any]) -> Callable[[int, str], Tensor]:
    """Return a function (number, name) -> pixels of the images that were found at a place before.

    It raises BrokenImage for an image that is not there any more. Raises UserError if the place itself is gone.
    """
    if place["kind"] == "files":
        root = Path(place["root"])
        return lambda number, name: _Read(FileReader(root, [name]))(0)
    images = (
        from_shards(place["shards"])
        if place["kind"] == "shards"
        else _lists([Path(file) for file in place["lists"]], place["column"], "", None)
    )

    def pixels(number: int, name: str) -> Tensor:
        if number >= len(images.names) or images.names[number] != name:
            raise BrokenImage("it is not there any more")
        return images.pixels(number)

    return pixels


def digest_of(images: Images) -> str:
    """Return a hash of where the images are, of their names and labels, and of the sizes and times of the files.

    Raises UserError for images in memory.
    """
    if images.place is None:
        raise UserError(f"{images.title}: expected image files, lists or shards, not pictures in memory")
    digest = hashlib.sha256(images.place["kind"].encode())
    if isinstance(images.names, _Keys):
        digest.update(images.names.shards.digest().encode())
        return digest.hexdigest()
    files: Sequence[str] = images.names
    if images.place["kind"] == "rows":
        files = images.place["lists"]
    for name in files:
        path = os.path.join(images.place.get("root", ""), name)
        digest.update(f"{path}\0{_stamp(path)}\n".encode(errors="surrogateescape"))
    for name, label in zip(images.names, images.labels or [None] * len(images.names), strict=True):
        digest.update(f"{name}\0{label}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _stamp(path: str) -> str:
    try:
        status = os.stat(path)
    except (OSError, ValueError):  # ValueError: a null character
        return "missing"
    return f"{status.st_size} {status.st_mtime_ns}"


def _kind_of(image: Any) -> str:
    if not isinstance(image, str | Path):
        return "picture"
    text = str(image)
    if Path(image).is_dir():
        return "folder"
    if text.lower().endswith(LISTS) and not is_remote(text):
        return "list"
    return "shard" if text.endswith(".tar") or is_remote(text) else "file"


def _folders(paths: list[Path]) -> Images:
    if len(paths) == 1:
        found = find_images(paths[0]).images
        names = [name.as_posix() for name in found]
        inside = all(len(name.parts) > 1 for name in found)
        labels = [name.parts[0] for name in found] if inside else None
        return _files(str(paths[0]), names, paths[0].absolute(), labels)
    real = [Path(os.path.realpath(path)) for path in paths]
    for one, path in zip(real, paths, strict=True):
        if sum(other == one or other in one.parents for other in real) > 1:
            raise UserError(
                f"folder {path} is given twice, or lies in another one that is given: name it once"
            )
    names = [(path / name).as_posix() for path in paths for name in find_images(path).images]
    return _files(f"{len(paths)} folders", names, Path.cwd(), None)


def _files(title: str, names: Sequence[str], root: Path, labels: Sequence[str | None] | None) -> Images:
    place = {"kind": "files", "root": str(root)}
    return Images(title, names, _Read(FileReader(root, names)), labels, place)


def _lists(files: list[Path], path_column: str, label_column: str | None, root: str | Path | None) -> Images:
    if label_column is None:
        label_column = "label" if "label" in list_columns(files[0], path_column) else ""
    rows = read_lists(files, path_column, label_column)
    title = ", ".join(map(str, files))
    labels = None
    if label_column and any(rows.labels):
        numbered = number_labels(rows.labels, declared_classes(rows), dst=None, title=title, classes=None)
        labels = [None if n < 0 else _class_name(str(n), numbered.classes) for n in numbered.labels]
    folder = Path(root) if root is not None else files[0].parent
    if not rows.groups:
        return _files(title, rows.names, folder.absolute(), labels)
    place = {"kind": "rows", "lists": [str(file.absolute()) for file in files], "column": path_column}
    return Images(title, rows.names, _Read(rows.reader(path_column, folder)), labels, place)


def _class_name(text: str | None, names: Sequence[str]) -> str | None:
    number = int(text) if text is not None and text.isdecimal() and text.isascii() else -1
    return names[number] if 0 <= number < len(names) else text


def from_shards(patterns: list[str]) -> Images:
    """Return the images of shards. Raises UserError if there are none."""
    shards = open_shards(patterns)
    title = ", ".join(map(shown, patterns))
    if not len(shards):
        raise UserError(f"{title}: no images in these shards")
    where = [identity(x) if is_remote(x) else os.path.abspath(expand(x)) for x in patterns]
    labels = shards.labels()
    named = _Labels(labels, shards) if (labels >= 0).any() else None
    return Images(title, _Keys(shards), _Read(shards.read), named, {"kind": "shards", "shards": where})


def _given(images: Any, are_files: bool) -> Images:
    names = [
        str(image) if isinstance(image, str | Path) else str(number) for number, image in enumerate(images)
    ]
    absent = next(
        (i for i, x in enumerate(images) if isinstance(x, str | Path) and not Path(x).exists()), None
    )
    if absent is not None:
        raise UserError(f"image {names[absent]}: no such file")
    title = names[0] if are_files and len(names) == 1 else f"{len(names)} images"
    if are_files:
        return _files(title, names, Path.cwd(), None)
    return Images(title, names, _Given(images))


class _Keys(Sequence):
    """The keys of the samples of shards, read when they are asked for."""

    def __init__(self, shards: ShardSet):
        self.shards = shards

    def __len__(self) -> int:
        return len(self.shards)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self.shards.key(i) for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self.shards.key(number)


class _Labels(Sequence):
    """The class names of the samples of shards: each shard has the names of the classes.json in its own folder."""

    def __init__(self, labels: np.ndarray, shards: ShardSet):
        self._labels = labels
        self._ends = np.cumsum(shards.shard_sizes)
        of_folder: dict[str, list[str]] = {}
        self._names: list[list[str]] = []
        for path in shards.paths:
            folder = path.rpartition("/")[0]
            if folder not in of_folder:
                file = os.path.join(folder, CLASSES_FILE)
                # Names on a server would cost a request, perhaps one that is forbidden.
                of_folder[folder] = read_classes(file) if not is_remote(path) and os.path.isfile(file) else []
            self._names.append(of_folder[folder])

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, number: Any) -> Any:
        label = int(self._labels[number])
        names = self._names[int(np.searchsorted(self._ends, number, side="right"))]
        return None if label < 0 else _class_name(str(label), names)

    def __iter__(self) -> Iterator[str | None]:
        return (self[number] for number in range(len(self)))


class _Read:
    """Decodes what a reader returns by number."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def __call__(self, number: int) -> Tensor:
        try:
            return decode(self._read(number))
        except (OSError, ValueError) as error:  # ValueError: a null character in a path
            raise BrokenImage(f"cannot be read: {one_line(error)}") from error


class _Given:
    """Images that the caller holds, or names one by one."""

    def __init__(self, images: Any):
        self._images = images

    def __call__(self, number: int) -> Tensor:
        image = self._images[number]
        if not isinstance(image, str | Path):
            return as_pixels(image)
        try:
            check_regular(Path(image))
            return decode(Path(image).read_bytes())
        except OSError as error:
            raise BrokenImage(f"cannot be read: {one_line(error)}") from error
