"""Images -> vectors, batch by batch: decoded in worker processes, embedded on one device."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from glsd.data.photometric import normalize
from glsd.data.transform import EvalTransform
from glsd.data.workers import make_loader
from glsd.errors import BrokenImage, UserError
from glsd.inference.images import Images


class Unreadable(NamedTuple):
    """An image that has no vector, and why."""

    number: int
    reason: str


class Vectors(NamedTuple):
    """The vectors of one batch."""

    numbers: Int64[np.ndarray, " m"]  # of the images, ascending
    vectors: Float32[np.ndarray, "m d"]
    unreadable: list[Unreadable]


def embedded(
    images: Images,
    forward: Callable[[Tensor], Tensor],
    transform: EvalTransform,
    *,
    batches: Iterable[list[int]],
    num_workers: int,
    device: torch.device,
    precision: str = "no",
) -> Iterator[Vectors]:
    """Yield the vectors of batches of images, in their order; see batches_of.

    forward: normalized images (b 3 s s) -> vectors (b d), of a network in evaluation mode on ``device``. precision: "no" or
    "bf16" (autocast). Memory is bounded by the batch. Raises UserError for a vector that is not finite, and as the images do.
    """
    loader = make_loader(
        _Squares(images.pixels, transform),
        batches,
        collate=_collate,
        num_workers=num_workers,
        pin_memory=device.type == "cuda",
    )
    for squares, found, unreadable in loader:
        vectors = _forward(forward, squares, device, precision) if found else np.zeros((0, 0), np.float32)
        if not np.isfinite(vectors).all():
            raise UserError(
                f"{images.title}: the network's vectors are not finite: it diverged, take an earlier checkpoint"
            )
        yield Vectors(np.array(found, dtype=np.int64), vectors, unreadable)


def batches_of(numbers: Sequence[int], batch_size: int) -> list[list[int]]:
    """Return the numbers in lists of ``batch_size``, the last one perhaps shorter. Raises UserError for a size below 1."""
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: expected at least 1")
    return [list(numbers[start : start + batch_size]) for start in range(0, len(numbers), batch_size)]


@torch.no_grad()
def _forward(
    forward: Callable[[Tensor], Tensor], squares: Tensor, device: torch.device, precision: str
) -> Float32[np.ndarray, "m d"]:
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        vectors = forward(normalize(squares.to(device, non_blocking=True)))
    return vectors.float().cpu().numpy()


class _Squares:
    """Center squares by number, or why there is none."""

    def __init__(self, pixels: Callable[[int], Tensor], transform: EvalTransform):
        self._pixels, self._transform = pixels, transform

    def __getitem__(self, number: int) -> tuple[int, Tensor | str]:
        try:
            return number, self._transform.square(self._pixels(number))
        except BrokenImage as error:
            return number, str(error)


def _collate(samples: list[tuple[int, Tensor | str]]) -> tuple[Tensor | None, list[int], list[Unreadable]]:
    squares = [square for _, square in samples if isinstance(square, Tensor)]
    found = [number for number, square in samples if isinstance(square, Tensor)]
    unreadable = [Unreadable(number, reason) for number, reason in samples if isinstance(reason, str)]
    return (torch.stack(squares) if squares else None), found, unreadable
