"""Colors: both implementations against torchvision, Pillow, literal formulas, one crop at a time, and each other."""

import colorsys
import itertools
import math
import tarfile

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms.v2 import functional as tvf

from glsd.batches import PHOTOMETRIC_FIELDS
from glsd.data import photometric as module
from glsd.data.crops import crop_sample, draw
from glsd.data.photometric import (
    MEAN,
    STD,
    gaussian_matrix,
    normalize,
    photometric,
    photometric_cpu,
    photometric_torch,
    plan,
)
from tests.helpers.usual_spec import usual_spec

NEUTRAL = [1.0, 1, 1, 0, 0, 0, 0, 0]
JITTERS = ("brightness", "contrast", "saturation", "hue")


@pytest.fixture(params=["opencv", "torch"], autouse=True)
def implementation(request, monkeypatch):
    """Run every test with the implementation of the CPU and with that of other devices."""
    if request.param == "torch":
        monkeypatch.setattr(module, "photometric_cpu", photometric_torch)


@pytest.fixture
def _threads_of_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def pictures(count: int, size: int = 32, seed: int = 0) -> torch.Tensor:
    """Random colored pictures with smooth parts, pure colors, black, white and gray."""
    rng = torch.Generator().manual_seed(seed)
    small = torch.rand(count, 3, 6, 6, generator=rng)
    images = F.interpolate(small, size=(size, size), mode="bicubic").mul(1.4).sub(0.2).clamp(0, 1)
    images[:, :, :4, :12] = torch.tensor([0.0, 0.0, 0.0, 1.0]).repeat(3)
    images[:, 0, 4:8, :12] = 1
    return (images * 255).round().to(torch.uint8)


def settings(count: int, **columns: float | list[float]) -> torch.Tensor:
    parameters = torch.tensor(NEUTRAL).repeat(count, 1)
    for name, value in columns.items():
        parameters[:, PHOTOMETRIC_FIELDS.index(name)] = torch.tensor(value)
    return parameters


def drawn(count: int, num_local: int = 8) -> torch.Tensor:
    spec = usual_spec(num_local=num_local)
    return torch.cat(
        [draw(spec, height=9, width=9, seed=0, epoch=0, position=i).photometric for i in range(count)]
    )


def shown(crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """The changed crops before normalization, 0..1."""
    return photometric(crops, parameters) * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)


def one_by_one(crops: torch.Tensor, parameters: torch.Tensor) -> torch.Tensor:
    """The same chain with torchvision's operations on one float crop at a time, and the blur written out."""
    results = []
    for crop, row in zip(crops, parameters.tolist(), strict=True):
        values = dict(zip(PHOTOMETRIC_FIELDS, row, strict=True))
        x = crop.double() / 255
        order = list(itertools.permutations(JITTERS))[int(values["jitter_order"])]
        for name in order:
            x = getattr(tvf, f"adjust_{name}")(x, values[name])
        if values["grayscale"]:
            x = tvf.rgb_to_grayscale(x, num_output_channels=3)
        if values["blur_sigma"]:
            x = blur_by_convolution(x, values["blur_sigma"])
        if values["solarize"]:
            x = torch.where((x * 255).round() >= 128, 1 - x, x)
        results.append(tvf.normalize(x, list(MEAN), list(STD)))
    return torch.stack(results)


def blur_by_convolution(x: torch.Tensor, sigma: float) -> torch.Tensor:
    reach = math.ceil(8 * sigma)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=x.dtype) / sigma) ** 2)
    kernel = kernel / kernel.sum()
    padded = F.pad(x[None], (reach,) * 4, mode="replicate")[0][:, None]
    return F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])[:, 0]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
@pytest.mark.parametrize("factor", [0.0, 0.3, 0.6, 1.4, 2.5])
def test_factors_are_torchvisions(name, factor):
    crops = pictures(5)
    expected = getattr(tvf, f"adjust_{name}")(crops.float() / 255, factor)
    # torchvision's gray weights add up to 0.9999.
    assert torch.allclose(shown(crops, settings(5, **{name: factor})), expected, atol=4e-4)


