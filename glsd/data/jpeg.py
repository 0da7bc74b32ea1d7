"""JPEG: whole or cut off, upright or turned, decoded by libjpeg-turbo at full or reduced size."""

import io
import re
from collections.abc import Callable, Iterator

import cv2
import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image, JpegImagePlugin
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from glsd.data.pixels import Grid, check_size, exif_orientation, upright, upright_grid
from glsd.data.workers import single_threaded
from glsd.errors import BrokenImage

# Encoders write about ten. libjpeg goes over the whole image for each: a megabyte can hold 90,000, half an hour of work.
MAX_SCANS = 100

# Second bytes of JPEG markers.
END, SCAN = 0xD9, 0xDA
# No length follows these: restarts, start of image, no marker at all.
NO_LENGTH = frozenset((0x00, 0x01, *range(0xD0, 0xD9)))
FRAMES = frozenset((*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0)))
START_OF_IMAGE, END_OF_IMAGE, START_OF_SCAN = b"\xff\xd8", b"\xff\xd9", b"\xff\xda"
# Any marker, also after coded data, where 0x00 or a restart follows a 0xff that is no marker.
MARKER = re.compile(rb"\xff([^\x00\xff\xd0-\xd7])")
CUT = "truncated JPEG (no end-of-image marker)"
TAIL = 8  # bytes of coded data that matter to the pixels of any whole image

# Side of an image / side of the reduced image -> OpenCV's flag.
REDUCTIONS = {
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}


def open_jpeg(raw: bytes) -> JpegImagePlugin.JpegImageFile:
    """Return the header of a JPEG, as Pillow reads it; no pixel is decoded."""
    header = JpegImagePlugin.JpegImageFile(io.BytesIO(raw))
    check_size(*header.size)
    return header


def decode_jpeg(raw: bytes, reduction_of: Callable[[int, int], int]) -> tuple[UInt8[Tensor, "3 h w"], Grid]:
    """Return an upright JPEG, perhaps at reduced size, and the place of its pixels, as decode_reduced() does."""
    header = open_jpeg(raw)
    # The exact count is slow, so it is made only if needed: the bytes also occur in a film after the image.
    if raw.count(START_OF_SCAN) > MAX_SCANS and _num_scans(raw) > MAX_SCANS:
        raise BrokenImage(f"JPEG of more than {MAX_SCANS} scans")
    # libjpeg fills the rest with gray where the data end, so we check for completeness.
    if not _has_end(raw):
        raw = _ended(raw, header)
    orientation = exif_orientation(header.info.get("exif", b""))
    reduction = 1
    if header.mode not in ("RGB", "L"):
        pixels = torch.from_numpy(
            np.array(JpegImagePlugin.JpegImageFile(io.BytesIO(raw)).convert("RGB"))
        ).permute(2, 0, 1)
    elif (reduction := reduction_of(header.height, header.width)) > 1:
        pixels = _decode_reduced(raw, reduction)
    else:
        buffer = torch.frombuffer(bytearray(raw), dtype=torch.uint8)
        pixels = decode_image(buffer, mode=ImageReadMode.RGB)
    return upright(pixels, orientation), upright_grid(header.height, header.width, reduction, orientation)


def _decode_reduced(raw: bytes, reduction: int) -> UInt8[Tensor, "3 h w"]:
    flags = REDUCTIONS[reduction] | cv2.IMREAD_IGNORE_ORIENTATION
    with single_threaded():
        pixels = cv2.imdecode(np.frombuffer(raw, dtype=np.uint8), flags)
        if pixels is None:
            raise BrokenImage("unreadable: libjpeg-turbo cannot decode it at a reduced size")
        cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB, dst=pixels)
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _has_end(raw: bytes) -> bool:
    """Tell whether an end-of-image marker follows the scans of a JPEG.

    A thumbnail in an earlier segment has its own end, and anything may follow the end of the image. So go from segment to
    segment to the first scan, and search from there. Coded data cannot contain a start or end of image: 0x00 or a restart
    marker follows each byte 0xff in them. Source: ITU-T T.81, annex B.
    """
    place = 2
    while (place := raw.find(b"\xff", place)) >= 0 and place + 4 <= len(raw):
        marker = raw[place + 1]
        if marker == SCAN:
            end = raw.find(END_OF_IMAGE, place)
            return end >= 0 and raw.find(START_OF_IMAGE, place, end) < 0
        if marker == END:
            return False
        if marker == 0xFF:  # any number of these may precede a marker
            place += 1
        elif marker in NO_LENGTH:
            place += 2
        else:
            place += 2 + int.from_bytes(raw[place + 2 : place + 4])
    return False


