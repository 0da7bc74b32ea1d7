"""TIFF: of its many layouts, those that are read right, by which reader, and the reasons against the others."""

import io
import logging
import math
import re
import struct
from dataclasses import dataclass
from types import ModuleType

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import TiffImagePlugin
from torch import Tensor

from glsd.data.pixels import MAX_PIXELS, ORIENTATION, check_size, upright
from glsd.errors import BrokenImage

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF, with 64-bit offsets
MAX_PAGES, MAX_SEGMENTS = 4096, 1 << 20
MAX_SAMPLES = 4 * MAX_PIXELS  # of an image or a tile
ROWS_AT_ONCE = 256  # whose colors are computed: bounds the memory for them

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER, DESCRIPTION = 256, 257, 258, 259, 262, 266, 270
STRIPS, SAMPLES, STRIP_ROWS, STRIP_SIZES, PLANAR, PREDICTOR, COLOR_MAP = 273, 277, 278, 279, 284, 317, 320
TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES, INK_SET, EXTRA, FORMAT = 322, 323, 324, 325, 332, 338, 339
SUBFILE, OLD_SUBFILE, DEPTH, STACK, PROFILE = 254, 255, 32997, 33629, 34675
# What a missing tag means.
DEFAULTS = dict.fromkeys((BITS, COMPRESSION, FILL_ORDER, SAMPLES, PLANAR, PREDICTOR, INK_SET, FORMAT), 1)
DEFAULTS |= {SUBFILE: 0, OLD_SUBFILE: 1, DEPTH: 1, ORIENTATION: 1}
TAGS = {*DEFAULTS, WIDTH, HEIGHT, PHOTOMETRIC, DESCRIPTION, STRIPS, STRIP_ROWS, STRIP_SIZES, COLOR_MAP}
TAGS |= {TILE_WIDTH, TILE_HEIGHT, TILES, TILE_SIZES, EXTRA, STACK, PROFILE}
# Type of a tag's values -> its letter in struct. Fractions and floats are in no tag that we read.
LETTERS = {1: "B", 2: "s", 3: "H", 4: "I", 6: "b", 7: "s", 8: "h", 9: "i", 13: "I", 16: "Q", 17: "q", 18: "Q"}

WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR = 0, 1, 2, 3, 5, 6
COLORS = {WHITE_IS_ZERO: 1, BLACK_IS_ZERO: 1, RGB: 3, PALETTE: 1, CMYK: 4, YCBCR: 3}  # samples of a color
PHOTOMETRICS = {4: "transparency mask", 8: "CIELab", 9: "ICCLab", 10: "ITULab", 32803: "raw camera data"}
PHOTOMETRICS |= {32844: "LogL", 32845: "LogLuv", 34892: "raw camera data"}
FORMATS = {2: ("signed integers", "int"), 3: ("floats", "float")}
NONE, LZW, JPEG, DEFLATE = 1, 5, 7, (8, 32946)
FAX = (2, 3, 4)
# LZMA, zstd: tifffile reads them, and not every Pillow.
PILLOW_COMPRESSIONS = (NONE, *FAX, LZW, JPEG, *DEFLATE, 32773)
COMPRESSIONS = (*PILLOW_COMPRESSIONS, 34925, 50000)
PREDICTED = (LZW, *DEFLATE, 34925, 50000)  # the others ignore the tag, or not
ASSOCIATED, UNASSOCIATED = 1, 2  # alpha that the colors are multiplied by; alpha beside them
PAGES_ADVICE = "save the picture that you mean as a file of one page"
BANDS_ADVICE = "save three of them as RGB"


