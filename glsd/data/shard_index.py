"""Where every sample of a tar shard lies: the sidecar that makes an image one ``pread`` away.

Our own versioned form, a safetensors file: it is safe to open, and its arrays can be mapped into memory, so
that opening a hundred million samples costs one small read per shard. (The text form of NVIDIA DALI's wds2idx
holds no labels, cannot hold names with spaces, and has to be parsed whole.)
"""

import hashlib
import json
import os
import re
import struct
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Int64, UInt8
from safetensors.numpy import save

from glsd.contracts import UserError

VERSION = 2
SUFFIX = ".index"
IMAGE_EXTENSIONS = frozenset(("jpg", "jpeg", "png", "webp", "bmp", "tif", "tiff", "ppm", "pgm", "gif"))
BLOCK = 512  # a tar file is a sequence of blocks of this many bytes, the last two of them zero
MAX_TAIL = (
    1 << 16
)  # what is looked at behind the last member; writers pad with zeros, usually to 10,240 bytes
MAX_HEADER = 1 << 20
MAX_LABEL_BYTES = 32
MARK_BYTES = (
    8 * BLOCK
)  # what is remembered of a shard at each of a few places; an image starts in the middle of it
REBUILD = "write it again with: python launch/pack.py index SHARDS"

# As webdataset groups members: the key ends at the first dot of the last path component, the rest names the
# member's kind.
MEMBER_NAME = re.compile(r"((?:.*/)?[^/.]+)\.([^/]*)", re.DOTALL)
LABEL = re.compile(rb"\s*(-1|[0-9]{1,18})\s*")

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
    marks: tuple[int, ...]  # where the pieces of the tar begin that tell it from another one of the same size
    digest: str  # of those pieces
    image_offset: Int64[np.ndarray, " n"]  # -1 = the sample has no image member
    image_size: Int64[np.ndarray, " n"]
    label: Int64[np.ndarray, " n"]  # -1 = no label
    key_end: Int64[np.ndarray, " n"]  # where each key ends in key_bytes
    key_bytes: UInt8[np.ndarray, " z"]  # all keys one after the other, UTF-8

    def __len__(self) -> int:
        return len(self.label)

    def key(self, row: int) -> str:
        """Return the sample's name: the members' path up to the first dot of the last component."""
        start = int(self.key_end[row - 1]) if row else 0
        return self.key_bytes[start : int(self.key_end[row])].tobytes().decode(errors="surrogateescape")


def index_path(shard: str | Path) -> Path:
    """Return where the sidecar of a shard lies: beside it, ``.index`` added to its name."""
    return Path(f"{shard}{SUFFIX}")


