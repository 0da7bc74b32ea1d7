"""What a user may hand over as images: a folder, a list file, shards, paths, pictures or arrays."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from glsd.data.decode import decode
from glsd.data.transform import as_pixels
from glsd.errors import BrokenImage, UserError, one_line
from glsd.packing.folder import find_images
from glsd.packing.source import FileReader, check_regular
from glsd.shards.remote import is_remote
from glsd.shards.store import open_shards


class Images(NamedTuple):
    """Images by number, with the name of each.

    ``pixels(number)`` returns uint8 RGB (3, h, w) and raises BrokenImage for an image that cannot be read. It goes to worker
    processes.
    """

    title: str  # what messages call them
    names: Sequence[str]
    pixels: Callable[[int], Tensor]


def as_images(images: Any) -> Images:
    """Return the images that ``images`` means.

    A folder means every image file below it, sorted by path. A text that ends in .tar, or that is an address, means shards
    (brace pattern or glob). Another text or path means one image file. A list holds paths, Pillow images, arrays (h, w, 3) or
    tensors (3, h, w), both uint8 RGB. Raises UserError for anything else, and for a path that does not exist.
    """
    if isinstance(images, str | Path):
        path = Path(images)
        if path.is_dir():
            return _folder(path)
        if str(images).endswith(".tar") or is_remote(str(images)):
            return _shards([str(images)])
        images = [images]
    if isinstance(images, Image.Image) or (isinstance(images, np.ndarray | Tensor) and images.ndim == 3):
        images = [images]
    if not isinstance(images, Sequence | np.ndarray | Tensor):
        raise UserError(
            f"images are a {type(images).__name__}: expected a folder, shards, or a list of paths, Pillow images or arrays"
        )
    if not len(images):
        raise UserError("no images: the list is empty")
    if all(isinstance(image, str) and image.endswith(".tar") for image in images):
        return _shards(list(images))
    names = [
        str(image) if isinstance(image, str | Path) else str(number) for number, image in enumerate(images)
    ]
    absent = next(
        (i for i, x in enumerate(images) if isinstance(x, str | Path) and not Path(x).exists()), None
    )
    if absent is not None:
        raise UserError(f"image {names[absent]}: no such file")
    return Images(f"{len(names)} images", names, _Given(images))


def _folder(path: Path) -> Images:
    names = [name.as_posix() for name in find_images(path).images]
    return Images(str(path), names, _Read(FileReader(path, names)))


def _shards(patterns: list[str]) -> Images:
    shards = open_shards(patterns)
    if not len(shards):
        raise UserError(f"{', '.join(patterns)}: no images in these shards")
    return Images(", ".join(patterns), _Keys(shards), _Read(shards.read))


class _Keys(Sequence):
    """The keys of the samples of shards, read when they are asked for."""

    def __init__(self, shards: Any):
        self._shards = shards

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self._shards.key(i) for i in range(*number.indices(len(self)))]
        if not 0 <= number < len(self):
            raise IndexError(number)
        return self._shards.key(number)


class _Read:
    """Decodes what a reader returns by number."""

    def __init__(self, read: Callable[[int], bytes]):
        self._read = read

    def __call__(self, number: int) -> Tensor:
        try:
            return decode(self._read(number))
        except OSError as error:
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
