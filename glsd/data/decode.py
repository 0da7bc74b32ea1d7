"""Decoding: the bytes of one image file to uint8 RGB pixels, at full or reduced size, or the reason why not.

docs/images.md says what is read, how, and what is refused. A reduced image comes with a Grid: which source pixels each of
its pixels stands for.
"""

import contextlib
import io
import re
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from glsd.data.jpeg import decode_jpeg, open_jpeg
from glsd.data.pixels import DECODE_ERRORS, Grid, check_size, exif_orientation, upright
from glsd.data.tiff import MAGICS, PALETTE, PHOTOMETRIC, decode_tiff, open_tiff
from glsd.errors import BrokenImage, one_line

# The formats that Pillow reads for us. It would recognize others by their bytes, whatever the file is called. One is EPS,
# which it hands to Ghostscript: a program that runs programs.
FORMATS = ("PNG", "WEBP", "BMP", "PPM", "GIF")
JPEG_MAGIC, PNG_MAGIC = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
# What Pillow converts to RGB as a viewer shows it. Alpha is dropped, the colors below it stay.
MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "1", "P", "PA", "CMYK")
# How files begin that people take for images of ours.
OTHERS = {
    "JPEG 2000": rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL ",
    "AVIF": rb"....ftypavi[fs]",
    "HEIC": rb"....ftyp(hei|hev|mif|msf)",
    "raw camera data": rb"....ftypcrx|FUJIFILMCCD-RAW|II[RU][O\0]",
    "Photoshop": rb"8BPS",
    "PostScript": rb"%!PS|\xc5\xd0\xd3\xc6",
    "PDF": rb"%PDF",
    "PAM": rb"P7\s",
    "PFM": rb"P[fF]\s",
    "a Sun raster": rb"\x59\xa6\x6a\x95",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance": rb"#\?RADIANCE",
    "FITS": rb"SIMPLE  =",
    "DICOM": rb".{128}DICM",
    "DDS": rb"DDS ",
    "an icon": rb"\0\0[\1\2]\0",
    "SVG": rb"\s*(<\?xml[^>]*>\s*)?<svg",
    "a web page": rb"(?i)\s*<(!doctype )?html",
}
# tifffile, torchvision and OpenCV put their own source file and line before the message.
LIBRARY_SOURCE = re.compile(r"^(decode_jpeg, .*?:[0-9]+, |OpenCV\(.*?\) .*?:[0-9]+: )")
MAX_EXIF = 1 << 20  # bytes, unpacked


class Header(NamedTuple):
    """What an image file says of itself before a pixel is decoded."""

    kind: str  # jpg, png, webp, bmp, ppm, gif or tiff: also the extension of such files
    height: int  # as stored, in pixels
    width: int
    bits: int  # of a sample; a palette's colors have 8
    is_gray: bool  # without alpha
    profile: bytes  # of the colors, or nothing


def decode(raw: bytes) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an image file as RGB, upright (EXIF orientation applied), channels last in memory.

    Gray is repeated, alpha dropped, a color profile ignored; samples of more than 8 bits keep their high byte. The first
    frame of an animation and the first page of a file are taken. Raises BrokenImage for empty, truncated or unreadable
    files, and where docs/images.md says so. Damage inside complete data looks like noise and passes.
    """
    return decode_reduced(raw, lambda height, width: 1)[0]


def decode_reduced(
    raw: bytes, reduction_of: Callable[[int, int], int]
) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    """Return the image as decode() does, perhaps at reduced size, and the place of its pixels in the source.

    reduction_of: from stored height and width in pixels (swapped in some EXIF orientations) to 1, 2, 4 or 8. Only RGB and
    gray JPEG files are reduced: libjpeg-turbo never computes the high frequencies. Raises BrokenImage as decode() does.
    """
    with _broken_if_unreadable(raw):
        if raw.startswith(JPEG_MAGIC):
            return decode_jpeg(raw, reduction_of)
        if raw.startswith(MAGICS):
            pixels = decode_tiff(raw, open_tiff(raw))
        else:
            image, orientation = _open_other(raw)
            pixels = upright(torch.from_numpy(_rgb(image)).permute(2, 0, 1), orientation)
        return pixels, Grid(height=pixels.shape[1], width=pixels.shape[2])


def read_header(raw: bytes) -> Header:
    """Return what an image file says of itself. Raises BrokenImage for one of a kind or size that decode() refuses."""
    with _broken_if_unreadable(raw):
        if raw.startswith(JPEG_MAGIC):
            jpeg = open_jpeg(raw)
            profile = jpeg.info.get("icc_profile") or b""
            return Header("jpg", jpeg.height, jpeg.width, 8, jpeg.mode == "L", profile)
        if raw.startswith(MAGICS):
            page = open_tiff(raw)
            bits = 8 if page.first(PHOTOMETRIC) == PALETTE else page.bits
            is_gray = page.is_gray and not page.num_extra
            return Header("tiff", page.height, page.width, bits, is_gray, page.profile)
        image, _ = _open_other(raw)
        kind = str(image.format).lower()
        is_gray = image.mode in ("1", "L") or image.mode.startswith("I")
        profile = _png_profile(raw) if kind == "png" else image.info.get("icc_profile")
        return Header(kind, image.height, image.width, _bits(raw, image), is_gray, profile or b"")


def from_pillow(image: Image.Image) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of an opened Pillow image as decode() would; BrokenImage for a mode that it refuses."""
    orientation = exif_orientation(image.info.get("exif", b""))
    return upright(torch.from_numpy(_rgb(image)).permute(2, 0, 1), orientation)


