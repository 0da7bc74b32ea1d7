"""Malicious and damaged images give pixels or BrokenImage with a reason, never anything else."""

import io
import json
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from glsd.data.decode import decode
from glsd.errors import BrokenImage
from tests.helpers import fuzz_images, fuzz_watch
from tests.helpers.fuzz_images import (
    encode,
    exif,
    picture,
    png,
    png_chunk,
)
from tests.helpers.image_bytes import directory, tiff

SEED = 5
NUM_MUTATED = 1000


def pixels_of(raw: bytes) -> np.ndarray:
    return decode(raw).permute(1, 2, 0).numpy()


def by_pillow(raw: bytes) -> np.ndarray:
    return np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(raw))).convert("RGB"))


@pytest.mark.parametrize("name", sorted(set(fuzz_images.originals()) - {"tiff float"}))
def test_whole_files_look_as_in_a_viewer(name):
    raw = fuzz_images.originals()[name]
    expected = picture() if name in fuzz_images.rare_tiffs() else by_pillow(raw)
    if name in ("png 16", "tiff 16", "pgm 16", "tiff white"):  # convert() would clip them to white
        expected = picture()[..., :1].repeat(3, axis=2)
    elif name == "pgm 10 bit":
        expected = (
            (np.arange(32).reshape(4, 8, 1) * 33 * 65535 / 1023 / 256).astype(np.uint8).repeat(3, axis=2)
        )
    assert np.abs(pixels_of(raw).astype(int) - expected).max() <= (4 if raw[:2] == b"\xff\xd8" else 0)


def zipped(kind: bytes, count: int, name: bytes = b"a") -> bytes:
    """A PNG chunk of a few kilobytes that unpacks to ``count`` bytes of text or color profile."""
    return png_chunk(kind, name + b"\0\0" + zlib.compress(bytes(count), 9))


