"""What a user sees when something cannot work, and what a run raises when it was asked to stop."""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator, Mapping

INTERRUPTED = 130  # exit code of a program that Ctrl-C ended, as shells report it


class StoppedEarly(Exception):
    """A run was asked to stop before its end; it has saved what it needs to go on."""


class UserError(Exception):
    """A mistake in what the user gave us: one line that names the file, key or value, what was expected, what to do.

    The launch scripts print it without a traceback and exit with code 2; anything else that is raised is our bug.
    """


def pick(choices: dict, name: str, what: str):
    """Return ``choices[name]``; an unknown name raises UserError with the nearest known one."""
    if name in choices:
        return choices[name]
    raise UserError(
        f"unknown {what} {name!r}: expected one of {', '.join(map(str, choices))}{nearest(name, choices)}"
    )


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known name, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def one_line(problem: object, limit: int = 300) -> str:
    """Return what an error says as one printable line: the reason of an OSError, else the text, else the name of its class.

    problem: an exception, or a text. torch's C++ stack is left out.
    """
    said = (isinstance(problem, OSError) and problem.strerror) or str(problem)
    said = re.split(r"\n\s*Exception raised from", said)[0]
    said = "".join(character if character.isprintable() else " " for character in said)
    return " ".join(said.split())[:limit] or type(problem).__name__


class BrokenImage(Exception):
    """These bytes are not an image that can be used; the message is the reason, in a few words."""


@contextlib.contextmanager
def config_keys(keys: Mapping[str, str]) -> Iterator[None]:
    """Within the block a UserError names configuration keys where a part has named its own arguments.

    keys: argument of a part -> configuration key that it came from, such as {"image_size": "data.global_size"}.
    """
    try:
        yield
    except UserError as problem:
        raise UserError(with_config_keys(str(problem), keys)) from problem


def with_config_keys(text: str, keys: Mapping[str, str]) -> str:
    """Return a part's text with its arguments' names replaced by the configuration keys that they came from."""
    names = "|".join(map(re.escape, sorted(keys, key=len, reverse=True)))
    # Not inside of a longer name, a path, a flag or a quoted value.
    return (
        re.sub(rf"(?<![\w./'-])({names})(?![\w/'-]|\.\w)", lambda match: keys[match[1]], text)
        if keys
        else text
    )
