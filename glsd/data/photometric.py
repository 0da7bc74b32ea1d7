"""Jitter, grayscale, blur, solarize, normalize: a whole batch of uint8 crops at once, on its device.

There are two implementations: torch for GPUs, OpenCV for the CPU. The tests compare them.
"""

import itertools
import math
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float32, UInt8
from torch import Tensor

from glsd.batches import PHOTOMETRIC_FIELDS
from glsd.data.workers import single_threaded

MEAN = (0.485, 0.456, 0.406)  # of ImageNet, in 0..1, as the published backbones expect
STD = (0.229, 0.224, 0.225)
LUMA = (0.299, 0.587, 0.114)  # ITU-R 601: the gray of an RGB pixel
# The values that round to 128 or more of 255: here values are not rounded.
SOLARIZE_THRESHOLD = 127.5 / 255

# The value of a column that leaves the crop as it is.
NEUTRAL = {
    name: 1.0 if name in ("brightness", "contrast", "saturation") else 0.0 for name in PHOTOMETRIC_FIELDS
}
COLUMN = {name: column for column, name in enumerate(PHOTOMETRIC_FIELDS)}

JITTERS = ("brightness", "contrast", "saturation", "hue")
AFTER_JITTERS = ("grayscale", "blur_sigma", "solarize")
ORDERS = tuple(itertools.permutations(JITTERS))

# A color change is 4 x 4 on (red, green, blue, 1), values in 0..255; OpenCV takes its first three rows.
UNCHANGED = np.eye(4)
GRAY = np.array([[*LUMA, 0], [*LUMA, 0], [*LUMA, 0], [0, 0, 0, 1]])
NORMALIZE = np.diag([*(1 / (255 * s) for s in STD), 1])
NORMALIZE[:3, 3] = [-m / s for m, s in zip(MEAN, STD, strict=True)]
# Solarize, v >= 127.5 ? 255 - v : v, is a fold: 127.5 - |v - 127.5|.
MIDDLE = 255 * SOLARIZE_THRESHOLD
AFTER_FOLD = np.diag([-1.0, -1, -1, 1])
AFTER_FOLD[:3, 3] = MIDDLE
# Less than 1e-5 of a Gaussian lies beyond this many sigma.
REACH = 4.5


def photometric(
    crops: UInt8[Tensor, "*m 3 h w"], parameters: Float32[Tensor, "*m f"]
) -> Float32[Tensor, "*m 3 h w"]:
    """Return the crops with their colors changed, then normalized with MEAN and STD.

    parameters: columns PHOTOMETRIC_FIELDS, on the CPU. Order: the four jitters in the crop's own order, grayscale, blur
    (sigma in pixels, edges repeated), solarize; in 0..1, not rounded. Source: DINO (arXiv 2104.14294).
    """
    implementation = photometric_cpu if crops.device.type == "cpu" else photometric_torch
    return implementation(crops.flatten(0, -4), parameters.flatten(0, -2)).view(crops.shape)


def photometric_torch(
    crops: UInt8[Tensor, "m 3 h w"], parameters: Float32[Tensor, "m f"]
) -> Float32[Tensor, "m 3 h w"]:
    """Return the crops changed as photometric() says, by torch operations on the whole batch, on its device.

    A change is computed only for the crops that need it. The CPU plans this without waiting for the device.
    """
    with torch.autocast(crops.device.type, enabled=False):
        changed = torch.empty(crops.shape, dtype=torch.float32, device=crops.device)
        torch.div(crops, 255, out=changed)
        _apply(changed, parameters)
        return _standardize(changed)


def normalize(images: UInt8[Tensor, "m 3 h w"]) -> Float32[Tensor, "m 3 h w"]:
    """Return the images in 0..1 minus MEAN, over STD, channel by channel, on their device."""
    return _standardize(images.float().div_(255))


class Task(NamedTuple):
    """One change, and the crops that need it."""

    change: str  # key of CHANGES, column of the parameters
    rows: list[int]


def plan(parameters: Float32[Tensor, "m f"]) -> list[Task]:
    """Return a sequence of changes that gives every crop its jitters in its own order."""
    turns = [*itertools.product(range(len(JITTERS)), JITTERS), *enumerate(AFTER_JITTERS, len(JITTERS))]
    rows: dict[tuple[int, str], list[int]] = {turn: [] for turn in turns}
    for number, row in enumerate(parameters.tolist()):
        mine = (*ORDERS[int(row[COLUMN["jitter_order"]])], *AFTER_JITTERS)
        for turn in enumerate(mine):
            if row[COLUMN[turn[1]]] != NEUTRAL[turn[1]]:
                rows[turn].append(number)
    return [Task(change, numbers) for (_, change), numbers in rows.items() if numbers]


