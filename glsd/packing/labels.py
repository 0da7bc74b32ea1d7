"""Numbers for the labels of folders and lists. A label is a number or the name of a class; the two never mix in silence."""

import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import NamedTuple

from glsd.errors import UserError
from glsd.shards.labels import (
    CLASSES_FILE,
    is_missing,
    is_numeric,
    is_padded,
    read_classes,
    whole_number,
    without_fraction,
)

NUMBERS = "expected whole numbers from 0 (-1 or nothing = no label), or names"


class Numbered(NamedTuple):
    """The labels of the rows of a list."""

    labels: list[int]  # -1 = none
    classes: list[str]  # names in label order; empty = no names
    note: str = ""  # what the user should know of how they were numbered


def number_classes(found: set[str], dst: Path, title: str, classes: str | Path | None) -> dict[str, int]:
    """Return the label of each class name: as in ``classes``, else as in ``dst/classes.json``, else sorted.

    Raises UserError for a class that the file lacks.
    """
    file = _file_of_names(dst, classes)
    if file is None:
        return {name: label for label, name in enumerate(sorted(found))}
    numbers = _numbers_of(read_classes(file))
    if new := sorted(found - set(numbers)):
        raise _unknown(title, new[0], file)
    return numbers


def number_labels(
    texts: Sequence[str | None],
    declared: Sequence[str],
    *,
    dst: Path | None,
    title: str,
    classes: str | Path | None,
) -> Numbered:
    """Return the labels that the texts of a column mean; the contract is in docs/labels.md.

    declared: class names in label order that the lists bring along. They, ``classes`` or ``dst/classes.json`` turn every text
    into a name. Without any, all texts are numbers, which are kept, or all are names, which are numbered in their order.
    Raises UserError for other texts: a name that is not known, numbers among names, negative numbers and fractions.
    """
    file = _file_of_names(dst, classes)
    names = read_classes(file) if file is not None else list(declared)
    known, brought = _numbers_of(names), set(declared)
    given = {text for text in texts if text is not None}
    numbers = {text: label for text in given if (label := _look_up(text, known)) is not None}
    found = {text for text in given if text in numbers or text in brought or not is_missing(text)}
    if not found:
        raise UserError(f"{title}: no row has a label; without labels: --label_column ''")
    note = ""
    if names:
        if unknown := sorted(found - set(numbers)):
            if classes is None or any(is_numeric(name) or is_padded(name) for name in names):
                raise _unknown(title, unknown[0], file)
            numbers = _places(found, title, file, len(names))
            note = f"the labels are numbers: they were taken as places in {file}, where {names[0]!r} is 0"
    elif all(whole_number(text) is not None for text in found):
        numbers = {text: label for text in found if (label := whole_number(text)) is not None}
    else:
        _check_names(found, title)
        names = sorted(found)
        numbers = _numbers_of(names)
    labels = [-1 if text is None else numbers.get(text, -1) for text in texts]
    return Numbered(labels, names, note)


def _file_of_names(dst: Path | None, classes: str | Path | None) -> Path | None:
    if classes is not None:
        return Path(classes)
    if dst is None:
        return None
    earlier = dst / CLASSES_FILE
    return earlier if os.path.isfile(earlier) else None


def _numbers_of(names: Sequence[str]) -> dict[str, int]:
    return {name: label for label, name in enumerate(names)}


def _look_up(text: str, known: dict[str, int]) -> int | None:
    """Return the number of the class that a text names, also where it writes the name 2 as 2.0."""
    return known.get(text, known.get(without_fraction(text)))


def _places(found: Collection[str], title: str, file: Path | None, count: int) -> dict[str, int]:
    """Return the labels of texts that are all places in a list of ``count`` names."""
    numbers = {}
    for text in sorted(found):
        number = whole_number(text)
        if number is None:
            raise _unknown(title, text, file)
        if number >= count:
            raise UserError(f"{title}: label {number} has no name: only {count} classes are named in {file}")
        numbers[text] = number
    return numbers


def _unknown(title: str, text: str, file: Path | None) -> UserError:
    where = file if file is not None else "the list of class names in the Parquet file"
    if is_numeric(text):
        return UserError(
            f"{title}: label {text} is a number and no class name of {where}: write the names into the list; if the numbers "
            "count those names from 0, name the file with --classes; if they mean other classes, pack into another folder"
        )
    return UserError(
        f"{title} has the class {text!r}, which {where} lacks: leave it out, or, to use it, pack all sets anew, first the "
        "one with all classes, so that a label means the same class in each"
    )


def _check_names(found: Collection[str], title: str) -> None:
    """Raise UserError unless texts are names: none reads as a number, or all are padded to one width (008, 009, 010)."""
    numeric = sorted(filter(is_numeric, found))
    others = sorted(set(found) - set(numeric))
    padded = [text for text in others if is_padded(text)]
    if numeric and len(padded) == len(others) and padded:
        widths = {len(text) for text in padded}
        if len(widths) == 1 and all(text.isdecimal() and len(text) >= min(widths) for text in numeric):
            return
    odd = next((text for text in numeric if whole_number(text) is None), None)
    if odd is not None:
        raise UserError(f"{title}: label {odd}: {NUMBERS}")
    if numeric:
        raise UserError(
            f"{title}: label {numeric[0]} is a number, label {others[0]!r} a name: write either numbers or names; if all are "
            'names, list them in a file ["name", ...] and give it with --classes'
        )
    if len({int(text) for text in padded}) < len(padded):
        raise UserError(
            f"{title}: labels such as {padded[0]} are padded with zeros to several widths: write each number in one way"
        )
