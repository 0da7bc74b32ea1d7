"""What a text says as a label: a number, nothing, or the name of a class; and the names in classes.json."""

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

from glsd.errors import UserError
from glsd.shards.remote import is_remote, read_all, shown

CLASSES_FILE = "classes.json"  # beside labeled shards: the class names, in the order of their labels
# What pandas reads as a missing value.
MARKS = "nan NaN -nan -NaN None null NULL N/A n/a NA <NA> #N/A #NA 1.#IND -1.#IND 1.#QNAN -1.#QNAN"
MISSING = frozenset(("", "#N/A N/A", *MARKS.split()))
# A column of whole numbers with a missing value is one of floats to pandas: N.0, or N,0 where the comma is the decimal sign.
WHOLE = re.compile(r"(0|[1-9][0-9]{0,17})(?:\.0*|,0)?")
NONE = re.compile(r"-1(?:\.0*|,0)?")
INTEGER = re.compile(r"(-?(?:0|[1-9][0-9]*))(?:\.0*|,0)?")
PADDED = re.compile(r"0[0-9]+")
NUMERIC = re.compile(r"[+-]?(?:[0-9]+[.,]?[0-9]*|[.,][0-9]+)(?:[eE][+-]?[0-9]+)?|[+-]?inf")


def whole_number(text: str) -> int | None:
    """Return the number that a text writes as N, N. or N.0, None for every other text; 007 is no number."""
    match = WHOLE.fullmatch(text)
    return int(match[1]) if match else None


def without_fraction(text: str) -> str:
    """Return a text that writes an integer as N.0 as N, every other text as it is."""
    match = INTEGER.fullmatch(text)
    return match[1] if match else text


def is_missing(text: str) -> bool:
    """Return whether a text means "no label": a mark of pandas for a missing value, or -1."""
    return text in MISSING or NONE.fullmatch(text) is not None


def is_padded(text: str) -> bool:
    """Return whether a text is a number with zeros in front, such as 007: it may be the name of a class."""
    return PADDED.fullmatch(text) is not None


def is_numeric(text: str) -> bool:
    """Return whether a text reads as a number that is not padded: whole, with a sign, a fraction or an exponent, or infinite."""
    return NUMERIC.fullmatch(text) is not None and not is_padded(text)


def read_classes(file: str | Path) -> list[str]:
    """Return the class names of a classes.json, in the order of their labels; UserError if it is not such a list."""
    try:
        names = json.loads(read_all(str(file)) if is_remote(str(file)) else Path(file).read_bytes())
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise UserError(
            f"cannot read {shown(str(file))} ({error}): expected a JSON list of class names"
        ) from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            f'{shown(str(file))} is not a list of class names: expected JSON such as ["cat", "dog"]'
        )
    if len(set(names)) < len(names):
        raise UserError(
            f"{shown(str(file))} names a class twice: expected each name once, in the order of the labels"
        )
    return names


def classes_digest(names: Sequence[str]) -> str:
    """Return a hash of class names in their order."""
    return hashlib.sha256(json.dumps(list(names)).encode()).hexdigest()[:16]
