"""The changes of color on the CPU, one crop after the other with OpenCV: the same arithmetic as photometric.py, in fewer passes.

What makes it fast: brightness, contrast, saturation, gray and normalization are matrices, and matrices that follow each other
are one; a change by a factor of at most 1 stays within 0..255, so only those above 1 need their values made and clamped; a blur
with weights that add up to 1 may trade places with a matrix, and stops where its weights do; crops stay in the cache.
"""

import math
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from glsd.data.colors import (
    AFTER_JITTERS,
    COLUMN,
    JITTERS,
    LUMA,
    MEAN,
    NEUTRAL,
    ORDERS,
    STD,
)
from glsd.data.opencv import single_threaded

# A color change is 4 x 4 on (red, green, blue, 1), values in 0..255; OpenCV takes its first three rows.
UNCHANGED = np.eye(4)
GRAY = np.array([[*LUMA, 0], [*LUMA, 0], [*LUMA, 0], [0, 0, 0, 1]])
NORMALIZE = np.diag([*(1 / (255 * s) for s in STD), 1])
NORMALIZE[:3, 3] = [-m / s for m, s in zip(MEAN, STD, strict=True)]
# v >= 127.5 ? 255 - v : v is a fold: 127.5 - |v - 127.5|.
MIDDLE = 127.5
AFTER_FOLD = np.diag([-1.0, -1, -1, 1])
AFTER_FOLD[:3, 3] = MIDDLE
# Beyond this many sigma lie less than 1e-5 of a Gaussian.
REACH = 4.5


def photometric_cpu(
    crops: UInt8[Tensor, "m 3 h w"], parameters: Float32[Tensor, "m f"]
) -> Float32[Tensor, "m 3 h w"]:
    """Return what photometric() defines, for crops on the CPU; within 1e-4 of the other arrangement (normalized values).

    Each result depends on its crop and parameters alone; as many crops at a time as torch may use threads.
    """
    into = np.empty(
        tuple(crops.shape), dtype=np.float32
    )  # numpy asks for huge pages, which halves the time of large batches
    pixels, rows = crops.numpy(), parameters.tolist()
    threads = min(torch.get_num_threads(), len(rows))

    def one(number: int) -> None:
        _change(pixels[number], dict(zip(COLUMN, rows[number], strict=True)), into[number])

    if into.size:
        with single_threaded():
            if threads == 1:
                for number in range(len(rows)):
                    one(number)
            else:
                with ThreadPoolExecutor(threads) as pool:
                    list(pool.map(one, range(len(rows))))
    return torch.from_numpy(into)


def _change(
    crop: UInt8[np.ndarray, "3 h w"], values: dict[str, float], into: Float32[np.ndarray, "3 h w"]
) -> None:
    jitters = ORDERS[int(values["jitter_order"])]
    asked = [name for name in (*jitters, *AFTER_JITTERS) if values[name] != NEUTRAL[name]]
    x = cv2.merge(tuple(crop))  # h w 3
    pending = UNCHANGED  # of the changes so far, what is not yet in x
    for name in asked:
        if name == "hue":
            x, pending = _hue(_made(x, pending), values[name]), UNCHANGED
        elif name in JITTERS:
            pending = MATRICES[name](x, pending, values[name]) @ pending
            if values[name] > 1:
                x, pending = _made(x, pending), UNCHANGED
                np.clip(x, 0, 255, out=x)
    if "grayscale" in asked:
        pending = GRAY @ pending
        x, pending = _made(x, pending[:1]), UNCHANGED
    x = x.astype(np.float32, copy=False)
    if "blur_sigma" in asked:
        x = _blur(x, values["blur_sigma"])
    if "solarize" in asked:
        x = _made(x, pending) if pending is not UNCHANGED else x
        x -= MIDDLE
        np.abs(x, out=x)
        pending = AFTER_FOLD
    _finish(x, NORMALIZE @ pending, into)


def _brightness(x: np.ndarray, pending: np.ndarray, factor: float) -> np.ndarray:
    return np.diag([factor, factor, factor, 1])


def _contrast(x: np.ndarray, pending: np.ndarray, factor: float) -> np.ndarray:
    mean = np.array([*cv2.mean(x)[:3], 1])
    matrix = np.diag([factor, factor, factor, 1])
    matrix[:3, 3] = (1 - factor) * (GRAY[0] @ pending @ mean)
    return matrix


def _saturation(x: np.ndarray, pending: np.ndarray, factor: float) -> np.ndarray:
    return factor * UNCHANGED + (1 - factor) * GRAY


# Jitters that are matrices, from the crop, what is pending on it, and the factor.
MATRICES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation}


def _made(x: np.ndarray, pending: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Return the values that ``pending`` makes of x; a matrix of one row makes one channel, without an axis for it."""
    x = x.astype(np.float32, copy=False)
    return x if pending is UNCHANGED else cv2.transform(x, pending[:3].astype(np.float32))


def _hue(x: Float32[np.ndarray, "h w 3"], turns: float) -> Float32[np.ndarray, "h w 3"]:
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV, dst=x)  # hue in degrees
    turn = np.eye(3, 4, dtype=np.float32)
    turn[0, 3] = turns % 1 * 360  # OpenCV reads degrees above 360 well, and those below 0 wrongly
    return cv2.cvtColor(cv2.transform(hsv, turn), cv2.COLOR_HSV2RGB)


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    kernel = cv2.getGaussianKernel(2 * math.ceil(REACH * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(x, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def _finish(x: np.ndarray, matrix: np.ndarray, into: Float32[np.ndarray, "3 h w"]) -> None:
    """Write the last matrix of x, channel by channel; of a gray x its diagonal and offsets."""
    if x.ndim == 3:
        cv2.split(cv2.transform(x, matrix[:3].astype(np.float32)), list(into))
        return
    for channel, plane in enumerate(into):
        np.multiply(x, np.float32(matrix[channel, channel]), out=plane)
        plane += np.float32(matrix[channel, 3])
