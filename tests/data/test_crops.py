"""Drawing and cutting crops against torchvision, Pillow and literal twins."""

import io
import math
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from glsd.batches import PHOTOMETRIC_FIELDS
from glsd.data.crops import (
    AREA_DRAWS,
    ASPECT_DRAWS,
    DRAWS,
    CropSpec,
    crop_sample,
    crop_uniforms,
    cut,
    draw,
)
from glsd.data.decode import decode
from glsd.errors import BrokenImage, UserError
from glsd.rng import Stream
from tests.helpers.pictures import as_array, encode, picture
from tests.helpers.usual_spec import usual_spec

COLUMN = {name: i for i, name in enumerate(PHOTOMETRIC_FIELDS)}


# ---------------------------------------------------------------------------------------------- draw


def boxes_by_loop(spec: CropSpec, height: int, width: int, key: dict) -> list[list[int]]:
    """Random resized crop written out, one crop and one try at a time, from the same uniform numbers."""
    boxes = []
    for crop, u in enumerate(crop_uniforms(2 + spec.num_local, stream=Stream.CROPS, **key).tolist()):
        low, high = spec.global_scale if crop < 2 else spec.local_scale
        for u_area, u_aspect in zip(u[AREA_DRAWS], u[ASPECT_DRAWS], strict=True):
            area = (low + (high - low) * u_area) * height * width
            aspect = math.exp(math.log(3 / 4) + (math.log(4 / 3) - math.log(3 / 4)) * u_aspect)
            w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < w <= width and 0 < h <= height:
                x, y = int(u[DRAWS["x"]] * (width - w + 1)), int(u[DRAWS["y"]] * (height - h + 1))
                break
        else:
            if width / height < 3 / 4:
                w, h = width, round(width / (3 / 4))
            elif width / height > 4 / 3:
                w, h = round(height * (4 / 3)), height
            else:
                w, h = width, height
            x, y = (width - w) // 2, (height - h) // 2
        boxes.append([x + w, y, x, y + h] if u[DRAWS["flip"]] < spec.flip_prob else [x, y, x + w, y + h])
    return boxes


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (96, 96), (500, 60), (40, 900), (1, 1), (1, 7), (2, 3)]
)
def test_boxes_equal_the_loop(height, width):
    spec = usual_spec(num_local=6)
    for position in range(40):
        key = {"seed": 3, "epoch": 1, "position": position}
        boxes = draw(spec, height=height, width=width, **key).boxes
        assert boxes.tolist() == boxes_by_loop(spec, height, width, key)
        left, right = boxes[:, [0, 2]].amin(1), boxes[:, [0, 2]].amax(1)
        assert (left >= 0).all()
        assert (right <= width).all()
        assert (right - left >= 1).all()
        assert (boxes[:, 1] >= 0).all()
        assert (boxes[:, 3] <= height).all()
        assert (boxes[:, 3] - boxes[:, 1] >= 1).all()


@pytest.mark.slow
@pytest.mark.parametrize(("group", "scale"), [(slice(0, 2), (0.4, 1.0)), (slice(2, None), (0.05, 0.4))])
def test_boxes_are_distributed_as_torchvisions(group, scale):
    height, width = 240, 320
    image = torch.empty(3, height, width, dtype=torch.uint8)
    torch.manual_seed(0)
    theirs = []
    crop = v2.RandomResizedCrop(224, scale=scale)
    for _ in range(4000):
        p = crop.make_params([image])
        theirs.append([p["left"], p["top"], p["left"] + p["width"], p["top"] + p["height"]])
    count = 4000 // len(range(10)[group])
    ours = torch.cat(
        [
            draw(usual_spec(), height=height, width=width, seed=0, epoch=0, position=i).boxes[group]
            for i in range(count)
        ]
    )
    ours = torch.stack([ours[:, [0, 2]].amin(1), ours[:, 1], ours[:, [0, 2]].amax(1), ours[:, 3]], 1)

    def features(boxes):
        w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        center = (boxes[:, :2] + boxes[:, 2:]) / 2
        return torch.stack(
            [w * h / (height * width), (w / h).log(), center[:, 0] / width, center[:, 1] / height], 1
        )

    a, b = features(ours), features(torch.tensor(theirs, dtype=torch.float64))
    # Five standard errors of a difference of means; a tenth for the spread.
    assert ((a.mean(0) - b.mean(0)).abs() < 5 * b.std(0) * math.sqrt(2 / 4000)).all()
    assert ((a.std(0) / b.std(0) - 1).abs() < 0.1).all()


