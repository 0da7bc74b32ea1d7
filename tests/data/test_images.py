"""What an image is: each line of docs/images.md, with a file that another program wrote than the one that reads it."""

import base64
import io
import re
import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from glsd.data.decode import decode, read_header
from glsd.errors import BrokenImage
from tests.helpers.fuzz_images import exif, interlaced_png, png, png_chunk
from tests.helpers.image_bytes import bmp, gif, packed, padded, tiff
from tests.helpers.image_writers import UPRIGHT, inked, meant, source, to_bits
from tests.helpers.pictures import encode, picture

PAGE = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
DEEP = source(np.random.default_rng(3), 14)  # 16 bits, 14 bands
HEIGHT, WIDTH = DEEP.shape[:2]
RGB = to_bits(DEEP[..., :3], 8)
RGBA = to_bits(DEEP[..., :4], 8)
SMOOTH = picture(40, 56)
ARITHMETIC = (  # cjpeg -arithmetic
    "/9j/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxOUlNSMj5aYVpQYEpRUk//yQALCAAQABABAREA"
    "/8wABgAQEAX/2gAIAQEAAD8A/wBB6oFnqw0YMKZ/D2gLA1zA/9k="
)

# Files and the pixels they must give (h w 3, 0..255).
Files = Iterator[tuple[bytes, np.ndarray]]


