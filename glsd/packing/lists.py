"""Packing lists of images: CSV, TSV or Parquet files with a path (or the image file itself) and a label in each row."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from glsd.errors import BrokenImage, UserError, nearest, one_line
from glsd.packing import NO_LABEL
from glsd.packing.labels import number_labels
from glsd.packing.parquet import ParquetReader, RowGroup, parquet_columns, read_parquet
from glsd.packing.source import FileReader, Source, check_regular
from glsd.packing.write import PackSummary, pack_sources

# The usual separator first; a header line that has the columns with another one is read with that.
SEPARATORS = {".csv": ",;\t", ".tsv": "\t,;"}
PARQUET = (".parquet", ".pq")
MAX_CELL = 2**20  # characters


@dataclass(kw_only=True)
class Rows:
    """The rows of all lists, one after the other."""

    names: list[str]  # paths as the lists give them, or list#row where the list holds the bytes
    labels: list[str | None]
    groups: list[RowGroup]  # of the Parquet files that hold the images themselves
    class_names: dict[
        tuple[str, ...], Path
    ]  # in label order, as Parquet files of the datasets library give them

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
    label_column: "" = no labels. All are numbers from 0, which are kept, or all are class names, which are numbered as in
    pack_folder; see number_labels. A row without label is left out and listed, as is a missing file.
    Raises UserError for a list that cannot be read, lacks a column or has no row, for labels that are neither, and as
    pack_sources does.
    """
    given = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    if not given:
        raise UserError("no list given: expected .csv, .tsv or .parquet files")
    rows = read_lists(given, path_column, label_column)
    title = ", ".join(map(str, given[:3])) + (f" and {len(given) - 3} more" if len(given) > 3 else "")
    numbered = None
    if label_column:
        declared = declared_classes(rows, classes)
        numbered = number_labels(rows.labels, declared, dst=Path(dst), title=title, classes=classes)
    read = rows.reader(path_column, Path(root) if root is not None else given[0].parent)
    source = Source(
        title=title,
        names=rows.names,
        read=read if numbered is None else _LabeledOnly(read, _without_label(rows.labels, numbered.labels)),
        labels=None if numbered is None else numbered.labels,
        classes=() if numbered is None else tuple(numbered.classes),
        groups=[group.rows for group in rows.groups],
    )
    summary = pack_sources({prefix: source}, dst, **settings)[prefix]
    return replace(summary, notes=(numbered.note,)) if numbered is not None and numbered.note else summary


def read_lists(files: Sequence[Path], path_column: str, label_column: str) -> Rows:
    """Return the rows of all lists. Raises UserError for a list that cannot be read, lacks a column, or if there is no row."""
    rows = Rows(names=[], labels=[], groups=[], class_names={})
    for file in files:
        _read(file, path_column, label_column, rows)
    if not rows.names:
        raise UserError(f"{files[0]} has no rows: nothing to read")
    if rows.groups and sum(group.rows for group in rows.groups) < len(rows.names):
        raise UserError(f"some of the lists hold images in {path_column}, others paths: give them separately")
    return rows


def list_columns(file: Path, path_column: str) -> list[str]:
    """Return the names of a list's columns; none for a file that cannot be read, which ``read_lists`` explains."""
    kind = file.suffix.lower()
    try:
        check_regular(file)
        if kind in PARQUET:
            return parquet_columns(file)
        with _open_csv(file) as lines:
            separator = _separator(lines.readline(MAX_CELL), SEPARATORS[kind], {path_column})
            lines.seek(0)
            return next(csv.reader(lines, delimiter=separator, strict=True), [])
    except (OSError, csv.Error, UserError):
        return []


class _LabeledOnly:
    """Reads images as another reader does; BrokenImage, with the reason, for one without label."""

    def __init__(self, read: Any, reasons: Mapping[int, str]):
        self._read, self._reasons = read, reasons

    def __call__(self, number: int) -> bytes:
        if number in self._reasons:
            raise BrokenImage(self._reasons[number])
        return self._read(number)


def _without_label(texts: Sequence[str | None], labels: Sequence[int]) -> dict[int, str]:
    """Return why each row without label has none: a word that stands in its place may be the name of a class."""
    reasons = {text: f"{NO_LABEL} ({text})" for text in set(texts) if text and text.upper() != text.lower()}
    rows = enumerate(zip(texts, labels, strict=True))
    return {row: reasons.get(text or "", NO_LABEL) for row, (text, label) in rows if label < 0}


def declared_classes(rows: Rows, classes: str | Path | None = None) -> Sequence[str]:
    """Return the class names that the lists bring along; UserError if they bring different ones and no file decides."""
    if len(rows.class_names) > 1 and classes is None:
        one, other = list(rows.class_names.values())[:2]
        raise UserError(
            f"{one} and {other} name different classes in their metadata: name the file that numbers all of them with --classes"
        )
    return next(iter(rows.class_names), ())


def _read(file: Path, path_column: str, label_column: str, rows: Rows) -> None:
    kind = file.suffix.lower()
    try:
        check_regular(file)
        if kind in PARQUET:
            table = read_parquet(file, path_column, label_column, len(rows.names), _check_columns)
            rows.names += table.names
            rows.labels += table.labels
            rows.groups += table.groups
            if table.class_names:
                rows.class_names.setdefault(tuple(table.class_names), file)
        elif kind in SEPARATORS:
            _read_csv(file, SEPARATORS[kind], path_column, label_column, rows)
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
        if columns.count(column) > 1:
            raise UserError(f"list {file} has {columns.count(column)} columns {column!r}: expected one")


def _open_csv(file: Path) -> TextIO:
    return open(file, encoding="utf-8-sig", errors="surrogateescape", newline="")


def _read_csv(file: Path, separators: str, path_column: str, label_column: str, rows: Rows) -> None:
    csv.field_size_limit(MAX_CELL)
    with _open_csv(file) as lines:
        separator = _separator(lines.readline(MAX_CELL), separators, {path_column, label_column} - {""})
        lines.seek(0)
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
                rows.labels.append((row[label].strip() if label is not None else "") or None)
        except csv.Error as error:
            raise UserError(f"list {file}, line {table.line_num}: {error}") from error


def _separator(header: str, separators: str, columns: set[str]) -> str:
    """Return the first separator by which a header line has the columns, else that by which it has the most."""
    heads = {sign: next(csv.reader([header], delimiter=sign), []) for sign in separators}
    return max(separators, key=lambda sign: (columns <= set(heads[sign]), len(heads[sign])))
