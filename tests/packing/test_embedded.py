"""The demo's images: deterministic, the announced number, unseen digits in val, and the digit really on the canvas."""

import io
from collections import Counter
from itertools import islice

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from glsd.packing.embedded import CANVAS, digit_canvases


def test_canvases_are_a_function_of_the_split():
    first, again = (list(islice(digit_canvases("train"), 5)) for _ in range(2))
    assert first == again
    assert first != list(islice(digit_canvases("val"), 5))


def test_numbers_labels_and_format():
    val = list(digit_canvases("val"))
    labels = [label for _, _, label in val]
    assert len(val) == 597
    assert labels == load_digits().target[-597:].tolist()
    assert min(Counter(labels).values()) > 40
    for raw, extension, _ in val[:10]:
        image = Image.open(io.BytesIO(raw))
        assert (extension, image.mode, image.size) == ("png", "RGB", (CANVAS, CANVAS))


def test_canvases_of_one_digit_differ_in_place():
    train = list(digit_canvases("train"))
    assert len(train) == 4800
    same_digit = [np.asarray(Image.open(io.BytesIO(train[i][0]))) for i in (0, 1200, 2400, 3600)]
    boxes = set()
    for canvas in same_digit:
        rows, columns = np.nonzero(canvas[:, :, 0] > 128)
        boxes.add((rows.min(), rows.max(), columns.min(), columns.max()))
    assert len(boxes) > 1
    assert len({train[i][2] for i in (0, 1200, 2400, 3600)}) == 1
