"""Shards of a few noise images for the tests of this folder."""

import functools
import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from glsd.packing.write import Sample, pack_samples


@functools.cache
def noise_image(number: int, kind: str = "JPEG") -> bytes:
    """The file of one 40 x 30 image of noise."""
    pixels = np.random.default_rng(number).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


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
