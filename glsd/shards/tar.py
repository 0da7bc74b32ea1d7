"""The samples of a tar shard: member headers read in bounded memory, members grouped by key.

Python's tarfile ends silently at a damaged header, takes extended headers of any size into memory, recurses once for
each of them and reads numbers such as "1_0". A shard from elsewhere must end in one clear line instead.
Formats: V7, ustar, pax (POSIX.1-2024, pax) and GNU (the GNU tar manual, "Basic Tar Format").
Consecutive members with one key are one sample, as in webdataset.
"""

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import BinaryIO, NamedTuple

from glsd.errors import UserError
from glsd.shards.labels import CLASSES_FILE, is_missing, whole_number

BLOCK = 512  # bytes; a tar file is a sequence of blocks, the last two of them zero
MAX_EXTENDED = 1 << 20  # bytes of one extended header: names of a few thousand bytes, access lists of 64 KiB
# Bytes read behind the last member; writers pad with zeros, usually to 10,240 bytes.
MAX_TAIL = 1 << 16

NAME, SIZE, CHECKSUM, KIND = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
MAGIC, PREFIX = slice(257, 265), slice(345, 500)
GNU_MAGIC = b"ustar  \0"  # then times and sparse maps stand where others have the prefix of the name
SPARSE_CONTINUES, MAP_CONTINUES = 482, 504  # a byte of the header, and of every block of the map behind it
OCTAL = re.compile(rb" *([0-7]+) *(?:\0.*)?", re.DOTALL)
REGULAR = b"0\0" + b"7"
LINKS = (b"1", b"2")  # hard and symbolic
NO_DATA = b"123456"  # links, devices, folders and pipes, whatever their size field says
PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")

# By the formats of data/decode.py: JPEG, PNG, WebP, BMP, TIFF, PPM, GIF.
JPEG_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "jif", "jfi", "pjpeg", "pjp")
OTHER_EXTENSIONS = ("png", "apng", "webp", "bmp", "dib", "tif", "tiff", "ppm", "pgm", "pbm", "pnm", "gif")
IMAGE_EXTENSIONS = frozenset(JPEG_EXTENSIONS + OTHER_EXTENSIONS)
MAX_LABEL_BYTES = 1000
MAX_UNUSED_KINDS, MAX_KIND_LETTERS = 16, 40  # a file may have another kind in each member
OTHER_KINDS = "others"
MAX_NAME_SHOWN = 100  # characters of a name in an error: it may be a megabyte long
# The key ends at the first dot of the last path component, the rest names the member's kind.
MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
SPECIAL = re.compile(r"__.*__", re.DOTALL)  # __meta__.json and the like
# The writers of .cls members put numbers there, whatever their zeros.
PADDED_LABEL = re.compile(r"0[0-9]{1,17}")


class TarError(ValueError):
    """A file that is not an uncompressed tar, is damaged or truncated; the message says where and why."""


