"""Image files of many kinds, and a seeded mutator that damages them; run as a script, it feeds them to the decoder."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import tifffile
from PIL import Image, TiffImagePlugin

HEIGHT, WIDTH = 24, 32
ORIENTATION = 0x0112


def picture(height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Smooth colors with an edge and some noise: no two pixels mirror each other."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([60 + 5 * x, 30 + 7 * y, 200 - 3 * x - 2 * y], axis=-1)
    noise = np.random.default_rng(7).integers(-9, 10, waves.shape)
    waves[height // 3 :, : width // 4] += 40
    return np.clip(waves + noise, 0, 255).astype(np.uint8)


def encode(image: Image.Image, form: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def exif(orientation: int, thumbnail: bytes = b"") -> bytes:
    """An EXIF block that names an orientation; with a thumbnail, as cameras write them."""
    entry = struct.pack(">HHHIHH", 1, ORIENTATION, 3, 1, orientation, 0)
    if not thumbnail:
        return b"Exif\0\0MM\0*\0\0\0\x08" + entry + bytes(4)
    second = struct.pack(">HHHIIHHII", 2, 0x0201, 4, 1, 56, 0x0202, 4, 1, len(thumbnail)) + bytes(4)
    return b"Exif\0\0MM\0*\0\0\0\x08" + entry + struct.pack(">I", 26) + second + thumbnail


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(
    width: int,
    height: int,
    rows: bytes,
    *,
    bits: int = 8,
    color: int = 2,
    extra: bytes = b"",
    adam7: int = 0,
) -> bytes:
    """A PNG file of filtered rows, as they are or already compressed."""
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, adam7)
    data = rows if rows[:1] == b"\x78" else zlib.compress(rows, 9)
    chunks = [png_chunk(b"IHDR", header), extra, png_chunk(b"IDAT", data), png_chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def interlaced_png(pixels: np.ndarray) -> bytes:
    """Seven coarse to fine passes: Pillow reads but does not write them. Source: PNG specification, section 8.2."""
    passes = [
        (0, 0, 8, 8),
        (0, 4, 8, 8),
        (4, 0, 8, 4),
        (0, 2, 4, 4),
        (2, 0, 4, 2),
        (0, 1, 2, 2),
        (1, 0, 2, 1),
    ]
    rows = [b"\0" + row.tobytes() for y, x, dy, dx in passes for row in pixels[y::dy, x::dx] if row.size]
    return png(pixels.shape[1], pixels.shape[0], b"".join(rows), adam7=1)


def tiled_tiff(pixels: np.ndarray, side: int = 16) -> bytes:
    """Uncompressed tiles, one after the other, with the directory behind them."""
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((0, -height % side), (0, -width % side), (0, 0)))
    grid = [(y, x) for y in range(0, height, side) for x in range(0, width, side)]
    tiles = [padded[y : y + side, x : x + side].tobytes() for y, x in grid]
    size, count = len(tiles[0]), len(tiles)
    data = b"".join(tiles)
    lists = 8 + len(data)
    offsets = struct.pack(f"<{count}I", *(8 + size * n for n in range(count)))
    sizes = struct.pack(f"<{count}I", *[size] * count)
    bits = lists + len(offsets) + len(sizes)
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, bits), (259, 3, 1, 1), (262, 3, 1, 2)]
    entries += [(277, 3, 1, 3), (284, 3, 1, 1), (322, 4, 1, side), (323, 4, 1, side)]
    entries += [(324, 4, count, lists), (325, 4, count, lists + len(offsets))]
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in entries)
    start = struct.pack("<I", bits + 6)
    return b"II*\0" + start + data + offsets + sizes + struct.pack("<3H", 8, 8, 8) + directory + bytes(4)


def frames(mode: str = "RGB") -> list[Image.Image]:
    return [Image.fromarray(np.roll(picture(), 5 * n, axis=1)).convert(mode) for n in range(3)]


def several(form: str, **options) -> bytes:
    first, *others = frames()  # new objects each time: Pillow leaves settings of one format in them
    return encode(first, form, save_all=True, append_images=others, **options)


def originals() -> dict[str, bytes]:
    """Whole files of every kind that users have; all but the float one can be read."""
    rgb = Image.fromarray(picture())
    gray16 = Image.fromarray(picture()[..., 0].astype(np.uint16) * 257)
    rgba = rgb.copy()
    rgba.putalpha(Image.fromarray(picture()[..., 1]))
    palette = rgb.quantize(32)
    files = {
        "jpeg": encode(rgb, "JPEG"),
        "jpeg 444 restarts": encode(rgb, "JPEG", subsampling=0, restart_marker_blocks=2),
        "jpeg progressive": encode(rgb, "JPEG", progressive=True, quality=90),
        "jpeg gray": encode(rgb.convert("L"), "JPEG"),
        "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG"),
        "jpeg cmyk progressive": encode(rgb.convert("CMYK"), "JPEG", progressive=True),
        "jpeg icc": encode(rgb, "JPEG", icc_profile=bytes(200), comment=b"a comment"),
        "jpeg thumbnail": encode(rgb, "JPEG", exif=exif(3, encode(rgb.resize((16, 12)), "JPEG"))),
        "mpo": several("MPO"),
        "png": encode(rgb, "PNG"),
        "png alpha": encode(rgba, "PNG"),
        "png gray alpha": encode(rgba.convert("LA"), "PNG"),
        "png 16": encode(gray16, "PNG"),
        "png rgb 16": png(4, 2, bytes(1) + bytes(range(24)) + bytes(1) + bytes(range(24)), bits=16),
        "png palette": encode(palette, "PNG", transparency=bytes(range(32))),
        "png 1 bit": encode(rgb.convert("1"), "PNG"),
        "png interlaced": interlaced_png(picture()),
        "png exif": encode(rgb, "PNG", exif=exif(6)),
        "apng": several("PNG"),
        "webp": encode(rgb, "WEBP"),
        "webp lossless alpha": encode(rgba, "WEBP", lossless=True, exif=exif(8)),
        "webp animated": several("WEBP"),
        "gif": encode(palette, "GIF"),
        "gif animated": several("GIF"),
        "bmp": encode(rgb, "BMP"),
        "bmp palette": encode(palette, "BMP"),
        "tiff": encode(rgb, "TIFF"),
        "tiff lzw": encode(rgba, "TIFF", compression="tiff_lzw"),
        "tiff jpeg": encode(rgb, "TIFF", compression="jpeg"),
        "tiff pages": several("TIFF", compression="tiff_adobe_deflate"),
        "tiff 16": encode(gray16, "TIFF", compression="tiff_deflate"),
        "tiff float": encode(rgb.convert("F"), "TIFF"),
        "tiff tiled": tiled_tiff(picture()),
        "tiff cmyk": encode(rgb.convert("CMYK"), "TIFF"),
        **rare_tiffs(),
        "tiff turned": encode(rgb, "TIFF", tiffinfo=turned()),
        "ppm": encode(rgb, "PPM"),
        "pgm 16": encode(gray16, "PPM"),
        "pgm 10 bit": b"P5 8 4 1023\n" + (np.arange(32) * 33).astype(">u2").tobytes(),
        "ppm plain": b"P3 2 2 255\n" + b" ".join(b"%d" % n for n in range(0, 240, 20)),
        "pbm": encode(rgb.convert("1"), "PPM"),
    }
    return files | {f"jpeg turned {n}": encode(rgb, "JPEG", exif=exif(n)) for n in range(2, 9)}


def rare_tiffs() -> dict[str, bytes]:
    """Layouts that Pillow does not read right."""
    planes = np.moveaxis(picture(), -1, 0)
    deep = picture().astype(np.uint16) * 257
    white = 255 - picture()[..., 0]
    made: dict[str, tuple[np.ndarray, str, dict, dict]] = {
        "tiff planes": (planes, "rgb", {"planarconfig": "separate", "compression": "zlib"}, {}),
        "tiff white": (white, "miniswhite", {"compression": "lzw", "tile": (16, 16)}, {}),
        "tiff planes 16": (np.moveaxis(deep, -1, 0), "rgb", {"planarconfig": "separate"}, {"byteorder": ">"}),
        "tiff big 16": (
            deep,
            "rgb",
            {"compression": "zlib", "predictor": True},
            {"byteorder": ">", "bigtiff": True},
        ),
    }
    files = {}
    for name, (array, kind, options, settings) in made.items():
        file = io.BytesIO()
        tifffile.imwrite(file, array, photometric=kind, metadata=None, **options, **settings)
        files[name] = file.getvalue()
    return files


def turned() -> TiffImagePlugin.ImageFileDirectory_v2:
    directory = TiffImagePlugin.ImageFileDirectory_v2()
    directory[ORIENTATION] = 6
    return directory


# How the bytes of any file are damaged: (file, another file, generator) -> file.


def flip_bits(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(raw)
    for place in rng.integers(0, len(raw), rng.integers(1, 9)):
        changed[place] ^= 1 << rng.integers(0, 8)
    return bytes(changed)


def spoil_header(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(raw)
    for place in rng.integers(0, min(len(raw), 64), rng.integers(1, 4)):
        changed[place] = rng.choice([0, 1, 0x7F, 0x80, 0xFF, int(rng.integers(0, 256))])
    return bytes(changed)


def delete(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(0, len(raw) + 1, 2).tolist())
    return raw[:first] + raw[min(last, first + 64) :]


def insert(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    place = int(rng.integers(0, len(raw) + 1))
    return raw[:place] + rng.bytes(int(rng.integers(1, 64))) + raw[place:]


def truncate(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    return raw[: int(rng.integers(0, len(raw)))]


def blank(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    place, length = (int(n) for n in rng.integers(0, [len(raw), 128]))
    return raw[:place] + bytes([rng.choice([0, 255])]) * length + raw[place + length :]


def splice(raw: bytes, other: bytes, rng: np.random.Generator) -> bytes:
    return raw[: int(rng.integers(0, len(raw)))] + other[int(rng.integers(0, len(other))) :]


def repeat(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    first, last = sorted(rng.integers(0, len(raw) + 1, 2).tolist())
    return raw[:last] + raw[first:last] * int(rng.integers(1, 4)) + raw[last:]


def swap(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    a, b, c, d = sorted(rng.integers(0, len(raw) + 1, 4).tolist())
    return raw[:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:]


def edit_size(raw: bytes, _: bytes, rng: np.random.Generator) -> bytes:
    """Other numbers where the file says how large it is, or something else of that value."""
    value = int(rng.choice([WIDTH, HEIGHT, 8, 3, 1, 255]))
    order = str(rng.choice(["<", ">"])) + str(rng.choice(["H", "I"]))
    found = [n for n in range(len(raw) - 4) if raw.startswith(struct.pack(order, value), n)]
    if not found:
        return flip_bits(raw, raw, rng)
    limit = 2 ** (8 * struct.calcsize(order)) - 1
    new = int(rng.choice([0, 1, value + 1, value - 1, 4 * value, 65535, limit, limit // 2 + 1]))
    place = int(rng.choice(found))
    changed = struct.pack(order, min(new, limit))
    return raw[:place] + changed + raw[place + len(changed) :]


MUTATIONS: tuple[Callable[[bytes, bytes, np.random.Generator], bytes], ...] = (
    flip_bits,
    spoil_header,
    delete,
    insert,
    truncate,
    blank,
    splice,
    repeat,
    swap,
    edit_size,
)


def mend_png(raw: bytes) -> bytes:
    """The same chunks with right checksums, so that damage comes as far as the decoder."""
    place, mended = 8, raw[:8]
    while place + 12 <= len(raw):
        (length,) = struct.unpack_from(">I", raw, place)
        if place + 12 + length > len(raw):
            break
        mended += png_chunk(raw[place + 4 : place + 8], raw[place + 8 : place + 8 + length])
        place += 12 + length
    return mended + raw[place:]


def mutated(number: int, files: dict[str, bytes], seed: int) -> tuple[str, bytes]:
    """Damaged file ``number`` of a seed: one or two mutations of one of the files."""
    rng = np.random.default_rng([seed, number])
    names = sorted(files)
    name = names[number % len(names)]
    raw, other = files[name], files[names[int(rng.integers(0, len(names)))]]
    made = []
    for _ in range(int(rng.integers(1, 3))):
        mutation = MUTATIONS[int(rng.integers(0, len(MUTATIONS)))]
        raw = mutation(raw, other, rng) if raw else raw
        made.append(mutation.__name__)
    if raw.startswith(b"\x89PNG") and rng.random() < 0.7:
        raw = mend_png(raw)
    return f"{name}: {', '.join(made)}", raw
