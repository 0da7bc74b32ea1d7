"""Reads a YAML as it was written: every value as its text, every key once. A key that stands twice is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from glsd.errors import UserError, one_line

_STANDARD = "tag:yaml.org,2002:"
_TAGS = {
    _STANDARD + name
    for name in ("null", "bool", "int", "float", "str", "timestamp", "map", "seq", "value", "merge")
}
_MERGE = _STANDARD + "merge"


class Text(NamedTuple):
    """A single value as it was written."""

    text: str
    quoted: bool = False  # in quotes 'no', '1' and '' are texts where any value is taken

    @property
    def empty(self) -> bool:
        """Tell whether this is YAML's null."""
        return not self.quoted and self.text in ("", "~", "null", "Null", "NULL")


Raw = Text | list["Raw"] | dict[str, "Raw"]


def read_file(path: Path) -> yaml.Node | None:
    """Return the checked document of a file, None if it is empty.

    Raises UserError for a file that cannot be read or is no YAML, for a key that stands twice at any depth, and for
    YAML's tags, which would name a class.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot read config file {path}: {one_line(problem)}") from problem
    return _parse(text, f"config file {path}")


def read_text(text: str) -> Raw:
    """Return a value of a flag that is written as YAML, such as ``{depth: 3}``. Raises UserError as ``read_file`` does."""
    node = _parse(text, f"value {text!r}")
    return Text("") if node is None else plain(node)


def _parse(text: str, source: str) -> yaml.Node | None:
    try:
        node = yaml.compose(text, yaml.SafeLoader)
        if node is not None:
            _check(node, source, set(), set())
    except (yaml.YAMLError, RecursionError) as problem:
        mark, said = getattr(problem, "problem_mark", None), getattr(problem, "problem", None)
        where = f", line {mark.line + 1}," if mark else ""
        raise UserError(
            f"{source}{where} is not valid YAML: {one_line(said or problem)} (a value with any of {{ [ : # , needs quotes)"
        ) from problem
    return node


def _check(node: yaml.Node, source: str, above: set[int], done: set[int]) -> None:
    """Check every node once; ``above`` are those that hold it, so that an alias inside its own anchor is found."""
    if id(node) in above:
        raise UserError(f"{source}, line {line(node)}: an anchor holds itself")
    if id(node) in done:
        return
    done.add(id(node))
    if node.tag not in _TAGS:
        raise UserError(
            f"{source}, line {line(node)}: the tag {node.tag.replace(_STANDARD, '!!')} is not taken: remove it"
        )
    inside = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, yaml.Node] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise UserError(f"{source}, line {line(key)}: a key must be a name")
            if key.value in seen:
                lines = sorted({line(seen[key.value]), line(key)})
                places = " and in line ".join(map(str, lines))
                raise UserError(f"{source}: key {key.value!r} stands twice, in line {places}: keep one")
            seen[key.value] = key
            _check(value, source, inside, done)
            if key.tag == _MERGE and not all(isinstance(part, yaml.MappingNode) for part in _merged(value)):
                raise UserError(
                    f"{source}, line {line(key)}: << takes an alias of keys with values, or a list of them"
                )
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check(item, source, inside, done)


def pairs(node: yaml.MappingNode) -> Iterator[tuple[str, yaml.Node, int]]:
    """Yield key, value and line of a mapping; its own keys come before those that ``<<`` merges into it."""
    own = {key.value: (value, line(key)) for key, value in node.value if key.tag != _MERGE}
    for key, value in node.value:
        if key.tag == _MERGE:
            for part in _merged(value):
                for name, inner, _ in pairs(part):
                    own.setdefault(name, (inner, line(key)))
    for name, (value, number) in own.items():
        yield name, value, number


def _merged(node: yaml.Node) -> list[Any]:
    return node.value if isinstance(node, yaml.SequenceNode) else [node]


def plain(node: yaml.Node) -> Raw:
    """Return a node as texts, lists and dicts."""
    if isinstance(node, yaml.MappingNode):
        return {name: plain(value) for name, value, _ in pairs(node)}
    if isinstance(node, yaml.SequenceNode):
        return [plain(item) for item in node.value]
    return text_of(node)


def text_of(node: Any) -> Text:
    """Return a single value of a document."""
    return Text(node.value, quoted=node.style is not None)


def line(node: yaml.Node) -> int:
    """Return the line in which a node begins, from 1."""
    return node.start_mark.line + 1
