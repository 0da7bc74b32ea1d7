"""Random image files of every format, depth, plane layout and orientation that four other programs write.

Each comes with its writer's own pixels: what it was given, or what the same program reads back from it where the format
loses something.
"""

import io
import shutil
import subprocess
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np
import tifffile
from PIL import Image, TiffImagePlugin

ORIENTATION = 0x0112
# Stored pixels -> upright ones. Source: EXIF 2.3, table of tag 274.
UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: lambda a: np.rot90(a, 1),
}
IMAGEMAGICK = shutil.which("convert-im6.q16") or shutil.which("magick") or shutil.which("convert")


class Written(NamedTuple):
    """An image file and the pixels that its writer meant, upright, 0..255 as floats."""

    name: str
    raw: bytes
    pixels: np.ndarray  # h w 3


def source(rng: np.random.Generator, channels: int = 3) -> np.ndarray:
    """A picture of 16 bits (h w c) that no turn leaves alike."""
    height, width = rng.integers(4, 40, 2)
    y, x = np.mgrid[:height, :width]
    waves = [30_000 + 29_000 * np.sin(x / (3 + c) + y / (9 + c) + c + rng.random()) for c in range(channels)]
    noise = rng.integers(0, 5000, (height, width, channels))
    return (np.stack(waves, -1) + noise).clip(0, 65535).astype(np.uint16)


def to_bits(picture: np.ndarray, bits: int) -> np.ndarray:
    """The picture with samples of ``bits`` bits."""
    return (picture >> (16 - bits)).astype(np.uint8 if bits <= 8 else np.uint16)


def meant(samples: np.ndarray, bits: int, orientation: int = 1) -> np.ndarray:
    """What gray or color samples of ``bits`` bits mean: h w 3, upright, 0..255."""
    samples = samples if samples.ndim == 3 else samples[..., None]
    colors = samples[..., :3] if samples.shape[-1] > 2 else np.repeat(samples[..., :1], 3, -1)
    return UPRIGHT[orientation](colors.astype(float) * 255 / (2**bits - 1))


def choose(rng: np.random.Generator, choices: Any) -> Any:
    choices = list(choices)
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------------------- Pillow

PILLOW_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "WEBP": ("RGB", "RGBA", "L"),
    "JPEG": ("L", "RGB", "CMYK", "YCbCr"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
}
PILLOW_COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg", "group4", "zstd", "lzma")


def pillow_image(rng: np.random.Generator, mode: str) -> Image.Image:
    picture = source(rng, 4)
    if mode == "I;16":
        return Image.fromarray(picture[..., 0])
    if mode in ("I", "F"):
        return Image.fromarray(picture[..., 0].astype(np.int32 if mode == "I" else np.float32))
    rgba = Image.fromarray(to_bits(picture, 8))
    if mode == "LAB":
        return (
            Image.fromarray(to_bits(picture, 8)[..., :3], "RGB").convert("YCbCr").copy()._new(rgba.im)
            if 0
            else Image.merge("LAB", rgba.split()[:3])
        )
    return (
        rgba if mode == "RGBA" else rgba.convert("RGB").convert(mode) if mode != "LA" else rgba.convert("LA")
    )


def by_pillow(rng: np.random.Generator) -> Written:
    form = choose(rng, PILLOW_MODES)
    mode = choose(rng, PILLOW_MODES[form])
    image = pillow_image(rng, mode)
    orientation = int(rng.integers(1, 9)) if form in ("PNG", "WEBP", "JPEG", "TIFF") else 1
    options: dict[str, Any] = {}
    if form in ("PNG", "WEBP", "JPEG"):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif.tobytes()
    if form == "JPEG":
        options |= {"quality": int(rng.integers(40, 101)), "progressive": bool(rng.integers(2))}
        options |= {"subsampling": choose(rng, (0, 1, 2)), "restart_marker_blocks": choose(rng, (0, 2))}
        options |= {"keep_rgb": True} if mode == "RGB" and rng.random() < 0.2 else {}
    elif form == "WEBP":
        options |= {"lossless": bool(rng.integers(2)), "exact": True}
    elif form == "PNG" and mode == "P" and rng.random() < 0.5:
        options["transparency"] = bytes(range(256))
    elif form == "TIFF":
        tags = TiffImagePlugin.ImageFileDirectory_v2()
        tags[ORIENTATION] = orientation
        options |= {"tiffinfo": tags, "compression": choose(rng, PILLOW_COMPRESSIONS)}
        options["big_tiff"] = bool(rng.integers(2))
    file = io.BytesIO()
    try:
        image.save(file, form, **options)
    except (OSError, ValueError):  # not every compression takes every mode
        options["compression"] = None
        file = io.BytesIO()
        image.save(file, form, **options)
    name = f"Pillow {form} {mode} orientation {orientation} { {**options, 'exif': 0, 'tiffinfo': 0} }"
    is_lossy = form in ("JPEG", "WEBP", "GIF") or options.get("compression") == "jpeg"
    again = Image.open(io.BytesIO(file.getvalue())) if is_lossy else image
    if is_lossy and form == "TIFF":
        return Written(
            name, file.getvalue(), meant(np.asarray(again.convert("RGB")), 8)
        )  # turned when loaded
    return Written(name, file.getvalue(), pillow_meant(again, orientation))


