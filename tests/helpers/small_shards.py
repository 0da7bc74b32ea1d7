"""Small images, and shards of a few of them."""

import functools
import io
import itertools
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from glsd.packing.write import Sample, pack_samples
from glsd.shards.index import build_index, index_path, write_index

DIGITS = load_digits()


def encoded(image: Image.Image | np.ndarray, kind: str = "JPEG", **options) -> bytes:
    """The file of an image."""
    file = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(file, kind, **options)
    return file.getvalue()


@functools.cache
def noise_image(number: int, kind: str = "JPEG", *, height: int = 30, width: int = 40) -> bytes:
    """The file of an image of noise, another one for each number."""
    return encoded(np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8), kind)


def scene(seed: int, width: int = 96, height: int = 64) -> Image.Image:
    """A picture with large shapes of many colors, another one for each seed."""
    rough = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(rough).resize((width, height), Image.Resampling.BICUBIC)


def digit_sample(number: int) -> Sample:
    """One of scikit-learn's digits as a labeled PNG file of 40 x 40 pixels."""
    pixels = (DIGITS.images[number] * 15.9375).astype(np.uint8).repeat(5, 0).repeat(5, 1)
    return encoded(Image.fromarray(pixels).convert("RGB"), "PNG"), "png", int(DIGITS.target[number])


def pack_digit_classes(folder: Path, *, prefix: str, classes: range, count: int) -> None:
    """Pack ``count`` images of each of some digits, in turn."""
    numbers = {label: np.flatnonzero(DIGITS.target == label) for label in classes}
    chosen = (int(numbers[label][turn]) for turn in range(count) for label in classes)
    pack_samples(map(digit_sample, chosen), folder, prefix=prefix)


def pack_uneven(folder: Path, sizes: Sequence[int], *, side: int) -> str:
    """Write shards of the given sizes into ``folder``, with an index each; return their pattern.

    Keys are 0000, 0001, ... over all shards; the images are noise.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = iter(range(sum(sizes)))
    for shard, size in enumerate(sizes):
        path = folder / f"train-{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for number in itertools.islice(numbers, size):
                raw = noise_image(number, "PNG", height=side, width=side)
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
        write_index(build_index(path), index_path(path), shard_name=path.name)
    return f"{folder}/train-{{000000..{len(sizes) - 1:06d}}}.tar"


def pack_noise(
    parent: Path,
    *sizes: int,
    change: Mapping[int, bytes] | None = None,
    index: bool = True,
    folder: str = "shards",
) -> tuple[str, list[Sample]]:
    """Pack shards of the given sizes into ``parent / folder``; return their pattern and what was packed, in order.

    change: other bytes for some samples, by number.
    """
    packed: list[Sample] = []
    dst = parent / folder
    for shard, size in enumerate(sizes):
        numbers = range(len(packed), len(packed) + size)
        part: list[Sample] = [((change or {}).get(n, noise_image(n)), "jpg", n % 7) for n in numbers]
        (made,) = pack_samples(part, dst / "work", prefix="s").shards
        os.replace(made, dst / f"s-{shard:06d}.tar")
        sidecar = Path(f"{made}.index")
        if index:
            os.replace(sidecar, dst / f"s-{shard:06d}.tar.index")
        else:
            sidecar.unlink()
        packed += part
    return str(dst / f"s-{{000000..{len(sizes) - 1:06d}}}.tar"), packed


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> Path:
    """Write a tar with members of the given names and contents, all of one kind."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, raw in members:
            header = tarfile.TarInfo(name)
            header.size, header.type = len(raw), kind
            tar.addfile(header, io.BytesIO(raw))
    return path
