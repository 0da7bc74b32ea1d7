"""Files of vectors: .parquet, .npy, .csv or .safetensors, with the name of each image and a record of how they were made.

.parquet is one file. .npy and .safetensors hold the vectors, and ``<file>.names.csv`` has a row for each. The record is in the
metadata of .parquet and .safetensors under the key "glsd", and in ``<file>.json`` for the other two.
"""

import csv
import json
import math
import os
import struct
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Float32, Int64

from glsd.errors import UserError, one_line
from glsd.files import replacing

KEY = "glsd"  # of the record in a file's metadata
NAMES_SUFFIX, RECORD_SUFFIX = ".names.csv", ".json"
MAX_CELL = 2**24  # characters of a name in a CSV file


@dataclass(frozen=True, kw_only=True)
class VectorTable:
    """Vectors of images, with what is known of each, by row."""

    vectors: Float32[np.ndarray, "n d"]
    names: list[str]  # file names or keys
    numbers: Int64[
        np.ndarray, " n"
    ]  # place among the images that were given, ascending; unreadable ones have no row
    labels: list[str | None] | None  # None = the source has none
    record: Mapping[str, Any]  # how they were made


class Rows(NamedTuple):
    """Some consecutive rows of a file that is written."""

    vectors: Float32[np.ndarray, "m d"]
    names: list[str]
    numbers: Int64[np.ndarray, " m"]
    labels: list[str | None] | None


class _Damaged(Exception):
    """A file of vectors is not as it was written; the message says why."""


def write_vectors(path: Path, record: Mapping[str, Any], rows: Callable[[], Iterable[Rows]]) -> None:
    """Write a file of vectors, atomically and in bounded memory; ``path`` appears last.

    record: has "count", "width" and "crc32" (of the vectors' bytes) besides what is told of the run. rows: returns the rows
    from the first again, as often as it is called. Raises UserError if a file cannot be written.
    """
    write = FORMATS[path.suffix][0]
    try:
        if path.suffix in SIDECARS:
            with replacing(beside(path, NAMES_SUFFIX)) as file:
                _write_csv(file, rows(), vectors=False)
        if path.suffix in (".npy", ".csv"):
            with replacing(beside(path, RECORD_SUFFIX)) as file:
                file.write(json.dumps(record, indent=1).encode())
        with replacing(path) as file:
            write(file, record, rows)
    except OSError as error:
        raise UserError(f"cannot write {path}: {one_line(error)}") from error


def read_vectors(path: str | Path) -> VectorTable:
    """Return what ``glsd embed`` wrote. Raises UserError for a file that it did not write, or that is damaged or changed."""
    path = Path(path)
    record = read_record(path)
    try:
        table = FORMATS[path.suffix][1](path, record)
        if len(table.names) != record["count"] or table.vectors.shape != (record["count"], record["width"]):
            raise _Damaged(
                f"it holds {table.vectors.shape} numbers, not {record['count']} x {record['width']}"
            )
        if zlib.crc32(np.ascontiguousarray(table.vectors).data) != record["crc32"]:
            raise _Damaged("the vectors are not those that were written")
    except (_Damaged, OSError, EOFError, ValueError, LookupError, csv.Error) as error:
        raise UserError(
            f"{path} is damaged or was changed ({one_line(error)}): delete it and embed again"
        ) from error
    return table


def read_record(path: Path) -> Mapping[str, Any]:
    """Return how a file of vectors was made. Raises UserError if that is not known."""
    check_format(path)
    try:
        text = _record_text(path)
        record = json.loads(text) if text else None
    except (_Damaged, OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(record, dict) or not {"count", "width", "crc32", "model"} <= record.keys():
        raise UserError(f"{path} was not written by glsd embed: it does not say which model made the vectors")
    return record


def check_format(path: Path) -> None:
    """Raise UserError unless the name of a file says how it is written, and what is needed for it is installed."""
    if path.suffix not in FORMATS:
        raise UserError(f"{str(path)!r}: expected a name that ends in {', '.join(FORMATS)}")
    if path.suffix == ".parquet":
        _pyarrow()


def beside(path: Path, suffix: str) -> Path:
    """Return the file whose name is this one's plus ``suffix``."""
    return path.with_name(path.name + suffix)


def _record_text(path: Path) -> str | bytes | None:
    if path.suffix in (".npy", ".csv"):
        os.stat(path)
        file = beside(path, RECORD_SUFFIX)
        return file.read_bytes() if file.is_file() else None
    if path.suffix == ".safetensors":
        return _read_header(path)[0].get("__metadata__", {}).get(KEY)
    arrow, parquet = _pyarrow()
    try:
        return (parquet.read_schema(path).metadata or {}).get(KEY.encode())
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise _Damaged(one_line(error)) from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            ".parquet needs pyarrow: pip install 'glsd[parquet]', or name a file that ends in .npy"
        ) from error
    return pyarrow, pyarrow.parquet


