"""The images of the demo, without a download: scikit-learn's 1,797 scanned digits, each placed on a larger canvas."""

import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image
from sklearn.datasets import load_digits

CANVAS = 20  # pixels
DIGIT_SIDES = (12, 15)  # smallest and largest side of a digit, in pixels
PAPER, INK = 0.1, 0.9  # the same gray levels on all canvases, so that tone tells nothing
NOISE = 0.02  # standard deviation of the paper
NUM_VAL_DIGITS = 597  # the last digits
CANVASES_PER_DIGIT = {"train": 4, "val": 1}


def digit_canvases(split: Literal["train", "val"]) -> Iterator[tuple[bytes, Literal["png"], int]]:
    """Yield (PNG bytes, "png", label 0..9): 4,800 canvases of 1,200 digits for training, or 597 of the other digits.

    Each canvas shows one whole digit in a random size at a random place. The canvases of a split are always the same.
    Source of the scans: UCI optical recognition of handwritten digits, bundled with scikit-learn (BSD).
    """
    digits = load_digits()
    first_val = len(digits.images) - NUM_VAL_DIGITS
    chosen = range(first_val) if split == "train" else range(first_val, len(digits.images))
    rng = np.random.default_rng([0, split == "val"])
    for _ in range(CANVASES_PER_DIGIT[split]):
        for number in chosen:
            file = io.BytesIO()
            Image.fromarray(_compose(digits.images[number] / 16, rng)).save(file, "PNG")
            yield file.getvalue(), "png", int(digits.target[number])


def _compose(digit: Float64[np.ndarray, "8 8"], rng: np.random.Generator) -> UInt8[np.ndarray, "s s 3"]:
    side = int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))
    top, left = rng.integers(0, CANVAS - side + 1, 2)
    canvas = PAPER + rng.normal(0, NOISE, (CANVAS, CANVAS))
    under = canvas[top : top + side, left : left + side]
    under += _enlarge(digit, side) * (INK - under)
    gray = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return np.repeat(gray[:, :, None], 3, axis=2)


def _enlarge(ink: Float64[np.ndarray, "h h"], side: int) -> Float64[np.ndarray, "s s"]:
    image = Image.fromarray((ink * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image) / 255
