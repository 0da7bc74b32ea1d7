"""What the changes of color are: constants, their order, and the values that leave a crop as it is.

Two arrangements of the same arithmetic follow them: photometric.py (any torch device) and photometric_cpu.py.
"""

import itertools

from glsd.batches import PHOTOMETRIC_FIELDS

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, in 0..1, as the published backbones expect
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601: the gray of an RGB pixel
# What counts as >= 128 after rounding to 0..255: values are not rounded here.
SOLARIZE_THRESHOLD = 127.5 / 255

# The value of a column that leaves the crop as it is.
NEUTRAL = {
    name: 1.0 if name in ("brightness", "contrast", "saturation") else 0.0 for name in PHOTOMETRIC_FIELDS
}
COLUMN = {name: column for column, name in enumerate(PHOTOMETRIC_FIELDS)}

JITTERS = ("brightness", "contrast", "saturation", "hue")
AFTER_JITTERS = ("grayscale", "blur_sigma", "solarize")
ORDERS = tuple(itertools.permutations(JITTERS))
