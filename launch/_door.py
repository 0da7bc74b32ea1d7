"""The door of every launch script: the user's mistakes become one line and exit code 2, our bugs keep their traceback."""

import io
import sys
from collections.abc import Callable

from glsd.contracts import UserError
from glsd.runtime import ending


def run(main: Callable[[list[str]], int | None]) -> None:
    """Run ``main(argv)`` and exit with its code (None = 0); a UserError is printed as one line, exit code 2.

    Whatever ends one rank ends all of them, and what several ranks have to say is said once.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show, such as a file name of another encoding, must not end a program.
            stream.reconfigure(errors="backslashreplace")
    try:
        code = main(sys.argv[1:])
    except UserError as problem:
        if ending.end_others(2):
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception:
        ending.end_others(1)
        raise
    sys.exit(code or 0)


def printable(text: object) -> str:
    r"""Return a text as one line that a terminal only shows: line ends, escape sequences and the like as \n, \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