def _segments(raw: bytes) -> Iterator[tuple[int, int]]:
    """Yield the marker of each segment and the place behind it, as libjpeg reads them, to the end of the image."""
    place = 2
    while (found := MARKER.search(raw, place)) and found[1] != END_OF_IMAGE[1:]:
        place = found.end()
        yield found[1][0], place
        if found[1][0] not in NO_LENGTH:
            place += int.from_bytes(raw[place : place + 2])


def _num_scans(raw: bytes) -> int:
    """Return the number of scans that libjpeg would read."""
    return sum(marker == SCAN for marker, _ in _segments(raw))


def _ended(raw: bytes, header: Image.Image) -> bytes:
    """Return a JPEG that lost nothing but its end marker, with one; BrokenImage if it lost more.

    All its scans are there, and what follows its coded data changes no pixel, but what follows them eight bytes earlier
    does: the decoder needs the last bytes and no further ones. Zeros at the end, of a broken copy, are no data.
    """
    data = raw.rstrip(b"\0")
    data = data + b"\0" if data.endswith(b"\xff") and len(data) < len(raw) else data.rstrip(b"\xff")
    start = _start_of_last_scan(data)
    # A block of 8 x 8 pixels takes a bit or more.
    if not start or 8 * 64 * len(data) < header.width * header.height:
        raise BrokenImage(CUT)
    tail = min(TAIL, len(data) - start)
    whole = _pixels(data)

    def is_whole_with(end: int) -> bool:
        start = data[:end].rstrip(b"\xff")  # it would begin a marker
        return all(np.array_equal(_pixels(start + _more_data(seed)), whole) for seed in range(4))

    # If the second were whole, too, the data would end somewhere before, and what follows them be something else.
    if not tail or not is_whole_with(len(data)) or is_whole_with(len(data) - tail):
        raise BrokenImage(CUT)
    return data + END_OF_IMAGE


def _more_data(seed: int) -> bytes:
    """Return noise that a decoder would take for coded data if some were missing, also where it waits for a restart."""
    rng = np.random.default_rng(seed)
    restarts = [b"", *(bytes([0xFF, marker]) for marker in range(0xD0, 0xD8))]
    return b"".join(restart + bytes(rng.integers(1, 255, 1024, np.uint8)) for restart in restarts)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(JpegImagePlugin.JpegImageFile(io.BytesIO(data + END_OF_IMAGE)))


def _start_of_last_scan(data: bytes) -> int:
    """Return where the coded data of the last scan begin; 0 if a scan is missing, or something follows the scans.

    Each coefficient of each component must have come down to its last bit. Source: ITU-T T.81, B.2.3 and G.1.1.
    """
    open_bits: dict[int, set[int]] = {}  # component -> coefficients that are not complete
    start = 0
    for marker, place in _segments(data):
        length = int.from_bytes(data[place : place + 2])
        segment = data[place + 2 : place + length]
        if marker in FRAMES:
            open_bits = {component: set(range(64)) for component in segment[6::3]}
        elif marker == SCAN and len(segment) == length - 2 == 4 + 2 * segment[0]:
            first, last, approximation = segment[-3:]
            start = place + length
            if not approximation & 15:
                for component in segment[1:-3:2]:
                    open_bits.get(component, set()).difference_update(range(first, last + 1))
        elif start and marker == START_OF_IMAGE[1]:
            return 0
    return 0 if any(open_bits.values()) else start