def by_opencv(extension: str, pixels: np.ndarray, *options: int) -> bytes:
    order = {1: None, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[
        pixels.shape[2] if pixels.ndim == 3 else 1
    ]
    done, data = cv2.imencode(extension, pixels if order is None else cv2.cvtColor(pixels, order), options)
    assert done
    return data.tobytes()


def by_tifffile(samples: np.ndarray, photometric: str, **options) -> bytes:
    file = io.BytesIO()
    tifffile.imwrite(file, samples, photometric=photometric, metadata=None, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------------- JPEG


def jpegs() -> Files:
    for raw in (
        encode(Image.fromarray(SMOOTH), "JPEG", quality=99, subsampling=0),
        encode(Image.fromarray(SMOOTH), "JPEG", quality=99, subsampling=0, progressive=True),
        encode(Image.fromarray(SMOOTH[..., 0]), "JPEG", quality=99),
    ):
        yield raw, np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def ink_jpegs() -> Files:
    inks = 255 - np.dstack([SMOOTH, np.full(SMOOTH.shape[:2], 230, np.uint8)])
    for stored in ("CMYK", "YCCK"):
        raw = bytes(imagecodecs.jpeg8_encode(255 - inks, 99, colorspace="CMYK", outcolorspace=stored))
        own = imagecodecs.jpeg8_decode(raw, colorspace=stored, outcolorspace="CMYK")
        assert np.abs(own.astype(int) - (255 - inks)).mean() < 3
        yield raw, inked(255 - own, 255)


def rgb_jpegs() -> Files:
    raw = encode(Image.fromarray(SMOOTH), "JPEG", quality=99, keep_rgb=True)
    yield raw, np.asarray(Image.open(io.BytesIO(raw)))


def arithmetic_jpegs() -> Files:
    y, x = np.mgrid[:16, :16]
    raw = base64.b64decode(ARITHMETIC)
    own = np.asarray(Image.open(io.BytesIO(raw)))
    assert np.abs(own - (40 + 8.0 * x + 4 * y)).max() < 9
    yield raw, meant(own, 8)


def endless_jpegs() -> Files:
    for raw, pixels in jpegs():
        for tail in (b"", b"\xff", bytes(100)):
            yield raw[:-2] + tail, pixels


def followed_jpegs() -> Files:
    for raw, pixels in jpegs():
        yield raw + b"\0\0\0\x18ftypmp42" + bytes(range(256)) * 9, pixels
    frames = [Image.fromarray(SMOOTH), Image.fromarray(SMOOTH[::-1].copy())]
    raw = encode(frames[0], "MPO", save_all=True, append_images=frames[1:], quality=99)
    yield raw, np.asarray(Image.open(io.BytesIO(raw)).convert("RGB"))


def turned_jpegs() -> Files:
    for orientation, turn in UPRIGHT.items():
        raw = encode(Image.fromarray(SMOOTH), "JPEG", quality=99, exif=exif(orientation))
        yield raw, turn(np.asarray(Image.open(io.BytesIO(raw))))


# ----------------------------------------------------------------------------------------------------- PNG


def pngs(bits: int) -> Files:
    for channels in (1, 3, 4):
        samples = to_bits(DEEP[..., :channels], bits)
        yield by_opencv(".png", samples[..., 0] if channels == 1 else samples), meant(samples, bits)
    samples = to_bits(DEEP[..., :2], bits)
    rows = samples.astype(f">u{bits // 8}").reshape(HEIGHT, -1).view(np.uint8)
    raw = png(WIDTH, HEIGHT, np.pad(rows, ((0, 0), (1, 0))).tobytes(), bits=bits, color=4)
    yield raw, meant(samples[..., 0], bits)


def shallow_pngs() -> Files:
    for bits in (1, 2, 4):
        samples = to_bits(DEEP[..., 0], bits)
        rows = b"".join(b"\0" + packed(row[None], bits) for row in samples)
        yield png(WIDTH, HEIGHT, rows, bits=bits, color=0), meant(samples, bits)


def palette_pngs() -> Files:
    table = np.random.default_rng(0).integers(0, 256, (16, 3)).astype(np.uint8)
    samples = to_bits(DEEP[..., 0], 4)
    rows = b"".join(b"\0" + packed(row[None], 4) for row in samples)
    extra = png_chunk(b"PLTE", table.tobytes()) + png_chunk(b"tRNS", bytes(range(0, 256, 17)))
    yield png(WIDTH, HEIGHT, rows, bits=4, color=3, extra=extra), table[samples]


def plain_png(extra: bytes = b"") -> bytes:
    return png(WIDTH, HEIGHT, b"".join(b"\0" + row.tobytes() for row in RGB), extra=extra)


def interlaced_pngs() -> Files:
    yield interlaced_png(RGB), RGB


def animated_pngs() -> Files:
    control = struct.pack(">IIIIIHHBB", 0, WIDTH, HEIGHT, 0, 0, 1, 10, 0, 0)
    first = plain_png(png_chunk(b"acTL", struct.pack(">II", 2, 0)) + png_chunk(b"fcTL", control))
    black = zlib.compress(bytes(HEIGHT * (1 + 3 * WIDTH)))
    second = png_chunk(b"fcTL", b"\0\0\0\1" + control[4:]) + png_chunk(b"fdAT", b"\0\0\0\2" + black)
    yield first[:-12] + second + first[-12:], RGB


def burdened_pngs() -> Files:
    large = zlib.compress(np.random.default_rng(0).bytes(2 << 20), 0)
    spoiled = png_chunk(b"iTXt", b"a text")[:-4] + b"oops"
    for extra in (
        png_chunk(b"iCCP", b"profile\0\0" + large),
        png_chunk(b"zTXt", b"prompt\0\0" + large),
        png_chunk(b"iTXt", b"prompt\0\0\0\0\0" + b"x" * (3 << 20)),
        png_chunk(b"iCCP", b"profile\0\0" + b"no zlib"),
        png_chunk(b"gAMA", bytes(4)) + png_chunk(b"tRNS", bytes(5)),
        spoiled,
    ):
        yield plain_png(extra), RGB


def turned_pngs() -> Files:
    for orientation, turn in UPRIGHT.items():
        data = exif(orientation)
        yield plain_png(png_chunk(b"eXIf", data[6:])), turn(RGB)
        text = b"\nexif\n%8d\n%s\n" % (len(data), data.hex().encode())
        yield plain_png(png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text))), turn(RGB)
        yield plain_png(png_chunk(b"eXIf", data[6:])[:-4] + b"oops"), RGB


# ----------------------------------------------------------------------------------- WebP, GIF, BMP, Netpbm


def lossy_webps() -> Files:
    raw = by_opencv(".webp", SMOOTH, cv2.IMWRITE_WEBP_QUALITY, 90)
    yield raw, np.asarray(cv2.imdecode(np.frombuffer(raw, np.uint8), cv2.IMREAD_COLOR_RGB))


def lossless_webps() -> Files:
    yield by_opencv(".webp", RGB, cv2.IMWRITE_WEBP_QUALITY, 101), RGB
    opaque = RGBA.copy()
    opaque[..., 3] |= 1  # libwebp does not keep the colors of what nobody can see
    yield by_opencv(".webp", opaque, cv2.IMWRITE_WEBP_QUALITY, 101), RGB


