"""Work on hostile files in a process of its own: bounded memory and time, and a record of everything it touched."""

import faulthandler
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

SECONDS = 30  # for one file, on a busy machine; a hang ends the process with a traceback
# Events of the interpreter (sys.audit): programs, sockets, libraries, unpickling, code, changes of folders.
FORBIDDEN = frozenset(
    (
        *("subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty"),
        *("socket.connect", "socket.bind", "ctypes.dlopen", "pickle.find_class", "exec"),
        *("os.symlink", "os.link", "os.chmod", "os.chown", "os.remove", "os.rename", "os.mkdir", "os.rmdir"),
    )
)
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def environment() -> dict[str, str]:
    """The variables of a process that finds this package and these tests, and leaves no compiled files anywhere."""
    root = Path(__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}


def run(script: str, arguments: list[str], cwd: Path) -> list[dict[str, Any]]:
    """Run a script of this folder in the empty folder ``cwd``; return the rows it printed, one JSON object a line.

    A crash or a hang is an AssertionError that shows the last file it began.
    """
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name(script)), *arguments],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"ended with {done.returncode} at {lines[-1:]}: {done.stderr[-3000:]}"
    return [json.loads(line) for line in lines]


def bound_memory(extra_bytes: int) -> None:
    """Let this process take at most so much address space more than it has."""
    now = _status("VmSize") + extra_bytes
    resource.setrlimit(resource.RLIMIT_AS, (now, now))


def peak_bytes() -> int:
    """The most memory that was ever resident in this process (getrusage would count that of its parent)."""
    return _status("VmHWM")


def forget_peak() -> None:
    """Let peak_bytes() begin anew. Source: proc_pid_clear_refs(5)."""
    Path("/proc/self/clear_refs").write_text("5")


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def watch(may_write: str | None = None) -> list[str]:
    """Record from now on what this process starts, loads, sends or writes elsewhere than in ``may_write``.

    A hook of the interpreter sees all of it, whichever module does it; it cannot be taken off again.
    """
    seen: list[str] = []

    def hook(event: str, arguments: tuple) -> None:
        wrote = event == "open" and isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
        if (not wrote and event not in FORBIDDEN) or (event == "os.chmod" and isinstance(arguments[0], int)):
            return  # a number stands for a file that was opened before, and seen then
        path = os.fsdecode(arguments[0]) if arguments and isinstance(arguments[0], str | bytes) else ""
        if may_write is None or not os.path.abspath(path).startswith(may_write):
            seen.append(f"{event} {arguments!r}"[:300])

    sys.addaudithook(hook)
    return seen


def go_through(numbers: Iterable[int], work: Callable[[int], dict[str, Any]]) -> None:
    """Print one row per number, begun before the work so that a crash names it."""
    for number in numbers:
        print(json.dumps({"begun": number}), flush=True)
        faulthandler.dump_traceback_later(SECONDS, exit=True)
        row = work(number)
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps({"done": number, **row}), flush=True)