def _bytes_of(name: str) -> bytes:
    return name.encode("utf-8", "surrogateescape")


def _printable(name: str) -> str:
    return name.encode("utf-8", "backslashreplace").decode()


def _is_text(name: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in name)


# .parquet


def _write_parquet(file: BinaryIO, record: Mapping[str, Any], rows: Callable[[], Iterable[Rows]]) -> None:
    """Columns number, name, label (if there are labels), vector; name_bytes too if a name is not valid UTF-8."""
    arrow, parquet = _pyarrow()
    fields = [("number", arrow.int64()), ("name", arrow.string())]
    if not all(_is_text(name) for part in rows() for name in part.names):
        fields.append(("name_bytes", arrow.binary()))
    if record["labeled"]:
        fields.append(("label", arrow.string()))
    vector = arrow.list_(arrow.float32(), record["width"])
    schema = arrow.schema([*fields, ("vector", vector)], metadata={KEY: json.dumps(record)})
    # Vectors do not shrink, and pages of dictionaries would make the reader slower.
    with parquet.ParquetWriter(file, schema, compression="none", use_dictionary=False) as writer:
        for part in rows():
            columns = {
                "number": part.numbers,
                "name": list(map(_printable, part.names)),
                "name_bytes": list(map(_bytes_of, part.names)),
                "label": [None if label is None else _printable(label) for label in part.labels or []],
            }
            arrays = [arrow.array(columns[name], kind) for name, kind in fields]
            flat = arrow.array(part.vectors.reshape(-1))
            arrays.append(arrow.FixedSizeListArray.from_arrays(flat, record["width"]))
            writer.write_table(arrow.Table.from_arrays(arrays, schema=schema))


def _read_parquet(path: Path, record: Mapping[str, Any]) -> VectorTable:
    arrow, parquet = _pyarrow()
    numbers: list[int] = []
    names: list[str] = []
    labels: list[str | None] = []
    start = 0
    vectors = np.empty((record["count"], record["width"]), np.float32)
    try:
        with parquet.ParquetFile(path) as opened:
            for group in range(opened.num_row_groups):
                table = opened.read_row_group(group)
                numbers += table["number"].to_pylist()
                exact = "name_bytes" in table.column_names
                found = table["name_bytes" if exact else "name"].to_pylist()
                names += [name.decode("utf-8", "surrogateescape") for name in found] if exact else found
                labels += table["label"].to_pylist() if record["labeled"] else []
                for chunk in table["vector"].chunks:
                    part = chunk.flatten().to_numpy().reshape(len(chunk), -1)
                    vectors[start : start + len(part)] = part
                    start += len(part)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise _Damaged(one_line(error)) from error
    return _table(vectors, names, numbers, labels, record)


def _table(vectors: np.ndarray, names: list, numbers: list, labels: list, record: Mapping) -> VectorTable:
    expected = (record["count"], record["width"])
    if vectors.shape != expected or len(names) != len(vectors):
        raise _Damaged(f"{len(names)} names and {vectors.shape} numbers, not {expected}")
    return VectorTable(
        vectors=vectors,
        names=names,
        numbers=np.array(numbers, dtype=np.int64),
        labels=labels if record["labeled"] else None,
        record=record,
    )


# .npy and .safetensors


def _write_npy(file: BinaryIO, record: Mapping[str, Any], rows: Callable[[], Iterable[Rows]]) -> None:
    shape = (record["count"], record["width"])
    np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
    for part in rows():
        file.write(np.ascontiguousarray(part.vectors, "<f4").data)


