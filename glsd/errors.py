"""What a user sees when something cannot work, and what a run raises when it was asked to stop."""

import difflib
from collections.abc import Iterable


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


class BrokenImage(Exception):
    """These bytes are not an image that can be used; the message is the reason, in a few words."""