def pillow_meant(image: Image.Image, orientation: int) -> np.ndarray:
    if image.mode.startswith("I"):
        return meant(np.asarray(image), 16, orientation)
    if image.mode == "F":
        return meant(np.asarray(image) * 255.0, 8, orientation)
    if image.mode == "LAB":
        return np.full((1, 1, 3), -1.0)  # may only be refused
    return meant(np.asarray(image.convert("RGB")), 8, orientation)


# ----------------------------------------------------------------------------------------------- tifffile


def by_tifffile(rng: np.random.Generator) -> Written:
    kind = choose(rng, ("miniswhite", "minisblack", "rgb", "rgb", "palette", "separated", "cielab", "bands"))
    bits = choose(
        rng,
        {"palette": (8,), "rgb": (8, 8, 16, 16, 12), "separated": (8, 16)}.get(
            kind, (1, 2, 4, 8, 10, 12, 14, 16, 32)
        ),
    )
    num_extra = int(rng.integers(1, 4)) if rng.random() < 0.3 and kind in ("rgb", "minisblack") else 0
    colors = {"rgb": 3, "separated": 4, "cielab": 3, "bands": int(rng.integers(2, 14))}.get(kind, 1)
    picture = source(rng, colors + num_extra)
    samples = to_bits(picture, min(bits, 16))
    options: dict[str, Any] = {"photometric": "minisblack" if kind == "bands" else kind, "metadata": None}
    orientation = int(rng.integers(1, 9))
    options["extratags"] = [(ORIENTATION, 3, 1, orientation, True)]
    options["compression"] = choose(rng, (None, None, "lzw", "zlib", "packbits", "zstd", "jpeg", "lzma"))
    if options["compression"] in ("lzw", "zlib", "zstd") and bits in (8, 16) and rng.random() < 0.5:
        options["predictor"] = True
    if options["compression"] == "jpeg" and (bits != 8 or colors + num_extra > 4):
        options["compression"] = None
    if rng.random() < 0.4:
        options["tile"] = (16, 32)
    elif rng.random() < 0.5:
        options["rowsperstrip"] = int(rng.integers(1, 9))
    if num_extra:
        options["extrasamples"] = [choose(rng, (0, 1, 2)), *[0] * (num_extra - 1)]
    if colors + num_extra > 1:
        options["planarconfig"] = choose(rng, ("contig", "separate"))
    byteorder = choose(rng, "<>")
    if bits in (1, 2, 4, 10, 12, 14):
        options |= {"bitspersample": bits, "compression": None, "predictor": None}
    if kind == "palette":
        table = rng.integers(0, 65536, (3, 2**bits)).astype(np.uint16)
        options["colormap"] = table
        expected = meant(np.moveaxis(table, 0, -1)[samples[..., 0]], 16, orientation)
        samples = samples[..., :1]
    elif kind == "separated":
        c, m, y, k = np.moveaxis(1 - samples.astype(float) / (2**bits - 1), -1, 0)
        expected = meant(np.stack([c * k, m * k, y * k], -1) * 255, 8, orientation)
    else:
        expected = meant(samples, min(bits, 16), orientation)
        if kind == "miniswhite":
            expected = 255 - expected
        if kind in ("cielab", "bands"):
            expected = np.full((1, 1, 3), -1.0)
        if (
            num_extra and options["extrasamples"][0] == 1
        ):  # the given colors are said to be multiplied by alpha
            alpha = samples[..., colors : colors + 1].astype(float)
            straight = samples[..., :colors] * (2.0 ** min(bits, 16) - 1) / np.maximum(alpha, 1)
            expected = meant(straight, min(bits, 16), orientation)
    if bits == 32:
        samples = choose(
            rng,
            (
                samples.astype(np.uint32) << 16,
                samples.astype(np.int16) >> 1,
                (samples / 65535).astype(np.float32),
            ),
        )
        bits = 8 * samples.itemsize
    array = samples[..., 0] if samples.shape[-1] == 1 else samples
    if options.get("planarconfig") == "separate":
        array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    file = io.BytesIO()
    settings = {"bigtiff": bool(rng.integers(2)), "byteorder": byteorder}
    with tifffile.TiffWriter(file, **settings) as writer:
        if array.size and kind == "miniswhite" and rng.random() < 0.2:
            small = np.ascontiguousarray(array[::2, ::2])
            writer.write(array, **options)
            writer.write(small, **{**options, "subfiletype": 1})
        else:
            writer.write(array, **options)
    if options["compression"] == "jpeg" and expected.size > 3:
        with tifffile.TiffFile(io.BytesIO(file.getvalue())) as again:
            page = again.pages[0]
            own = page.asarray()
            own = np.moveaxis(own, 0, -1) if options.get("planarconfig") == "separate" else own
        if kind == "separated":
            c, m, y, k = np.moveaxis(1 - own.astype(float) / 255, -1, 0)
            own = np.stack([c * k, m * k, y * k], -1) * 255
        elif kind == "palette":
            own = (table >> 8).T[own]
        elif kind == "miniswhite":
            own = 255 - own
        expected = meant(own, 8, orientation)
        if num_extra and options["extrasamples"][0] == 1:
            expected = np.full((1, 1, 3), -1.0)
    return Written(
        f"tifffile {kind} {array.dtype} {bits} bits {settings} { {**options, 'colormap': 0} } orientation {orientation}",
        file.getvalue(),
        expected,
    )


