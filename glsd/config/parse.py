"""Reads a configuration from defaults, YAML files and flags, and writes it as YAML. jsonargparse parses the types."""

import argparse
import dataclasses
import re
import shutil
import sys
import textwrap
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ActionConfigFile, ArgumentParser

from glsd.errors import UserError, nearest, one_line, pick

Config = TypeVar("Config")
RECIPES = Path(__file__).parents[1] / "configs"
HELP = ("-h", "--help")


class _Parser(ArgumentParser):
    """jsonargparse's parser, which raises UserError with one line."""

    def error(self, message: str, ex: Exception | None = None) -> typing.NoReturn:
        message = message.replace("Parser key", "key").replace("typing.Literal", "one of ")
        message = re.sub(r"Expected an? <class '(\w+)'>", r"expected \1", message).replace(
            "Expected a ", "expected "
        )
        raise UserError(one_line(message, 1000))


def load(
    config_class: type[Config], argv: list[str], *, about: str = "", first: Sequence[str] = ()
) -> Config:
    """Return the configuration of a command line: defaults, then each ``--config``, then flags.

    ``--config`` takes a YAML file or the name of a recipe. ``--help`` prints ``about`` and the keys of ``first`` and
    exits; ``--help all`` prints every key, ``--print_config`` the resolved values.
    Raises UserError for an unknown key or recipe (with the nearest known one), a value of the wrong type, or a file that
    cannot be read.
    """
    parser = _Parser(prog=Path(sys.argv[0]).name, usage=argparse.SUPPRESS)
    parser.add_argument(
        "--config",
        action=ActionConfigFile,
        help="Recipe by its name, or YAML file; holds what differs from the defaults.",
    )
    parser.add_class_arguments(config_class, as_group=False)
    if any(word in HELP for word in argv):
        print(_help(parser, about.strip() or config_class.__doc__ or "", () if "all" in argv else first))
        sys.exit(0)
    argv = _with_recipes(argv, getattr(config_class, "recipes", ()))
    _check_flags(argv, config_class)
    namespace = parser.parse_args(argv)
    values = {f.name: parser.instantiate(namespace)[f.name] for f in dataclasses.fields(config_class)}  # type: ignore[arg-type]
    return config_class(**values)


def load_file(config_class: type[Config], path: Path) -> Config:
    """Return the configuration of one YAML file, such as that of a run directory. Raises UserError as ``load`` does."""
    return load(config_class, ["--config", str(path)])


def in_its_folder(cfg: Config, argv: list[str]) -> Config:
    """Return the configuration with ``out`` where the run is now, if its last ``--config`` file is that of a run.

    A run folder may have been moved or copied since it was written. ``--out`` on the command line wins.
    """
    given = [word.partition("=") for word in argv]
    files = [value or argv[place + 1] for place, (flag, _, value) in enumerate(given) if flag == "--config"]
    file = Path(files[-1]) if files else Path()
    is_of_run = re.fullmatch(r"config(\.\d+)?\.yaml", file.name) and (file.parent / "checkpoints").is_dir()
    if not is_of_run or any(flag == "--out" for flag, _, _ in given):
        return cfg
    return dataclasses.replace(cfg, out=str(file.parent))  # type: ignore[type-var]


def dump(cfg: Any) -> str:
    """Return the whole configuration as YAML that ``load`` reads back to an equal one."""
    return yaml.safe_dump(_plain(dataclasses.asdict(cfg)), sort_keys=False, default_flow_style=None)


def differences(cfg: Any) -> dict[str, Any]:
    """Return the dotted keys whose values differ from the defaults, with their values."""
    mine, default = _flatten(dataclasses.asdict(cfg)), _flatten(dataclasses.asdict(type(cfg)()))
    return {key: value for key, value in mine.items() if key not in default or default[key] != value}