@dataclass(frozen=True)
class Page:
    """A picture of a TIFF file, in its own words."""

    number: int  # of its directory in the file
    order: str  # of its bytes: < or >
    is_big: bool  # BigTIFF, with 64-bit offsets
    tags: dict[int, tuple]

    def first(self, tag: int) -> int:
        """Return the first number of a tag, or what its absence means."""
        value = self.tags.get(tag, (DEFAULTS.get(tag),))[0]
        if not isinstance(value, int):
            raise BrokenImage(f"damaged TIFF: tag {tag} is missing or no number")
        return value

    @property
    def height(self) -> int:
        """Stored rows."""
        return self.first(HEIGHT)

    @property
    def width(self) -> int:
        """Stored columns."""
        return self.first(WIDTH)

    @property
    def bits(self) -> int:
        """Bits a sample."""
        return self.first(BITS)

    @property
    def num_extra(self) -> int:
        """Samples of a pixel beside its color."""
        return self.first(SAMPLES) - COLORS[self.first(PHOTOMETRIC)]

    @property
    def extra(self) -> int:
        """What the first extra sample is; 0 = nobody says."""
        return self.first(EXTRA) if self.num_extra and EXTRA in self.tags else 0

    @property
    def is_gray(self) -> bool:
        """Whether no pixel has a color."""
        return self.first(PHOTOMETRIC) in (WHITE_IS_ZERO, BLACK_IS_ZERO)

    @property
    def profile(self) -> bytes:
        """The color profile, or nothing."""
        (profile,) = self.tags.get(PROFILE, (b"",))[:1]
        return profile if isinstance(profile, bytes) else b""


def open_tiff(raw: bytes) -> Page:
    """Return the picture that a TIFF file shows: its first page; no pixel is decoded.

    Raises BrokenImage for what no reader here reads right, and for a file of several gray pages of one size: whether they
    are channels, a stack or a film, each is a part of something. So it does where it takes the extra, without it.
    """
    pages = _pages(raw)
    shown = [page for page in pages if not page.first(SUBFILE) & 5 and page.first(OLD_SUBFILE) != 2]
    if not shown:
        raise BrokenImage(
            "TIFF of thumbnails and masks only: the picture may be raw camera data; develop it first"
        )
    page = shown[0]
    _check_layout(page)
    _check_data(page, len(raw))
    alike = sum(_shape(other) == _shape(page) for other in shown)
    if alike > 1 and page.bits > 1 and page.first(PHOTOMETRIC) in (WHITE_IS_ZERO, BLACK_IS_ZERO, PALETTE):
        raise BrokenImage(
            f"TIFF of {alike} pages of one channel each (channels, a stack or a film?): {PAGES_ADVICE}"
        )
    if len(shown) == 1 and (hidden := _hidden_pages(page)):
        raise BrokenImage(f"TIFF of {hidden}: {PAGES_ADVICE}")
    if not _is_pillows(page):
        _tifffile(page)  # now, so that a packing command says it
    return page


def decode_tiff(raw: bytes, page: Page) -> UInt8[Tensor, "3 h w"]:
    """Return the pixels of a page of open_tiff(), upright; alpha is dropped."""
    if _is_pillows(page):
        image = TiffImagePlugin.TiffImageFile(io.BytesIO(raw))
        image.info.pop("xmp", None)  # Pillow turns a TIFF when it loads it, and asks XMP, too
        if image.mode.startswith("I"):
            return _tensor(_gray((np.asarray(image) >> 8).astype(np.uint8)))
        return _tensor(np.array(image.convert("RGB")))
    with _tifffile(page).TiffFile(io.BytesIO(raw), is_ome=False) as file:
        samples = file.pages[page.number].asarray(squeeze=False, maxworkers=1)
    planes, height, width = _planes(page), page.height, page.width
    if samples.shape != (planes, 1, height, width, page.first(SAMPLES) // planes):
        raise BrokenImage(f"damaged TIFF: pixels of shape {samples.shape}")
    samples = np.moveaxis(samples[:, 0, :, :, 0], 0, -1) if planes > 1 else samples[0, 0]
    pixels = np.empty((height, width, 3), np.uint8)
    for row in range(0, height, ROWS_AT_ONCE):
        pixels[row : row + ROWS_AT_ONCE] = _colors(page, samples[row : row + ROWS_AT_ONCE])
    return upright(_tensor(pixels), page.first(ORIENTATION))


def _tifffile(page: Page) -> ModuleType:
    """Return the reader of the extra; BrokenImage without it."""
    try:
        import imagecodecs  # noqa: F401 - tifffile decompresses with it
        import tifffile
    except ImportError as error:
        what = f"{page.bits}-bit samples, PhotometricInterpretation {page.first(PHOTOMETRIC)}"
        raise BrokenImage(
            f"TIFF of a less common layout ({what}): to read it, pip install 'glsd[tiff]'"
        ) from error
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)  # what is wrong with a file is raised
    return tifffile


