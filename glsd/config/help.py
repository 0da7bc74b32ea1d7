"""The help of a command: one screen with the keys to set first, or every key with its type and default."""

import itertools
import shutil
import textwrap
from collections.abc import Sequence
from typing import Any

from glsd.config.keys import groups_of, keys_of
from glsd.config.values import expected

HELP = ("-h", "--help")
_CONFIG = (
    "Recipe by its name, or YAML file; holds what differs from the defaults. Of several the later one wins."
)


def help_text(config_class: Any, about: str, first: Sequence[str]) -> str:
    """Return the help: one screen with the chosen keys, or every key if none is chosen."""
    about = about.strip() or config_class.__doc__ or ""
    columns = min(shutil.get_terminal_size().columns, 110)
    return (
        _screen(config_class, about, first, columns) if first else _everything(config_class, about, columns)
    )


def _screen(config_class: Any, about: str, first: Sequence[str], columns: int) -> str:
    lines = [about, "", "What to set first, with the default in brackets:"]
    keys = keys_of(config_class)
    texts = {"config": _CONFIG}
    for name in first:
        default = keys[name].default
        texts[name] = (
            f"{keys[name].says} [{default}]" if default not in (None, "", [], {}) else keys[name].says
        )
    for name, text in texts.items():
        lines += textwrap.wrap(
            text, columns, initial_indent=f"  --{name} ".ljust(24), subsequent_indent=" " * 24
        )
    return "\n".join(
        [*lines, "", "--help all explains every key. --print_config prints the resolved values."]
    )


def _everything(config_class: Any, about: str, columns: int) -> str:
    def wrapped(text: str) -> list[str]:
        return textwrap.wrap(text, columns, initial_indent=" " * 6, subsequent_indent=" " * 6)

    lines = [about.splitlines()[0], "", "  --config FILE", *wrapped(_CONFIG)]
    lines += [
        "  --print_config",
        *wrapped("Print the values that result; =skip_default prints those that differ."),
    ]
    groups = groups_of(config_class)
    for group, names in itertools.groupby(
        keys_of(config_class).items(), lambda item: item[0].rpartition(".")[0]
    ):
        if group:
            lines += ["", f"{group}: {(groups[group].__doc__ or '').splitlines()[0]}"]
        for name, key in names:
            lines += [
                f"  --{name} (type: {expected(key.kind)}, default: {_written(key.default)})",
                *wrapped(key.says),
            ]
    return "\n".join(lines)


def _written(default: Any) -> str:
    """Return a default as a flag takes it."""
    if default is None:
        return "null"
    if isinstance(default, bool):
        return str(default).lower()
    if isinstance(default, list | tuple):
        return f"[{', '.join(map(str, default))}]"
    return str(default) if default != "" else "''"