def solid_png(width: int, height: int) -> bytes:
    """A gray PNG of zeros, 1/1000 of its pixels in size, made without taking them into memory."""
    packer = zlib.compressobj(9)
    rows = max(1, (1 << 20) // (width + 1))
    parts = [packer.compress(bytes((width + 1) * min(rows, height - y))) for y in range(0, height, rows)]
    return png(width, height, b"".join(parts) + packer.flush(), color=0)


def webp_canvas(width: int, height: int) -> bytes:
    """An animation of two 16 x 16 frames that claims a larger canvas."""
    frames = [Image.new("RGBA", (16, 16), (n, 0, 0, 255)) for n in (0, 99)]
    raw = bytearray(encode(frames[0], "WEBP", save_all=True, append_images=frames[1:]))
    place = raw.index(b"VP8X") + 12
    raw[place : place + 6] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(raw)


def jpeg_frame(raw: bytes) -> int:
    return min(n for n in (raw.find(b"\xff" + bytes([kind])) for kind in (0xC0, 0xC2)) if n > 0)


def jpeg_claiming(raw: bytes, width: int, height: int) -> bytes:
    place = jpeg_frame(raw) + 5
    return raw[:place] + struct.pack(">HH", height, width) + raw[place + 4 :]


def gif_claiming(width: int, height: int) -> bytes:
    raw = encode(Image.fromarray(picture()), "GIF")
    return raw[:6] + struct.pack("<HH", width, height) + raw[10:]


def many_scans(count: int, width: int, height: int) -> bytes:
    """A progressive JPEG of a kilobyte a hundred scans; each of them makes the decoder go over all its pixels."""
    raw = encode(Image.new("L", (32, 32), 90), "JPEG", progressive=True)
    last = raw.rindex(b"\xff\xda")
    return jpeg_claiming(raw[:-2] + raw[last:-2] * count + b"\xff\xd9", width, height)


def tiff_planes(width: int, height: int, packed: bytes) -> bytes:
    """An RGB TIFF whose three planes are the same deflated bytes."""
    tags = {
        256: [width],
        257: [height],
        258: [8] * 3,
        259: [8],
        262: [2],
        273: [8] * 3,
        277: [3],
        278: [height],
    }
    tags |= {279: [len(packed)] * 3, 284: [2]}
    data = packed + bytes(len(packed) % 2)
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory(tags, 8 + len(data))


JPEG = encode(Image.fromarray(picture()), "JPEG")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(x) (w) file\n"
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
PICKLE = b"cos\nsystem\n(S'touch executed'\ntR."

BROKEN: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "text": (b"I am not an image", "not an image"),
    "pickle": (PICKLE, "not an image"),
    "EPS, which Pillow gives to Ghostscript": (EPS, "not an image"),
    "SVG": (SVG, "not an image"),
    "PNG of 2^62 pixels": (png(2**31 - 1, 2**31 - 1, bytes(9)), "not an image|limit"),
    "PNG of no pixels": (png(0, 5, bytes(9)), "not an image|unreadable"),
    "GIF of 65535 x 65535": (gif_claiming(65535, 65535), "limit"),
    "WebP canvas of 60000 x 60000": (webp_canvas(60000, 60000), "limit|not an image|unreadable"),
    "JPEG of 65500 x 65500": (jpeg_claiming(JPEG, 65500, 65500), "limit"),
    "BMP of 13000 x 13000": (
        encode(Image.fromarray(picture()), "BMP")[:18] + struct.pack("<ii", 13000, 13000) + bytes(3000),
        "truncated|unreadable",
    ),
    "PPM of 13000 x 13000": (b"P6 13000 13000 255\n" + bytes(100), "truncated"),
    "plain PPM of 13000 x 13000": (b"P3 13000 13000 255\n" + b"1 " * 100, "not enough"),
    "half a JPEG": (JPEG[: len(JPEG) // 2], "truncated"),
    "half a progressive JPEG": (fuzz_images.originals()["jpeg progressive"][:-200], "truncated"),
    "half a CMYK JPEG": (fuzz_images.originals()["jpeg cmyk"][:-200], "truncated"),
    "half a PNG": (fuzz_images.originals()["png"][:-300], "truncated|broken"),
    "half a WebP": (fuzz_images.originals()["webp"][:-30], "unreadable|not an image"),
    "half a TIFF": (fuzz_images.originals()["tiff tiled"][:-300], "unreadable|not an image"),
    "float TIFF": (fuzz_images.originals()["tiff float"], "float32"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_cannot_be_used_has_a_reason_of_one_line(name):
    raw, reason = BROKEN[name]
    with pytest.raises(BrokenImage, match=f"(?i){reason}") as caught:
        decode(raw)
    assert len(str(caught.value).splitlines()) == 1
    assert len(str(caught.value)) < 250


def comment(data: bytes) -> bytes:
    """The JPEG with something in a segment that nobody reads."""
    return JPEG[:2] + b"\xff\xfe" + struct.pack(">H", 2 + len(data)) + data + JPEG[2:]


BLACK = png(2, 2, bytes(14))
ROTTEN = png_chunk(b"gAMA", bytes(4))[:-1] + b"!"  # a wrong checksum

# A file -> the pixels a viewer shows.
READABLE: dict[str, tuple[bytes, bytes]] = {
    "pickle in a comment": (comment(PICKLE), JPEG),
    "pickle behind the end": (JPEG + PICKLE * 100, JPEG),
    "end marker in a comment": (comment(b"\xff\xd9\xff\xd8\xff\xda"), JPEG),
    "200 scans in a film behind the end": (JPEG + b"\xff\xda" * 200, JPEG),
    "200 scans in a comment": (comment(b"\xff\xda" * 200), JPEG),
    "a zip behind the end": (JPEG + b"PK\x03\x04" + bytes(100), JPEG),
    "EXIF of nonsense": (
        encode(Image.fromarray(picture()), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"),
        JPEG,
    ),
    "orientation 9": (encode(Image.fromarray(picture()), "JPEG", exif=exif(9)), JPEG),
    "PNG with 300 MB of text": (png(2, 2, bytes(14), extra=zipped(b"zTXt", 300 << 20)), BLACK),
    "PNG with 300 MB of profile": (png(2, 2, bytes(14), extra=zipped(b"iCCP", 300 << 20)), BLACK),
    "PNG with 100 MB in 100 texts": (png(2, 2, bytes(14), extra=zipped(b"zTXt", 1_000_000) * 100), BLACK),
    "PNG with 300 MB of EXIF data as a text": (
        png(2, 2, bytes(14), extra=zipped(b"zTXt", 300 << 20, b"Raw profile type exif")),
        BLACK,
    ),
    "PNG with a damaged chunk beside the pixels": (png(2, 2, bytes(14), extra=ROTTEN), BLACK),
    "orientation 0": (encode(Image.fromarray(picture()), "JPEG", exif=exif(0)), JPEG),
}


@pytest.mark.parametrize("name", READABLE)
def test_strange_but_whole_files_are_read(name):
    raw, expected = READABLE[name]
    assert np.array_equal(pixels_of(raw), pixels_of(expected))


PEAK = """
import sys, time
from pathlib import Path
import torch
from tests.helpers import fuzz_images, fuzz_watch
from glsd.errors import BrokenImage
from glsd.data.decode import decode
torch.set_num_threads(1)
for raw in fuzz_images.originals().values():
    try:
        decode(raw)
    except BrokenImage:
        pass
for path in sys.argv[1:]:
    raw = Path(path).read_bytes()
    fuzz_watch.forget_peak()
    before, start = fuzz_watch.peak_bytes(), time.process_time()
    try:
        outcome = list(decode(raw).shape)
    except BrokenImage as error:
        outcome = error
    print(fuzz_watch.peak_bytes() - before >> 20, time.process_time() - start, outcome, sep=chr(9))
"""

# What claims most for its bytes -> megabytes and seconds of the processor that decoding may take at most.
BOMBS: dict[str, tuple[Callable[[], bytes], int, int]] = {
    "PNG of 40 million pixels": (lambda: solid_png(6324, 6324), 520, 10),
    "PNG one pixel wide": (lambda: solid_png(1, 20_000_000), 10, 1),
    "PNG one pixel high": (lambda: solid_png(178_000_000, 1), 10, 1),
    "WebP of 16383 x 16383 in 200 bytes": (lambda: webp_canvas(16383, 16383), 10, 1),
    "JPEG of 170 million pixels in a kilobyte": (lambda: jpeg_claiming(JPEG, 65500, 2600), 2100, 20),
    "TIFF of 170 million pixels in a kilobyte": (
        lambda: tiff_planes(13_000, 13_000, zlib.compress(b"")),
        2100,
        20,
    ),
    "TIFF of 16 x 16 pixels that unpack to 300 MB": (
        lambda: tiff_planes(16, 16, zlib.compress(bytes(300 << 20), 9)),
        40,
        2,
    ),
    "TIFF of 16 x 16 pixels of 60,000 bands in a tile of 8192 x 8192": (
        lambda: tiff(
            np.zeros((16, 16, 1), np.uint8),
            8,
            2,
            t277=[60_000],
            t322=[8192],
            t323=[8192],
            t324=[8],
            t325=[99],
        ),
        10,
        1,
    ),
    "JPEG of 170 million pixels in a kilobyte, without an end": (
        lambda: jpeg_claiming(JPEG, 65500, 2600)[:-2],
        10,
        1,
    ),
    "JPEG of 20,000 scans": (lambda: many_scans(20_000, 8000, 8000), 10, 1),
    "JPEG of 20,000 scans and a run of 0xff": (
        lambda: JPEG[:2] + b"\xff" * 300_000 + b"\0" + many_scans(20_000, 8000, 8000)[2:],
        10,
        2,
    ),
    "JPEG of 60,000 segments": (lambda: JPEG[:2] + b"\xff\xfe\0\4\xff\xda" * 60_000 + JPEG[2:], 10, 10),
}


@pytest.mark.slow
def test_bombs_take_bounded_memory_and_time(tmp_path):
    """At most 13 bytes a pixel (2.3 GB for decode.MAX_PIXELS), and next to nothing for what is refused at sight."""
    for number, (make, _, _) in enumerate(BOMBS.values()):
        (tmp_path / str(number)).write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", PEAK, *(str(tmp_path / str(number)) for number in range(len(BOMBS)))],
        env=fuzz_watch.environment(),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for (name, (_, most, longest)), line in zip(BOMBS.items(), done.stdout.splitlines(), strict=True):
        megabytes, seconds, outcome = line.split("\t")
        assert int(megabytes) < most, f"{name}: {line}"
        assert float(seconds) < longest, f"{name}: {line}"
        assert outcome


@pytest.mark.slow
def test_a_thousand_mutated_images(tmp_path):
    """Pixels or a reason, within 30 s and 2 GiB of address space each; no process, no socket, no file, no code."""
    (tmp_path / "empty").mkdir()
    rows = fuzz_watch.run("fuzz_run_images.py", [str(SEED), str(NUM_MUTATED)], tmp_path / "empty")
    done = [row for row in rows if "done" in row]
    assert [row["done"] for row in done] == list(range(NUM_MUTATED))
    assert [row for row in done if "escaped" in row or row["seen"]] == [], f"seed {SEED}"
    assert all(("pixels" in row) != ("reason" in row) for row in done)
    assert (
        sum("pixels" in row for row in done) > 100
    )  # both happen: the mutations are neither harmless nor hopeless
    assert len({row["reason"] for row in done if "reason" in row}) > 30
    assert max(row["grown"] for row in done) < 1 << 30
    assert all(len(row.get("reason", "").splitlines()) <= 1 for row in done)
    assert list((tmp_path / "empty").iterdir()) == []


def test_mutations_are_a_function_of_seed_and_number():
    files = fuzz_images.originals()
    first, again, other = (
        [fuzz_images.mutated(number, files, seed) for number in range(60)] for seed in (1, 1, 2)
    )
    assert first == again
    assert first != other
    names = [name for name, _ in first]
    assert json.loads(json.dumps(names)) == names  # they go into the records


def test_the_watch_sees_what_it_forbids(tmp_path):
    """A guard that sees nothing would pass everything."""
    code = (
        "import os, pickle, subprocess, sys\nfrom tests.helpers import fuzz_watch\n"
        "seen = fuzz_watch.watch(may_write=sys.argv[1])\n"
        "open(sys.argv[1] + '/allowed', 'w').close()\n"
        "assert seen == [], seen\n"
        "open('written', 'w').close(); os.system('true'); subprocess.run(['true']); eval('1 + 1')\n"
        "pickle.loads(pickle.dumps(os.getcwd))\n"
        "print(' '.join(line.split()[0] for line in seen))\n"
    )
    (tmp_path / "cwd").mkdir()
    (tmp_path / "may").mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "may"],
        cwd=tmp_path / "cwd",
        env=fuzz_watch.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert {"open", "os.system", "subprocess.Popen", "exec", "pickle.find_class"} <= set(done.stdout.split())
    assert Path(tmp_path / "cwd" / "written").exists()