def _apply(x: Float32[Tensor, "m 3 h w"], parameters: Float32[Tensor, "m f"]) -> None:
    tasks = plan(parameters)
    if not tasks:
        return
    # One upload for all index lists, one for all values.
    rows = _upload(torch.tensor([row for task in tasks for row in task.rows]), x.device)
    values = _upload(torch.cat([parameters[task.rows, COLUMN[task.change]] for task in tasks]), x.device)
    start = 0
    for change, numbers in tasks:
        end = start + len(numbers)
        everything = len(numbers) == len(x)
        some = x if everything else x.index_select(0, rows[start:end])
        CHANGES[change](some, values[start:end].view(-1, 1, 1, 1))
        if not everything:
            x.index_copy_(0, rows[start:end], some)
        start = end


def brightness(x: Float32[Tensor, "m 3 h w"], factor: Float32[Tensor, "m 1 1 1"]) -> None:
    """Scale every value."""
    x.mul_(factor).clamp_(0, 1)


def contrast(x: Float32[Tensor, "m 3 h w"], factor: Float32[Tensor, "m 1 1 1"]) -> None:
    """Scale the distance of every value from the mean gray of its crop."""
    mean = _gray(x.mean(dim=(2, 3), keepdim=True))
    x.mul_(factor).add_(mean * (1 - factor)).clamp_(0, 1)


def saturation(x: Float32[Tensor, "m 3 h w"], factor: Float32[Tensor, "m 1 1 1"]) -> None:
    """Scale the distance of every pixel from its own gray."""
    gray = _gray(x)
    x.mul_(factor).add_(gray.mul_(1 - factor)).clamp_(0, 1)


def hue(x: Float32[Tensor, "m 3 h w"], shift: Float32[Tensor, "m 1 1 1"]) -> None:
    """Turn the hue by ``shift`` turns at equal saturation and value (HSV).

    With hue h in 0..6, value v and chroma c, a channel is v - c + c * s(h), where s rises and falls linearly:
    |h - 3| - 1 for red, 2 - |h - 2| for green, 2 - |h - 4| for blue, each clamped to 0..1.
    """
    red, green, blue = x.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    low = torch.minimum(torch.minimum(red, green), blue)
    chroma = high - low
    inverse = chroma.clamp(min=1e-12).reciprocal_()  # gray has no hue: chroma 0 leaves it unchanged
    h = torch.where(high == green, (blue - red).mul_(inverse).add_(2), (red - green).mul_(inverse).add_(4))
    h = torch.where(high == red, (green - blue).mul_(inverse), h).add_(6 * shift[:, 0])
    h.sub_((h * (1 / 6)).floor_(), alpha=6)
    shares = ((h - 3).abs_().sub_(1), (h - 2).abs_().neg_().add_(2), (h - 4).abs_().neg_().add_(2))
    for channel, share in enumerate(shares):
        torch.addcmul(low, chroma, share.clamp_(0, 1), out=x[:, channel])


def grayscale(x: Float32[Tensor, "m 3 h w"], _: Float32[Tensor, "m 1 1 1"]) -> None:
    """Replace every channel by the gray of its pixel."""
    x.copy_(_gray(x).expand_as(x))


def blur(x: Float32[Tensor, "m 3 h w"], sigma: Float32[Tensor, "m 1 1 1"]) -> None:
    """Blur by a Gaussian of ``sigma`` pixels.

    The border pixels repeat beyond the border. A separable filter is one matrix from the left and one from the right: as
    fast as a convolution with one kernel per crop, and the matrix contains the border.
    """
    count, _, height, width = x.shape
    down = gaussian_matrix(sigma, height)[:, 0]
    across = gaussian_matrix(sigma, width)[:, 0]
    rows_done = torch.bmm(x.reshape(count, 3 * height, width), across.mT).view_as(x)
    for channel in range(3):  # one product for all three would copy the matrices
        x[:, channel] = torch.bmm(down, rows_done[:, channel])


def gaussian_matrix(sigma: Float32[Tensor, "m 1 1 1"], size: int) -> Float32[Tensor, "m 1 s s"]:
    """Return the matrices that blur a line of ``size`` pixels whose end pixels repeat forever; rows sum to 1."""
    place = torch.arange(size, device=sigma.device)
    kernel = torch.exp(-0.5 * (place / sigma) ** 2)
    # float32 loses nothing beyond 6 sigma, and the denormal numbers there make CPUs many times slower.
    kernel = torch.where(place > 6 * sigma, 0, kernel)
    beyond = kernel.flip(-1).cumsum(-1).flip(-1)  # the sum at this distance and beyond, on one side
    matrix = kernel[..., 0, (place[:, None] - place).abs()]
    matrix[..., 0] = beyond[..., 0, :]
    matrix[..., -1] = beyond[..., 0, :].flip(-1)
    return matrix / (2 * beyond[..., :1] - kernel[..., :1])


def solarize(x: Float32[Tensor, "m 3 h w"], _: Float32[Tensor, "m 1 1 1"]) -> None:
    """Invert the values that round to 128 or more of 255."""
    torch.where(x >= SOLARIZE_THRESHOLD, 1 - x, x, out=x)


