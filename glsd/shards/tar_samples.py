"""Which members of a tar shard make up which sample: consecutive ones with one key, as webdataset groups them."""

import re
from array import array
from dataclasses import dataclass, field
from typing import BinaryIO

from glsd.errors import UserError
from glsd.shards.tar import Member, read_members

IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "gif"))
MAX_LABEL_BYTES = 32
SHOWN = 100  # characters of a name in an error: it may be a megabyte long

# The key ends at the first dot of the last path component, the rest names the member's kind.
MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
SPECIAL = re.compile(r"__.*__", re.DOTALL)  # __meta__.json and the like
LABEL = re.compile(rb"\s*(-1|[0-9]{1,18})\s*")


def _numbers() -> "array[int]":
    return array("q")


@dataclass(kw_only=True, slots=True)
class Samples:
    """One row per sample; plain numbers, since a file may hold a member for every 512 bytes."""

    offset: "array[int]" = field(default_factory=_numbers)  # of the image in the file, -1 = no image member
    size: "array[int]" = field(default_factory=_numbers)
    label: "array[int]" = field(default_factory=_numbers)  # -1 = none
    key_end: "array[int]" = field(default_factory=_numbers)  # where each key ends in keys
    keys: bytearray = field(default_factory=bytearray)  # one after the other, UTF-8

    def key(self, row: int) -> bytes:
        return bytes(self.keys[self.key_end[row - 1] if row else 0 : self.key_end[row]])


def scan_samples(file: BinaryIO, shard: str) -> Samples:
    """Return the samples of an uncompressed tar file in their order; only headers and labels are read.

    A sample without image member is kept, so that it is reported when it is read instead of vanishing; links and sparse
    files hold no image. Raises TarError for a damaged tar, and UserError naming ``shard`` for a member that comes twice
    in its sample, a label (``.cls``) that is no integer of at least 0 (or -1 = none), and a sample whose members stand
    apart.
    """
    samples = Samples()
    current, kinds = None, set[str]()
    for member in read_members(file):
        parts = MEMBER_NAME.fullmatch(member.name)
        if parts is None or SPECIAL.fullmatch(parts[1]) or member.folder:
            continue
        key, kind = parts[1], parts[2].lower()
        if key != current:
            current, kinds = key, set()
            _start(samples, key)
        if kind in kinds:
            raise UserError(f"shard {shard}: member {shown(member.name)} comes twice: pack it again")
        kinds.add(kind)
        if not member.regular:
            continue
        if kind in IMAGE_EXTENSIONS and samples.offset[-1] < 0:
            samples.offset[-1], samples.size[-1] = member.offset, member.size
        elif kind == "cls":
            samples.label[-1] = _read_label(file, member, shard)
    _check_together(samples, shard)
    return samples


def _start(samples: Samples, key: str) -> None:
    samples.keys += key.encode(errors="surrogateescape")
    samples.offset.append(-1)
    samples.size.append(0)
    samples.label.append(-1)
    samples.key_end.append(len(samples.keys))


def _read_label(file: BinaryIO, member: Member, shard: str) -> int:
    file.seek(member.offset)
    raw = file.read(min(member.size, MAX_LABEL_BYTES + 1))
    match = LABEL.fullmatch(raw)
    if match is None or len(raw) > MAX_LABEL_BYTES:
        raise UserError(
            f"shard {shard}: label member {shown(member.name)} holds {raw!r}: expected an integer of at least 0"
        )
    return int(match[1])


def _check_together(samples: Samples, shard: str) -> None:
    """Refuse a tar of files in no order, where labels would be lost and half of the samples have no image.

    A key that comes again with all it needs is another sample, as joined data sets have them.
    """
    lacking = {samples.key(row) for row, offset in enumerate(samples.offset) if offset < 0}
    if not lacking:
        return
    for row, offset in enumerate(samples.offset):
        if offset >= 0 and samples.key(row) in lacking:
            key = samples.key(row).decode(errors="surrogateescape")
            raise UserError(
                f"shard {shard}: the members of sample {shown(key)} stand apart: expected those of a sample one after the "
                "other (tar --sort=name); pack it again"
            )


def shown(name: str) -> str:
    """Return a name as it can stand in a line of output, long ones shortened."""
    return repr(name if len(name) <= SHOWN else f"{name[:SHOWN]}...")
