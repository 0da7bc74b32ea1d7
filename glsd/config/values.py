"""What a text means where a number, a choice, a list or a path is expected: the same in a YAML, a flag or a list's entry.

YAML's own idea of a type is not asked: it reads ``no`` as false, ``1e-3`` as a text and ``010`` as eight. Here the type that
a key has decides.
"""

import re
import types
import typing
from collections.abc import Sequence
from typing import Annotated, Any, Literal, Union

from glsd.config.yaml_file import Raw, Text, read_text
from glsd.errors import UserError, nearest
from glsd.files import expand

PathText = Annotated[str, "a path"]  # ``~`` and ``$NAME`` are replaced when it is read

_TRUE, _FALSE = ("true", "yes", "on", "y", "1"), ("false", "no", "off", "n", "0")
_LEAVE_OUT = " (leave the key out to keep the default)"
_INT = re.compile(r"[+-]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[+-]?(\.?inf|([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]+)?)", re.I)
_MOST_DIGITS = 25


class Unfit(Exception):
    """The value does not fit the type; the message, which may be empty, says more than the type's description."""


def convert(kind: Any, raw: Raw) -> Any:
    """Return the value of type ``kind`` that was written as ``raw``.

    Raises Unfit for another type, UserError for a path whose variable or home folder does not exist.
    """
    if kind == PathText:
        return expand(_one(raw))
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(parts, raw)
    if origin is dict:
        return _pairs(raw)
    if origin is tuple:
        if len(pieces := _pieces(raw)) != len(parts):
            raise Unfit
        return tuple(convert(part, piece) for part, piece in zip(parts, pieces, strict=True))
    if origin is list:
        return [convert(parts[0], piece) for piece in (_texts(raw) if parts[0] is str else _pieces(raw))]
    if origin is Literal:
        text = _one(raw)
        if text not in parts:
            raise Unfit(nearest(text, parts))
        return text
    return _SCALARS[kind](_one(raw))


def _union(parts: Sequence[Any], raw: Raw) -> Any:
    """Convert to the first type that fits: a list where one was written, the only other type or nothing."""
    kinds = [part for part in parts if part is not type(None)]
    lists = [kind for kind in kinds if typing.get_origin(kind) is list]
    if lists and (isinstance(raw, list) or _is_bracketed(raw, "[]")):
        return convert(lists[0], raw)
    (kind,) = [kind for kind in kinds if kind not in lists]
    try:
        return convert(kind, raw)
    except Unfit:
        if type(None) in parts and isinstance(raw, Text) and (raw.empty or raw.text in ("none", "None")):
            return None
        raise


def free(raw: Raw) -> Any:
    """Return what a value is where any plain value is taken, such as an argument of timm."""
    if isinstance(raw, dict) or (isinstance(raw, list) and not all(isinstance(item, Text) for item in raw)):
        raise Unfit(": expected a plain value or a list of them")
    if isinstance(raw, list):
        return [free(item) for item in raw]
    if raw.quoted:
        return raw.text
    text = raw.text.strip()
    if raw.empty or text == "None":
        return None
    if text.lower() in ("true", "yes", "on", "false", "no", "off"):
        return text.lower() in _TRUE
    for read in (_integer, _number):
        try:
            return read(text)
        except Unfit:
            continue
    if _is_bracketed(raw, "[]"):
        return free(_texts(raw))
    numbers = [free(item) for item in _pieces(raw)] if "," in text or _is_bracketed(raw) else []
    return numbers if numbers and all(type(number) in (int, float) for number in numbers) else raw.text


def _one(raw: Raw) -> str:
    """Return the text of a single value, which is not YAML's null; ~ is a home folder."""
    if not isinstance(raw, Text):
        raise Unfit(", a single one" if isinstance(raw, list) else "")
    if raw.empty and raw.text != "~":
        raise Unfit(_LEAVE_OUT)
    return raw.text


def _is_bracketed(raw: Raw, *kinds: str) -> bool:
    text = raw.text.strip() if isinstance(raw, Text) and not raw.quoted else ""
    return text[:1] + text[-1:] in (kinds or ("[]", "()"))


def _texts(raw: Raw) -> list[Raw]:
    """Return the entries of a list of texts, which may hold blanks and commas."""
    if isinstance(raw, Text) and _is_bracketed(raw, "[]"):
        raw = read_text(raw.text)
    if not isinstance(raw, list):
        raise Unfit
    return raw


