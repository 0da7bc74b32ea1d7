"""Image files written byte by byte, from the specifications of their formats."""

import struct
from collections.abc import Mapping, Sequence

import numpy as np


def packed(samples: np.ndarray, bits: int) -> bytes:
    """Rows of samples (h w) of any number of bits, most significant first; each row begins with a new byte."""
    place = np.arange(bits - 1, -1, -1)
    digits = (samples.astype(np.int64)[..., None] >> place & 1).reshape(len(samples), -1)
    return np.packbits(digits.astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: np.ndarray,
    bits: int,
    photometric: int,
    *,
    planar: int = 1,
    order: str = "<",
    **more: Sequence[int],
) -> bytes:
    """An uncompressed TIFF of one strip a plane, of samples (h w s). more: further tags by number, as ``t338=[2]``.

    Source: TIFF 6.0, sections 2 and 8.
    """
    height, width, count = samples.shape
    planes = np.moveaxis(samples, -1, 0) if planar == 2 else [samples.reshape(height, -1)]
    if bits in (16, 32):
        strips = [np.asarray(plane).astype(f"{order}u{bits // 8}").tobytes() for plane in planes]
    else:
        strips = [packed(np.asarray(plane), bits) for plane in planes]
    tags: dict[int, Sequence[int]] = {
        256: [width],
        257: [height],
        258: [bits] * count,
        259: [1],
        262: [photometric],
        273: np.cumsum([8, *map(len, strips)])[:-1].tolist(),
        277: [count],
        278: [height],
        279: [len(strip) for strip in strips],
        284: [planar],
        **{int(name[1:]): values for name, values in more.items() if len(values)},
    }
    start = b"II*\0" if order == "<" else b"MM\0*"
    data = b"".join(strips)
    data += bytes(len(data) % 2)
    return start + struct.pack(f"{order}I", 8 + len(data)) + data + directory(tags, 8 + len(data), order)


def directory(tags: Mapping[int, Sequence[int]], place: int, order: str = "<") -> bytes:
    """A directory of 32-bit numbers that lies at ``place``; longer lists follow it."""
    lists = place + 2 + 12 * len(tags) + 4
    entries, behind = b"", b""
    for tag, values in sorted(tags.items()):
        content = struct.pack(f"{order}{len(values)}I", *values)
        where = content if len(values) == 1 else struct.pack(f"{order}I", lists + len(behind))
        behind += b"" if len(values) == 1 else content
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + where
    return struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + behind


def bmp(
    rows: bytes,
    width: int,
    height: int,
    bits: int,
    *,
    form: int = 0,
    masks: bytes = b"",
    palette: bytes = b"",
) -> bytes:
    """A Windows bitmap; a negative height: the first row is the top one. form: 0 plain, 1 RLE8, 2 RLE4, 3 bit masks."""
    start = 54 + len(masks) + len(palette)
    info = struct.pack(
        "<IiiHHIIiiII", 40, width, height, 1, bits, form, len(rows), 0, 0, len(palette) // 4, 0
    )
    return b"BM" + struct.pack("<IHHI", start + len(rows), 0, 0, start) + info + masks + palette + rows


def padded(rows: np.ndarray) -> bytes:
    """Rows of bytes (h n), each filled up to a multiple of four."""
    return np.pad(rows, ((0, 0), (0, -rows.shape[1] % 4))).tobytes()


def gif(frames: Sequence[np.ndarray], palette: np.ndarray) -> bytes:
    """A GIF of frames (h w) of values below 128, uncompressed: codes of 8 bits, and a clear code before they would grow."""
    height, width = frames[0].shape
    raw = b"GIF89a" + struct.pack("<HHBBB", width, height, 0xF6, 0, 0) + palette.astype(np.uint8).tobytes()
    for frame in frames:
        flat = frame.astype(np.uint8).tobytes()
        codes = b"".join(b"\x80" + flat[n : n + 100] for n in range(0, len(flat), 100)) + b"\x81"
        blocks = [codes[n : n + 255] for n in range(0, len(codes), 255)]
        raw += b"," + struct.pack("<HHHHBB", 0, 0, width, height, 0, 7)
        raw += b"".join(bytes([len(block)]) + block for block in blocks) + b"\0"
    return raw + b";"
