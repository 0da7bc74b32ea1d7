"""The member headers of an uncompressed tar file, read one after the other in bounded memory.

Python's tarfile ends silently at a damaged header, takes extended headers of any size into memory, recurses once for
each of them and reads numbers such as "1_0"; a shard from elsewhere must end in one clear line instead.
Formats: V7, ustar, pax (POSIX.1-2024, pax) and GNU (the GNU tar manual, "Basic Tar Format").
"""

import os
import re
from collections.abc import Iterator
from typing import BinaryIO, NamedTuple

BLOCK = 512  # a tar file is a sequence of blocks of this many bytes, the last two of them zero
MAX_EXTENDED = 1 << 20  # bytes of one extended header: names of a few thousand bytes, access lists of 64 KiB
MAX_TAIL = (
    1 << 16
)  # what is looked at behind the last member; writers pad with zeros, usually to 10,240 bytes

NAME, SIZE, CHECKSUM, KIND = slice(0, 100), slice(124, 136), slice(148, 156), slice(156, 157)
MAGIC, PREFIX = slice(257, 265), slice(345, 500)
GNU_MAGIC = b"ustar  \0"  # then times and sparse maps stand where others have the prefix of the name
SPARSE_GOES_ON, MAP_GOES_ON = 482, 504  # a byte of the header, and of every block of the map behind it
OCTAL = re.compile(rb" *([0-7]+) *(?:\0.*)?", re.DOTALL)
REGULAR, NO_DATA = (
    b"0\0" + b"7",
    b"123456",
)  # second: links, devices, folders and pipes, whatever their size says
PAX_LENGTH = re.compile(rb"([1-9][0-9]{0,6}) ")


class TarError(ValueError):
    """The file is no uncompressed tar, damaged or cut; the message says where and why, in a few words."""


class Member(NamedTuple):
    """One member of a tar file."""

    name: str  # UTF-8; other bytes as surrogates
    offset: int  # of its data, bytes
    size: int  # bytes
    regular: bool  # a file whose data stand here, whole: no folder, link, device or sparse file
    folder: bool


def read_members(file: BinaryIO) -> Iterator[Member]:
    """Yield the members of an uncompressed tar file in their order; their data are not read.

    One extended header of at most MAX_EXTENDED bytes is held at a time. Raises TarError if the file is no tar, a header
    is damaged, a member reaches beyond the end, or anything but zeros follows the last one (another tar, for example).
    """
    end = file.seek(0, os.SEEK_END)
    place = 0
    extended: dict[str, bytes] = {}  # what stands before a header and is meant for it
    while any(header := _read(file, place, min(BLOCK, end - place), "header")):
        if len(header) < BLOCK:
            raise TarError(f"header cut at byte {end}")
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
                raise TarError(f"one name or size for all members at byte {place}")
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
        yield Member(name, start, size, regular, folder)
    _check_end(file, place, end, started=bool(extended))


def _check_end(file: BinaryIO, place: int, end: int, *, started: bool) -> None:
    if started:
        raise TarError(f"no member after the extended header before byte {place}")
    tail = _read(file, place, min(MAX_TAIL, max(0, end - place)), "end")
    if len(tail) < 2 * BLOCK:
        raise TarError(f"cut at byte {end}: no end mark")
    if any(tail):
        raise TarError(f"joined from several tar files at byte {place} of {end}, or damaged there")


def _read(file: BinaryIO, place: int, size: int, what: str) -> bytes:
    if size <= 0:
        return b""
    file.seek(place)
    raw = file.read(size)
    if len(raw) < size:
        raise TarError(f"{what} cut at byte {place + len(raw)}")
    return raw


def _check(header: bytes, place: int) -> None:
    rest = header[: CHECKSUM.start] + b" " * 8 + header[CHECKSUM.stop :]
    given = OCTAL.fullmatch(header[CHECKSUM])
    if given is not None:
        total = int(given[1], 8)
        if total == sum(rest) or total == sum(
            memoryview(rest).cast("b")
        ):  # some old writers summed signed bytes
            return
    raise TarError(f"damaged header at byte {place}" if place else "its first bytes are no tar header")


def _number(field: bytes, place: int) -> int:
    if not field.split(b"\0")[0].strip(b" "):
        return 0
    if field[0] == 0x80:  # beyond 8 GiB: binary, the largest byte first
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
        raise TarError(f"extended header cut at byte {end}")
    raw = _read(file, start, size, "extended header")
    if kind == b"K":  # the name that a link points to: never followed
        return {}
    if kind == b"L":
        return {"path": raw.split(b"\0")[0]}
    return _pax_records(raw, start)


def _pax_records(raw: bytes, start: int) -> dict[str, bytes]:
    """Return what records "LENGTH KEY=VALUE\\n" say of names, sizes and sparse files; the length counts the whole record."""
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
    goes_on = header[SPARSE_GOES_ON]
    while goes_on:
        if start + BLOCK > end:
            raise TarError(f"map of a sparse member cut at byte {end}")
        goes_on = _read(file, start, BLOCK, "map of a sparse member")[MAP_GOES_ON]
        start += BLOCK
    return start