def _pieces(raw: Raw) -> list[Text]:
    """Return the entries of a list of numbers, written with brackets or without, with commas or blanks."""
    if isinstance(raw, dict):
        raise Unfit
    if isinstance(raw, list):
        if not all(isinstance(item, Text) and item.text.strip() for item in raw):
            raise Unfit
        raw = Text(" ".join(item.text for item in raw if isinstance(item, Text)), quoted=True)
    text = raw.text.strip()
    if _is_bracketed(raw):
        text = text[1:-1]
    if raw.empty:
        raise Unfit(_LEAVE_OUT)
    return [Text(piece) for piece in re.split(r"\s*,\s*|\s+", text.strip().removesuffix(",")) if text.strip()]


def _pairs(raw: Raw) -> dict[str, Any]:
    """Return the values of ``{a: 1, b: 2}``, ``a=1 b=2`` or ``a=1,b=2``."""
    if isinstance(raw, Text) and not raw.empty:
        text = raw.text.strip()
        raw = read_text(text) if text[:1] == "{" or ": " in text else [raw]
    if isinstance(raw, list):
        raw = _equations(raw)
    if not isinstance(raw, dict):
        raise Unfit
    found = {}
    for name, value in raw.items():
        if not name.isidentifier():
            raise Unfit(f", but {name!r} is no name")
        try:
            found[name] = free(value)
        except Unfit as problem:
            raise Unfit(f", but {name} is {shown(value)}{problem}") from None
    return found


def _equations(words: Sequence[Raw]) -> dict[str, Raw]:
    found: dict[str, Raw] = {}
    # A comma or blank in front of a name begins the next pair; others belong to a list.
    for word in re.split(
        r"[,\s]\s*(?=[A-Za-z_]\w*\s*=)",
        " ".join(word.text if isinstance(word, Text) else "" for word in words),
    ):
        name, is_pair, value = word.strip().removesuffix(",").partition("=")
        if not is_pair:
            raise Unfit
        if name.strip() in found:
            raise UserError(f"{name.strip()} is given twice: keep one")
        found[name.strip()] = Text(value.strip())
    return found


def _boolean(text: str) -> bool:
    if text.lower() not in _TRUE + _FALSE:
        raise Unfit
    return text.lower() in _TRUE


def _integer(text: str) -> int:
    if not _INT.fullmatch(text) or len(text) > _MOST_DIGITS:
        raise Unfit
    return int(text)


def _whole(text: str) -> int:
    """Return a whole number, which may be written 1e6."""
    try:
        return _integer(text)
    except Unfit:
        value = _number(text)
        # 010 is eight in YAML, and the last part of 1,000 is no number of its own.
        if text.isdecimal() or not value.is_integer() or abs(value) > 2**53:
            raise
        return int(value)


def _number(text: str) -> float:
    if not _FLOAT.fullmatch(text):
        raise Unfit
    return float(text.lower().replace(".inf", "inf"))


_SCALARS: dict[Any, Any] = {str: str, bool: _boolean, int: _whole, float: _number}
_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_PLURALS = {int: "whole numbers", float: "numbers", str: "texts"}


def expected(kind: Any) -> str:
    """Return in words what a type takes."""
    if kind == PathText:
        return "a path"
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        singles_first = sorted(parts, key=lambda part: typing.get_origin(part) is list)
        return " or ".join("null" if part is type(None) else expected(part) for part in singles_first)
    if origin is dict:
        return "names with values"
    if origin is tuple:
        return f"{len(parts)} {_PLURALS[parts[0]]}"
    if origin is list:
        return _PLURALS[parts[0]]
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    return _NAMES[kind]


def takes_several(kind: Any) -> bool:
    """Tell whether a type is, or may be, a list of values or names with values."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    return origin in (list, tuple, dict) or (
        origin in (Union, types.UnionType) and any(map(takes_several, parts))
    )


def shown(raw: Raw) -> str:
    """Return a value as it was written, for a message."""
    if isinstance(raw, dict):
        return "{" + ", ".join(f"{name}: {shown(value)}" for name, value in raw.items()) + "}"
    if isinstance(raw, list):
        return f"[{', '.join(item.text if isinstance(item, Text) else shown(item) for item in raw)}]"
    return "empty" if raw.empty and not raw.text else repr(raw.text)


def example(kind: Any, default: Any, key: str) -> str:
    """Return how a list or names with values are written, for a message; key: a flag (``--k``) or a key of a file."""
    origin = typing.get_origin(kind)
    flag = key.startswith("--")
    if origin is dict:
        return f", e.g. {key} name=4 other=[1,2]" if flag else f", e.g. {key}: {{name: 4, other: [1, 2]}}"
    if takes_several(kind) and origin not in (list, tuple):
        return f", e.g. {key} a.tar b.tar" if flag else f", e.g. {key}: [a.tar, b.tar]"
    if origin not in (list, tuple):
        return ""
    items = [*map(str, default)] or ["1", "0.25" if typing.get_args(kind)[0] is float else "10"]
    return f", e.g. {key} {' '.join(items)}" if flag else f", e.g. {key}: [{', '.join(items)}]"