@pytest.mark.parametrize("shift", [-0.5, -0.1, -0.01, 0.05, 0.1, 0.3, 0.5])
def test_hue_is_torchvisions_and_the_standard_librarys(shift):
    crops = pictures(5)
    ours = shown(crops, settings(5, hue=shift))
    assert torch.allclose(ours, tvf.adjust_hue(crops.float() / 255, shift), atol=2e-5)
    for pixel, changed in zip(crops[0].flatten(1).T[::7], ours[0].flatten(1).T[::7], strict=True):
        h, s, v = colorsys.rgb_to_hsv(*(pixel / 255).tolist())
        assert torch.allclose(changed, torch.tensor(colorsys.hsv_to_rgb((h + shift) % 1, s, v)), atol=2e-5)


def test_hue_properties():
    crops = pictures(3)
    x = crops / 255
    module.hue(x, torch.full((3, 1, 1, 1), 1 / 3))  # in place
    # A third of a turn exchanges the channels: red becomes green, green blue, blue red.
    assert torch.allclose(x, (crops / 255)[:, [2, 0, 1]], atol=2e-5)
    gray = crops[:, :1].repeat(1, 3, 1, 1)
    assert torch.allclose(shown(gray, settings(3, hue=0.2)), gray / 255, atol=1e-6)


def test_gray_is_the_luma_of_itu_601():
    crops = pictures(4)
    ours = shown(crops, settings(4, grayscale=1.0))
    x = crops / 255
    expected = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    assert torch.allclose(ours, expected[:, None].expand_as(ours), atol=1e-6)
    for crop, gray in zip(crops, ours, strict=True):
        pillow = np.asarray(Image.fromarray(crop.permute(1, 2, 0).numpy()).convert("L")).astype(float)
        assert np.abs(gray[0].numpy() * 255 - pillow).max() <= 1


def test_solarize_inverts_from_128_on():
    crops = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    ours = shown(crops, settings(1, solarize=1.0)) * 255
    pillow = np.asarray(ImageOps.solarize(Image.fromarray(crops[0, 0].numpy())))
    assert np.abs(ours[0, 0].numpy() - pillow).max() < 1e-3


@pytest.mark.parametrize(
    ("sigma", "size"),
    [(0.1, 32), (0.3, 32), (0.5, 32), (1.0, 32), (2.0, 32), (5.0, 32), (0.1, 5), (0.8, 5), (2.0, 12)],
)
def test_blur_is_a_convolution_with_a_gaussian(sigma, size):
    crops = pictures(3, size=32)[..., :size, :size]
    expected = torch.stack([blur_by_convolution(crop.double() / 255, sigma) for crop in crops]).float()
    ours = shown(crops, settings(3, blur_sigma=sigma))
    assert torch.allclose(ours, expected, atol=1e-5)


def test_blur_is_torchvisions_away_from_the_border_and_close_to_pillows():
    crops = pictures(4, size=64)
    for sigma in (0.5, 1.0, 2.0):
        ours = shown(crops, settings(4, blur_sigma=sigma))
        theirs = tvf.gaussian_blur(crops.float() / 255, [33, 33], [sigma, sigma])
        assert torch.allclose(ours[..., 16:-16, 16:-16], theirs[..., 16:-16, 16:-16], atol=1e-5)
        for crop, blurred in zip(crops, ours, strict=True):
            pillow = Image.fromarray(crop.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(sigma))
            # Pillow stacks box filters and rounds between them.
            difference = blurred.permute(1, 2, 0).numpy() * 255 - np.asarray(pillow).astype(float)
            assert np.abs(difference).mean() < 1.0
            assert np.abs(difference).max() < 16