def build_index(shard: str | Path) -> ShardIndex:
    """Scan the member headers of one uncompressed tar file and return its index; nothing is extracted.

    Samples are consecutive members with the same key. A sample without image member is kept, so that it is
    reported when it is read instead of vanishing. Links are not followed. Raises UserError if the file cannot
    be read, is no uncompressed tar, is truncated or damaged, holds no image, or a label (``.cls`` member) is
    not an integer of at least 0 (or -1 = none).
    """
    try:
        shard_bytes = os.stat(shard).st_size
        with tarfile.open(shard, mode="r:") as tar:
            samples = _scan(tar, str(shard))
            end = tar.offset
        with open(shard, "rb") as file:
            file.seek(end)
            tail = file.read(MAX_TAIL)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise UserError(
            f"shard {shard} is damaged, truncated or not an uncompressed tar file ({error}): restore it"
        ) from error
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {error.strerror or error}") from error
    if len(tail) < 2 * BLOCK or any(tail):
        raise UserError(
            f"shard {shard} is truncated, damaged or joined from several tar files at byte {end} of {shard_bytes}: "
            "restore it"
        )
    if not any(sample.offset >= 0 for sample in samples):
        raise UserError(
            f"shard {shard} holds no image: expected members such as 00000000.jpg (one dot only; "
            f"{', '.join(sorted(IMAGE_EXTENSIONS))})"
        )
    keys = [sample.key.encode(errors="surrogateescape") for sample in samples]
    with_image = [sample.offset for sample in samples if sample.offset >= 0]
    # Before an image stand its headers, and its label or that of the sample before: new labels alone are seen, too.
    chosen = {with_image[0], with_image[len(with_image) // 2], with_image[-1]}
    marks = tuple(sorted(max(0, offset - MARK_BYTES // 2) for offset in chosen))
    return ShardIndex(
        shard_bytes=shard_bytes,
        marks=marks,
        digest=marks_digest(shard, marks),
        image_offset=np.array([sample.offset for sample in samples], dtype=np.int64),
        image_size=np.array([sample.size for sample in samples], dtype=np.int64),
        label=np.array([sample.label for sample in samples], dtype=np.int64),
        key_end=np.cumsum([len(key) for key in keys], dtype=np.int64),
        key_bytes=np.frombuffer(b"".join(keys), dtype=np.uint8),
    )


def marks_digest(shard: str | Path, marks: tuple[int, ...]) -> str:
    """Return the hash of a shard's bytes at a few places: one small read for each.

    It goes with the content, so it survives what a time stamp does not: copies, archives, version control.
    """
    digest = hashlib.sha256()
    try:
        with open(shard, "rb", buffering=0) as file:
            for mark in marks:
                digest.update(os.pread(file.fileno(), MARK_BYTES, mark))
    except OSError as error:
        raise UserError(f"cannot read shard {shard}: {error.strerror or error}") from error
    return digest.hexdigest()


@dataclass(kw_only=True, slots=True)
class _Sample:
    key: str
    kinds: set[str]
    offset: int = -1
    size: int = 0
    label: int = -1


def _scan(tar: tarfile.TarFile, shard: str) -> list[_Sample]:
    samples: list[_Sample] = []
    while (member := tar.next()) is not None:
        tar.members.clear()  # type: ignore[attr-defined]  # every header would be kept: gigabytes
        parts = MEMBER_NAME.fullmatch(member.name)
        if member.isdir() or parts is None or re.fullmatch("__.*__", parts[1]):  # __meta__.json and the like
            continue
        key, kind = parts[1], parts[2].lower()
        if not samples or samples[-1].key != key:
            samples.append(_Sample(key=key, kinds=set()))
        sample = samples[-1]
        if kind in sample.kinds:
            raise UserError(f"shard {shard}: member {member.name!r} comes twice: pack it again")
        sample.kinds.add(kind)
        if not member.isreg() or member.issparse():
            continue
        if kind in IMAGE_EXTENSIONS and sample.offset < 0:
            sample.offset, sample.size = member.offset_data, member.size
        elif kind == "cls":
            sample.label = _read_label(tar, member, shard)
    return samples


def _read_label(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str) -> int:
    file = tar.extractfile(member)
    raw = file.read(MAX_LABEL_BYTES + 1) if file else b""
    match = LABEL.fullmatch(raw)
    if match is None or len(raw) > MAX_LABEL_BYTES:
        raise UserError(
            f"shard {shard}: label member {member.name!r} holds {raw!r}: expected an integer of at least 0"
        )
    return int(match[1])


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
    }
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = file.name
            file.write(save(arrays, metadata=metadata))
            os.fchmod(file.fileno(), 0o644)  # temporary files are private, an index is as public as its shard
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise UserError(
            f"cannot write the index {path}: {error.strerror or error} (GLSD_CACHE names the folder for indices that do "
            "not lie beside their shards)"
        ) from error


@dataclass(frozen=True, kw_only=True)
class IndexHeader:
    """What is known of an index without touching its arrays."""

    path: Path
    count: int
    shard_bytes: int
    marks: tuple[int, ...]
    digest: str
    data_start: int  # byte of the file where the arrays begin
    spans: dict[str, tuple[int, int]]  # first and past-the-last byte of each array, from data_start


def read_header(path: Path) -> IndexHeader:
    """Return the checked header of an index file; UserError if it is damaged or of another version."""
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > MAX_HEADER:
                raise ValueError("header too long")
            header = json.loads(file.read(length))
            file_bytes = os.fstat(file.fileno()).st_size
        metadata = header["__metadata__"]
        version, count = metadata["version"], int(metadata["count"])
        if version != str(VERSION):
            raise UserError(f"index {path} is of version {version}, expected {VERSION}: {REBUILD}")
        spans = {name: _span(header[name], name, count) for name in DTYPES}
        if max(end for _, end in spans.values()) != file_bytes - 8 - length or count < 1:
            raise ValueError("wrong length")
        shard_bytes, digest = int(metadata["shard_bytes"]), str(metadata["digest"])
        marks = tuple(int(mark) for mark in json.loads(metadata["marks"]))
        if not all(0 <= mark < shard_bytes for mark in marks):
            raise ValueError("marks outside the shard")
    except OSError as error:
        raise UserError(f"cannot read the index {path}: {error.strerror or error}") from error
    except (struct.error, ValueError, KeyError, TypeError) as error:
        raise UserError(f"index {path} is damaged ({error!r}): {REBUILD}") from error
    return IndexHeader(
        path=path,
        count=count,
        shard_bytes=shard_bytes,
        marks=marks,
        digest=digest,
        data_start=8 + length,
        spans=spans,
    )


def _span(entry: dict, name: str, count: int) -> tuple[int, int]:
    label, dtype = DTYPES[name]
    start, end = entry["data_offsets"]
    items, rest = divmod(end - start, np.dtype(dtype).itemsize)
    sized = items >= 0 and not rest and (name == "key_bytes" or items == count)
    if start < 0 or not sized or entry["dtype"] != label or entry["shape"] != [items]:
        raise ValueError(f"array {name}")
    return start, end


def map_index(header: IndexHeader) -> ShardIndex:
    """Return the index behind a header, its arrays mapped: pages are read when used, shared by processes."""
    try:
        data = np.memmap(header.path, dtype=np.uint8, mode="r", offset=0)[header.data_start :]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the index {header.path}: {error}") from error
    if len(data) != max(end for _, end in header.spans.values()):
        raise UserError(f"index {header.path} changed while it was in use: start again")
    arrays = {
        name: data[start:end].view(DTYPES[name][1]).view(np.ndarray)
        for name, (start, end) in header.spans.items()
    }
    return ShardIndex(shard_bytes=header.shard_bytes, marks=header.marks, digest=header.digest, **arrays)