def animated_webps() -> Files:
    animation = cv2.Animation()
    animation.frames = [cv2.cvtColor(frame, cv2.COLOR_RGB2BGRA) for frame in (RGB, RGB[::-1].copy())]
    animation.durations = [100, 100]
    done, data = cv2.imencodeanimation(".webp", animation, [cv2.IMWRITE_WEBP_QUALITY, 101])
    assert done
    yield data.tobytes(), RGB


def gifs() -> Files:
    table = np.random.default_rng(0).integers(0, 256, (128, 3))
    samples = to_bits(DEEP[..., 0], 7)
    yield gif([samples, samples[::-1]], table), table[samples]


def plain_bmps() -> Files:
    for channels in (3, 4):
        rows = padded(np.dstack([RGB[..., ::-1], RGBA[..., 3]])[..., :channels].reshape(HEIGHT, -1))
        stride = len(rows) // HEIGHT
        backwards = b"".join(rows[n : n + stride] for n in range(0, len(rows), stride)[::-1])
        yield bmp(rows, WIDTH, -HEIGHT, 8 * channels), RGB
        yield bmp(backwards, WIDTH, HEIGHT, 8 * channels), RGB


def short_bmps() -> Files:
    for bits, masks, form in (
        ((5, 5, 5), b"", 0),
        ((5, 6, 5), struct.pack("<III", 0xF800, 0x7E0, 0x1F), 3),
    ):
        colors = [DEEP[..., n] >> (16 - bits[n]) for n in range(3)]
        rows = (colors[0] << bits[1] + bits[2] | colors[1] << bits[2] | colors[2]).astype("<u2")
        raw = bmp(padded(rows.view(np.uint8)), WIDTH, -HEIGHT, 16, form=form, masks=masks)
        yield raw, np.dstack([color * 255 / (2**n - 1) for color, n in zip(colors, bits, strict=True)])


def palette_bmps() -> Files:
    for bits in (1, 4, 8):
        table = np.random.default_rng(bits).integers(0, 256, (2**bits, 4)).astype(np.uint8)
        samples = to_bits(DEEP[..., 0], bits)
        rows = padded(np.array([np.frombuffer(packed(row[None], bits), np.uint8) for row in samples]))
        yield bmp(rows, WIDTH, -HEIGHT, bits, palette=table.tobytes()), table[samples][..., 2::-1]


def run_length_bmps() -> Files:
    table = np.random.default_rng(0).integers(0, 256, (16, 4)).astype(np.uint8)
    samples = np.repeat(np.random.default_rng(1).integers(0, 16, (5, 6)), 4, axis=1)
    for form, bits, both in ((1, 8, lambda v: v), (2, 4, lambda v: v * 17)):
        rows = b"".join(
            b"".join(bytes([4, both(int(value))]) for value in row[::4]) + b"\0\0" for row in samples[::-1]
        )
        raw = bmp(rows + b"\0\1", 24, 5, bits, form=form, palette=table.tobytes())
        yield raw, table[samples][..., 2::-1]


def netpbms() -> Files:
    for most in (1, 100, 255, 1023, 4095, 65535):
        for number, channels in ((2, 1), (3, 3)):
            samples = DEEP[..., :channels].astype(np.int64) * (most + 1) >> 16
            head = f"{WIDTH} {HEIGHT}\n# a comment\n{most}\n"
            text = f"P{number}\n{head}" + " ".join(map(str, samples.ravel()))
            binary = (
                f"P{number + 3}\n{head}".encode() + samples.astype(">u2" if most > 255 else "u1").tobytes()
            )
            for raw in (text.encode(), binary):
                yield raw, meant(samples, 1) / most
    bits = to_bits(DEEP[..., 0], 1)  # 1 is black
    head = f"{WIDTH} {HEIGHT}\n"
    yield f"P4\n{head}".encode() + packed(bits, 1), 255 - meant(bits, 1)
    yield (
        f"P1\n{head}".encode() + "\n".join(" ".join(map(str, row)) for row in bits).encode(),
        255 - meant(bits, 1),
    )


# ---------------------------------------------------------------------------------------------------- TIFF