def drawn_parameters(spec: CropSpec, count: int) -> torch.Tensor:
    plans = [draw(spec, height=50, width=60, seed=1, epoch=2, position=i).photometric for i in range(count)]
    return torch.stack(plans)  # (n m f)


@pytest.mark.slow
def test_photometric_rates_and_ranges():
    spec = usual_spec()
    count = 3000
    drawn = drawn_parameters(spec, count)

    def near(share, expected, number):
        assert abs(share - expected) <= 5 * math.sqrt(expected * (1 - expected) / number)

    blurred = (drawn[..., COLUMN["blur_sigma"]] > 0).float().mean(0)
    solarized = drawn[..., COLUMN["solarize"]].mean(0)
    for crop in range(10):
        near(blurred[crop].item(), spec.blur_prob[min(crop, 2)], count)
        near(solarized[crop].item(), spec.solarize_prob[min(crop, 2)], count)
    near(drawn[..., COLUMN["grayscale"]].mean().item(), 0.2, count * 10)
    jittered = drawn[..., COLUMN["brightness"]] != 1
    near(jittered.float().mean().item(), 0.8, count * 10)

    torch.manual_seed(0)
    theirs = torch.tensor([v2_jitter_params() for _ in range(4000)])
    ours = drawn[jittered][:, [COLUMN[n] for n in ("brightness", "contrast", "saturation", "hue")]]
    assert torch.allclose(ours.mean(0), theirs.mean(0), atol=0.02)
    assert torch.allclose(ours.std(0), theirs.std(0), rtol=0.06)
    assert torch.allclose(ours.amin(0), torch.tensor([0.6, 0.6, 0.8, -0.1]), atol=2e-3)
    assert torch.allclose(ours.amax(0), torch.tensor([1.4, 1.4, 1.2, 0.1]), atol=2e-3)
    # The ways to look at a crop are independent of one another: no correlation beyond five standard errors.
    correlation = torch.corrcoef(torch.cat([ours, drawn[jittered][:, [4, 5, 7]]], 1).T) - torch.eye(7)
    assert correlation.abs().max() < 5 / math.sqrt(len(ours)) + 1e-6

    orders = torch.bincount(drawn[jittered][:, COLUMN["jitter_order"]].long(), minlength=24)
    assert len(orders) == 24
    assert ((orders - orders.sum() / 24).abs() < 5 * (orders.sum() / 24).sqrt()).all()
    sigma = drawn[..., 0, COLUMN["blur_sigma"]]
    assert 0.1 <= sigma.min() < 0.12
    assert 1.98 < sigma.max() <= 2.0
    assert abs(sigma.mean().item() - 1.05) < 0.05


def v2_jitter_params() -> list[float]:
    jitter = v2.ColorJitter(0.4, 0.4, 0.2, 0.1)
    p = jitter.make_params([])
    return [p[f"{name}_factor"] for name in ("brightness", "contrast", "saturation", "hue")]


def test_neutral_when_nothing_is_asked_for():
    never = (0.0, 0.0, 0.0)
    spec = usual_spec(
        jitter_prob=0.0, grayscale_prob=0.0, blur_prob=never, solarize_prob=never, flip_prob=0.0
    )
    plan = draw(spec, height=50, width=60, seed=0, epoch=0, position=0)
    assert (plan.photometric == torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])).all()
    assert (plan.boxes[:, 0] < plan.boxes[:, 2]).all()


def test_half_of_the_crops_are_mirrored():
    plans = [draw(usual_spec(), height=50, width=60, seed=0, epoch=0, position=i).boxes for i in range(500)]
    share = (torch.cat(plans)[:, 0] > torch.cat(plans)[:, 2]).double().mean()
    assert abs(share - 0.5) < 5 * 0.5 / math.sqrt(5000)


