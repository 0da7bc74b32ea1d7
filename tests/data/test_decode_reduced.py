"""Decoding at a reduced size: pixels whose color tells their place show that boxes and pixels agree."""

import io
import math
import struct

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from glsd.data.crops import (
    LARGE,
    MARGIN,
    choose_reduction,
    crop_sample,
    cut,
    draw,
    random_crop,
)
from glsd.data.decode import decode, decode_reduced
from glsd.data.pixels import Grid, upright, upright_grid
from glsd.errors import BrokenImage
from tests.helpers.usual_spec import usual_spec

KEY = {"seed": 1, "epoch": 2, "position": 3}
# Upright picture -> the pixels that a camera held that way stores: the inverse of the orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, -1),
}


def jpeg(pixels: np.ndarray, orientation: int = 1, **options) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    image = Image.fromarray(np.ascontiguousarray(pixels))
    image.save(buffer, "JPEG", **{"quality": 100, "subsampling": 0, "exif": exif.tobytes(), **options})
    return buffer.getvalue()


def always(reduction: int):
    return lambda height, width: reduction


def ramps(height: int, width: int) -> np.ndarray:
    """Red tells the column, green the row, both two levels a pixel; blue is gray."""
    y, x = np.mgrid[:height, :width]
    return np.stack([2 * x, 2 * y, np.full_like(x, 128)], axis=2).astype(np.uint8)


