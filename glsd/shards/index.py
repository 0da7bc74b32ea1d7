"""The index of a tar shard: key, byte offset, size and label of each sample, in a file beside the tar.

The index is a versioned safetensors file. It is safe to open, and its arrays are mapped into memory, so that opening a
hundred million samples costs one small read per shard. (The text format of NVIDIA DALI's wds2idx has no labels and no names
with spaces, and must be parsed as a whole.)
"""

import functools
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
from glsd.shards.labels import CLASSES_FILE, classes_digest, read_classes
from glsd.shards.tar import BLOCK, IMAGE_EXTENSIONS, OTHER_KINDS, Samples, TarError, scan_samples

VERSION = 3
SUFFIX = ".index"
MAX_HEADER = 1 << 20
MAX_MARKS = 3
PIECE = 1 << 20  # bytes read at a time
MARK_BYTES = 8 * BLOCK  # hashed at each of a few places of a shard; an image starts in the middle of it
VERSIONS = re.compile("[0-9]{1,9}")
REBUILD = "write the index again with: python launch/pack.py index SHARDS"

# First bytes of files that are given as tars -> what they are, and how they become tars.
NO_TAR = {
    b"\x1f\x8b": ("compressed with gzip", "uncompress it (gunzip FILE, or gzip -dc FILE > FILE.tar)"),
    b"BZh": ("compressed with bzip2", "uncompress it (bunzip2 FILE)"),
    b"\xfd7zXZ": ("compressed with xz", "uncompress it (unxz FILE)"),
    b"\x28\xb5\x2f\xfd": ("compressed with zstd", "uncompress it (unzstd FILE)"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "uncompress it (unlz4 FILE)"),
    b"PK\x03\x04": ("a zip archive", "unpack it and pack the folder (glsd pack FOLDER DST)"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it and pack the folder (glsd pack FOLDER DST)"),
    b"Rar!\x1a": ("a rar archive", "unpack it and pack the folder (glsd pack FOLDER DST)"),
    b"PAR1": ("a Parquet file", "pack it (glsd pack list FILE DST)"),
    b"version https://git-lfs": ("a pointer of Git LFS, not the file itself", "fetch it (git lfs pull)"),
}

DTYPES: dict[str, tuple[str, type]] = {
    "image_offset": ("I64", np.int64),
    "image_size": ("I64", np.int64),
    "label": ("I64", np.int64),
    "key_end": ("I64", np.int64),
    "key_bytes": ("U8", np.uint8),
}


@dataclass(frozen=True, kw_only=True)
class Notes:
    """What an index says about members that are not used, and about the names of its labels."""

    unused: dict[str, int]  # images that are not the one of their sample, by kind such as ".edited.jpg"
    num_links: int = 0  # images that are links
    classes: str = (
        ""  # classes_digest of the names by which labels were looked up; empty = labels are numbers
    )

    def text(self) -> str:
        """Return the notes as JSON, an empty text if there is nothing to say."""
        found = {"unused": self.unused, "num_links": self.num_links, "classes": self.classes}
        return (
            json.dumps({name: value for name, value in found.items() if value}) if any(found.values()) else ""
        )


def read_notes(text: str) -> Notes:
    """Return the notes of a text; ValueError or TypeError for another text."""
    if not text:
        return Notes(unused={})
    notes = Notes(**{"unused": {}, **json.loads(text)})
    if not all(type(kind) is str and type(count) is int for kind, count in dict(notes.unused).items()):
        raise TypeError("unused")
    if type(notes.num_links) is not int or type(notes.classes) is not str:
        raise TypeError("notes")
    return notes


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
    notes: str = ""  # see Notes.text

    def __len__(self) -> int:
        return len(self.label)


def index_path(shard: str | Path) -> Path:
    """Return the path of a shard's index: its own plus ``.index``."""
    return Path(f"{shard}{SUFFIX}")


def build_index(shard: str | Path, *, image: str = "") -> ShardIndex:
    """Scan the member headers of one uncompressed tar file and return its index; nothing is extracted.

    image: the kind of the member that is the image of a sample, as in scan_samples. Labels that are names get the numbers
    of the ``classes.json`` beside the shard. Links are not followed. Raises UserError if the file cannot be read, is not an
    uncompressed tar, is truncated or damaged, has no image, a bad label (``.cls`` member), or a sample whose members are not
    consecutive.
    """
    file_of_classes = os.path.join(os.path.dirname(shard), CLASSES_FILE)

    @functools.cache
    def class_numbers() -> dict[str, int]:
        names = read_classes(file_of_classes) if os.path.isfile(file_of_classes) else []
        return {name: number for number, name in enumerate(names)}

    try:
        shard_bytes = os.stat(shard).st_size
        with open(shard, "rb") as file:
            samples = scan_samples(file, str(shard), image=image, class_numbers=class_numbers)
    except TarError as error:
        raise UserError(f"shard {shard} is {_no_tar(shard, error)}") from error
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {one_line(error)}") from error
    with_image = [offset for offset in samples.offset if offset >= 0]
    if not with_image:
        raise UserError(f"shard {shard} holds no image: {_why_no_image(samples, image)}")
    # The bytes before an image hold its label or the one of the sample before, so that a change of labels alone is seen.
    chosen = {with_image[0], with_image[len(with_image) // 2], with_image[-1]}
    marks = tuple(sorted(max(0, offset - MARK_BYTES // 2) for offset in chosen))
    notes = Notes(
        unused=dict(samples.unused.most_common()),
        num_links=samples.num_links,
        classes=classes_digest(list(class_numbers())) if samples.num_named else "",
    )
    return ShardIndex(
        shard_bytes=shard_bytes,
        marks=marks,
        digest=marks_digest(shard, marks),
        image_offset=np.array(samples.offset, dtype=np.int64),
        image_size=np.array(samples.size, dtype=np.int64),
        label=np.array(samples.label, dtype=np.int64),
        key_end=np.array(samples.key_end, dtype=np.int64),
        key_bytes=np.frombuffer(bytes(samples.keys), dtype=np.uint8),
        notes=notes.text(),
    )


def _no_tar(shard: str | Path, error: TarError) -> str:
    """Return what a file is that the scanner refused, and what to do."""
    with open(shard, "rb") as file:
        start = file.read(max(map(len, NO_TAR)))
    for mark, (what, how) in NO_TAR.items():
        if start.startswith(mark):
            return f"{what}, not an uncompressed tar file: {how}"
    return f"damaged, truncated or not an uncompressed tar file ({error}): restore it"


def _why_no_image(samples: Samples, image: str) -> str:
    if samples.num_links:
        return (
            f"{samples.num_links} of its members are links, which are not followed: write the tar again with the files "
            "themselves (tar --dereference --hard-dereference)"
        )
    if samples.unused:
        kinds = [kind for kind, _ in samples.unused.most_common() if kind != OTHER_KINDS]
        wanted = f"of the kind .{image}" if image else "such as 00000000.jpg (one dot only)"
        how = f"to take one as the image: glsd pack index --image {kinds[0].removeprefix('.')} SHARDS"
        if OTHER_KINDS in samples.unused:
            how = "give each image its own name before the first dot"
        return f"expected members {wanted}, found {', '.join(kinds[:5])}; {how}"
    return f"expected members such as 00000000.jpg (one dot only; {', '.join(sorted(IMAGE_EXTENSIONS))})"


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
        "checksum": str(_checksum({name: [array.data] for name, array in arrays.items()}, index.notes)),
        **({"notes": index.notes} if index.notes else {}),
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
    notes: str = ""  # see Notes.text


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
        notes = metadata.get("notes", "")
        read_notes(notes)
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
        notes=notes,
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


def _checksum(pieces: Mapping[str, Iterable[bytes | memoryview]], notes: str = "") -> int:
    """Return a checksum of the notes and of the arrays in order. It detects damage, not malice."""
    total = zlib.crc32(notes.encode())
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
                },
                header.notes,
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
    return ShardIndex(
        shard_bytes=header.shard_bytes,
        marks=header.marks,
        digest=header.digest,
        notes=header.notes,
        **arrays,
    )