def plain_tiffs() -> Files:
    for bits in (8, 16):
        for samples in (to_bits(DEEP[..., 0], bits), to_bits(DEEP[..., :3], bits)):
            kind = "rgb" if samples.ndim == 3 else "minisblack"
            yield by_tifffile(samples, kind), meant(samples, bits)
            yield by_opencv(".tiff", samples, cv2.IMWRITE_TIFF_COMPRESSION, 5), meant(samples, bits)


def odd_tiffs() -> Files:
    for bits in (1, 2, 4, 6, 8, 10, 12, 14, 15, 16):
        for count in (1, 3):
            samples = (DEEP[..., :count] >> (16 - bits)).astype(np.uint16)
            yield tiff(samples, bits, 2 if count == 3 else 1), meant(samples, bits)


def white_is_zero() -> Files:
    for bits in (1, 4, 8, 12, 16):
        samples = DEEP[..., :1] >> (16 - bits)
        yield tiff(samples, bits, 0), 255 - meant(samples, bits)


def planar_tiffs() -> Files:
    for bits in (4, 8, 12, 16):
        for count in (3, 4, 6):
            samples = DEEP[..., :count] >> (16 - bits)
            raw = tiff(samples, bits, 2, planar=2, t338=[0] * (count - 3))
            yield raw, meant(samples, bits)
    for order in "<>":
        samples = to_bits(DEEP[..., :3], 16)
        yield tiff(samples, 16, 2, planar=2, order=order), meant(samples, 16)


def palette_tiffs() -> Files:
    for bits in (2, 4, 8):
        table = np.random.default_rng(bits).integers(0, 65536, (3, 2**bits))
        samples = to_bits(DEEP[..., :1], bits)
        raw = tiff(samples, bits, 3, t320=table.ravel().tolist())
        yield raw, table.T[samples[..., 0]] * 255 / 65535
        raw = tiff(samples, bits, 3, t320=(table >> 8).ravel().tolist())  # as some old programs write it
        yield raw, table.T[samples[..., 0]] >> 8
    table = np.random.default_rng(0).integers(0, 65536, (3, 256)).astype(np.uint16)
    yield by_tifffile(RGB[..., 0], "palette", colormap=table), table.T[RGB[..., 0]] * 255.0 / 65535


def ink_tiffs() -> Files:
    yield by_tifffile(RGBA, "separated"), inked(RGBA, 255)
    yield tiff(DEEP[..., :4], 16, 5, planar=2), inked(DEEP[..., :4], 65535)
    yield tiff(DEEP[..., :4], 16, 5), inked(DEEP[..., :4], 65535)


def jpeg_tiffs() -> Files:
    luma = cv2.cvtColor(SMOOTH, cv2.COLOR_RGB2YCrCb)[..., [0, 2, 1]]
    for kind, samples, given in (
        ("rgb", SMOOTH, SMOOTH),
        ("ycbcr", SMOOTH, luma),
        ("minisblack", SMOOTH[..., 0], SMOOTH[..., 0]),
    ):
        raw = by_tifffile(given, kind, compression="jpeg", compressionargs={"level": 95}, rowsperstrip=16)
        own = tifffile.imread(io.BytesIO(raw))
        assert np.abs(own.astype(int) - samples).mean() < 4
        yield raw, meant(own, 8)


def banded_tiffs() -> Files:
    for bits in (8, 16):
        for count in (4, 5, 8, 13):
            samples = to_bits(DEEP[..., :count], bits)
            yield tiff(samples, bits, 2, t338=[0] * (count - 3)), meant(samples, bits)
        samples = to_bits(DEEP[..., :4], bits)
        yield by_tifffile(samples, "rgb", extrasamples=[0]), meant(samples, bits)


def alpha_tiffs() -> Files:
    for bits in (8, 16):
        samples = to_bits(DEEP[..., :4], bits)
        yield by_tifffile(samples, "rgb", extrasamples=[2]), meant(samples, bits)
        yield tiff(samples[..., :2], bits, 1, t338=[2]), meant(samples[..., 0], bits)
        alpha = samples[..., 3:].astype(np.int64) | 1
        colors = samples[..., :3] * alpha // (2**bits - 1)
        straight = meant(colors * (2**bits - 1) / alpha, bits)
        yield tiff(np.dstack([colors, alpha]), bits, 2, t338=[1]), straight