def photograph(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Shapes of many sizes, sharp edges among them."""
    rng = np.random.default_rng(seed)
    pixels = np.zeros((height, width, 3))
    for cells, strength in ((6, 60), (40, 40), (200, 20)):
        small = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        pixels += strength / 255 * np.asarray(small.resize((width, height), Image.Resampling.BICUBIC))
    for _ in range(60):
        y, x = rng.integers(0, height), rng.integers(0, width)
        pixels[y : y + height // 12, x : x + width // 20] = rng.integers(0, 256, 3)
    return pixels.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def large() -> bytes:
    return jpeg(photograph(1403, 1871), quality=92)


# ---------------------------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("reduction", [2, 4, 8])
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("height", "width"), [(101, 75), (64, 96), (90, 121)])
def test_reduced_pixels_lie_where_the_grid_says(reduction, orientation, height, width):
    raw = jpeg(STORED[orientation](ramps(height, width)), orientation)
    assert np.abs(decode(raw).permute(1, 2, 0).numpy().astype(int) - ramps(height, width)).max() <= 4
    pixels, grid = decode_reduced(raw, always(reduction))
    assert (grid.height, grid.width, grid.reduction) == (height, width, reduction)
    assert pixels.shape[1:] == (math.ceil(height / reduction), math.ceil(width / reduction))
    for channel, start, length in ((0, grid.left, width), (1, grid.top, height)):
        along = pixels[channel].double()
        along = along if channel == 0 else along.T
        first = start + reduction * torch.arange(along.shape[1])
        inside = (first >= 0) & (first + reduction <= length)
        assert inside.sum() == length // reduction
        expected = 2 * (first + (reduction - 1) / 2)  # the mean of the pixels it stands for
        # A quarter of a pixel, and rounding: a ramp is not all low frequencies.
        assert (along[:, inside] - expected[inside]).abs().max() <= 0.25 * 2 + 1.5


@pytest.mark.parametrize("orientation", [1, 3, 6, 7])
def test_a_snapped_box_is_what_is_cut(orientation):
    """Crops of one pixel per reduced pixel read their own box off their colors."""
    height, width, reduction = 121, 99, 4
    raw = jpeg(STORED[orientation](ramps(height, width)), orientation)
    pixels, grid = decode_reduced(raw, always(reduction))
    rng = np.random.default_rng(0)
    for _ in range(50):
        side = 10 * reduction
        x, y = rng.integers(0, width - side + 1), rng.integers(0, height - side + 1)
        drawn = np.array([[x, y, x + side, y + side], [x + side, y, x, y + side]], dtype=np.float64)
        boxes, cells = grid.snap(drawn)
        crops = cut(pixels, torch.from_numpy(cells), 10).double()
        for crop, (x0, y0, x1, y1) in zip(crops, boxes.tolist(), strict=True):
            assert abs(x1 - x0) in (side, side - reduction)  # the last may not fit once more
            place = (np.arange(10) + 0.5) / 10
            columns = 2 * (x0 + (x1 - x0) * place - 0.5)  # a mirrored box runs backwards
            rows = 2 * (y0 + (y1 - y0) * place - 0.5)
            edge = slice(1, -1)  # where the resize has pixels on both sides
            assert np.abs(crop[0, edge, edge].numpy() - columns[edge]).max() <= 3
            assert np.abs(crop[1, edge, edge].numpy().T - rows[edge]).max() <= 3


@pytest.mark.parametrize("orientation", [*range(1, 9), 0, 9])
def test_upright_is_pillows(orientation):
    stored = photograph(12, 17)
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(stored).save(buffer, "PNG", exif=exif.tobytes())
    theirs = np.asarray(ImageOps.exif_transpose(Image.open(buffer)))
    ours = upright(torch.from_numpy(stored).permute(2, 0, 1), orientation)
    assert np.array_equal(ours.permute(1, 2, 0), theirs)
    grid = upright_grid(12, 17, 4, orientation)
    assert (grid.height, grid.width) == theirs.shape[:2]


def segment(content: bytes) -> bytes:
    return b"\xff\xe1" + (len(content) + 2).to_bytes(2) + content


def exif_6(*, kind: int = 3, mark: int = 42, offset: int = 8) -> bytes:
    """EXIF data that ask for a quarter turn."""
    entry = struct.pack("<HHHII", 1, 0x0112, kind, 1, 6)
    return segment(b"Exif\0\0II" + struct.pack("<HI", mark, offset) + entry + bytes(4))


XMP_6 = segment(
    b'http://ns.adobe.com/xap/1.0/\0<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
)


@pytest.mark.parametrize(
    ("metadata", "is_turned"),
    [
        (b"", False),
        (exif_6(), True),
        (XMP_6, False),
        (XMP_6 + exif_6(), True),
        (exif_6() + XMP_6, True),
        (exif_6(kind=4), True),
        (exif_6(mark=43), False),
        (exif_6(offset=5000), False),
        (exif_6()[:12] + exif_6()[14:], False),
        (segment(b"Exif\0\0" + bytes(range(60))), False),
    ],
)
def test_an_image_is_as_upright_whole_as_reduced(metadata, is_turned):
    plain = jpeg(photograph(60, 90), exif=b"")
    raw = plain[:2] + metadata + plain[2:]
    whole = decode(raw)
    assert torch.equal(whole, decode(plain).transpose(1, 2).flip(2) if is_turned else decode(plain))
    for reduction in (2, 4):
        pixels, grid = decode_reduced(raw, always(reduction))
        assert (grid.height, grid.width) == whole.shape[1:]
        assert pixels.shape[1:] == tuple(math.ceil(side / reduction) for side in whole.shape[1:])


def test_snapping_finds_the_nearest_edge_inside():
    rng = np.random.default_rng(0)
    for grid in (
        Grid(101, 203, 4),
        Grid(101, 203, 8, left=-5, top=-3),
        Grid(96, 64, 2),
        Grid(97, 99, 4, left=-1),
    ):
        lines = [
            [e for e in range(start, length + 1, grid.reduction) if e >= 0]
            for start, length in ((grid.left, grid.width), (grid.top, grid.height))
        ]
        for _ in range(100):
            x, y = rng.integers(0, grid.width, 2), rng.integers(0, grid.height, 2)
            box = np.array([[x[0], y.min(), x[1], y.max()]], dtype=np.float64)
            boxes, cells = grid.snap(box)
            for number, (edge, snapped) in enumerate(zip(box[0], boxes[0], strict=True)):
                assert snapped in lines[number % 2]
                assert abs(snapped - edge) == min(abs(line - edge) for line in lines[number % 2])
            start = np.array([grid.left, grid.top] * 2)
            assert np.array_equal(cells * grid.reduction + start, boxes)
    box = np.array([[7.0, 3, 2, 50]])
    assert all(np.array_equal(part, box) for part in Grid(60, 60).snap(box))


# ---------------------------------------------------------------------------------------------- choice


@pytest.mark.parametrize(
    ("height", "width", "expected"),
    [
        (375, 500, 1),
        (1000, 1999, 1),  # below LARGE
        (1200, 1800, 1),
        (1500, 2000, 2),
        (3000, 4000, 4),
        (4000, 3000, 4),
        (8000, 6000, 8),
        (400, 30_000, 1),  # a short side of 400 gives crops of 224 no room
        (12_000, 16_000, 8),
    ],
)
def test_the_reduction_by_size(height, width, expected):
    assert choose_reduction(height, width, [(0.4, 224), (0.05, 96)]) == expected


def test_every_box_keeps_its_pixels():
    rng = np.random.default_rng(0)
    seen = set()
    for position in range(300):
        height, width = rng.integers(300, 7000, 2).tolist()
        spec = usual_spec(local_scale=(0.05, 0.1) if position % 2 else (0.2, 0.4), global_scale=(0.4, 0.5))
        wanted = [(spec.global_scale[0], 224), (spec.local_scale[0], 96)]
        reduction = choose_reduction(height, width, wanted)
        assert reduction == 1 or height * width >= LARGE
        seen.add(reduction)
        plan = draw(spec, height=height, width=width, seed=0, epoch=0, position=position)
        _, cells = Grid(height, width, reduction).snap(plan.boxes.numpy())
        sides = np.minimum(np.abs(cells[:, 2] - cells[:, 0]), cells[:, 3] - cells[:, 1])
        if reduction > 1:
            assert (sides[:2] >= MARGIN * 224 - 1).all()
            assert (sides[2:] >= MARGIN * 96 - 1).all()
    assert seen == {1, 2, 4, 8}


# ---------------------------------------------------------------------------------------------- pixels


@pytest.mark.parametrize("options", [{"subsampling": 0}, {"subsampling": 2}, {"progressive": True}])
@pytest.mark.parametrize("gray", [False, True])
def test_reduced_pixels_are_pillows(options, gray):
    pixels = photograph(203, 301)
    raw = jpeg(pixels[..., 0] if gray else pixels, **options)
    for reduction in (2, 4, 8):
        image = Image.open(io.BytesIO(raw))
        image.draft(None, (301 // reduction, 203 // reduction))
        theirs = np.asarray(image.convert("RGB")).astype(int)
        ours = decode_reduced(raw, always(reduction))[0].permute(1, 2, 0).numpy()
        assert ours.shape == theirs.shape
        assert np.abs(ours - theirs).max() <= 2


def test_crops_of_a_large_photograph_are_those_of_the_whole_one(large):
    sample = crop_sample(large, usual_spec(), **KEY)
    drawn = draw(usual_spec(), height=1403, width=1871, **KEY).boxes
    assert (sample.boxes % 2 == 0).all()
    assert (sample.boxes - drawn).abs().max() <= 2
    assert torch.equal(sample.boxes[:, 0] > sample.boxes[:, 2], drawn[:, 0] > drawn[:, 2])
    whole = decode(large)
    for crops, boxes, size in (
        (sample.global_crops, sample.boxes[:2], 224),
        (sample.local_crops, sample.boxes[2:], 96),
    ):
        difference = (crops.double() - cut(whole, boxes, size).double()).abs()
        assert difference.mean() < 1.0
        beside = (
            crops.double()
            - cut(whole, boxes + 2 * torch.tensor([1, 1, 1, 1]) * (boxes < 1300), size).double()
        ).abs()
        assert beside.mean() > 1.5 * difference.mean()  # a shift by one reduced pixel would show
    again = crop_sample(large, usual_spec(), **KEY)
    assert all(torch.equal(a, b) for a, b in zip(sample, again, strict=True))


def test_a_box_of_fine_tuning_is_reduced_too(large):
    crop = random_crop(large, size=96, scale=(0.3, 1.0), flip_prob=0.5, seed=0, step=0, slot=0)
    assert crop.shape == (3, 96, 96)
    assert decode_reduced(large, lambda h, w: choose_reduction(h, w, [(0.3, 96)]))[1].reduction == 4


def test_other_kinds_are_not_reduced():
    image = Image.fromarray(photograph(40, 60))
    for form, kind in (("JPEG", image.convert("CMYK")), ("PNG", image), ("BMP", image.convert("L"))):
        buffer = io.BytesIO()
        kind.save(buffer, form)
        pixels, grid = decode_reduced(buffer.getvalue(), always(2))
        assert grid == Grid(40, 60)
        assert torch.equal(pixels, decode(buffer.getvalue()))


def test_damage_is_refused_with_a_reason(large):
    with pytest.raises(BrokenImage, match="truncated"):
        crop_sample(large[: len(large) // 2], usual_spec(), **KEY)
    raw = bytearray(large)
    table = raw.index(b"\xff\xc4") + 5
    raw[table : table + 16] = b"\xff" * 16  # more codes than a Huffman table can hold
    with pytest.raises(BrokenImage) as caught:
        crop_sample(bytes(raw), usual_spec(), **KEY)
    assert "unreadable" in str(caught.value)
    assert "/" not in str(caught.value)