def test_blur_matrices():
    sigma = torch.tensor([0.1, 0.7, 2.0]).view(3, 1, 1, 1)
    matrix = gaussian_matrix(sigma, 20)
    assert torch.allclose(matrix.sum(-1), torch.ones(3, 1, 20), atol=1e-6)
    assert torch.allclose(matrix.flip(-1, -2), matrix, atol=1e-7)
    assert torch.allclose(matrix[0, 0], torch.eye(20), atol=1e-6)
    assert (matrix >= 0).all()
    # No denormal numbers: they would slow the product down by orders of magnitude.
    assert matrix[matrix > 0].min() > torch.finfo(torch.float32).tiny
    variance = (matrix[2, 0, 10] * (torch.arange(20) - 10) ** 2).sum()
    assert variance.item() == pytest.approx(4.0, rel=1e-3)


def test_every_order_of_jitters():
    crops = pictures(1).repeat(24, 1, 1, 1)
    strong = {"brightness": 1.4, "contrast": 0.6, "saturation": 1.8, "hue": 0.1}
    parameters = settings(24, jitter_order=[float(i) for i in range(24)], **strong)
    ours, expected = photometric(crops, parameters), one_by_one(crops, parameters).float()
    assert torch.allclose(ours, expected, atol=3e-3)
    distances = (expected[:, None] - expected).abs().amax((2, 3, 4)) + torch.eye(24)
    assert (distances > 6e-3).float().mean() > 0.9  # the orders differ, so the comparison above can fail


@pytest.mark.parametrize("size", [32, 33])
def test_drawn_parameters_give_what_one_crop_at_a_time_gives(size):
    parameters = drawn(12, num_local=2)
    crops = pictures(len(parameters), size=size)
    ours, expected = photometric(crops, parameters), one_by_one(crops, parameters).float()
    unsure = ((ours - expected).abs() > 5e-3).float().mean()
    # Solarize jumps at its threshold: there a rounding error may flip a pixel.
    assert unsure < 1e-3
    jumping = parameters[:, PHOTOMETRIC_FIELDS.index("solarize")] > 0
    assert torch.allclose(ours[~jumping], expected[~jumping], atol=5e-3)
    assert jumping.any()


def test_neutral_parameters_only_normalize():
    crops = pictures(3)
    assert plan(settings(3)) == []
    expected = tvf.normalize(crops.float() / 255, list(MEAN), list(STD))
    assert torch.allclose(photometric(crops, settings(3)), expected, atol=1e-6)


def test_a_crop_does_not_depend_on_the_batch():
    parameters = drawn(4)
    crops = pictures(len(parameters))
    together = photometric(crops, parameters)
    alone = torch.cat([photometric(crops[i : i + 1], parameters[i : i + 1]) for i in range(len(crops))])
    assert torch.allclose(together, alone, atol=1e-5)
    shuffle = torch.randperm(len(crops), generator=torch.Generator().manual_seed(0))
    assert torch.allclose(photometric(crops[shuffle], parameters[shuffle]), together[shuffle], atol=1e-5)


@pytest.mark.parametrize(
    ("height", "width"), [(32, 32), (33, 47), (1, 1), (1, 40), (40, 1), (2, 3), (96, 96)]
)
def test_the_two_implementations_agree(height, width):
    """Normalized values; the blur differs most, because the CPU cuts its tails."""
    parameters = drawn(20)
    crops = pictures(len(parameters), size=96)[..., :height, :width]
    ours, theirs = photometric_cpu(crops, parameters), photometric_torch(crops, parameters)
    assert (ours - theirs).abs().max() < 5e-5
    # Among them are crops of every kind: the comparison would notice if a change were left out.
    assert (parameters != torch.tensor(NEUTRAL)).any(0).all()


