"""Packing lists of images: CSV, TSV or Parquet files with a path (or the image file itself) and a label in each row."""

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from glsd.errors import BrokenImage, UserError, nearest, one_line
from glsd.packing.folder import number_classes
from glsd.packing.parquet import ParquetReader, RowGroup, parquet_columns, read_parquet
from glsd.packing.source import FileReader, Source, check_regular
from glsd.packing.write import PackSummary, pack_sources
from glsd.shards.store import CLASSES_FILE, read_classes

NEGATIVE = re.compile(r"-[0-9]+")
NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")  # as str(int) writes it: 007 is a class name
CSV_SEPARATORS = {".csv": ",", ".tsv": "\t"}
PARQUET = (".parquet", ".pq")
MAX_CELL = 2**20  # characters
NO_LABEL = "no label"


@dataclass(kw_only=True)
class Rows:
    """The rows of all lists, one after the other."""

    names: list[str]  # paths as the lists give them, or list#row where the list holds the bytes
    labels: list[str | None]
    groups: list[RowGroup]  # of the Parquet files that hold the images themselves
    class_names: list[str]  # from a Parquet file of the datasets library, in label order

    def reader(self, path_column: str, root: Path) -> Callable[[int], bytes]:
        """Return what reads the image file of a row: below ``root``, or from the lists where they hold the bytes."""
        return ParquetReader(path_column, self.groups) if self.groups else FileReader(root, self.names)


def pack_list(
    files: str | Path | Sequence[str | Path],
    dst: str | Path,
    *,
    prefix: str = "train",
    path_column: str = "path",
    label_column: str = "label",
    root: str | Path | None = None,
    classes: str | Path | None = None,
    **settings: Any,
) -> PackSummary:
    """Pack the images that lists name; ``settings`` as pack_sources.

    path_column: paths relative to ``root``, by default to the folder of the first list. In Parquet files the column may
    hold the image files instead, alone or as ``{bytes, path}``, as the datasets library writes them; then row groups are
    shuffled, and the rows in each.
    label_column: "" = no labels. Numbers from 0 are kept; if any label is no number, all are class names, which are numbered
    as in pack_folder. A row without label is left out and listed, as is a missing file.
    Raises UserError for a list that cannot be read, lacks a column or has no row, for labels beyond the classes, and as
    pack_sources does.
    """
    given = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not given:
        raise UserError("no list given: expected .csv, .tsv or .parquet files")
    rows = read_lists(given, path_column, label_column)
    title = ", ".join(map(str, given[:3])) + (f" and {len(given) - 3} more" if len(given) > 3 else "")
    labels, names = _labels(rows, Path(dst), title, classes) if label_column else (None, [])
    read = rows.reader(path_column, Path(root) if root is not None else given[0].parent)
    source = Source(
        title=title,
        names=rows.names,
        read=read if labels is None else _LabeledOnly(read, labels),
        labels=labels,
        classes=tuple(names),
        groups=[group.rows for group in rows.groups],
    )
    return pack_sources({prefix: source}, dst, **settings)[prefix]


def read_lists(files: Sequence[Path], path_column: str, label_column: str) -> Rows:
    """Return the rows of all lists. Raises UserError for a list that cannot be read, lacks a column, or if there is no row."""
    rows = Rows(names=[], labels=[], groups=[], class_names=[])
    for file in files:
        _read(file, path_column, label_column, rows)
    if not rows.names:
        raise UserError(f"{files[0]} has no rows: nothing to read")
    if rows.groups and sum(group.rows for group in rows.groups) < len(rows.names):
        raise UserError(f"some of the lists hold images in {path_column}, others paths: give them separately")
    return rows


def list_columns(file: Path) -> list[str]:
    """Return the names of a list's columns; none for a file that cannot be read, which ``read_lists`` explains."""
    kind = file.suffix.lower()
    try:
        check_regular(file)
        if kind in PARQUET:
            return parquet_columns(file)
        with _open_csv(file) as lines:
            return next(csv.reader(lines, delimiter=CSV_SEPARATORS[kind], strict=True), [])
    except (OSError, csv.Error, UserError):
        return []


class _LabeledOnly:
    """Reads images as another reader does; BrokenImage for one without label."""

    def __init__(self, read: Any, labels: Sequence[int]):
        self._read, self._labels = read, labels

    def __call__(self, number: int) -> bytes:
        if self._labels[number] < 0:
            raise BrokenImage(NO_LABEL)
        return self._read(number)


def _labels(rows: Rows, dst: Path, title: str, classes: str | Path | None) -> tuple[list[int], list[str]]:
    """Return the label of each row (-1 = none) and the class names in label order (empty = no names)."""
    texts = {text for text in rows.labels if text is not None}
    if not texts:
        raise UserError(f"{title}: no row has a label; without labels: --label_column ''")
    if negative := next(filter(NEGATIVE.fullmatch, sorted(texts)), None):
        raise UserError(
            f"{title}: label {negative}: expected whole numbers from 0 (-1 or nothing = no label), or names"
        )
    if all(NUMBER.fullmatch(text) for text in texts):
        file = Path(classes) if classes is not None else dst / CLASSES_FILE
        names = read_classes(file) if classes is not None or file.is_file() else rows.class_names
        return [-1 if text is None else int(text) for text in rows.labels], names
    numbers = number_classes(texts, dst, title, classes)
    return [-1 if text is None else numbers[text] for text in rows.labels], list(numbers)


def _read(file: Path, path_column: str, label_column: str, rows: Rows) -> None:
    kind = file.suffix.lower()
    try:
        check_regular(file)
        if kind in PARQUET:
            table = read_parquet(file, path_column, label_column, len(rows.names), _check_columns)
            rows.names += table.names
            rows.labels += table.labels
            rows.groups += table.groups
            rows.class_names = rows.class_names or table.class_names
        elif kind in CSV_SEPARATORS:
            _read_csv(file, CSV_SEPARATORS[kind], path_column, label_column, rows)
        else:
            raise UserError(f"list {file}: expected a name that ends with .csv, .tsv or .parquet")
    except OSError as error:
        raise UserError(f"cannot read list {file}: {one_line(error)}") from error


def _check_columns(file: Path, columns: Sequence[str], path_column: str, label_column: str) -> None:
    for column, flag in ((path_column, "--path_column"), (label_column, "--label_column")):
        if column and column not in columns:
            without = "; without labels: --label_column ''" if column == label_column else ""
            raise UserError(
                f"list {file} has no column {column!r}, but {', '.join(map(repr, columns))}"
                f"{nearest(column, columns)}: name it with {flag}{without}"
            )


def _open_csv(file: Path) -> TextIO:
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(file: Path, separator: str, path_column: str, label_column: str, rows: Rows) -> None:
    csv.field_size_limit(MAX_CELL)
    with _open_csv(file) as lines:
        table = csv.reader(lines, delimiter=separator, strict=True)
        try:
            head = next(table, [])
            _check_columns(file, head, path_column, label_column)
            path, label = head.index(path_column), head.index(label_column) if label_column else None
            for row in table:
                if not row:
                    continue  # an empty line
                if len(row) != len(head):
                    raise csv.Error(f"{len(row)} cells, the header has {len(head)}")
                if not row[path]:
                    raise csv.Error(f"empty {path_column}")
                rows.names.append(row[path])
                text = row[label].strip() if label is not None else ""
                rows.labels.append(None if text in ("", "-1") else text)
        except csv.Error as error:
            raise UserError(f"list {file}, line {table.line_num}: {error}") from error