def _pages(raw: bytes) -> list[Page]:
    """Return every directory of the main chain."""
    order = "<" if raw[:2] == b"II" else ">"
    big = 43 in raw[2:4]
    count_of, entry, offset = (f"{order}Q", 20, f"{order}Q") if big else (f"{order}H", 12, f"{order}I")
    places: set[int] = set()
    pages: list[Page] = []
    (place,) = struct.unpack_from(offset, raw, 8 if big else 4)
    while place and place not in places:
        places.add(place)
        (count,) = struct.unpack_from(count_of, raw, place)
        start = place + struct.calcsize(count_of)
        if len(pages) == MAX_PAGES or start + count * entry > len(raw):
            raise BrokenImage("damaged TIFF, or one of too many pages")
        entries = (raw[start + n * entry : start + (n + 1) * entry] for n in range(count))
        pages.append(
            Page(len(pages), order, big, dict(filter(None, (_tag(raw, e, order, offset) for e in entries))))
        )
        (place,) = struct.unpack_from(offset, raw, start + count * entry)
    return pages


def _tag(raw: bytes, entry: bytes, order: str, offset: str) -> tuple[int, tuple] | None:
    """Return a tag that we read, and its values; None for another, or one that is damaged."""
    tag, kind = struct.unpack_from(f"{order}HH", entry)
    if tag not in TAGS or kind not in LETTERS:
        return None
    (count,) = struct.unpack_from(offset, entry, 4)
    form = f"{order}{count}{LETTERS[kind]}"
    inside = len(entry) - 4 - struct.calcsize(offset)
    if count > (len(raw) if LETTERS[kind] == "s" else MAX_SEGMENTS):
        raise BrokenImage(f"damaged TIFF: tag {tag} has {count} values")
    if struct.calcsize(form) <= inside:
        return tag, struct.unpack_from(form, entry, 4 + struct.calcsize(offset))
    (place,) = struct.unpack_from(offset, entry, 4 + struct.calcsize(offset))
    return (tag, struct.unpack_from(form, raw, place)) if place + struct.calcsize(form) <= len(raw) else None


def _shape(page: Page) -> tuple:
    return tuple(page.tags.get(tag, DEFAULTS.get(tag)) for tag in (WIDTH, HEIGHT, BITS, SAMPLES))


def _hidden_pages(page: Page) -> str:
    """Return what else lies behind the only page, where some writers say it in the description."""
    (text,) = page.tags.get(DESCRIPTION, (b"",))[:1]
    text = text[:65536] if isinstance(text, bytes) else b""
    found = re.search(rb"^images=(\d+)", text, re.MULTILINE) if text.startswith(b"ImageJ=") else None
    if found and int(found[1]) > 1:
        return f"an ImageJ stack of {int(found[1])} pages"
    if text.startswith(b'{"shape": [') and (found := re.match(rb'\{"shape": \[([0-9, ]+)\]', text)):
        size = math.prod(int(length) for length in found[1].split(b","))
        if size > page.width * page.height * page.first(SAMPLES):
            return f"an array of shape [{found[1].decode()}]"
    return "a MetaMorph stack" if STACK in page.tags else ""


