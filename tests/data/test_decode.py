"""Decoding against Pillow, and damaged or hostile files."""

import contextlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.data.decode import decode
from glsd.errors import BrokenImage
from tests.helpers.pictures import as_array, encode, picture


@pytest.mark.parametrize("form", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_decode_exactly(form):
    assert np.array_equal(as_array(decode(encode(Image.fromarray(picture()), form))), picture())


@pytest.mark.parametrize("form", ["JPEG", "WEBP"])
def test_lossy_formats_decode_as_pillow_does(form):
    raw = encode(Image.fromarray(picture()), form, quality=95)
    expected = np.asarray(Image.open(io.BytesIO(raw)).convert("RGB")).astype(int)
    assert np.abs(as_array(decode(raw)) - expected).max() <= 2


def test_gray_is_repeated():
    gray = Image.fromarray(picture()).convert("L")
    for form in ("PNG", "JPEG"):
        pixels = decode(encode(gray, form))
        assert pixels.shape == (3, 60, 80)
        assert torch.equal(pixels[0], pixels[1])
        assert torch.equal(pixels[0], pixels[2])
    assert np.array_equal(as_array(decode(encode(gray, "PNG")))[..., 0], np.asarray(gray))


def test_cmyk_jpeg_keeps_its_colors():
    raw = encode(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=98)
    assert np.abs(as_array(decode(raw)).astype(int) - picture()).mean() < 4


def test_alpha_is_dropped():
    alpha = np.linspace(0, 255, 80).astype(np.uint8)[None].repeat(60, 0)
    rgba = np.concatenate([picture(), alpha[..., None]], axis=2)
    assert np.array_equal(as_array(decode(encode(Image.fromarray(rgba), "PNG"))), picture())


def test_palette_with_transparency():
    palette = Image.fromarray(picture()).quantize(64)
    expected = np.asarray(palette.convert("RGB"))
    assert np.array_equal(as_array(decode(encode(palette, "PNG", transparency=bytes(range(64))))), expected)


def test_sixteen_bit_gray_is_scaled_not_clipped():
    gray = (np.arange(60 * 80).reshape(60, 80) * 13).astype(np.uint16)
    pixels = as_array(decode(encode(Image.fromarray(gray), "PNG")))
    assert np.array_equal(pixels[..., 1], (gray >> 8).astype(np.uint8))


@pytest.mark.parametrize("top", [200, 256, 4095, 65535])
def test_gray_is_scaled_by_its_mode_whatever_its_values(top):
    gray = np.linspace(0, top, 60 * 80).astype(np.uint16).reshape(60, 80)
    for image, form in (
        (Image.fromarray(gray), "PNG"),
        (Image.fromarray(gray), "TIFF"),
        (Image.fromarray(gray.astype(np.int32)), "PPM"),
    ):
        pixels = as_array(decode(encode(image, form)))
        assert np.array_equal(pixels[..., 0], gray >> 8)
    with pytest.raises(BrokenImage, match="signed integers"):
        decode(encode(Image.fromarray(gray.astype(np.int32)), "TIFF"))


def test_other_formats_are_not_even_opened():
    """Pillow would hand an EPS to Ghostscript, whatever the file is called."""
    for form in ("EPS", "PCX", "ICO", "TGA"):
        raw = encode(Image.fromarray(picture()), form)
        assert Image.open(io.BytesIO(raw)).format == form
        with pytest.raises(BrokenImage, match="not an image of a known format"):
            decode(raw)


def test_pictures_of_several_views_in_one_file():
    frames = [Image.fromarray(picture(seed=seed)) for seed in (0, 1)]
    raw = encode(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(as_array(decode(raw)).astype(int) - picture()).mean() < 4


def test_first_frame_of_an_animation():
    frames = [Image.fromarray(picture(seed=s)).quantize(32) for s in (0, 1)]
    raw = encode(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert np.array_equal(as_array(decode(raw)), np.asarray(frames[0].convert("RGB")))


@pytest.mark.parametrize("form", ["JPEG", "PNG"])
@pytest.mark.parametrize("orientation", [2, 3, 6, 8])
def test_exif_orientation_is_applied(form, orientation):
    image = Image.fromarray(picture())
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 6: "ROTATE_270", 8: "ROTATE_90"}[orientation]
    expected = np.asarray(image.transpose(Image.Transpose[upright])).astype(int)
    pixels = as_array(
        decode(encode(image, form, exif=exif.tobytes(), **({"quality": 98} if form == "JPEG" else {})))
    )
    assert pixels.shape == expected.shape
    assert np.abs(pixels - expected).mean() < 3


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_truncation_is_refused_or_harmless(form):
    raw = encode(Image.fromarray(picture()), form)
    whole = decode(raw)
    refused = 0
    for end in sorted({*range(0, len(raw), max(1, len(raw) // 60)), *range(len(raw) - 8, len(raw))}):
        try:
            assert torch.equal(decode(raw[:end]), whole)
        except BrokenImage:
            refused += 1
    assert refused > 40


def test_progressive_jpeg_truncated():
    raw = encode(Image.fromarray(picture()), "JPEG", progressive=True)
    assert decode(raw).shape == (3, 60, 80)
    with pytest.raises(BrokenImage):
        decode(raw[: len(raw) * 2 // 3])


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_jpeg_whose_end_was_overwritten_with_zeros_is_refused(keep):
    raw = encode(Image.fromarray(picture()), "JPEG")
    kept = int(len(raw) * keep)
    with pytest.raises(BrokenImage, match="truncated"):
        decode(raw[:kept] + bytes(len(raw) - kept))


def with_thumbnail(raw: bytes) -> bytes:
    """Put an EXIF segment with a whole small JPEG in front, as cameras do."""
    exif = Image.Exif()
    exif[0x0112] = 1
    start = exif.tobytes() + encode(Image.fromarray(picture(24, 32)), "JPEG")
    return raw[:2] + b"\xff\xe1" + (len(start) + 2).to_bytes(2) + start + raw[2:]


JPEGS = {
    "plain": lambda: encode(Image.fromarray(picture()), "JPEG"),
    "gray": lambda: encode(Image.fromarray(picture()).convert("L"), "JPEG"),
    "progressive": lambda: encode(Image.fromarray(picture()), "JPEG", progressive=True),
    "with a thumbnail": lambda: with_thumbnail(encode(Image.fromarray(picture()), "JPEG")),
    "progressive with a thumbnail": lambda: with_thumbnail(
        encode(Image.fromarray(picture()), "JPEG", progressive=True)
    ),
    "with restarts and fill bytes": lambda: encode(
        Image.fromarray(picture()), "JPEG", restart_marker_blocks=2
    ).replace(b"\xff\xda", b"\xff\xff\xff\xda", 1),
}


@pytest.mark.parametrize("kind", JPEGS)
def test_jpeg_with_something_appended_is_whole(kind):
    raw = JPEGS[kind]()
    rng = np.random.default_rng(0)
    film = b"\0\0\0\x18ftypmp42" + rng.bytes(20_000) + b"\xff\xda\0\x0c" + rng.bytes(400)
    for tail in (b"\0" * 100, b"a note", raw, b"\xff\xda", film, *(rng.bytes(5000) for _ in range(20))):
        assert torch.equal(decode(raw + tail), decode(raw))


@pytest.mark.parametrize("kind", JPEGS)
def test_truncated_jpeg_is_refused_wherever_it_was_cut(kind):
    raw = JPEGS[kind]()
    assert raw.count(b"\xff\xd9") == (2 if "thumbnail" in kind else 1)
    for end in range(0, len(raw) - 2, 5):
        with pytest.raises(BrokenImage):
            decode(raw[:end])
    scan = raw.rindex(b"\xff\xda")
    for end in range(scan, len(raw) - 1, 31):
        with pytest.raises(BrokenImage):
            decode(raw[:end] + raw)  # another picture is no end


def png_claiming(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    return start + struct.pack(">I", 100) + b"IDAT" + bytes(104)


def jpeg_claiming(width: int, height: int) -> bytes:
    raw = bytearray(encode(Image.fromarray(picture()), "JPEG"))
    start = raw.index(b"\xff\xc0")
    raw[start + 5 : start + 9] = struct.pack(">HH", height, width)
    return bytes(raw)


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"", "empty"),
        (b"hello, this is text\n" * 20, "not an image"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"\xff\xd8\xff", "unreadable"),
        (b"\xff\xd8\xff" + bytes(500), "unreadable"),
        (b"\0" * 5000, "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (png_claiming(50_000, 50_000), "(?i)exceeds limit|more than"),
        (jpeg_claiming(60_000, 60_000), "60000 x 60000 pixels are more than"),
    ],
)
def test_what_is_no_image_is_broken_with_a_reason(raw, reason):
    with pytest.raises(BrokenImage, match=reason) as caught:
        decode(raw)
    assert 5 < len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)


def test_random_damage_raises_nothing_but_broken_image():
    rng = np.random.default_rng(0)
    for form in ("JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP"):
        raw = encode(Image.fromarray(picture(24, 24)), form)
        for _ in range(60):
            damaged = bytearray(raw)
            for place in rng.integers(0, min(len(raw), 200), 4):
                damaged[place] = rng.integers(0, 256)
            with contextlib.suppress(BrokenImage):
                assert decode(bytes(damaged)).dtype == torch.uint8


def test_reasons_hold_no_paths_of_others():
    raw = bytearray(encode(Image.fromarray(picture()), "JPEG"))
    table = raw.index(b"\xff\xc4") + 5
    raw[table : table + 16] = b"\xff" * 16  # more codes than a Huffman table can hold
    with pytest.raises(BrokenImage) as caught:
        decode(bytes(raw))
    assert "/" not in str(caught.value)
    assert "Huffman" in str(caught.value)


def test_float_pixels_are_refused():
    raw = encode(Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)), "TIFF")
    with pytest.raises(BrokenImage, match="float32"):
        decode(raw)
