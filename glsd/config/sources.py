"""What YAML files and flags give to the keys of a configuration, as it was written."""

import os
import re
import sys
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from glsd.config import yaml_file
from glsd.config.keys import find, groups_of, hint, keys_of
from glsd.config.values import example, expected, shown, takes_several
from glsd.config.yaml_file import Raw, Text
from glsd.errors import UserError

BUILTIN = ("help", "config", "print_config")


class Entry(NamedTuple):
    """A value that a file or a flag gives to a key."""

    key: str
    raw: Raw
    said: str  # the key as the user wrote it: optim.lr, --optim.lr
    where: str  # 'config file x.yaml, line 3: ', nothing for a flag


def flag_words(argv: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield each flag's name and the words behind it; several words are a list."""
    name, words = None, []
    for word in argv:
        if re.match(r"--?(?!\.?inf$)[A-Za-z_]", word) or word == "--":
            if name is not None:
                yield name, words
            if not word.startswith("--") or word == "--":
                raise UserError(
                    f"unexpected {word!r}: flags begin with --, such as --out (all flags: --help all)"
                )
            name, joined, value = word[2:].partition("=")
            name = name.replace("-", "_") if name.replace("-", "_") in BUILTIN else name
            words = [value] if joined else []
        elif name is None:
            raise UserError(
                f"unexpected {word!r}: give it behind a flag, such as --config {word} (--help lists them)"
            )
        else:
            words.append(word)
    if name is not None:
        yield name, words


def flag_entries(given: Iterable[tuple[str, list[str]]], config_class: Any) -> list[Entry]:
    """Return the entries of the flags, those of a whole group (``--optim '{lr: 1}'``) first.

    Of a flag that stands twice the last counts, as in other programs, and a line says so. Where the value is a list or
    holds names with values it is refused, because both may be meant.
    """
    keys, found = keys_of(config_class), dict[str, Entry]()
    for name, words in given:
        if name in BUILTIN:
            continue
        key, said = find(name, config_class), f"--{name}"
        if key is None:
            known = [*keys, *groups_of(config_class), *BUILTIN]
            raise UserError(f"unknown flag {said}{hint(name, known, '--')} (all flags: --help all)")
        kind = keys[key].kind if key in keys else None
        if not words and bool in (kind, *typing.get_args(kind)):
            words = ["true"]
        if not words:
            what = f"{expected(kind)}{example(kind, keys[key].default, said)}" if kind else "a value"
            raise UserError(f"{said} has no value: expected {what}")
        entry = Entry(key, _raw(words), said, "")
        if key in found and found[key].raw != entry.raw:
            if kind and takes_several(kind):
                how = example(kind, keys[key].default, said)
                raise UserError(f"{said} is given twice: give all its values at once{how}")
            _note(f"{said} is given twice: the last one counts, {shown(entry.raw)}")
        found[key] = entry
    groups = groups_of(config_class)
    inside = [e for entry in found.values() if entry.key in groups for e in _members(entry, config_class)]
    return [*inside, *(entry for entry in found.values() if entry.key not in groups)]


def _raw(words: list[str]) -> Raw:
    if len(words) == 1:
        return Text(words[0], quoted=not words[0])
    joined = " ".join(words)
    if joined[0] + joined[-1] in ("[]", "()", "{}"):  # a list that the shell has cut at its blanks
        return Text(joined)
    return [Text(word) for word in words]


def _members(entry: Entry, config_class: Any) -> Iterator[Entry]:
    """Yield what a flag says of a whole group."""
    raw = yaml_file.read_text(entry.raw.text) if isinstance(entry.raw, Text) else entry.raw
    if not isinstance(raw, dict):
        raise UserError(
            f"{entry.said} is {shown(entry.raw)}: give its keys as flags, such as --{_first(entry, config_class)}"
        )
    for name, value in raw.items():
        said = f"{entry.said}.{name}"
        key = find(f"{entry.key}.{name}", config_class)
        if key is None:
            raise UserError(
                f"unknown key {said}{hint(said[2:], keys_of(config_class), '--')} (all flags: --help all)"
            )
        yield Entry(key, value, said, "")


def _first(entry: Entry, config_class: Any) -> str:
    return next(name for name in keys_of(config_class) if name.startswith(f"{entry.key}."))


def _note(text: str) -> None:
    """Print a line on stderr, once for all ranks."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text}", file=sys.stderr, flush=True)


def file_entries(path: Path, config_class: Any) -> Iterator[Entry]:
    """Yield what a YAML file says; an empty group says nothing."""
    node = yaml_file.read_file(path)
    seen: dict[str, tuple[str, int]] = {}

    def walk(node: yaml.Node, prefix: str, line: int) -> Iterator[Entry]:
        if isinstance(node, yaml.ScalarNode) and yaml_file.text_of(node).empty:
            return
        if not isinstance(node, yaml.MappingNode):
            what = f"key {prefix[:-1]!r}" if prefix else "the file"
            raise UserError(
                f"config file {path}, line {line}: {what} must hold 'key: value' lines, not {shown(yaml_file.plain(node))}"
            )
        for name, value, line in yaml_file.pairs(node):
            said, where = prefix + name, f"config file {path}, line {line}: "
            key = find(said, config_class)
            if key is None and ")" in name:  # {scale: (0.4, 1.0)} is two keys in YAML
                raise UserError(
                    f"{where}{name!r} is no key: write a list with square brackets, such as [0.4, 1.0]"
                )
            if key is None:
                known = [*keys_of(config_class), *groups_of(config_class)]
                raise UserError(f"{where}unknown key {said!r}{hint(said, known)}")
            if key in groups_of(config_class):
                yield from walk(value, f"{said}.", line)
                continue
            if key in seen:
                raise UserError(
                    f"config file {path}: key {key!r} stands twice, in line {seen[key][1]} ({seen[key][0]}) and in line "
                    f"{line} ({said}): keep one"
                )
            seen[key] = (said, line)
            yield Entry(key, yaml_file.plain(value), said, where)

    if node is not None:
        yield from walk(node, "", yaml_file.line(node))
