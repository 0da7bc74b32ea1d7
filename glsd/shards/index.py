"""The index of a tar shard: key, byte offset, size and label of each sample, in a file beside the tar.

The index is a versioned safetensors file. It is safe to open, and its arrays are mapped into memory, so that opening a
hundred million samples costs one small read per shard. (The text format of NVIDIA DALI's wds2idx has no labels and no names
with spaces, and must be parsed as a whole.)
"""

import hashlib
import json
import os
import re
import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from jaxtyping import Int64, UInt8
from safetensors.numpy import save

from glsd.errors import UserError, one_line
from glsd.files import replacing
from glsd.shards.tar import BLOCK, IMAGE_EXTENSIONS, TarError, scan_samples

VERSION = 3
SUFFIX = ".index"
MAX_HEADER = 1 << 20
MAX_MARKS = 3
PIECE = 1 << 20  # bytes read at a time
MARK_BYTES = 8 * BLOCK  # hashed at each of a few places of a shard; an image starts in the middle of it
VERSIONS = re.compile("[0-9]{1,9}")
REBUILD = "write the index again with: python launch/pack.py index SHARDS"

DTYPES: dict[str, tuple[str, type]] = {
    "image_offset": ("I64", np.int64),
    "image_size": ("I64", np.int64),
    "label": ("I64", np.int64),
    "key_end": ("I64", np.int64),
    "key_bytes": ("U8", np.uint8),
}


@dataclass(frozen=True, kw_only=True)
class ShardIndex:
    """The samples of one shard in their order in the tar; offsets and sizes in bytes."""

    shard_bytes: int  # size of the whole tar file
    marks: tuple[int, ...]  # offsets of the pieces that are hashed to identify the tar
    digest: str  # hash of those pieces
    image_offset: Int64[np.ndarray, " n"]  # -1: no image member
    image_size: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]  # -1: no label
    key_end: Int64[np.ndarray, " n"]  # where each key ends in key_bytes
    key_bytes: UInt8[np.ndarray, " z"]  # all keys concatenated, UTF-8

    def __len__(self) -> int:
        return len(self.label)


def index_path(shard: str | Path) -> Path:
    """Return the path of a shard's index: its own plus ``.index``."""
    return Path(f"{shard}{SUFFIX}")