@pytest.mark.parametrize("order", range(24))
def test_the_two_implementations_agree_beyond_the_usual_strengths(order):
    """Factors from 0 to 3 and whole turns of the hue: with clamps that act and clamps that do not, before and after each."""
    rng = torch.Generator().manual_seed(order)
    parameters = torch.rand(60, len(PHOTOMETRIC_FIELDS), generator=rng)
    parameters[:, :3] *= 3
    parameters[:, 3] -= 0.5
    parameters[:, 4] = order
    parameters[:, 5] = (parameters[:, 5] < 0.3).float()
    parameters[:, 6] = torch.where(parameters[:, 6] < 0.5, 0.0, 3 * parameters[:, 6])
    parameters[:, 7] = (parameters[:, 7] < 0.5).float()
    neutral = torch.rand(60, len(PHOTOMETRIC_FIELDS), generator=rng) < 0.25
    neutral[:, 4] = False
    parameters = torch.where(neutral, torch.tensor(NEUTRAL), parameters)
    crops = pictures(60, size=24, seed=order)
    assert (photometric_cpu(crops, parameters) - photometric_torch(crops, parameters)).abs().max() < 2e-4


@pytest.mark.usefixtures("_threads_of_before")
def test_neither_threads_nor_batch_change_a_bit_on_the_cpu():
    parameters = drawn(4)
    crops = pictures(len(parameters), size=41)
    torch.set_num_threads(1)
    alone = torch.cat([photometric_cpu(crops[i : i + 1], parameters[i : i + 1]) for i in range(len(crops))])
    before = cv2.getNumThreads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        assert torch.equal(photometric_cpu(crops, parameters), alone)
    assert cv2.getNumThreads() == before


def test_mirrored_crops_give_mirrored_results():
    parameters = drawn(2)
    crops = pictures(len(parameters))
    assert torch.allclose(
        photometric(crops.flip(-1), parameters), photometric(crops, parameters).flip(-1), atol=1e-5
    )


def test_inputs_stay_and_runs_repeat():
    parameters, crops = drawn(2), pictures(20)
    before = crops.clone(), parameters.clone()
    first, second = photometric(crops, parameters), photometric(crops, parameters)
    assert torch.equal(first, second)
    assert torch.equal(crops, before[0])
    assert torch.equal(parameters, before[1])
    assert first.dtype == torch.float32
    assert first.isfinite().all()


