"""Reads a configuration from defaults, YAML files and flags, and writes it as YAML. docs/configuration.md is its contract."""

import dataclasses
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from glsd.config import yaml_file
from glsd.config.help import HELP, help_text
from glsd.config.keys import keys_of
from glsd.config.sources import Entry, file_entries, flag_entries, flag_words
from glsd.config.values import PathText, Unfit, convert, example, expected, free, shown
from glsd.config.yaml_file import Text
from glsd.errors import UserError, pick
from glsd.files import expand, written

Config = TypeVar("Config")
RECIPES = Path(__file__).parents[1] / "configs"
SKIP_DEFAULT = "skip_default"


def load(
    config_class: type[Config], argv: Sequence[str], *, about: str = "", first: Sequence[str] = ()
) -> Config:
    """Return the configuration of a command line: defaults, then each ``--config`` in order, then flags.

    ``--config`` takes YAML files or names of recipes. ``--help`` prints ``about`` and the keys of ``first`` and exits;
    ``--help all`` prints every key, ``--print_config`` the resolved values (``=skip_default``: those that differ).
    Raises UserError for an unknown key or recipe (with the nearest known one), a value of the wrong type, a file that
    cannot be read, and a key that stands twice in a file.
    """
    if any(word in HELP for word in argv):
        print(help_text(config_class, about, () if "all" in argv else first))
        sys.exit(0)
    given = list(flag_words(argv))
    files = [word for name, words in given if name == "config" for word in words or [""]]
    flags = flag_entries(given, config_class)
    recipes = _recipes(getattr(config_class, "recipes", ()))
    sources = [list(file_entries(_file(word, recipes), config_class)) for word in files]
    cfg = _build(config_class, _settle([*sources, flags], config_class))
    if printing := [words for name, words in given if name == "print_config"]:
        print(_printed(cfg, printing[-1]), end="")
        sys.exit(0)
    return cfg


def load_file(config_class: type[Config], path: Path) -> Config:
    """Return the configuration of one YAML file, such as that of a run directory. Raises UserError as ``load`` does."""
    return _build(config_class, _settle([list(file_entries(path, config_class))], config_class))


def groups_in(path: Path) -> set[str]:
    """Return the outermost keys of a YAML file. Raises UserError if it cannot be read."""
    node = yaml_file.read_file(path)
    return {name for name, _, _ in yaml_file.pairs(node)} if isinstance(node, yaml.MappingNode) else set()