def arranged_tiffs() -> Files:
    for bits in (8, 16):
        for order in "<>":
            for big in (False, True):
                for options in ({"tile": (16, 16)}, {"rowsperstrip": 3}, {}):
                    for samples in (DEEP[..., 0], DEEP[..., :3]):
                        samples = to_bits(samples, bits)
                        kind = "rgb" if samples.ndim == 3 else "minisblack"
                        raw = by_tifffile(samples, kind, byteorder=order, bigtiff=big, **options)
                        yield raw, meant(samples, bits)


def compressed_tiffs() -> Files:
    for compression in ("lzw", "zlib", "packbits", "lzma", "zstd"):
        for samples in (RGB, DEEP[..., :3], DEEP[..., 0]):
            kind, bits = "rgb" if samples.ndim == 3 else "minisblack", 8 * samples.itemsize
            yield by_tifffile(samples, kind, compression=compression), meant(samples, bits)
            if compression != "packbits":
                raw = by_tifffile(samples, kind, compression=compression, predictor=True)
                yield raw, meant(samples, bits)
    black = to_bits(DEEP[..., 0], 1)
    for name in (
        "group3",
        "group4",
        "tiff_ccitt",
    ):  # Pillow wrote, libtiff in Pillow reads: no other program at hand
        raw = encode(Image.fromarray(black.astype(bool)), "TIFF", compression=name)
        assert read_header(raw).bits == 1
        yield raw, meant(black, 1)


def turned_tiffs() -> Files:
    for orientation, turn in UPRIGHT.items():
        tag = [(274, 3, 1, orientation, True)]
        yield by_tifffile(RGB, "rgb", extratags=tag), turn(RGB)
        yield tiff(DEEP[..., :3], 16, 2, planar=2, t274=[orientation]), turn(meant(DEEP[..., :3], 16))


def pages(*arrays: np.ndarray, **options) -> bytes:
    """A TIFF of one page an array; an option is a list of one value a page."""
    file = io.BytesIO()
    with tifffile.TiffWriter(file) as writer:
        for number, array in enumerate(arrays):
            own = {name: values[number] for name, values in options.items()}
            kind = "rgb" if array.ndim == 3 else "minisblack"
            writer.write(array, metadata=None, contiguous=False, **{"photometric": kind, **own})
    return file.getvalue()


def paged_tiffs() -> Files:
    yield pages(RGB, RGB[::-1], RGB[:5]), RGB
    yield pages(RGB[..., 0], RGB), meant(RGB[..., 0], 8)


def small_copies() -> Files:
    small = np.ascontiguousarray(RGB[::2, ::2])
    yield pages(RGB, small, subfiletype=[0, 1]), RGB
    yield pages(small, RGB, subfiletype=[1, 0]), RGB
    mask = RGB[..., 0] > 99
    yield pages(RGB, mask, subfiletype=[0, 4], photometric=["rgb", "mask"]), RGB
    yield pages(mask, RGB, subfiletype=[4, 0], photometric=["mask", "rgb"]), RGB


READ: dict[str, Callable[[], Files]] = {
    "JPEG, gray and color, baseline and progressive": jpegs,
    "JPEG, CMYK and YCCK": ink_jpegs,
    "JPEG that holds RGB": rgb_jpegs,
    "JPEG with arithmetic coding": arithmetic_jpegs,
    "JPEG without its end marker": endless_jpegs,
    "JPEG with something behind its end": followed_jpegs,
    "JPEG, turned by EXIF": turned_jpegs,
    "PNG, 8 bits, gray, color, with alpha": lambda: pngs(8),
    "PNG, 16 bits, gray, color, with alpha": lambda: pngs(16),
    "PNG, 1, 2 and 4 bits": shallow_pngs,
    "PNG with a palette and transparency": palette_pngs,
    "PNG, interlaced": interlaced_pngs,
    "PNG, animated": animated_pngs,
    "PNG with a large or damaged chunk beside the pixels": burdened_pngs,
    "PNG, turned by EXIF": turned_pngs,
    "WebP, lossy": lossy_webps,
    "WebP, lossless, with alpha": lossless_webps,
    "WebP, animated": animated_webps,
    "GIF, animated": gifs,
    "BMP, 24 and 32 bits, from the top or the bottom": plain_bmps,
    "BMP, 16 bits": short_bmps,
    "BMP, palette of 1, 4 and 8 bits": palette_bmps,
    "BMP, run-length coding": run_length_bmps,
    "PBM, PGM, PPM, binary and text, to 16 bits": netpbms,
    "TIFF, 8 and 16 bits, gray and RGB": plain_tiffs,
    "TIFF, 1 to 15 bits": odd_tiffs,
    "TIFF, white is zero": white_is_zero,
    "TIFF, one plane a color": planar_tiffs,
    "TIFF with a palette": palette_tiffs,
    "TIFF, CMYK": ink_tiffs,
    "TIFF with JPEG compression": jpeg_tiffs,
    "TIFF, RGB with more bands": banded_tiffs,
    "TIFF with alpha": alpha_tiffs,
    "TIFF in tiles, strips, BigTIFF, either byte order": arranged_tiffs,
    "TIFF, LZW, deflate, PackBits, fax, LZMA, zstd, predictor": compressed_tiffs,
    "TIFF, turned by its tag": turned_tiffs,
    "TIFF of several pages in color": paged_tiffs,
    "TIFF with thumbnails or smaller copies": small_copies,
}