def test_autocast_does_not_reach_the_colors():
    parameters, crops = drawn(2), pictures(20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = photometric(crops, parameters)
    assert torch.equal(inside, photometric(crops, parameters))


def test_memory_layout_and_odd_shapes():
    parameters = drawn(1)
    crops = pictures(10)[..., :20, :31]
    dense = photometric(crops.contiguous(), parameters)
    assert torch.allclose(photometric(crops, parameters), dense, atol=1e-6)
    channels_last = crops.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(photometric(channels_last, parameters), dense, atol=1e-6)
    assert photometric(crops[:0], parameters[:0]).shape == (0, 3, 20, 31)


def test_the_plan_names_only_what_is_needed():
    parameters = settings(3)
    parameters[1] = torch.tensor([1.2, 1, 1, 0.1, 23, 0, 0, 1])  # the last order: hue first, brightness last
    tasks = plan(parameters)
    assert [(task.change, task.rows) for task in tasks] == [
        ("hue", [1]),
        ("brightness", [1]),
        ("solarize", [1]),
    ]


# What torchvision's operation on a single image makes of it, and the largest difference that its coarser constants
# explain: its gray weights are rounded to four digits and add up to 0.9999.
BLUR_KERNEL = 21  # pixels, 10 sigma to each side
OPERATIONS = {
    "brightness": (1.3, lambda x: tvf.adjust_brightness(x, 1.3), 1e-6),
    "contrast": (0.6, lambda x: tvf.adjust_contrast(x, 0.6), 1e-4),
    "saturation": (1.7, lambda x: tvf.adjust_saturation(x, 1.7), 2e-4),
    "hue": (0.1, lambda x: tvf.adjust_hue(x, 0.1), 1e-5),
    "grayscale": (1.0, lambda x: tvf.rgb_to_grayscale(x, num_output_channels=3), 2e-4),
    "blur_sigma": (1.0, lambda x: tvf.gaussian_blur(x, [BLUR_KERNEL, BLUR_KERNEL], [1.0, 1.0]), 1e-5),
    "solarize": (1.0, lambda x: tvf.solarize(x, 128 / 255), 1e-6),
}


@pytest.fixture(scope="module")
def photo_crops(photos) -> torch.Tensor:
    """Twelve global crops of six photographs."""
    with tarfile.open(photos / "pretrain_caltech101" / "train-000001.tar") as tar:
        raws = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")][:6]  # type: ignore[union-attr]
    spec = usual_spec(num_local=0)
    return torch.cat(
        [crop_sample(raw, spec, seed=0, epoch=0, position=i).global_crops for i, raw in enumerate(raws)]
    )


def moments(image: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"mean": image.mean((1, 2)), "std": image.std((1, 2)), "cov": torch.cov(image.flatten(1))}


@pytest.mark.photos
@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_on_photographs_is_torchvisions_on_one_image(photo_crops, name):
    value, operation, tolerance = OPERATIONS[name]
    ours = shown(photo_crops, settings(len(photo_crops), **{name: value})).double()
    moved = []
    for crop, result in zip(photo_crops, ours, strict=True):
        before = crop.double() / 255
        expected, inside = operation(before), result
        if name == "blur_sigma":  # beyond the border torchvision mirrors the image, we repeat its last pixel
            for moment, want in moments(expected).items():
                assert torch.allclose(moments(result)[moment], want, atol=2e-3), moment
            reach = BLUR_KERNEL // 2
            expected, inside = (x[:, reach:-reach, reach:-reach] for x in (expected, result))
        assert (inside - expected).abs().max() < tolerance
        for moment, want in moments(expected).items():
            assert torch.allclose(moments(inside)[moment], want, rtol=1e-4, atol=tolerance), moment
        moved.append(max((moments(result)[m] - old).abs().max().item() for m, old in moments(before).items()))
    # What it does to the moments of most crops (some photographs are gray) is far more than the tolerance.
    assert sum(move > 10 * tolerance for move in moved) >= 6


@pytest.mark.photos
def test_photographs_look_as_torchvision_makes_them(photos):
    with tarfile.open(photos / "pretrain_caltech101" / "train-000001.tar") as tar:
        raws = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")][:6]  # type: ignore[union-attr]
    spec = usual_spec(num_local=3)
    samples = [crop_sample(raw, spec, seed=0, epoch=0, position=i) for i, raw in enumerate(raws)]
    for field, rows in (("global_crops", slice(0, 2)), ("local_crops", slice(2, None))):
        crops = torch.cat([getattr(sample, field) for sample in samples])
        parameters = torch.cat([sample.photometric[rows] for sample in samples])
        ours, expected = photometric(crops, parameters), one_by_one(crops, parameters).float()
        assert ((ours - expected).abs() > 5e-3).float().mean() < 1e-3
        assert torch.allclose(ours.mean((2, 3)), expected.mean((2, 3)), atol=1e-2)
        assert torch.allclose(ours.std((2, 3)), expected.std((2, 3)), atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_device_gives_what_the_cpu_gives():
    parameters = drawn(4)
    crops = pictures(len(parameters))
    on_device = photometric(crops.cuda(), parameters).cpu()
    on_cpu = photometric_cpu(crops, parameters)
    assert ((on_device - on_cpu).abs() > 2e-3).float().mean() < 1e-3
    crops = crops.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        photometric(crops, parameters)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_normalize_takes_each_channels_mean_and_deviation():
    images = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(2, 3, 1, 1)
    kept = images.clone()
    made = normalize(images)
    expected = (images.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(made, expected.float(), rtol=1e-6, atol=1e-6)
    assert torch.equal(images, kept)
    assert normalize(images[:0]).shape == (0, 3, 16, 16)