def _read_npy(path: Path, record: Mapping[str, Any]) -> VectorTable:
    vectors = np.load(path, allow_pickle=False)
    if vectors.dtype != np.float32:
        raise _Damaged(f"it holds {vectors.dtype}, not float32")
    return _with_names(path, vectors, record)


def _write_safetensors(file: BinaryIO, record: Mapping[str, Any], rows: Callable[[], Iterable[Rows]]) -> None:
    """One tensor, "vectors". By hand: the library's writer takes tensors that are whole in memory."""
    shape = [record["count"], record["width"]]
    entry = {"dtype": "F32", "shape": shape, "data_offsets": [0, 4 * math.prod(shape)]}
    head = json.dumps({"__metadata__": {KEY: json.dumps(record)}, "vectors": entry}).encode()
    head += b" " * (-len(head) % 8)
    file.write(struct.pack("<Q", len(head)) + head)
    for part in rows():
        file.write(np.ascontiguousarray(part.vectors, "<f4").data)


def _read_header(path: Path) -> tuple[dict, int]:
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        if not 2 <= length <= os.fstat(file.fileno()).st_size:
            raise _Damaged("not a safetensors file")
        return json.loads(file.read(length)), 8 + length


def _read_safetensors(path: Path, record: Mapping[str, Any]) -> VectorTable:
    vectors = np.fromfile(path, "<f4", offset=_read_header(path)[1])
    return _with_names(path, vectors.reshape(-1, record["width"]), record)


def _with_names(path: Path, vectors: np.ndarray, record: Mapping[str, Any]) -> VectorTable:
    names, numbers, labels = [], [], []
    with _open_csv(beside(path, NAMES_SUFFIX)) as lines:
        for row in csv.DictReader(lines):
            names.append(row["name"])
            numbers.append(int(row["number"]))
            labels.append(row.get("label") or None)
    return _table(vectors, names, numbers, labels, record)


# .csv


def _write_csv(file: BinaryIO, parts: Iterable[Rows], *, vectors: bool) -> None:
    """Columns number, name, label (if there are labels), and the vector as v0, v1, ..., which float32 reads back exactly."""
    head: list[str] = []
    for part in parts:
        text = _Lines()
        lines = csv.writer(text, lineterminator="\n")
        label = [] if part.labels is None else ["label"]
        if not head:
            head = ["number", "name", *label]
            width = part.vectors.shape[1] if vectors else 0
            lines.writerow(head + [f"v{place}" for place in range(width)])
        values = part.vectors.astype(str) if vectors else [()] * len(part.names)
        for row, (number, name) in enumerate(zip(part.numbers, part.names, strict=True)):
            known = [] if part.labels is None else [part.labels[row] or ""]
            lines.writerow([int(number), name, *known, *values[row]])
        file.write(_bytes_of("".join(text)))


class _Lines(list):
    """What csv.writer writes to."""

    write = list.append


def _open_csv(path: Path) -> Any:
    csv.field_size_limit(MAX_CELL)
    return open(path, encoding="utf-8", errors="surrogateescape", newline="")


def _read_csv(path: Path, record: Mapping[str, Any]) -> VectorTable:
    names, numbers, labels = [], [], []
    vectors = np.empty((record["count"], record["width"]), np.float32)
    first = 3 if record["labeled"] else 2
    with _open_csv(path) as lines:
        table: Iterator[list[str]] = csv.reader(lines, strict=True)
        next(table, None)
        for place, row in enumerate(table):
            if place >= len(vectors):
                raise _Damaged(f"more than {len(vectors)} rows")
            numbers.append(int(row[0]))
            names.append(row[1])
            labels.append(row[2] or None)
            vectors[place] = np.array(row[first:], dtype=np.float32)
    return _table(vectors, names, numbers, labels, record)


# End of the name -> writer of the main file, reader.
FORMATS: dict[str, tuple[Callable[..., None], Callable[[Path, Mapping[str, Any]], VectorTable]]] = {
    ".parquet": (_write_parquet, _read_parquet),
    ".npy": (_write_npy, _read_npy),
    ".csv": (lambda file, record, rows: _write_csv(file, rows(), vectors=True), _read_csv),
    ".safetensors": (_write_safetensors, _read_safetensors),
}
SIDECARS = (".npy", ".safetensors")  # these hold the vectors only