@pytest.mark.parametrize("row", READ)
def test_a_line_of_the_page_is_read(row):
    count = 0
    for count, (raw, pixels) in enumerate(READ[row](), 1):
        ours = decode(raw).permute(1, 2, 0).numpy()
        assert ours.shape == pixels.shape
        assert np.abs(ours - pixels.astype(float)).max() <= 1, f"file {count}"
        header = read_header(raw)
        assert sorted((header.height, header.width)) == sorted(ours.shape[:2])
    assert count


# ------------------------------------------------------------------------------------------------- refused


def cut_files() -> Iterator[bytes]:
    for raw in (
        plain_png(),
        *(next(READ[row]())[0] for row in READ if row.startswith(("WebP", "BMP", "TIFF"))),
    ):
        yield raw[: len(raw) * 2 // 3]


def large_files() -> Iterator[bytes]:
    for width, height in ((70_000, 10), (10, 70_000), (60_000, 60_000)):
        yield png(width, height, bytes(100))
        yield bmp(bytes(100), width, height, 24)
        yield b"P5 %d %d 255\n" % (width, height) + bytes(100)
        yield tiff(np.zeros((1, 1, 3), np.uint8), 8, 2, t256=[width], t257=[height])
        yield tiff(np.zeros((1, 1, 3), np.uint8), 8, 2, planar=2, t256=[width], t257=[height])
    small = gif([GRAY >> 1], np.zeros((128, 3)))
    yield small[:6] + struct.pack("<HH", 60_000, 60_000) + small[10:]


def other_files() -> Iterator[bytes]:
    yield by_opencv(".jp2", SMOOTH)
    yield bytes(imagecodecs.jpeg2k_encode(SMOOTH, codecformat="j2k"))
    yield by_opencv(".pam", RGBA)
    for name in ("EPS", "PDF", "ICO"):
        yield encode(Image.fromarray(SMOOTH), name)
    yield b"\xff\x0a" + bytes(50)
    for brand in (b"avif", b"heic", b"mif1", b"crx "):
        yield b"\0\0\0\x18ftyp" + brand + bytes(50)
    for start in (b"8BPS", b"\x76\x2f\x31\x01", b"#?RADIANCE", b"<svg >", b"<!DOCTYPE html>"):
        yield start + bytes(50)


def twelve_bits() -> bytes:
    raw = bytearray(encode(Image.fromarray(SMOOTH), "JPEG"))
    raw[raw.index(b"\xff\xc0") + 4] = 12
    return bytes(raw)


def many_scans() -> bytes:
    raw = encode(Image.fromarray(SMOOTH[..., 0]), "JPEG", progressive=True)
    last = raw.rindex(b"\xff\xda")
    return raw[:-2] + raw[last:-2] * 100 + b"\xff\xd9"


def imagej_stack() -> bytes:
    # ImageJ writes one directory for a large stack.
    text = b"ImageJ=1.53t\nimages=7\nslices=7\n"
    return by_tifffile(RGB[..., 0], "minisblack", extratags=[(270, 2, 0, text.decode(), True)])


GRAY = RGB[..., 0]
REFUSED: dict[str, Callable[[], list[bytes]]] = {
    "an empty file": lambda: [b""],
    "JPEG that was cut": lambda: [raw[:-end] for raw, _ in jpegs() for end in (3, 4, 10, 200)],
    "JPEG, 12 bits": lambda: [twelve_bits()],
    "JPEG of more than 100 scans": lambda: [many_scans()],
    "PNG, WebP, BMP or TIFF that was cut": lambda: list(cut_files()),
    "any file of more than 178,956,970 pixels, or 65,535 a side": lambda: list(large_files()),
    "JPEG 2000, JPEG XL, AVIF, HEIC, PSD, PAM, EPS, PDF, EXR, SVG, icons, raw camera data": lambda: list(
        other_files()
    ),
    "PFM (floats)": lambda: [by_opencv(".pfm", RGB.astype(np.float32))],
    "TIFF of floats": lambda: [
        by_tifffile((RGB / 255).astype(np.float32), "rgb"),
        by_tifffile((GRAY / 255).astype(np.float32), "minisblack", compression="zlib", predictor=3),
    ],
    "TIFF of signed integers": lambda: [by_tifffile(GRAY.astype(np.int16), "minisblack")],
    "TIFF of 32-bit integers": lambda: [by_tifffile(RGB.astype(np.uint32), "rgb")],
    "TIFF, CIELab": lambda: [by_tifffile(RGB, "cielab"), tiff(RGB, 8, 8)],
    "TIFF, YCbCr without JPEG": lambda: [tiff(RGB, 8, 6), tiff(RGB, 8, 6, planar=2)],
    "TIFF of bands without colors": lambda: [
        tiff(DEEP[..., :5], 16, 1, t338=[0] * 4),
        tiff(DEEP[..., :5], 16, 1, planar=2),
    ],
    "TIFF of other inks": lambda: [tiff(DEEP[..., :4], 16, 5, t332=[2]), tiff(DEEP[..., :6], 16, 5)],
    "TIFF of gray pages of one size": lambda: [
        pages(GRAY, GRAY[::-1], GRAY),
        by_tifffile(np.stack([GRAY] * 3), "minisblack"),
    ],
    "TIFF that hides a stack behind one page": lambda: [imagej_stack()],
    "TIFF of thumbnails only": lambda: [pages(RGB, subfiletype=[1])],
    "TIFF whose samples have different bits": lambda: [tiff(DEEP[..., :3] >> 10, 5, 2, t258=[5, 6, 5])],
    "TIFF of 12 bits, big-endian": lambda: [tiff(DEEP[..., :1] >> 4, 12, 1, order=">")],
    "TIFF, other compressions": lambda: [by_tifffile(RGB, "rgb", compression="jpeg2000")],
}


@pytest.mark.parametrize("row", REFUSED)
def test_a_line_of_the_page_is_refused(row):
    reasons = re.findall("`([^`]+)`", rows("Refused")[row])
    for number, raw in enumerate(REFUSED[row]()):
        with pytest.raises(BrokenImage) as caught:
            decode(raw)
        text = str(caught.value)
        assert any(reason in text for reason in reasons), f"file {number}: {text}"
        assert len(text.splitlines()) == 1
        assert len(text) < 250


EXTRA = "TIFF, less common, without the extra"


def test_without_the_extra_a_line_says_what_to_install(monkeypatch):
    """What is read without it is the same, and everything else is refused."""
    every = [file for row in READ if row.startswith("TIFF") for file in READ[row]()]
    monkeypatch.setitem(sys.modules, "tifffile", None)
    refused = 0
    for raw, pixels in every:
        try:
            ours = decode(raw).permute(1, 2, 0).numpy()
        except BrokenImage as error:
            assert "pip install 'glsd[tiff]'" in str(error)  # noqa: PT017 - which files these are is not the question
            assert "pip install 'glsd[tiff]'" in rows("Refused")[EXTRA]
            refused += 1
            with pytest.raises(BrokenImage, match="pip install"):
                read_header(raw)
        else:
            assert np.abs(ours - pixels.astype(float)).max() <= 1
    assert 20 < refused < len(every) - 20


def rows(title: str) -> dict[str, str]:
    """The table below a title of the page: first column -> second."""
    part = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| ")]
    return {first.strip(): second.strip() for first, second in lines[1:]}


def test_every_line_of_the_page_has_its_test():
    assert set(rows("Read")) == set(READ)
    assert set(rows("Refused")) == {*REFUSED, EXTRA}
