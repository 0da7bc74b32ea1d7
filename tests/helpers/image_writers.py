"""Random image files of every format, depth, plane layout and orientation that four other programs write.

Each comes with its writer's own pixels: what it was given, or what the same program reads back from it where the format
loses something.
"""

import io
import shutil
import subprocess
from collections.abc import Callable, Sequence
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


class Written(NamedTuple):
    """An image file and the pixels that its writer meant."""

    name: str
    raw: bytes
    pixels: (
        np.ndarray | None
    )  # h w 3, upright, 0..255 as floats; None: nobody can say, it may only be refused


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


def inked(inks: np.ndarray, most: int) -> np.ndarray:
    """The colors (h w 3, 0..255) of cyan, magenta, yellow and black ink."""
    left = 1 - inks.astype(float) / most
    return left[..., :3] * left[..., 3:] * 255


def choose(rng: np.random.Generator, choices: Sequence[Any]) -> Any:
    return choices[int(rng.integers(len(choices)))]


# ------------------------------------------------------------------------------------------------- Pillow

PILLOW_MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "GIF": ("1", "L", "P", "RGB"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "WEBP": ("RGB", "RGBA", "L"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
}
TIFF_COMPRESSIONS = (None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "zstd", "lzma")


def pillow_image(rng: np.random.Generator, mode: str) -> Image.Image:
    picture = source(rng, 4)
    if mode in ("I;16", "I", "F"):
        kind = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
        return Image.fromarray(picture[..., 0].astype(kind))
    rgba = Image.fromarray(to_bits(picture, 8))
    if mode == "LAB":
        return Image.merge("LAB", rgba.split()[:3])
    return rgba.convert(mode) if mode in ("RGBA", "LA") else rgba.convert("RGB").convert(mode)


def by_pillow(rng: np.random.Generator) -> Written:
    form = choose(rng, list(PILLOW_MODES))
    mode = choose(rng, PILLOW_MODES[form])
    image = pillow_image(rng, mode)
    orientation = int(rng.integers(1, 9)) if form in ("PNG", "WEBP", "JPEG", "TIFF") else 1
    options: dict[str, Any] = {}
    if form == "JPEG":
        options = {"quality": int(rng.integers(40, 101)), "progressive": bool(rng.integers(2))}
        options |= {"subsampling": choose(rng, (0, 1, 2)), "restart_marker_blocks": choose(rng, (0, 2))}
        options |= {"keep_rgb": True, "subsampling": 0} if mode == "RGB" and rng.random() < 0.2 else {}
    elif form == "WEBP":
        options = {"lossless": bool(rng.integers(2)), "exact": True}
    elif form == "PNG" and mode == "P" and rng.random() < 0.5:
        options = {"transparency": bytes(range(256))}
    elif form == "TIFF":
        more = {"1": ("group3", "group4"), "RGB": ("jpeg",), "L": ("jpeg",), "YCbCr": ("jpeg",)}.get(mode, ())
        options = {"compression": choose(rng, (*TIFF_COMPRESSIONS, *more)), "big_tiff": bool(rng.integers(2))}
    name = f"Pillow {form} {mode} orientation {orientation} {options}"
    if form == "TIFF":
        options["tiffinfo"] = TiffImagePlugin.ImageFileDirectory_v2()
        options["tiffinfo"][ORIENTATION] = orientation
    elif form in ("PNG", "WEBP", "JPEG"):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        options["exif"] = exif.tobytes()
    file = io.BytesIO()
    image.save(file, form, **options)
    if form in ("JPEG", "WEBP", "GIF") or options.get("compression") == "jpeg":
        image = Image.open(io.BytesIO(file.getvalue()))
        image.load()
        orientation = 1 if form == "TIFF" else orientation  # Pillow turns a TIFF when it loads it
    return Written(name, file.getvalue(), pillow_meant(image, orientation))


def pillow_meant(image: Image.Image, orientation: int) -> np.ndarray | None:
    if image.mode in ("LAB", "I", "F"):
        return None
    if image.mode == "I;16":
        return meant(np.asarray(image), 16, orientation)
    return meant(np.asarray(image.convert("RGB")), 8, orientation)


# ----------------------------------------------------------------------------------------------- tifffile

TIFFFILE_BITS = {"palette": (8,), "rgb": (8, 8, 12, 16, 16, 32), "separated": (8, 16), "cielab": (8,)}
GRAY_BITS = (1, 2, 4, 8, 8, 12, 14, 16, 16, 32)


def by_tifffile(rng: np.random.Generator) -> Written:
    kind = choose(
        rng, ("miniswhite", "minisblack", "rgb", "rgb", "rgb", "palette", "separated", "cielab", "bands")
    )
    bits = choose(rng, TIFFFILE_BITS.get(kind, GRAY_BITS))
    num_colors = {"rgb": 3, "separated": 4, "cielab": 3, "bands": int(rng.integers(2, 14))}.get(kind, 1)
    extra = choose(rng, ((), (0,), (1,), (2,), (2, 0, 0))) if kind in ("rgb", "minisblack") else ()
    samples = to_bits(source(rng, num_colors + len(extra)), min(bits, 16))
    if extra and extra[0] == 1 and rng.random() < 0.8:  # sometimes the alpha is no alpha
        samples = np.sort(samples, axis=-1)
    options, settings = tiff_layout(rng, bits, samples.shape[-1])
    options["photometric"] = "minisblack" if kind == "bands" else kind
    orientation = int(rng.integers(1, 9))
    options["extratags"] = [(ORIENTATION, 3, 1, orientation, True)]
    options |= {"extrasamples": extra} if extra else {}
    if kind == "palette":
        options["colormap"] = rng.integers(0, 65536, (3, 256)).astype(np.uint16)
    if bits == 32:
        numbers = (
            samples.astype(np.uint32) << 16,
            (samples >> 1).astype(np.int16),
            (samples / 65535).astype("f4"),
        )
        samples = choose(rng, numbers)
    array = samples[..., 0] if samples.shape[-1] == 1 else samples
    if options.get("planarconfig") == "separate":
        array = np.ascontiguousarray(np.moveaxis(array, -1, 0))
    file = io.BytesIO()
    with tifffile.TiffWriter(file, **settings) as writer:
        writer.write(array, metadata=None, **options)
    name = f"tifffile {kind} {array.shape} {array.dtype} {settings} { {**options, 'colormap': 0} }"
    if kind in ("cielab", "bands") or bits == 32:
        return Written(name, file.getvalue(), None)
    if options.get("compression") == "jpeg":
        samples = tifffile.imread(io.BytesIO(file.getvalue())).reshape(array.shape)
        samples = np.moveaxis(samples, 0, -1) if options.get("planarconfig") == "separate" else samples
    colors = tiff_meant(samples.reshape(*samples.shape[:2], -1), kind, bits, extra, options.get("colormap"))
    return Written(name, file.getvalue(), UPRIGHT[orientation](colors) if colors is not None else None)


def tiff_layout(rng: np.random.Generator, bits: int, num_samples: int) -> tuple[dict, dict]:
    """How tifffile is to arrange and compress the samples: options of a page and of the file."""
    options: dict[str, Any] = {}
    if bits in (1, 2, 4, 12, 14):  # tifffile compresses no packed samples
        options["bitspersample"] = bits
    else:
        compressions = [None, None, "lzw", "zlib", "packbits", "zstd", "lzma"]
        compressions += ["jpeg"] if bits == 8 and num_samples in (1, 3) else []
        options["compression"] = choose(rng, compressions)
        if options["compression"] in ("lzw", "zlib", "zstd", "lzma") and bits != 32:
            options["predictor"] = bool(rng.integers(2))
    layout = choose(rng, ({}, {"tile": (16, 32)}, {"rowsperstrip": int(rng.integers(1, 9))}))
    planes = {"planarconfig": choose(rng, ("contig", "separate"))} if num_samples > 1 else {}
    return {**options, **layout, **planes}, {"bigtiff": bool(rng.integers(2)), "byteorder": choose(rng, "<>")}


def tiff_meant(
    samples: np.ndarray, kind: str, bits: int, extra: Sequence[int], table: np.ndarray | None
) -> np.ndarray | None:
    most = 2**bits - 1
    if table is not None:
        return table.T[samples[..., 0]] * 255.0 / 65535
    if kind == "separated":
        return inked(samples, most)
    if extra and extra[0] == 1:  # the stored colors are multiplied by alpha
        colors, alpha = samples[..., :-1].astype(float), samples[..., -1:]
        return meant(colors * most / np.maximum(alpha, 1), bits) if (colors <= alpha).all() else None
    return 255 - meant(samples, bits) if kind == "miniswhite" else meant(samples, bits)


# ------------------------------------------------------------------------------------------------- OpenCV

# Extension -> numbers of channels, bits, options.
OPENCV: dict[str, tuple[Sequence[int], Sequence[int], Sequence[tuple[int, ...]]]] = {
    ".png": ((1, 3, 4), (8, 16), ((), (cv2.IMWRITE_PNG_BILEVEL, 1))),
    ".tiff": ((1, 3, 4), (8, 16, 32), tuple((cv2.IMWRITE_TIFF_COMPRESSION, n) for n in (1, 5, 8, 32773))),
    ".bmp": ((1, 3, 4), (8,), ((),)),
    ".ppm": ((3,), (8, 16), ((), (cv2.IMWRITE_PXM_BINARY, 0))),
    ".pgm": ((1,), (8, 16), ((), (cv2.IMWRITE_PXM_BINARY, 0))),
    ".pbm": ((1,), (8,), ((),)),
    ".webp": ((3, 4), (8,), ((cv2.IMWRITE_WEBP_QUALITY, 80), (cv2.IMWRITE_WEBP_QUALITY, 101))),
    ".jpg": ((1, 3), (8,), ((), (cv2.IMWRITE_JPEG_PROGRESSIVE, 1), (cv2.IMWRITE_JPEG_RST_INTERVAL, 2))),
    ".gif": ((3,), (8,), ((),)),
    ".pam": ((1, 3, 4), (8, 16), ((),)),
    ".pfm": ((1, 3), (32,), ((),)),
    ".hdr": ((3,), (32,), ((),)),
    ".ras": ((1, 3), (8,), ((),)),
}
TO_OPENCV = {3: cv2.COLOR_RGB2BGR, 4: cv2.COLOR_RGBA2BGRA}
LOSING = (".jpg", ".webp", ".gif", ".pbm")


def by_opencv(rng: np.random.Generator) -> Written:
    extension = choose(rng, list(OPENCV))
    channels, bits, options = (choose(rng, choices) for choices in OPENCV[extension])
    picture = to_bits(source(rng, channels), min(bits, 16))
    if cv2.IMWRITE_PNG_BILEVEL in options:
        bits, picture = 8, (picture[..., :1] > picture.max() // 2).astype(np.uint8) * 255
    given = cv2.cvtColor(picture, TO_OPENCV[channels]) if picture.shape[-1] > 1 else picture
    given = given.astype(np.float32) / 65535 if bits == 32 else given
    is_written, data = cv2.imencode(extension, given, options)
    assert is_written
    expected = None if bits == 32 else meant(picture, bits)
    if extension in LOSING:
        expected = meant(np.asarray(cv2.imdecode(data, cv2.IMREAD_COLOR_RGB)), 8)
    return Written(f"OpenCV {extension} {given.shape} {given.dtype} {options}", data.tobytes(), expected)


# -------------------------------------------------------------------------------------------- ImageMagick

IMAGEMAGICK = shutil.which("convert-im6.q16") or shutil.which("magick") or shutil.which("convert")
# Format -> how it may be written.
MAGICK: dict[str, tuple[str, ...]] = {
    "png": (
        "-depth 8",
        "-depth 16",
        "-colorspace Gray -depth 16",
        "-colorspace Gray -depth 2",
        "-type Palette",
        "-interlace PNG",
        "-define png:color-type=6 -depth 16",
        "-define png:color-type=4",
        "-monochrome",
    ),
    "tiff": (
        "-depth 8 -compress LZW",
        "-depth 16 -compress Zip",
        "-depth 16 -interlace Plane",
        "-depth 16 -interlace Plane -endian MSB",
        "-interlace Plane -compress RLE",
        "-colorspace Gray -depth 16 -endian MSB",
        "-colorspace Gray -define quantum:polarity=min-is-white",
        "-colorspace CMYK",
        "-colorspace CMYK -depth 8 -interlace Plane",
        "-colorspace Lab",
        "-colorspace YCbCr -compress None",
        "-type Palette -compress None",
        "-colors 12 -type Palette",
        "-monochrome -compress Group4",
        "-monochrome -define quantum:polarity=min-is-white",
        "-monochrome -define tiff:fill-order=lsb",
        "-depth 32 -define quantum:format=floating-point",
        "-depth 16 -define quantum:format=signed",
        "-depth 32",
        "-alpha set -define tiff:alpha=associated",
        "-alpha set -define tiff:alpha=unassociated",
        "-define tiff:tile-geometry=16x16",
        "-depth 12",
        "-depth 10 -colorspace Gray",
        "-depth 4 -colorspace Gray",
        "-compress JPEG",
        "-compress LZMA",
        "-compress ZSTD",
        "-define tiff:rows-per-strip=3",
    ),
    "tiff64": ("-depth 16", "-endian MSB", "-interlace Plane -depth 16 -endian MSB"),
    "ptif": ("-depth 8",),
    "bmp": (
        "-depth 8",
        "-type Palette -compress RLE",
        "-define bmp:subtype=RGB565",
        "-define bmp:subtype=RGB555",
        "-define bmp:subtype=ARGB4444",
        "-define bmp:subtype=ARGB1555",
        "-alpha set",
        "-monochrome",
        "-colors 12",
    ),
    "bmp2": ("-depth 8", "-colors 200"),
    "bmp3": ("-depth 8", "-alpha set", "-colors 200 -compress RLE"),
    "gif": ("-depth 8", "-interlace GIF", "-colors 7"),
    "jpeg": (
        "-quality 90",
        "-sampling-factor 4:4:4",
        "-interlace JPEG",
        "-colorspace CMYK",
        "-colorspace Gray",
        "-sampling-factor 1x2",
        "-sampling-factor 4:1:1",
    ),
    "webp": ("-define webp:lossless=true", "-quality 60"),
    "ppm": ("-depth 8", "-depth 16", "-depth 16 -compress None", "-depth 8 -compress None", "-depth 10"),
    "pgm": ("-depth 8", "-depth 16", "-depth 12", "-depth 16 -compress None"),
    "pbm": ("-depth 1", "-compress None"),
    "pam": ("-depth 8",),
    "psd": ("-depth 8",),
    "jp2": ("-quality 100",),
}
ORIENTATIONS = (
    "TopLeft",
    "TopRight",
    "BottomRight",
    "BottomLeft",
    "LeftTop",
    "RightTop",
    "RightBottom",
    "LeftBottom",
)
BACK = "-[0] -orient Undefined -alpha off -colorspace sRGB -endian LSB -depth 16 rgb:-"


def magick(arguments: Sequence[str], given: bytes) -> bytes:
    command = [str(IMAGEMAGICK), *arguments]
    return subprocess.run(command, input=given, capture_output=True, check=False, timeout=60).stdout


def by_imagemagick(rng: np.random.Generator) -> Written:
    """A file of ImageMagick, with what it reads back itself."""
    form = choose(rng, list(MAGICK))
    options = choose(rng, MAGICK[form])
    # It reads the JPEG parts of a turned TIFF through an interface of libtiff that turns them half.
    can_turn = form in ("tiff", "tiff64") and options != "-compress JPEG"
    orientation = int(rng.integers(1, 9)) if can_turn else 1
    picture = source(rng)
    height, width = picture.shape[:2]
    given = f"-size {width}x{height} -depth 16 -endian LSB rgb:-"
    turned = f"-orient {ORIENTATIONS[orientation - 1]} {form}:-"
    raw = magick(f"{given} {options} {turned}".split(), picture.astype("<u2").tobytes())
    name = f"ImageMagick {form} {options} orientation {orientation}"
    own = np.frombuffer(magick(BACK.split(), raw), "<u2").reshape(height, width, 3)
    is_unclear = form in ("pam", "psd", "jp2") or any(word in options for word in ("float", "signed", "Lab"))
    return Written(name, raw, None if is_unclear else meant(own, 16, orientation))


WRITERS: dict[str, Callable[[np.random.Generator], Written]] = {
    "Pillow": by_pillow,
    "tifffile": by_tifffile,
    "OpenCV": by_opencv,
    "ImageMagick": by_imagemagick,
}
