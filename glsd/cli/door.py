"""The door of every launch script: the user's mistakes become one line and exit code 2, our bugs keep their traceback."""

import io
import os
import sys
from collections.abc import Callable

# Where another host goes, torch's store would add forty lines of its own stack to the one that says who is missing.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from glsd.errors import StoppedEarly, UserError

STOPPED_CODE = (
    "GLSD_STOPPED_CODE"  # environment: exit code of a run that was asked to stop and saved, by default 0
)


def run(main: Callable[[list[str]], int | None], words: list[str] | None = None) -> None:
    """Run ``main(argv)`` and exit with its code (None = 0); a UserError is printed as one line, exit code 2.

    Whatever ends one rank ends all of them, and what several ranks have to say is said once. Where another rank is lost,
    each says who is missing; exit code shutdown.EXIT_LOST.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # What a terminal cannot show, such as a file name of another encoding, must not end a program.
            stream.reconfigure(errors="backslashreplace")
    try:
        when_stopped = stopped_code()
        try:
            code = main(sys.argv[1:] if words is None else words)
        except StoppedEarly as stopped:
            from glsd.cluster import dist, shutdown

            if dist.is_main():
                print(stopped, flush=True)
            code = when_stopped
            shutdown.finish(code)
    except UserError as problem:
        # Importing torch takes seconds, and ranks that wait for each other have imported it already.
        ranks = sys.modules.get("glsd.cluster.shutdown")
        if ranks is None or ranks.end_others(2):
            print(f"error: {problem}", file=sys.stderr, flush=True)
        sys.exit(2)
    except Exception as problem:
        from glsd.cluster import dist, shutdown

        if dist.is_broken_connection(problem):
            shutdown.end_with_lost(problem)
        shutdown.end_others(1)
        raise
    sys.exit(code or 0)


def stopped_code() -> int:
    """Return the exit code of a run that was asked to stop: what a scheduler's script can tell from the end of the run."""
    word = os.environ.get(STOPPED_CODE, "0")
    if not word.isdecimal() or int(word) > 255:
        raise UserError(f"{STOPPED_CODE} is {word!r}: expected an exit code, 0 to 255")
    return int(word)


def printable(text: object) -> str:
    r"""Return a text as one line that a terminal only shows: line ends, escape sequences and the like as \n, \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
