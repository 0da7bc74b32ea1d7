"""Starts the ranks of training runs on hosts within a second: a process that has imported everything forks them.

As a program (``python forks.py``) it is that process: it reads orders from its input, one JSON object a line, and answers
each with one line. ``{"inside", "argv", "env", "log"}`` forks a run of launch/pretrain.py that begins on the host of the
process ``inside`` and is answered with its pid; ``{"poll": pid}`` with its exit code as subprocess has it, null while it runs.
"""

import contextlib
import gc
import importlib
import json
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from hosts import Host, Started
from namespaces import entering
from PIL import Image

ROOT = Path(__file__).parents[2]


class Forks:
    """The warm process, from the tests' side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self._ask({})

    def _ask(self, order: dict) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warm process ended"
        return json.loads(answer)

    def start(self, host: Host, argv: Sequence[str], log: Path, environment: Mapping[str, str]) -> Started:
        """Start a run on a host, in a session of its own; what it says is appended to ``log``."""
        order = {"inside": host.first.pid, "argv": argv, "log": str(log), "env": environment}
        pid = self._ask(order)
        assert pid is not None
        return host.watch(Started(pid, log, lambda: self._ask({"poll": pid})))

    def end(self) -> None:
        """End the warm process."""
        self._process.communicate()


def serve() -> None:
    """Be the warm process. A forked run comes out of here and ends as a program does."""
    sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
    import _door
    import pretrain

    import_what_a_run_imports()
    for line in sys.stdin:
        order = json.loads(line)
        answer: int | None = 0
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif "argv" in order:
            with entering(order["inside"]) as enter:
                answer = os.fork()
                if answer == 0:
                    enter()
            if answer == 0:
                become(order)
                _door.run(pretrain.main)
        print(json.dumps(answer), flush=True)
    os._exit(0)  # what is frozen would be reported as leaked


def become(order: dict) -> None:
    """Make this process a program of its own."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.update(order["env"])
    platform._uname_cache = None  # type: ignore[attr-defined]  # the name of the host where it was warmed
    sys.argv = [str(ROOT / "launch" / "pretrain.py"), *order["argv"]]


def import_what_a_run_imports() -> None:
    """Import what a run imports late; nothing here may start a thread, which would not survive a fork."""
    for module in ("torch.utils.tensorboard", "docstring_parser"):
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    Image.init()
    assert threading.active_count() == 1, f"started by an import: {threading.enumerate()}"
    gc.freeze()  # a fork that ends would look at every object, and copy its page, for seconds


if __name__ == "__main__":
    serve()