def build_index(shard: str | Path) -> ShardIndex:
    """Scan the member headers of one uncompressed tar file and return its index; nothing is extracted.

    Links are not followed. Raises UserError if the file cannot be read, is not an uncompressed tar, is truncated or damaged,
    has no image, a bad label (``.cls`` member), or a sample whose members are not consecutive.
    """
    try:
        shard_bytes = os.stat(shard).st_size
        with open(shard, "rb") as file:
            samples = scan_samples(file, str(shard))
    except TarError as error:
        raise UserError(
            f"shard {shard} is damaged, truncated or not an uncompressed tar file ({error}): restore it"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {one_line(error)}") from error
    with_image = [offset for offset in samples.offset if offset >= 0]
    if not with_image:
        raise UserError(
            f"shard {shard} holds no image: expected members such as 00000000.jpg (one dot only; "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    # The bytes before an image hold its label or the one of the sample before, so that a change of labels alone is seen.
    chosen = {with_image[0], with_image[len(with_image) // 2], with_image[-1]}
    marks = tuple(sorted(max(0, offset - MARK_BYTES // 2) for offset in chosen))
    return ShardIndex(
        shard_bytes=shard_bytes,
        marks=marks,
        digest=marks_digest(shard, marks),
        image_offset=np.array(samples.offset, dtype=np.int64),
        image_size=np.array(samples.size, dtype=np.int64),
        label=np.array(samples.label, dtype=np.int64),
        key_end=np.array(samples.key_end, dtype=np.int64),
        key_bytes=np.frombuffer(bytes(samples.keys), dtype=np.uint8),
    )


def marks_digest(shard: str | Path, marks: tuple[int, ...]) -> str:
    """Return the hash of a shard's bytes at a few offsets; one small read each.

    Unlike a time stamp it survives copies, archives and version control.
    """
    digest = hashlib.sha256()
    try:
        with open(shard, "rb", buffering=0) as file:
            for mark in marks:
                digest.update(os.pread(file.fileno(), MARK_BYTES, mark))
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {one_line(error)}") from error
    return digest.hexdigest()


def write_index(index: ShardIndex, path: Path, *, shard_name: str) -> None:
    """Write an index atomically; UserError if the folder cannot be written."""
    arrays = {name: getattr(index, name) for name in DTYPES}
    metadata = {
        "version": str(VERSION),
        "shard": shard_name,
        "shard_bytes": str(index.shard_bytes),
        "marks": json.dumps(index.marks),
        "digest": index.digest,
        "count": str(len(index)),
        "checksum": str(_checksum({name: [array.data] for name, array in arrays.items()})),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(save(arrays, metadata=metadata))
    except OSError as error:
        raise UserError(
            f"cannot write the index {path}: {one_line(error)} (GLSD_CACHE names the folder for indices that do "
            "not lie beside their shards)"
        ) from error


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """The header of an index file: everything but the arrays."""

    path: Path
    count: int
    shard_bytes: int
    marks: tuple[int, ...]
    digest: str
    checksum: int  # of the arrays
    data_start: int  # byte of the file where the arrays begin
    spans: dict[str, tuple[int, int]]  # first and past-the-last byte of each array, from data_start


def read_header(path: Path) -> IndexHeader:
    """Read and check the header of an index file; UserError if it is damaged or of another version."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
            file_bytes = os.fstat(file.fileno()).st_size
        metadata = header["__metadata__"]
        version, count = metadata["version"], int(metadata["count"])
        if not VERSIONS.fullmatch(version):
            raise ValueError("no version")
        if version != str(VERSION):
            raise UserError(f"index {path} has version {version}, expected {VERSION}: {REBUILD}")
        spans = {name: _span(header[name], name, count) for name in DTYPES}
        if max(end for _, end in spans.values()) != file_bytes - 8 - length or count < 1:
            raise ValueError("wrong length")
        shard_bytes, checksum = int(metadata["shard_bytes"]), int(metadata["checksum"])
        digest, marks = str(metadata["digest"]), tuple(json.loads(metadata["marks"]))
        if not 1 <= len(marks) <= MAX_MARKS or not all(_within(mark, shard_bytes) for mark in marks):
            raise ValueError("marks outside the shard")
    except OSError as error:
        raise UserError(f"cannot read the index {path}: {one_line(error)}") from error
    except (struct.error, ValueError, KeyError, TypeError, ArithmeticError, RecursionError) as error:
        raise UserError(f"index {path} is damaged ({_what(error)}): {REBUILD}") from error
    return IndexHeader(
        path=path,
        count=count,
        shard_bytes=shard_bytes,
        marks=marks,
        digest=digest,
        checksum=checksum,
        data_start=8 + length,
        spans=spans,
    )


def _span(entry: dict, name: str, count: int) -> tuple[int, int]:
    label, dtype = DTYPES[name]
    start, end = entry["data_offsets"]
    if type(start) is not int or type(end) is not int:  # true and 8.0 would pass for numbers
        raise TypeError(f"array {name}")
    items, rest = divmod(end - start, np.dtype(dtype).itemsize)
    sized = items >= 0 and not rest and (name == "key_bytes" or items == count)
    if start < 0 or not sized or entry["dtype"] != label or entry["shape"] != [items]:
        raise ValueError(f"array {name}")
    return start, end


def _what(error: Exception) -> str:
    return repr(f"{type(error).__name__}: {error}"[:100])  # it may quote the file


def _within(mark: object, shard_bytes: int) -> bool:
    return type(mark) is int and 0 <= mark < shard_bytes


def _checksum(pieces: Mapping[str, Iterable[bytes | memoryview]]) -> int:
    """Return a checksum of the arrays in order. It detects damage, not malice."""
    total = 0
    for name in DTYPES:
        total = zlib.crc32(name.encode(), total)
        for piece in pieces[name]:
            total = zlib.crc32(piece, total)
    return total


def _pieces(file: BinaryIO, start: int, end: int) -> Iterator[bytes]:
    file.seek(start)
    while start < end and (piece := file.read(min(PIECE, end - start))):
        start += len(piece)
        yield piece


def map_index(header: IndexHeader) -> ShardIndex:
    """Return the index of a header with memory-mapped arrays, whose pages processes share.

    The whole file is read once for its checksum, piece by piece. Raises UserError if it is damaged or was replaced.
    """
    size = max(end for _, end in header.spans.values())
    try:
        with open(header.path, "rb") as file:
            found = _checksum(
                {
                    name: _pieces(file, header.data_start + start, header.data_start + end)
                    for name, (start, end) in header.spans.items()
                }
            )
            data = np.memmap(file, dtype=np.uint8, mode="r")[header.data_start :]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the index {header.path}: {error}") from error
    if len(data) != size:
        raise UserError(f"index {header.path} changed while it was in use: start again")
    if found != header.checksum:
        raise UserError(f"index {header.path} is damaged (wrong checksum): {REBUILD}")
    arrays = {
        name: data[start:end].view(DTYPES[name][1]).view(np.ndarray)
        for name, (start, end) in header.spans.items()
    }
    return ShardIndex(shard_bytes=header.shard_bytes, marks=header.marks, digest=header.digest, **arrays)