class _Dumper(yaml.SafeDumper):
    """Quotes a text that would be read as something else, such as 1e-3, no or None."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text_node(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    try:
        style = None if free(Text(text)) == text else "'"
    except (Unfit, UserError):
        style = "'"
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text_node)


def in_its_folder(cfg: Config, argv: list[str]) -> Config:
    """Return the configuration with ``out`` where the run is now, if its last ``--config`` file is that of a run.

    A run folder may have been moved or copied since it was written. ``--out`` on the command line wins.
    """
    given = [word.partition("=") for word in argv]
    files = [value or argv[place + 1] for place, (flag, _, value) in enumerate(given) if flag == "--config"]
    file = Path(expand(files[-1])) if files else Path()
    is_of_run = re.fullmatch(r"config(\.\d+)?\.yaml", file.name) and (file.parent / "checkpoints").is_dir()
    if not is_of_run or any(flag == "--out" for flag, _, _ in given):
        return cfg
    return dataclasses.replace(cfg, out=str(file.parent))  # type: ignore[type-var]


def dump(cfg: Any) -> str:
    """Return the whole configuration as YAML that ``load`` reads back to an equal one."""
    return _yaml(_tree(cfg))


def _tree(cfg: Any) -> dict[str, Any]:
    """Return a configuration as nested dicts, its paths as ``load`` reads them."""
    kinds = {name: key.kind for name, key in keys_of(typing.cast(Any, type(cfg))).items()}

    def tree(part: Any, prefix: str) -> dict[str, Any]:
        found = {}
        for field in dataclasses.fields(part):
            value, name = getattr(part, field.name), prefix + field.name
            if dataclasses.is_dataclass(value):
                value = tree(value, f"{name}.")
            elif kinds[name] == PathText:
                value = written(value)
            found[field.name] = value
        return found

    return tree(cfg, "")


def _yaml(tree: dict[str, Any]) -> str:
    return yaml.dump(_plain(tree), Dumper=_Dumper, sort_keys=False, default_flow_style=None)


def differences(cfg: Any) -> dict[str, Any]:
    """Return the dotted keys whose values differ from the defaults, with their values."""
    mine, default = _flatten(dataclasses.asdict(cfg)), _flatten(dataclasses.asdict(type(cfg)()))
    return {key: value for key, value in mine.items() if key not in default or default[key] != value}


def _printed(cfg: Any, words: Sequence[str]) -> str:
    """Return what --print_config prints: everything, or with skip_default what differs."""
    if not words:
        return dump(cfg)
    if list(words) != [SKIP_DEFAULT]:
        raise UserError(f"--print_config is {' '.join(words)!r}: expected nothing, or {SKIP_DEFAULT}")
    tree: dict[str, Any] = {}
    for key in differences(cfg):
        place, source = tree, _tree(cfg)
        *groups, last = key.split(".")
        for group in groups:
            place, source = place.setdefault(group, {}), source[group]
        place[last] = source[last]
    return _yaml(tree)


def _recipes(folders: Sequence[str]) -> dict[str, str]:
    return {file.stem: str(file) for name in folders for file in sorted((RECIPES / name).glob("*.yaml"))}


def _file(word: str, recipes: dict[str, str]) -> Path:
    """Return the file that a word behind --config names; a recipe by its name, unless there is a file of that name."""
    if not word:
        raise UserError("--config has no value: expected a YAML file or the name of a recipe")
    path = Path(expand(word))
    if path.is_dir():
        raise UserError(f"--config {word} is a folder: name the file, such as {path / 'config.yaml'}")
    if recipes and word.isidentifier() and not path.is_file():
        return Path(pick(recipes, word, "recipe"))
    if path.stem in recipes and not path.exists():
        raise UserError(
            f"cannot read config file {path}: No such file; did you mean the recipe, --config {path.stem}?"
        )
    return path


def _settle(sources: Iterable[Iterable[Entry]], config_class: Any) -> dict[str, Any]:
    """Return the values that are set; a later source wins, and in one source an entry of names with values over the whole."""
    keys, values = keys_of(config_class), dict[str, Any]()
    for source in sources:
        for entry in sorted(source, key=lambda entry: entry.key not in keys):
            if entry.key in keys:
                key = keys[entry.key]
                if typing.get_origin(key.kind) is not dict or not (
                    isinstance(entry.raw, Text) and entry.raw.empty
                ):
                    values[entry.key] = _value(entry, key.kind, key.default)
            else:
                holder, _, name = entry.key.rpartition(".")
                value = _value(entry, None, None)
                values[holder] = {**values.get(holder, keys[holder].default), name: value}
    return values


def _value(entry: Entry, kind: Any, default: Any) -> Any:
    """Return the value of an entry; kind: of the key, None = any plain value."""
    name = f"{entry.where}{entry.said}"
    try:
        value = convert(kind, entry.raw) if kind else free(entry.raw)
    except Unfit as problem:
        what = (
            f"expected {expected(kind)}{problem}{example(kind, default, entry.said)}"
            if kind
            else f"{problem}"[2:]
        )
        raise UserError(f"{name} is {shown(entry.raw)}: {what}") from problem
    except UserError as problem:
        raise UserError(f"{name}: {problem}") from problem
    if kind == PathText and default and not value.strip():
        raise UserError(f"{name} is empty: expected a path (leave it out for {default!r})")
    return value


def _build(config_class: type[Config], values: dict[str, Any]) -> Config:
    def make(part: Any, prefix: str) -> Any:
        given = {}
        for field in dataclasses.fields(part):
            name = prefix + field.name
            if dataclasses.is_dataclass(field.type):
                given[field.name] = make(field.type, f"{name}.")
            elif name in values:
                given[field.name] = values[name]
        return part(**given)

    return make(config_class, "")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
