"""Real images that come with a dependency: scikit-learn's 1,797 scanned digits, set on coloured, cluttered canvases."""

import io
from collections.abc import Iterator
from typing import Literal

import numpy as np
from jaxtyping import Float64, UInt8
from PIL import Image
from sklearn.datasets import load_digits

CANVAS = 32  # pixels
DIGIT_SIDES = (22, 28)  # smallest and largest side of the digit on the canvas, in pixels
NUM_CLUTTER = 3  # fragments of other digits on each canvas
TINT = 0.05  # how far the three channels of a colour lie apart
NUM_VAL_DIGITS = 597  # the last ones: other writers than the first 1,200, as the data set was collected
CANVASES_PER_DIGIT = {"train": 4, "val": 1}


def digit_canvases(
    split: Literal["train", "val"], *, seed: int = 0
) -> Iterator[tuple[bytes, Literal["png"], int]]:
    """Yield (PNG bytes, "png", label 0..9): 4,800 canvases of 1,200 digits to train on, or 597 of the other 597.

    Each shows one digit whole and fragments of four digits of the same split, in random colours: raw pixels say little about
    the class. A function of split and seed alone.
    Source of the scans: UCI optical recognition of handwritten digits, bundled with scikit-learn (BSD).
    """
    digits = load_digits()
    first_val = len(digits.images) - NUM_VAL_DIGITS
    chosen = range(first_val) if split == "train" else range(first_val, len(digits.images))
    rng = np.random.default_rng([seed, split == "val"])
    for _ in range(CANVASES_PER_DIGIT[split]):
        for number in chosen:
            others = [digits.images[i] / 16 for i in rng.choice(chosen, NUM_CLUTTER)]
            canvas = _compose(digits.images[number] / 16, others, rng)
            file = io.BytesIO()
            Image.fromarray(canvas).save(file, "PNG")
            yield file.getvalue(), "png", int(digits.target[number])


def _compose(
    digit: Float64[np.ndarray, "8 8"], others: list[Float64[np.ndarray, "8 8"]], rng: np.random.Generator
) -> UInt8[np.ndarray, "s s 3"]:
    paper, ink = _tone(rng, 0.05, 0.3), _tone(rng, 0.7, 0.95)
    canvas = np.tile(paper, (CANVAS, CANVAS, 1)) + rng.normal(0, 0.03, (CANVAS, CANVAS, 3))
    for other in others:
        top, left = rng.integers(0, 5, 2)
        fragment = _enlarge(other[top : top + 4, left : left + 4], int(rng.integers(6, 11)))
        _draw(canvas, fragment, _tone(rng, 0.3, 0.7), rng)
    _draw(canvas, _enlarge(digit, int(rng.integers(DIGIT_SIDES[0], DIGIT_SIDES[1] + 1))), ink, rng)
    return (canvas.clip(0, 1) * 255).round().astype(np.uint8)


def _tone(rng: np.random.Generator, low: float, high: float) -> Float64[np.ndarray, "3"]:
    """Return a gray between low and high with a slight tint."""
    return rng.uniform(low, high) + rng.normal(0, TINT, 3)


def _enlarge(ink: Float64[np.ndarray, "h h"], side: int) -> Float64[np.ndarray, "s s"]:
    image = Image.fromarray((ink * 255).astype(np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(image) / 255


def _draw(
    canvas: Float64[np.ndarray, "s s 3"],
    ink: Float64[np.ndarray, "h h"],
    color: Float64[np.ndarray, "3"],
    rng: np.random.Generator,
) -> None:
    """Blend a shape into the canvas, in place, somewhere it fits whole."""
    top, left = rng.integers(0, CANVAS - len(ink) + 1, 2)
    under = canvas[top : top + len(ink), left : left + len(ink)]
    under += ink[:, :, None] * (color - under)
