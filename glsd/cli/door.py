"""How every command ends: a mistake of the user becomes one line and exit code 2, Ctrl-C one line, a bug keeps its traceback."""

import io
import os
import sys
from collections.abc import Callable

# When another host goes, torch's store would add forty lines of its own stack to the line that says which rank is missing.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

from glsd.errors import INTERRUPTED, StoppedEarly, UserError

# Environment variable: the exit code of a run that was asked to stop and saved, 0 by default.
STOPPED_CODE = "GLSD_STOPPED_CODE"


def run(main: Callable[[list[str]], int | None], words: list[str] | None = None) -> None:
    """Run ``main(argv)`` and exit with its code (None = 0); a UserError is printed as one line, with exit code 2.

    What ends one rank ends all ranks, and only one of them prints the error. If a rank is lost, every other rank says which one
    and exits with shutdown.EXIT_LOST. words: the arguments, by default those of the command line.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A character that the terminal cannot show, as in a file name of another encoding, must not end the program.
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
    except KeyboardInterrupt as stop:
        ranks = sys.modules.get("glsd.cluster.shutdown")
        if ranks is None or ranks.end_others(INTERRUPTED):
            print(str(stop) or "stopped by Ctrl-C", file=sys.stderr, flush=True)
        sys.exit(INTERRUPTED)
    except Exception as problem:
        from glsd.cluster import dist, shutdown

        if dist.is_broken_connection(problem):
            shutdown.end_with_lost(problem)
        shutdown.end_others(1)
        raise
    sys.exit(code or 0)


def stopped_code() -> int:
    """Return the exit code of a run that was asked to stop, by which the script of a scheduler recognizes it."""
    word = os.environ.get(STOPPED_CODE, "0")
    if not word.isdecimal() or int(word) > 255:
        raise UserError(f"{STOPPED_CODE} is {word!r}: expected an exit code, 0 to 255")
    return int(word)


def printable(text: object) -> str:
    r"""Return a text as one line of printable characters, with line ends and escape sequences as \n and \x1b."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))