def _check_layout(page: Page) -> None:
    """Raise BrokenImage unless we know how the samples of a page become colors."""
    check_size(page.width, page.height)
    if min(page.width, page.height) < 1 or page.first(DEPTH) != 1:
        raise BrokenImage("TIFF of no pixels, or of voxels")
    photometric, samples, bits = page.first(PHOTOMETRIC), page.first(SAMPLES), page.bits
    compression, predictor = page.first(COMPRESSION), page.first(PREDICTOR)
    if photometric not in COLORS:
        what = PHOTOMETRICS.get(photometric, f"unknown colors (PhotometricInterpretation {photometric})")
        raise BrokenImage(f"TIFF of {what}: convert it to RGB")
    if samples < COLORS[photometric] or len(set(page.tags.get(BITS, ()))) > 1:
        raise BrokenImage(f"TIFF of {samples} samples of {page.tags.get(BITS)} bits")
    formats = set(page.tags.get(FORMAT, (1,)))
    if wrong := sorted(formats - {1, 4}):
        what, name = FORMATS.get(wrong[0], ("complex numbers", "complex"))
        raise BrokenImage(
            f"TIFF of {what} ({name}{bits}), which have no agreed black and white: scale them to 8 or 16 bits"
        )
    if not 1 <= bits <= 16:
        raise BrokenImage(
            f"TIFF of {bits}-bit integers, which have no agreed white: scale them to 8 or 16 bits"
        )
    if page.order == ">" and bits not in (1, 2, 4, 8, 16):
        raise BrokenImage(
            f"TIFF of {bits}-bit samples in big-endian order, which writers disagree about: use 16 bits"
        )
    if page.first(PLANAR) not in (1, 2) or page.first(FILL_ORDER) not in (1, 2):
        raise BrokenImage("damaged TIFF: an unknown order of samples or bits")
    if compression not in COMPRESSIONS:
        raise BrokenImage(f"TIFF compression {compression} is not read: use LZW, deflate or none")
    if predictor != 1 and (predictor != 2 or compression not in PREDICTED):
        raise BrokenImage(f"TIFF predictor {predictor} with compression {compression} is not read")
    _check_extra(page)


def _check_extra(page: Page) -> None:
    """Raise BrokenImage unless the color of a page is all that its samples are, or clearly apart from the others."""
    photometric, count = page.first(PHOTOMETRIC), page.num_extra
    is_alpha = page.extra in (ASSOCIATED, UNASSOCIATED)
    if page.is_gray and count and not (count == 1 and is_alpha):
        raise BrokenImage(
            f"TIFF of {count + 1} bands, and nobody says which are red, green and blue: {BANDS_ADVICE}"
        )
    if photometric == WHITE_IS_ZERO and page.extra == ASSOCIATED:
        raise BrokenImage("TIFF of inverted gray that is multiplied by alpha: convert it to RGB")
    if photometric == CMYK and (page.first(INK_SET) != 1 or (count and page.extra != UNASSOCIATED)):
        raise BrokenImage("TIFF of other inks than cyan, magenta, yellow and black: convert it to RGB")
    if photometric == PALETTE and ((count and not is_alpha) or COLOR_MAP not in page.tags or page.bits > 8):
        raise BrokenImage("TIFF whose palette is missing, or does not say all: convert it to RGB")
    is_plain = page.bits == 8 and page.first(PLANAR) == 1 and not count
    if photometric == YCBCR and not (page.first(COMPRESSION) == JPEG and is_plain):
        raise BrokenImage("TIFF of YCbCr without JPEG compression: convert it to RGB")
    if page.first(COMPRESSION) == JPEG and page.bits != 8:
        raise BrokenImage(f"TIFF of {page.bits}-bit JPEG: use LZW, deflate or none")


def _planes(page: Page) -> int:
    return page.first(SAMPLES) if page.first(PLANAR) == 2 else 1


