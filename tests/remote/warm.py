"""Starts training processes within a second: a warm process that has imported everything forks them.

As a program (``python warm.py``) it is that process: it reads orders from its input, one JSON object a line, and
answers each with one line. ``{"argv", "env", "log"}`` forks a run of launch/pretrain.py in a process group of its own and
is answered with its pid, ``{"poll": pid}`` with its exit code as subprocess has it, null while it runs.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).parents[2]
PIECE = 100_000  # bytes of a request for a part of a shard, so that the small shards of these tests come in several


class Warm:
    """The warm process, from the tests' side."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        self._started: list[Started] = []
        self._ask({})

    def _ask(self, order: dict) -> int | None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the warm process ended"
        return json.loads(answer)

    def start(self, argv: list[str], log: Path, environment: dict[str, str] | None = None) -> "Started":
        """Start a run in a process group of its own; what it says goes to ``log``, anew."""
        pid = self._ask({"argv": argv, "log": str(log), "env": environment or {}})
        assert pid is not None
        self._started.append(Started(self, pid, log))
        return self._started[-1]

    def start_ranks(
        self, argv: list[str], log: Path, environments: list[dict[str, str]], port: int
    ) -> "list[Started]":
        """Start the ranks of a run as torchrun would, one for each environment."""
        world = str(len(environments))
        common = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "ACCELERATE_USE_CPU": "true"}
        common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return [
            self.start(
                argv,
                log.with_name(f"{log.name}.{rank}"),
                {**environment, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank, environment in enumerate(environments)
        ]

    def poll(self, pid: int) -> int | None:
        return self._ask({"poll": pid})

    def end(self) -> None:
        """Kill whatever still runs and end."""
        for started in self._started:
            started.kill()
        self._process.communicate()


@dataclass
class Started:
    """A run that was started."""

    warm: Warm
    pid: int
    log: Path
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            self.code = self.warm.poll(self.pid)
        return self.code

    def wait(self, seconds: float) -> int:
        """Return the exit code; AssertionError with what the run said if it takes longer (it is killed then)."""
        deadline = time.monotonic() + seconds
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"still running after {seconds} s: {self.said()}")
            time.sleep(0.01)
        assert self.code is not None
        return self.code

    def kill(self) -> None:
        """Kill -9 the run and its loader processes, and wait for the end of it."""
        if self.poll() is None:
            os.killpg(self.pid, signal.SIGKILL)
            while self.poll() is None:
                time.sleep(0.001)

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


def serve() -> None:
    """Be the warm process. A forked run comes out of here and ends as a program does."""
    from glsd.cli import pretrain
    from glsd.cli.door import run as run_door
    from glsd.shards import remote

    import_what_a_run_imports()
    remote.PIECE = PIECE
    for line in sys.stdin:
        order = json.loads(line)
        answer: int | None = 0
        if "poll" in order:
            pid, status = os.waitpid(order["poll"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif "argv" in order:
            answer = os.fork()
            if answer == 0:
                become(order)
                run_door(pretrain.main)
        print(json.dumps(answer), flush=True)


def become(order: dict) -> None:
    """Make this process a program of its own."""
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDONLY)
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for target, source in ((0, nothing), (1, log), (2, log)):
        os.dup2(source, target)
    os.environ.update(order["env"])
    sys.argv = [str(ROOT / "launch" / "pretrain.py"), *order["argv"]]


def import_what_a_run_imports() -> None:
    """Import what a run imports late; nothing here may start a thread, which would not survive a fork."""
    for module in (
        "glsd.pretrain.dry_run",
        "torch.utils.tensorboard",
        "docstring_parser",
        "fsspec.implementations.http",
        "s3fs",
    ):
        with contextlib.suppress(ModuleNotFoundError):  # s3fs is an extra; the tests that need it say so
            importlib.import_module(module)
    Image.init()
    assert threading.active_count() == 1, f"started by an import: {threading.enumerate()}"


if __name__ == "__main__":
    serve()