def test_a_draw_depends_on_its_key_alone():
    def one(seed=5, epoch=2, position=7):
        return crop_uniforms(10, stream=Stream.CROPS, seed=seed, epoch=epoch, position=position)

    reference = one()
    one(position=8)
    np.random.seed(0)
    torch.manual_seed(0)
    assert np.array_equal(one(), reference)
    others = [
        one(seed=6),
        one(epoch=3),
        one(position=8),
        one(seed=2, epoch=5),
        one(epoch=7, position=2),
        one(seed=-5),
    ]
    others += [one(position=2**40 + 7), one(seed=2**63 + 5)]
    for i, other in enumerate(others):
        assert np.abs(other - reference).min() > 0
        assert all(np.abs(other - another).min() > 0 for another in others[:i])
    # The last bits of large keys count too.
    assert not np.array_equal(one(seed=2**63 + 4), one(seed=2**63 + 5))
    assert not np.array_equal(one(position=2**53), one(position=2**53 + 1))


def test_neighboring_positions_are_uncorrelated():
    u = np.stack(
        [crop_uniforms(2, stream=Stream.CROPS, seed=0, epoch=0, position=i).ravel() for i in range(2000)]
    )
    for lag in (1, 2, 8):
        product = ((u[lag:] - 0.5) * (u[:-lag] - 0.5)).mean(0) * 12
        assert np.abs(product).max() < 5 / math.sqrt(2000 - lag)
    between_crops = (u[:, : u.shape[1] // 2] - 0.5) * (u[:, u.shape[1] // 2 :] - 0.5) * 12
    assert np.abs(between_crops.mean(0)).max() < 5 / math.sqrt(2000)


def test_settings_do_not_move_each_others_numbers():
    key = {"height": 50, "width": 60, "seed": 0, "epoch": 0, "position": 3}
    base = draw(usual_spec(), **key)
    fewer = draw(usual_spec(num_local=2), **key)
    assert torch.equal(base.boxes[:4], fewer.boxes)
    assert torch.equal(base.photometric[:4], fewer.photometric)
    sharper = draw(usual_spec(blur_sigma=(0.1, 0.57)), **key).photometric
    changed = (sharper != base.photometric).any(0)
    assert changed.nonzero().flatten().tolist() == [COLUMN["blur_sigma"]]
    assert 0 < sharper[:, COLUMN["blur_sigma"]].max() <= 0.57
    gray = draw(usual_spec(grayscale_prob=1.0, blur_prob=(0.0, 0.0, 0.0)), **key)
    assert torch.equal(base.boxes, gray.boxes)
    assert torch.equal(base.photometric[:, :5], gray.photometric[:, :5])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("global_size", 0),
        ("local_size", -1),
        ("num_local", -1),
        ("global_scale", (0.0, 1.0)),
        ("global_scale", (0.9, 0.4)),
        ("local_scale", (0.1, 1.5)),
        ("jitter_prob", 1.5),
        ("grayscale_prob", float("nan")),
        ("flip_prob", -0.1),
        ("blur_prob", (1.0, 0.1, -0.5)),
        ("blur_sigma", (0.0, 2.0)),
        ("blur_sigma", (2.0, 0.1)),
        ("solarize_prob", (0.0, 2.0, 0.0)),
        ("jitter", (0.4, 0.4, 0.2, 0.6)),
        ("jitter", (0.4, -0.4, 0.2, 0.1)),
    ],
)
def test_wrong_settings_are_named(key, value):
    with pytest.raises(UserError, match=rf"^{key} is .*: expected ") as caught:
        usual_spec(**{key: value})
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------------------------------------- cut


def close_to_pillow(crop: torch.Tensor, pillow: np.ndarray) -> bool:
    """Equal up to rounding but for rare overshoots: the two clip between their passes, and may swap the passes."""
    difference = np.abs(as_array(crop).astype(int) - pillow)
    return difference.mean() < 0.5 and (difference > 2).mean() < 0.02