# ------------------------------------------------------------------------------------------------- OpenCV

OPENCV = (
    ".png",
    ".tiff",
    ".bmp",
    ".ppm",
    ".pgm",
    ".pbm",
    ".webp",
    ".jpg",
    ".jp2",
    ".gif",
    ".avif",
    ".exr",
    ".hdr",
    ".pam",
    ".ras",
    ".pfm",
)


def by_opencv(rng: np.random.Generator) -> Written:
    while True:
        extension = choose(rng, OPENCV)
        channels = choose(rng, (1, 3, 3, 4))
        bits = choose(rng, (8, 16)) if extension in (".png", ".tiff", ".ppm", ".pgm", ".jp2", ".pam") else 8
        picture = to_bits(source(rng, channels), bits)
        given = (
            cv2.cvtColor(
                picture, {1: cv2.COLOR_GRAY2BGR, 3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}[channels]
            )
            if channels > 1
            else picture
        )
        options: list[int] = []
        if extension == ".tiff":
            options = [cv2.IMWRITE_TIFF_COMPRESSION, choose(rng, (1, 5, 8, 32773, 32946))]
        if extension == ".webp":
            options = [cv2.IMWRITE_WEBP_QUALITY, choose(rng, (80, 101))]
        if extension in (".exr", ".hdr", ".pfm") or (extension == ".tiff" and rng.random() < 0.1):
            given = given.astype(np.float32) / (2**bits - 1)
        try:
            is_written, data = cv2.imencode(extension, given, options)
        except cv2.error:  # not every format takes every number of channels
            continue
        if is_written:
            break
    raw = data.tobytes()
    expected = meant(picture, bits)
    if extension in (".jpg", ".webp", ".gif", ".pbm", ".pgm", ".ppm"):
        again = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_ANYDEPTH)
        expected = meant(again, 8 * again.itemsize)
    return Written(f"OpenCV {extension} {given.shape} {given.dtype} {options}", raw, expected)


# -------------------------------------------------------------------------------------------- ImageMagick

