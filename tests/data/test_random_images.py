"""300 random files of four writers: their pixels within one of 255 levels, or a reason. Never other pixels."""

import warnings

import numpy as np
import pytest

from glsd.data.decode import decode, read_header
from glsd.errors import BrokenImage
from tests.helpers.image_writers import IMAGEMAGICK, WRITERS

SEED, FILES = 13, 75


@pytest.mark.parametrize("writer", WRITERS)
def test_the_writers_own_pixels_or_a_reason(writer):
    if writer == "ImageMagick" and not IMAGEMAGICK:
        pytest.skip("ImageMagick is not installed (Debian: apt-get install imagemagick)")
    num_read, different, reasons = 0, [], []
    for number in range(FILES):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the writers, about rare settings
            written = WRITERS[writer](np.random.default_rng([SEED, number]))
        try:
            ours = decode(written.raw).permute(1, 2, 0).numpy()
        except BrokenImage as error:
            reasons.append(str(error))
            continue
        header = read_header(written.raw)
        assert sorted((header.height, header.width)) == sorted(ours.shape[:2])
        if written.pixels is None:
            different.append(f"{number}, read though nobody can say how: {written.name}")
        elif ours.shape != written.pixels.shape or np.abs(ours - written.pixels).max() > 1:
            different.append(f"{number}: {written.name}")
        num_read += 1
    assert different == [], f"seed {SEED}"
    assert all(10 < len(reason) < 250 for reason in reasons)
    assert num_read > FILES // 3