def test_cut_is_torchvisions_resized_crop():
    image = decode(encode(Image.fromarray(picture(120, 160)), "PNG"))
    boxes = torch.tensor(
        [[0, 0, 160, 120], [10, 20, 150, 100], [30, 5, 70, 60], [159, 119, 160, 120]]
    ).double()
    for size in (96, 32):
        crops = cut(image, boxes, size)
        for crop, (x0, y0, x1, y1) in zip(crops, boxes.long().tolist(), strict=True):
            box = {"top": y0, "left": x0, "height": y1 - y0, "width": x1 - x0}
            bicubic = v2.InterpolationMode.BICUBIC
            theirs = tvf.resized_crop(image, **box, size=[size, size], interpolation=bicubic, antialias=True)
            assert (crop.int() - theirs.int()).abs().max() <= 1
            pillow = Image.fromarray(as_array(image)).crop((x0, y0, x1, y1))
            pillow = pillow.resize((size, size), Image.Resampling.BICUBIC)
            assert close_to_pillow(crop, np.asarray(pillow))


def test_a_swapped_box_is_a_mirrored_crop():
    image = decode(encode(Image.fromarray(picture(120, 160)), "PNG"))
    boxes = torch.tensor([[10.0, 20, 90, 100], [90, 20, 10, 100]]).double()
    crop, mirrored = cut(image, boxes, 64)
    assert torch.equal(mirrored, crop.flip(-1))
    assert not torch.equal(mirrored, crop)


def test_cut_ignores_the_memory_layout():
    image = decode(encode(Image.fromarray(picture()), "PNG"))
    boxes = draw(usual_spec(), height=60, width=80, seed=0, epoch=0, position=0).boxes
    assert torch.equal(cut(image, boxes, 48), cut(image.contiguous(), boxes, 48))


def test_crop_sample_is_a_function_of_its_arguments():
    raw = encode(Image.fromarray(picture()), "JPEG")
    spec = usual_spec(global_size=48, local_size=32, num_local=3)
    key = {"seed": 1, "epoch": 2, "position": 3}
    first, again = (crop_sample(raw, spec, **key) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert first.global_crops.shape == (2, 3, 48, 48)
    assert first.local_crops.shape == (3, 3, 32, 32)
    assert first.boxes.shape == (5, 4)
    assert first.photometric.shape == (5, len(PHOTOMETRIC_FIELDS))
    assert torch.equal(first.local_crops, cut(decode(raw), first.boxes[2:], 32))
    assert crop_sample(raw, usual_spec(num_local=0), **key).local_crops.shape == (0, 3, 96, 96)


def test_one_pixel_images_work():
    raw = encode(Image.fromarray(np.full((1, 1, 3), 200, dtype=np.uint8)), "PNG")
    sample = crop_sample(raw, usual_spec(), seed=0, epoch=0, position=0)
    assert (sample.global_crops == 200).all()
    assert (sample.local_crops == 200).all()


@pytest.mark.photos
def test_photographs_decode_and_cut_as_pillow_does(photos):
    with tarfile.open(photos / "pretrain_caltech101" / "train-000000.tar") as tar:
        raws = [tar.extractfile(m).read() for m in tar if m.name.endswith(".jpg")][:20]  # type: ignore[union-attr]
    spec = usual_spec()
    for position, raw in enumerate(raws):
        pillow = Image.open(io.BytesIO(raw)).convert("RGB")
        assert np.abs(as_array(decode(raw)).astype(int) - np.asarray(pillow)).max() <= 2
        sample = crop_sample(raw, spec, seed=0, epoch=0, position=position)
        for crops, boxes in ((sample.global_crops, sample.boxes[:2]), (sample.local_crops, sample.boxes[2:])):
            for crop, (x0, y0, x1, y1) in zip(crops, boxes.tolist(), strict=True):
                theirs = pillow.crop((min(x0, x1), y0, max(x0, x1), y1))
                theirs = theirs.resize(tuple(crop.shape[1:]), Image.Resampling.BICUBIC)
                if x0 > x1:
                    theirs = theirs.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                assert close_to_pillow(crop, np.asarray(theirs))
        assert any(x0 > x1 for x0, _, x1, _ in sample.boxes.tolist())
        with pytest.raises(BrokenImage):
            crop_sample(raw[: len(raw) // 2], spec, seed=0, epoch=0, position=position)