class Member(NamedTuple):
    """One member of a tar file."""

    name: str  # UTF-8; other bytes as surrogates
    offset: int  # of its data, bytes
    size: int  # bytes
    regular: bool  # a file whose whole data stand here: not a folder, link, device or sparse file
    folder: bool
    link: bool


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of an uncompressed tar file in order, without reading their data.

    One extended header of at most MAX_EXTENDED bytes is in memory at a time. Raises TarError if the file is not a tar, a
    header is damaged, a member reaches beyond the end, or something other than zeros (such as another tar) follows the
    last member.
    """
    end = file.seek(0, os.SEEK_END)
    place = 0
    extended: dict[str, bytes] = {}  # of the header that follows
    while any(header := _read(file, place, min(BLOCK, end - place), "header")):
        if len(header) < BLOCK:
            raise TarError(f"header truncated at byte {end}")
        _check(header, place)
        kind = header[KIND]
        size = _number(header[SIZE], place)
        start = place + BLOCK
        if kind in (b"x", b"X", b"L", b"K"):
            for key, value in _extended(file, kind, start, size, end).items():
                extended.setdefault(key, value)
            place = start + _padded(size)
            continue
        if kind == b"g":
            if _extended(file, kind, start, size, end).keys() & {"path", "size"}:
                raise TarError(f"a global header gives all members one name or size at byte {place}")
            place = start + _padded(size)
            continue
        if kind == b"S":
            start = _behind_sparse_map(file, header, start, end)
        if "size" in extended:
            size = _pax_size(extended["size"], place)
        holds_data = kind not in NO_DATA
        place = start + (_padded(size) if holds_data else 0)
        if holds_data and start + size > end:
            raise TarError(f"a member at byte {start} of {size} bytes in a file of {end}")
        raw_name = extended.get("path") or _header_name(header)
        folder = kind == b"5" or (kind == b"\0" and raw_name.endswith(b"/"))
        sparse = any(key.startswith("GNU.sparse.") for key in extended)
        regular = kind in REGULAR and not folder and not sparse
        name = extended.get("GNU.sparse.name", raw_name).decode(errors="surrogateescape")
        extended.clear()
        yield Member(name, start, size, regular, folder, kind in LINKS)
    if extended:
        raise TarError(f"no member after the extended header before byte {place}")
    _check_end(file, place, end)


def _check_end(file: BinaryIO, place: int, end: int) -> None:
    tail = _read(file, place, min(MAX_TAIL, max(0, end - place)), "end")
    if len(tail) < 2 * BLOCK:
        raise TarError(f"truncated at byte {end}: no end mark")
    if any(tail):
        raise TarError(f"joined from several tar files at byte {place} of {end}, or damaged there")


def _read(file: BinaryIO, place: int, size: int, what: str) -> bytes:
    if size <= 0:
        return b""
    file.seek(place)
    raw = file.read(size)
    if len(raw) < size:
        raise TarError(f"{what} truncated at byte {place + len(raw)}")
    return raw


def _check(header: bytes, place: int) -> None:
    rest = header[: CHECKSUM.start] + b" " * 8 + header[CHECKSUM.stop :]
    given = OCTAL.fullmatch(header[CHECKSUM])
    # Some old writers summed signed bytes.
    if given is None or int(given[1], 8) not in (sum(rest), sum(memoryview(rest).cast("b"))):
        raise TarError(f"damaged header at byte {place}" if place else "its first bytes are not a tar header")


def _number(field: bytes, place: int) -> int:
    if not field.split(b"\0")[0].strip(b" "):
        return 0
    if field[0] == 0x80:  # beyond 8 GiB: binary, big-endian
        return int.from_bytes(field[1:])
    digits = OCTAL.fullmatch(field)
    if digits is None:
        raise TarError(f"no size in the header at byte {place}: {field!r}")
    return int(digits[1], 8)


def _pax_size(value: bytes, place: int) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", value):
        raise TarError(f"no size in the extended header before byte {place}: {value[:40]!r}")
    return int(value)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _header_name(header: bytes) -> bytes:
    name, prefix = (header[part].split(b"\0")[0] for part in (NAME, PREFIX))
    return b"/".join((prefix, name)) if prefix and header[MAGIC] != GNU_MAGIC else name


def _extended(file: BinaryIO, kind: bytes, start: int, size: int, end: int) -> dict[str, bytes]:
    if size > MAX_EXTENDED:
        raise TarError(f"an extended header of {size} bytes at byte {start}: at most {MAX_EXTENDED} are read")
    if start + size > end:
        raise TarError(f"extended header truncated at byte {end}")
    raw = _read(file, start, size, "extended header")
    if kind == b"K":  # the target of a link: never followed
        return {}
    if kind == b"L":
        return {"path": raw.split(b"\0")[0]}
    return _pax_records(raw, start)


def _pax_records(raw: bytes, start: int) -> dict[str, bytes]:
    """Return the names, sizes and sparse fields in records "LENGTH KEY=VALUE\\n"; the length counts the whole record."""
    wanted = {}
    place = 0
    while place < len(raw) and raw[place]:  # some writers pad with zeros
        length = PAX_LENGTH.match(raw, place)
        stop = place + int(length[1]) if length else 0
        equals = raw.find(b"=", place, stop)
        if length is None or equals < length.end() or raw[stop - 1 : stop] != b"\n":
            raise TarError(f"damaged extended header at byte {start + place}")
        key = raw[length.end() : equals].decode(errors="replace")
        if key in ("path", "size") or key.startswith("GNU.sparse."):
            wanted[key] = raw[equals + 1 : stop - 1]
        place = stop
    return wanted


def _behind_sparse_map(file: BinaryIO, header: bytes, start: int, end: int) -> int:
    continues = header[SPARSE_CONTINUES]
    while continues:
        if start + BLOCK > end:
            raise TarError(f"map of a sparse member truncated at byte {end}")
        continues = _read(file, start, BLOCK, "map of a sparse member")[MAP_CONTINUES]
        start += BLOCK
    return start


def _numbers() -> "array[int]":
    return array("q")


@dataclass(kw_only=True, slots=True)
class Samples:
    """One row per sample, as plain numbers: a file may hold a member for every 512 bytes."""

    offset: "array[int]" = field(default_factory=_numbers)  # of the image in the file, -1 = no image member
    size: "array[int]" = field(default_factory=_numbers)
    label: "array[int]" = field(default_factory=_numbers)  # -1 = none
    key_end: "array[int]" = field(default_factory=_numbers)  # where each key ends in keys
    keys: bytearray = field(default_factory=bytearray)  # one after the other, UTF-8
    unused: Counter[str] = field(default_factory=Counter)  # images that are not used, by kind
    num_links: int = 0  # image-like members that are links
    num_named: int = 0  # labels that were looked up by name

    def key(self, row: int) -> bytes:
        return bytes(self.keys[self.key_end[row - 1] if row else 0 : self.key_end[row]])

    def leave_out(self, kind: str) -> None:
        kind = f".{kind[:MAX_KIND_LETTERS]}"
        if kind not in self.unused and len(self.unused) >= MAX_UNUSED_KINDS:
            kind = OTHER_KINDS
        self.unused[kind] += 1


def scan_samples(
    file: BinaryIO,
    shard: str,
    *,
    image: str = "",
    class_numbers: Callable[[], Mapping[str, int]] = dict,
) -> Samples:
    """Return the samples of an uncompressed tar file in order, reading only headers and labels.

    image: the kind of the member that is the image, such as "tif" or "edited.jpg", by default the first of IMAGE_EXTENSIONS.
    class_numbers: returns the numbers of class names, for labels that are names.
    A sample without an image member is kept: reading it reports it. Links and sparse files are no images. Raises
    TarError for a damaged tar, and UserError naming ``shard`` for a member that appears twice in its sample, a label
    (``.cls``) that is neither a number nor a known name nor missing, labels of which some are names and others numbers,
    and a sample whose members are not consecutive.
    """
    samples = Samples()
    current, kinds = None, set[str]()
    num_labels = 0
    for member in read_members(file):
        parts = MEMBER_NAME.fullmatch(member.name)
        if parts is None or SPECIAL.fullmatch(parts[1]) or member.folder:
            continue
        key, kind = parts[1], parts[2].lower()
        if key != current:
            current, kinds = key, set()
            _start(samples, key)
        if kind in kinds:
            raise UserError(
                f"shard {shard}: member {_quoted(member.name)} appears twice in its sample: pack the shard again"
            )
        kinds.add(kind)
        is_image_like = kind == image or kind.rpartition(".")[2] in IMAGE_EXTENSIONS
        if not member.regular:
            samples.num_links += member.link and is_image_like
        elif kind == "cls":
            samples.label[-1] = _read_label(file, member, shard, samples, class_numbers)
            num_labels += samples.label[-1] >= 0
        elif is_image_like:
            if samples.offset[-1] < 0 and (kind == image if image else kind in IMAGE_EXTENSIONS):
                samples.offset[-1], samples.size[-1] = member.offset, member.size
            else:
                samples.leave_out(kind)
    if 0 < samples.num_named < num_labels:
        raise UserError(
            f"shard {shard}: {samples.num_named} label members hold names, {num_labels - samples.num_named} numbers: write "
            "either names or numbers into all of them"
        )
    _check_together(samples, shard)
    return samples


def _start(samples: Samples, key: str) -> None:
    samples.keys += key.encode(errors="surrogateescape")
    samples.offset.append(-1)
    samples.size.append(0)
    samples.label.append(-1)
    samples.key_end.append(len(samples.keys))


def _read_label(
    file: BinaryIO,
    member: Member,
    shard: str,
    samples: Samples,
    class_numbers: Callable[[], Mapping[str, int]],
) -> int:
    """Return the number that a label member holds, or that of the class it names, or -1."""
    file.seek(member.offset)
    raw = file.read(min(member.size, MAX_LABEL_BYTES + 1))
    text = raw.decode(errors="replace").strip() if member.size <= MAX_LABEL_BYTES else ""
    number = int(text) if PADDED_LABEL.fullmatch(text) else whole_number(text)
    if number is None and (number := class_numbers().get(text)) is not None:
        samples.num_named += 1
    if number is not None:
        return number
    if text and is_missing(text):
        return -1
    raise UserError(
        f"shard {shard}: label member {_quoted(member.name)} holds {raw[:MAX_NAME_SHOWN]!r}: expected an integer >= 0, or a "
        f"class name that the {CLASSES_FILE} beside the shard lists (a JSON list of names, in the order of their numbers)"
    )


def _check_together(samples: Samples, shard: str) -> None:
    """Raise UserError for a tar of unsorted files, where labels would be lost and samples have no image.

    A key that appears again with an image is another sample, as in joined data sets.
    """
    lacking = {samples.key(row) for row, offset in enumerate(samples.offset) if offset < 0}
    if not lacking:
        return
    for row, offset in enumerate(samples.offset):
        if offset >= 0 and samples.key(row) in lacking:
            key = samples.key(row).decode(errors="surrogateescape")
            raise UserError(
                f"shard {shard}: the members of sample {_quoted(key)} are not consecutive: sort the files "
                "(tar --sort=name) and pack the shard again"
            )


def _quoted(name: str) -> str:
    return repr(name if len(name) <= MAX_NAME_SHOWN else f"{name[:MAX_NAME_SHOWN]}...")