@contextlib.contextmanager
def _broken_if_unreadable(raw: bytes) -> Iterator[None]:
    if not raw:
        raise BrokenImage("empty file (0 bytes)")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # where Pillow guesses: here an image is readable or broken
            yield
    except Image.UnidentifiedImageError as error:
        raise BrokenImage(_unknown(raw)) from error
    except DECODE_ERRORS as error:
        message = LIBRARY_SOURCE.sub("", one_line(error))[:200]
        raise BrokenImage(f"unreadable: {message}") from error


def _unknown(raw: bytes) -> str:
    """Return what a file is that is no image of ours."""
    said = "not an image of a known format"
    for name, start in OTHERS.items():
        if re.match(start, raw[:1024], re.DOTALL):
            return f"{said}: it looks like {name}; convert it to PNG or JPEG"
    return said


def _open_other(raw: bytes) -> tuple[Image.Image, int]:
    """Return an image that Pillow reads, before it is decoded, and its EXIF orientation."""
    # Pillow allocates the canvas of an animated WebP two or three times when it opens the file.
    if raw[:4] == b"RIFF" and raw[8:16] == b"WEBPVP8X":
        check_size(*(1 + int.from_bytes(raw[place : place + 3], "little") for place in (24, 27)))
    exif = b""
    if raw.startswith(PNG_MAGIC):
        raw, exif = _png_pixels(raw)
    image = Image.open(io.BytesIO(raw), formats=FORMATS)
    check_size(*image.size)
    return image, exif_orientation(exif or image.info.get("exif", b""))


def _png_chunks(raw: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Yield the type of each chunk of a PNG, and where it begins and ends; the last may reach beyond the file."""
    place = len(PNG_MAGIC)
    while place < len(raw):
        end = place + 12 + int.from_bytes(raw[place : place + 4])
        yield raw[place + 4 : place + 8], place, end
        place = end


def _png_pixels(raw: bytes) -> tuple[bytes, bytes]:
    """Return a PNG without what its pixels do not need, and its EXIF data.

    Pillow refuses a file for too large or damaged texts and profiles. The chunks that matter have a capital first letter.
    ImageMagick writes EXIF data as a text, too.
    """
    parts, exif = [PNG_MAGIC], b""
    for kind, start, end in _png_chunks(raw):
        content = raw[start + 8 : end - 4]
        if not kind[:1].islower():
            parts.append(raw[start:end])
        elif kind == b"eXIf" and zlib.crc32(kind + content) == int.from_bytes(raw[end - 4 : end]):
            exif = b"Exif\0\0" + content
        elif kind == b"zTXt" and content.startswith(b"Raw profile type exif\0\0") and not exif:
            exif = _exif_of_text(content.split(b"\0\0", 1)[1])
    return b"".join(parts), exif


def _exif_of_text(packed: bytes) -> bytes:
    """Return EXIF data that ImageMagick wrote as hexadecimal digits: a name and a length come first."""
    try:
        lines = zlib.decompressobj().decompress(packed, MAX_EXIF).split(b"\n")
        return bytes.fromhex(b"".join(lines[3:]).decode("ascii"))
    except (zlib.error, ValueError):
        return b""


def _png_profile(raw: bytes) -> bytes:
    """Return the color profile of a PNG of at most MAX_EXIF bytes."""
    for kind, start, end in _png_chunks(raw):
        if kind == b"iCCP":
            _, _, packed = raw[start + 8 : end - 4].partition(b"\0")
            unpacker = zlib.decompressobj()
            with contextlib.suppress(zlib.error):
                profile = unpacker.decompress(packed[1:], MAX_EXIF)
                return profile if unpacker.eof else b""
    return b""


def _bits(raw: bytes, image: Image.Image) -> int:
    """Return the bits of a sample, from the header of a PNG or PPM."""
    if image.format == "PNG":
        return 8 if image.mode == "P" else raw[24]
    if image.format == "PPM":
        words = re.sub(rb"#[^\r\n]*", b"", raw[:1024]).split()
        return 16 if words[0] not in (b"P1", b"P4") and int(words[3]) > 255 else 8
    return 8


def _rgb(image: Image.Image) -> UInt8[np.ndarray, "h w 3"]:
    if image.mode.startswith("I"):
        # convert("RGB") would clip instead of scale: every 16-bit image would turn white.
        gray = np.asarray(image)
        if gray.min() < 0 or gray.max() > 65535:
            raise BrokenImage(f"pixels of {gray.dtype} outside 0..65535")
        return np.repeat((gray >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode not in MODES:
        raise BrokenImage(f"pixels of Pillow's mode {image.mode}, which have no agreed black and white")
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))