def _help(parser: ArgumentParser, about: str, first: Sequence[str]) -> str:
    """Return the help text: one screen with the chosen keys, or every key if none is chosen."""
    if not first:
        return f"{about.splitlines()[0]}\n\n{parser.format_help()}"
    columns = min(shutil.get_terminal_size().columns, 110)
    lines = [about, "", "What to set first, with the default in brackets:"]
    for key in ("config", *first):
        action = next(action for action in parser._actions if action.dest == key)
        text = (
            f"{action.help} [{action.default}]"
            if action.default not in (None, "", [], {})
            else f"{action.help}"
        )
        indent = " " * 24
        lines += textwrap.wrap(
            text, columns, initial_indent=f"  --{key} ".ljust(24), subsequent_indent=indent
        )
    return "\n".join(
        [*lines, "", "--help all explains every key. --print_config prints the resolved values."]
    )


def _with_recipes(argv: list[str], folders: Sequence[str]) -> list[str]:
    """Return the command line with the name of a recipe behind ``--config`` replaced by its file."""
    recipes = {file.stem: str(file) for name in folders for file in sorted((RECIPES / name).glob("*.yaml"))}

    def resolve(name: str) -> str:
        named = recipes and name.isidentifier() and not Path(name).is_file()
        return pick(recipes, name, "recipe") if named else name

    found = []
    for before, word in zip(["", *argv], argv, strict=False):
        flag, is_joined, value = word.partition("=")
        if before == "--config":
            word = resolve(word)
        elif flag == "--config" and is_joined:
            word = f"--config={resolve(value)}"
        found.append(word)
    return found


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _dotted_keys(config_class: Any, prefix: str = "") -> list[str]:
    keys = []
    for f in dataclasses.fields(config_class):
        keys.append(prefix + f.name)
        if dataclasses.is_dataclass(f.type):
            keys += _dotted_keys(f.type, f"{prefix}{f.name}.")
    return keys


def _check_flags(argv: list[str], config_class: Any) -> None:
    """Check the keys before jsonargparse does, whose message for an unknown key names neither the file nor a neighbor."""
    known = _dotted_keys(config_class)
    builtin = {"help", "config", "print_config"}
    for place, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        name, _, value = word[2:].partition("=")
        free = any(name.startswith(f"{key}.") for key in known if _is_free(config_class, key))
        if name not in known and name not in builtin and not free:
            raise UserError(
                f"unknown flag --{name}{_hint(name, [*known, *builtin], '--')} (all flags: --help all)"
            )
        if name == "config":
            file = value or (argv[place + 1] if place + 1 < len(argv) else "")
            _check_file(Path(file), config_class)


def _is_free(config_class: Any, key: str) -> bool:
    head, _, rest = key.partition(".")
    kind = {f.name: f.type for f in dataclasses.fields(config_class)}[head]
    return _is_free(kind, rest) if rest else typing.get_origin(kind) is dict


def _check_file(path: Path, config_class: Any) -> None:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"cannot read config file {path}: {one_line(problem)}") from problem
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise UserError(f"config file {path} is not valid YAML: {one_line(problem)}") from problem
    _check_tree(tree, config_class, "", path)


def _check_tree(tree: Any, config_class: Any, prefix: str, path: Path) -> None:
    if not isinstance(tree, dict):
        where = f"key '{prefix[:-1]}'" if prefix else "the file"
        raise UserError(f"config file {path}: {where} must hold 'key: value' lines, not {tree!r}")
    kinds = {f.name: f.type for f in dataclasses.fields(config_class)}
    for key, value in tree.items():
        if key not in kinds:
            known = [prefix + name for name in kinds] + _dotted_keys(config_class, prefix)
            raise UserError(
                f"config file {path}: unknown key '{prefix}{key}'{_hint(f'{prefix}{key}', known)}"
            )
        if typing.get_origin(kinds[key]) is dict and isinstance(value, dict):
            for name, inner in value.items():
                if isinstance(inner, dict):
                    raise UserError(
                        f"config file {path}: key '{prefix}{key}.{name}' must be a plain value or a list"
                    )
        if dataclasses.is_dataclass(kinds[key]):
            _check_tree(value, kinds[key], f"{prefix}{key}.", path)


def _hint(name: str, known: list[str], dashes: str = "") -> str:
    """Return a hint at the nearest dotted key. A name without its group (``--lr``) finds the key that ends in it."""
    for key in known:
        if key.rpartition(".")[2] == name:
            return f"; did you mean {dashes + key!r}?"
    hint = nearest(name, known)
    return hint.replace("'", f"'{dashes}", 1) if hint else ""