CHANGES = {
    "brightness": brightness,
    "contrast": contrast,
    "saturation": saturation,
    "hue": hue,
    "grayscale": grayscale,
    "blur_sigma": blur,
    "solarize": solarize,
}


def _standardize(x: Float32[Tensor, "m 3 h w"]) -> Float32[Tensor, "m 3 h w"]:
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        x[:, channel].sub_(mean).div_(std)
    return x


def _gray(x: Float32[Tensor, "m 3 h w"]) -> Float32[Tensor, "m 1 h w"]:
    red, green, blue = x.split(1, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def _upload(host: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the device.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host.to(device)


# On the CPU. Why it is fast: brightness, contrast, saturation, gray and normalization are matrices, and successive matrices
# are one. A factor of at most 1 keeps values within 0..255, so only larger factors need a pass that clamps. A blur whose
# weights sum to 1 commutes with a matrix, and its kernel is short. Crops stay in the cache.


def photometric_cpu(
    crops: UInt8[Tensor, "m 3 h w"], parameters: Float32[Tensor, "m f"]
) -> Float32[Tensor, "m 3 h w"]:
    """Return the crops changed as photometric() says, on the CPU, as many at a time as torch has threads."""
    into = np.empty(
        tuple(crops.shape), dtype=np.float32
    )  # in huge pages, which halves the time of large batches
    pixels, rows = crops.numpy(), parameters.tolist()
    threads = min(torch.get_num_threads(), len(rows))

    def one(number: int) -> None:
        _change(pixels[number], dict(zip(COLUMN, rows[number], strict=True)), into[number])

    if into.size:
        with single_threaded(), ThreadPoolExecutor(threads) as pool:
            list(pool.map(one, range(len(rows))))
    return torch.from_numpy(into)


def _change(
    crop: UInt8[np.ndarray, "3 h w"], values: dict[str, float], into: Float32[np.ndarray, "3 h w"]
) -> None:
    jitters = ORDERS[int(values["jitter_order"])]
    asked = [name for name in (*jitters, *AFTER_JITTERS) if values[name] != NEUTRAL[name]]
    x = cv2.merge(tuple(crop))  # h w 3
    pending = UNCHANGED  # the matrix of changes that are not yet applied to x
    for name in asked:
        if name == "hue":
            x, pending = _hue(_applied(x, pending), values[name]), UNCHANGED
        elif name in JITTERS:
            pending = MATRICES[name](x, pending, values[name]) @ pending
            if values[name] > 1:
                x, pending = _applied(x, pending), UNCHANGED
                np.clip(x, 0, 255, out=x)
    if "grayscale" in asked:
        pending = GRAY @ pending
        x, pending = _applied(x, pending[:1]), UNCHANGED
    x = x.astype(np.float32, copy=False)
    if "blur_sigma" in asked:
        x = _blur(x, values["blur_sigma"])
    if "solarize" in asked:
        x = _applied(x, pending)
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


# Jitters that are matrices, made from the crop, its pending matrix, and the factor.
MATRICES = {"brightness": _brightness, "contrast": _contrast, "saturation": _saturation}


def _applied(x: np.ndarray, pending: np.ndarray) -> Float32[np.ndarray, "..."]:
    """Return x with ``pending`` applied; a matrix of one row makes one channel, without an axis for it."""
    x = x.astype(np.float32, copy=False)
    return x if pending is UNCHANGED else cv2.transform(x, pending[:3].astype(np.float32))


def _hue(x: Float32[np.ndarray, "h w 3"], turns: float) -> Float32[np.ndarray, "h w 3"]:
    hsv = cv2.cvtColor(x, cv2.COLOR_RGB2HSV, dst=x)  # hue in degrees
    turn = np.eye(3, 4, dtype=np.float32)
    turn[0, 3] = turns % 1 * 360  # OpenCV accepts degrees above 360, but not below 0
    return cv2.cvtColor(cv2.transform(hsv, turn), cv2.COLOR_HSV2RGB)


def _blur(x: np.ndarray, sigma: float) -> np.ndarray:
    kernel = cv2.getGaussianKernel(2 * math.ceil(REACH * sigma) + 1, sigma, cv2.CV_32F)
    return cv2.sepFilter2D(x, cv2.CV_32F, kernel, kernel, borderType=cv2.BORDER_REPLICATE)


def _finish(x: np.ndarray, matrix: np.ndarray, into: Float32[np.ndarray, "3 h w"]) -> None:
    """Write x with the last matrix applied, channel by channel; a gray x needs its diagonal and offsets only."""
    if x.ndim == 3:
        cv2.split(cv2.transform(x, matrix[:3].astype(np.float32)), list(into))
        return
    for channel, plane in enumerate(into):
        np.multiply(x, np.float32(matrix[channel, channel]), out=plane)
        plane += np.float32(matrix[channel, 3])