MAGICK: dict[str, tuple[tuple[str, ...], ...]] = {
    "png": (
        ("-depth", "8"),
        ("-depth", "16"),
        ("-colorspace", "Gray", "-depth", "16"),
        ("-colorspace", "Gray", "-depth", "2"),
        ("-type", "Palette"),
        ("-interlace", "PNG"),
        ("-define", "png:color-type=6", "-depth", "16"),
        ("-define", "png:color-type=4"),
        ("-monochrome",),
    ),
    "tiff": (
        ("-depth", "8", "-compress", "LZW"),
        ("-depth", "16", "-compress", "Zip"),
        ("-depth", "16", "-interlace", "Plane"),
        ("-interlace", "Plane", "-compress", "RLE"),
        ("-colorspace", "Gray", "-depth", "16", "-endian", "MSB"),
        ("-colorspace", "Gray", "-define", "quantum:polarity=min-is-white"),
        ("-colorspace", "CMYK"),
        ("-colorspace", "Lab"),
        ("-colorspace", "YCbCr", "-compress", "None"),
        ("-type", "Palette"),
        ("-monochrome", "-compress", "Group4"),
        ("-monochrome", "-define", "quantum:polarity=min-is-white"),
        ("-depth", "32", "-define", "quantum:format=floating-point"),
        ("-alpha", "set", "-define", "tiff:alpha=associated"),
        ("-alpha", "set", "-define", "tiff:alpha=unspecified"),
        ("-define", "tiff:tile-geometry=16x16"),
        ("-depth", "12"),
        ("-depth", "4", "-colorspace", "Gray"),
        ("-define", "tiff:fill-order=lsb", "-monochrome"),
        ("-compress", "JPEG"),
        ("-depth", "16", "-define", "quantum:format=signed"),
    ),
    "tiff64": (
        ("-depth", "16"),
        ("-endian", "MSB"),
        ("-interlace", "Plane", "-depth", "16", "-endian", "MSB"),
    ),
    "bmp": (
        (),
        ("-compress", "RLE", "-type", "Palette"),
        ("-define", "bmp:subtype=RGB565"),
        ("-define", "bmp:subtype=RGB555"),
        ("-define", "bmp:subtype=ARGB4444"),
        ("-define", "bmp:subtype=ARGB1555"),
        ("-alpha", "set"),
        ("-monochrome",),
        ("-colors", "12"),
    ),
    "bmp2": ((), ("-colors", "200")),
    "bmp3": ((), ("-alpha", "set"), ("-colors", "200", "-compress", "RLE")),
    "gif": ((), ("-interlace", "GIF"), ("-colors", "7")),
    "jpeg": (
        ("-quality", "90"),
        ("-sampling-factor", "4:4:4"),
        ("-interlace", "JPEG"),
        ("-colorspace", "CMYK"),
        ("-colorspace", "Gray"),
        ("-sampling-factor", "1x2"),
        ("-colorspace", "RGB"),
        ("-sampling-factor", "4:1:1"),
    ),
    "webp": (("-define", "webp:lossless=true"), ("-quality", "60")),
    "ppm": (
        ("-depth", "8"),
        ("-depth", "16"),
        ("-depth", "16", "-compress", "None"),
        ("-depth", "8", "-compress", "None"),
        ("-depth", "10"),
    ),
    "pgm": (("-depth", "8"), ("-depth", "16"), ("-depth", "12"), ("-compress", "None", "-depth", "16")),
    "pbm": ((), ("-compress", "None")),
    "pam": ((),),
    "jp2": ((),),
    "heic": ((),),
    "avif": ((),),
    "psd": ((),),
    "ptif": ((),),
    "ps": ((),),
}


def magick(arguments: list[str], given: bytes) -> bytes:
    done = subprocess.run(
        [str(IMAGEMAGICK), *arguments], input=given, capture_output=True, check=False, timeout=60
    )
    return done.stdout


def by_imagemagick(rng: np.random.Generator) -> Written:
    form = choose(rng, MAGICK)
    options = list(choose(rng, MAGICK[form]))
    orientation = int(rng.integers(1, 9)) if form in ("tiff", "tiff64") else 1
    picture = source(rng)
    height, width = picture.shape[:2]
    options += [
        "-orient",
        (
            "TopLeft",
            "TopRight",
            "BottomRight",
            "BottomLeft",
            "LeftTop",
            "RightTop",
            "RightBottom",
            "LeftBottom",
        )[orientation - 1],
    ]
    raw = magick(
        ["-size", f"{width}x{height}", "-depth", "16", "-endian", "LSB", "rgb:-", *options, f"{form}:-"],
        picture.astype("<u2").tobytes(),
    )
    back = magick(
        [
            "-",
            "-orient",
            "Undefined",
            "-alpha",
            "off",
            "-colorspace",
            "sRGB",
            "-endian",
            "LSB",
            "-depth",
            "16",
            "rgb:-",
        ],
        raw,
    )
    if len(back) != 6 * height * width:
        return Written(f"ImageMagick {form} {options}", raw, np.full((1, 1, 3), -1.0))
    own = np.frombuffer(back, "<u2").reshape(height, width, 3)
    return Written(f"ImageMagick {form} {options}", raw, meant(own, 16, orientation))


WRITERS: dict[str, Callable[[np.random.Generator], Written]] = {
    "Pillow": by_pillow,
    "tifffile": by_tifffile,
    "OpenCV": by_opencv,
    "ImageMagick": by_imagemagick,
}