def _check_data(page: Page, length: int) -> None:
    """Raise BrokenImage unless every strip or tile is inside the file. Nobody would say that one is missing."""
    width, height = page.width, page.height
    if TILES in page.tags:
        columns, rows = page.first(TILE_WIDTH), page.first(TILE_HEIGHT)
        offsets, sizes = page.tags[TILES], page.tags.get(TILE_SIZES, page.tags.get(STRIP_SIZES, ()))
        check_size(columns, rows)
    else:
        columns, rows = width, min(height, page.first(STRIP_ROWS) if STRIP_ROWS in page.tags else height)
        offsets, sizes = page.tags.get(STRIPS, ()), page.tags.get(STRIP_SIZES, ())
    if max(width * height, columns * rows) * page.first(SAMPLES) > MAX_SAMPLES:
        raise BrokenImage(
            f"TIFF of {page.first(SAMPLES)} bands: more than the limit of {MAX_SAMPLES} samples"
        )
    if columns < 1 or rows < 1:
        raise BrokenImage("damaged TIFF: tiles or strips of no pixels")
    parts = _planes(page) * math.ceil(height / rows) * math.ceil(width / columns)
    if len(offsets) != parts or len(sizes) != parts or not all(sizes):
        raise BrokenImage(f"damaged TIFF: {len(offsets)} strips or tiles of {parts}")
    if max(offset + size for offset, size in zip(offsets, sizes, strict=True)) > length:
        raise BrokenImage("truncated TIFF: some pixels are behind the end of the file")
    if page.first(COMPRESSION) == NONE:
        line = math.ceil(columns * page.bits * page.first(SAMPLES) / _planes(page) / 8)
        lines = parts * rows if TILES in page.tags else _planes(page) * height
        if sum(sizes) < line * lines:
            raise BrokenImage("truncated TIFF: fewer bytes than pixels")


def _is_pillows(page: Page) -> bool:
    """Tell whether Pillow is known to read a page right, with or without the extra."""
    photometric, count, bits = page.first(PHOTOMETRIC), page.num_extra, page.bits
    if (page.first(PLANAR) == 2 and page.first(SAMPLES) > 1) or page.first(FILL_ORDER) != 1:
        return False
    if page.number or (page.is_big and page.order == ">"):
        return False
    if 4 in page.tags.get(FORMAT, ()) or page.first(COMPRESSION) not in PILLOW_COMPRESSIONS:
        return False
    if photometric == RGB:
        return bits in (8, 16) and (not count or (count == 1 and page.extra != ASSOCIATED))
    if photometric in (CMYK, PALETTE, YCBCR):
        return bits == 8 and not count and max(page.tags.get(COLOR_MAP, (256,))) > 255
    return not count and (bits == 1 or (photometric == BLACK_IS_ZERO and bits in (8, 16)))


def _colors(page: Page, samples: np.ndarray) -> UInt8[np.ndarray, "h w 3"]:
    """Return the colors of the samples (h w s) that tifffile has unpacked."""
    photometric, bits = page.first(PHOTOMETRIC), page.bits
    most = (1 << bits) - 1
    if photometric == PALETTE:
        table = np.array(page.tags[COLOR_MAP], dtype=np.uint16).reshape(3, -1)
        if table.shape[1] != 1 << bits:
            raise BrokenImage("damaged TIFF: a palette of another size")
        if table.max() > 255:  # else some writer took them for bytes
            table >>= 8
        return table.astype(np.uint8).T[samples[..., 0]]
    if page.extra == ASSOCIATED:
        values = _unmultiplied(samples[..., : COLORS[photometric]], samples[..., COLORS[photometric], None])
        return _gray(values[..., 0]) if page.is_gray else values
    samples = samples[..., : COLORS[photometric]]
    if photometric == CMYK:
        inks = most - samples.astype(np.uint32)  # 65535 x 65535 fits
        samples = inks[..., :3] * inks[..., 3:] // most
    elif photometric == WHITE_IS_ZERO:
        samples = most - samples.astype(np.uint16)
    values = samples >> (bits - 8) if bits > 8 else samples.astype(np.uint16) * 255 // most
    values = values.astype(np.uint8)
    return _gray(values[..., 0]) if page.is_gray else np.ascontiguousarray(values)


def _unmultiplied(colors: np.ndarray, alpha: np.ndarray) -> UInt8[np.ndarray, "h w c"]:
    """Return colors that were multiplied by alpha (h w 1) as they were before; 0 where alpha is 0."""
    if (colors > alpha).any():
        raise BrokenImage("TIFF whose colors exceed the alpha that they are said to be multiplied by")
    return (colors.astype(np.uint32) * 255 // np.maximum(alpha, 1)).astype(np.uint8)


def _tensor(pixels: UInt8[np.ndarray, "h w 3"]) -> UInt8[Tensor, "3 h w"]:
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _gray(values: UInt8[np.ndarray, "h w"]) -> UInt8[np.ndarray, "h w 3"]:
    return np.repeat(values[:, :, None], 3, axis=2)
