"""Lists of images in Parquet files: rows with a path, or with the image file itself."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from glsd.errors import BrokenImage, UserError, one_line


class RowGroup(NamedTuple):
    """Rows that a Parquet file stores together, and that are read together."""

    first: int  # number of its first row, over all lists
    rows: int
    file: Path
    place: int  # number of the group in the file


class ParquetRows(NamedTuple):
    """The rows of one file."""

    names: list[str]  # paths as given, or file#row where the file holds the images
    labels: list[str | None]  # as pandas writes them; None = nothing
    groups: list[RowGroup]  # empty = paths
    class_names: list[str]  # in label order; empty = the file names none


def read_parquet(
    file: Path,
    path_column: str,
    label_column: str,
    first: int,
    check_columns: Callable[[Path, Sequence[str], str, str], None],
) -> ParquetRows:
    """Return the rows of a Parquet file, without the images. first: number of its first row, over all lists.

    Raises UserError if pyarrow is missing, the file is damaged, a path is missing or a column has another type: text, bytes
    or {bytes, path} for the images, text, numbers or booleans for the labels. Raises OSError if the file cannot be read.
    """
    arrow, parquet = _pyarrow()
    try:
        with parquet.ParquetFile(file) as opened:
            schema = opened.schema_arrow
            check_columns(file, schema.names, path_column, label_column)
            holds_images = _holds_images(arrow, file, path_column, schema.field(path_column).type)
            sizes = [opened.metadata.row_group(place).num_rows for place in range(opened.num_row_groups)]
            labels: list = [None] * sum(sizes)
            class_names = []
            if label_column:
                _check_label_type(arrow, file, label_column, schema.field(label_column).type)
                class_names = _class_names(schema.metadata or {}, label_column)
                labels = opened.read([label_column]).column(0).to_pylist()
            paths = None if holds_images else opened.read([path_column]).column(0).to_pylist()
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read list {file}: {one_line(error)}") from error
    texts = _texts(labels, class_names, f"list {file}: column {label_column!r}")
    if paths is not None:
        if empty := [row for row, path in enumerate(paths) if not path]:
            raise UserError(f"list {file}, row {empty[0]}: empty {path_column}")
        return ParquetRows(paths, texts, [], class_names)
    starts = first + np.cumsum(sizes) - sizes
    groups = [
        RowGroup(int(start), size, file, place)
        for place, (start, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    names = [f"{file.name}#{row}" for row in range(sum(sizes))]
    return ParquetRows(names, texts, [group for group in groups if group.rows], class_names)


def parquet_columns(file: Path) -> list[str]:
    """Return the names of a Parquet file's columns. Raises UserError if it is none, or pyarrow is missing."""
    arrow, parquet = _pyarrow()
    try:
        return list(parquet.read_schema(file).names)
    except (arrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(f"cannot read list {file}: {one_line(error)}") from error


class ParquetReader:
    """Reads images from Parquet files by number. It keeps one row group, which mostly holds the next image, too."""

    def __init__(self, column: str, groups: Sequence[RowGroup]):
        self._column, self._groups = column, groups
        self._starts = np.array([group.first for group in groups])
        self._kept: tuple[int, Any] | None = None

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_kept": None}

    def __call__(self, number: int) -> bytes:
        which = int(np.searchsorted(self._starts, number, side="right")) - 1
        group = self._groups[which]
        if self._kept is None or self._kept[0] != which:
            self._kept = which, self._load(group)
        value = self._kept[1][number - group.first].as_py()
        raw = value["bytes"] if isinstance(value, dict) else value
        if raw is None:
            raise BrokenImage("no image in this row")
        return raw

    def _load(self, group: RowGroup) -> Any:
        arrow, parquet = _pyarrow()
        try:
            with parquet.ParquetFile(group.file) as opened:
                return opened.read_row_group(group.place, columns=[self._column], use_threads=False).column(0)
        except (arrow.ArrowException, OSError) as error:
            raise UserError(f"cannot read list {group.file}: {one_line(error)}") from error


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(
            "Parquet lists need pyarrow: pip install 'glsd[parquet]', or write the list as .csv"
        ) from error
    return pyarrow, pyarrow.parquet


def _holds_images(arrow: Any, file: Path, column: str, kind: Any) -> bool:
    types = arrow.types
    if types.is_string(kind) or types.is_large_string(kind):
        return False
    inside = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
    inner = kind.field("bytes").type if inside else kind
    if types.is_binary(inner) or types.is_large_binary(inner):
        return True
    raise UserError(
        f"list {file}: column {column!r} is of type {kind}: expected text, bytes or {{bytes, path}}"
    )


def _check_label_type(arrow: Any, file: Path, column: str, kind: Any) -> None:
    types = arrow.types
    inner = kind.value_type if types.is_dictionary(kind) else kind
    known = (
        types.is_integer,
        types.is_floating,
        types.is_decimal,
        types.is_boolean,
        types.is_string,
        types.is_large_string,
        types.is_string_view,
        types.is_null,
    )
    if not any(fits(inner) for fits in known):
        raise UserError(f"list {file}: column {column!r} is of type {kind}: expected whole numbers or names")


def _texts(labels: Sequence[Any], class_names: Sequence[str], where: str) -> list[str | None]:
    """Return values as pandas writes them into a CSV, and class names in place of their numbers. UserError as number_labels."""
    texts: dict[Any, str | None] = {}
    for label in set(labels):
        is_place = class_names and type(label) is int and label >= 0
        if is_place and label >= len(class_names):
            raise UserError(
                f"{where} holds label {label}, but its metadata name only {len(class_names)} classes"
            )
        texts[label] = class_names[label] if is_place else str(label).strip()
    return [None if label is None else texts[label] or None for label in labels]


def _class_names(metadata: dict[bytes, bytes], column: str) -> list[str]:
    """Return the class names that the datasets library wrote into a Parquet file for a column, or none."""
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][column]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []
    fine = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if fine and len(set(names)) == len(names) else []
