"""Starts the ranks of a test without a launcher: a second less than with one."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def processes_of(world: int, body: Path, *argv: str) -> Iterator[list[subprocess.Popen]]:
    """Run a script as ``world`` ranks on CPUs; what still runs at the end is killed."""
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    running = [
        subprocess.Popen(
            [sys.executable, str(body), *argv],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        yield running
    finally:
        for process in running:
            process.kill()  # does nothing to one that has ended
            process.wait()


def run_ranks(world: int, body: Path, *argv: str, seconds: float = 300) -> list[str]:
    """Run a script as ``world`` ranks and return what each printed; AssertionError if one does not exit with 0."""
    with processes_of(world, body, *argv) as running:
        outputs = [process.communicate(timeout=seconds) for process in running]
    codes = [process.returncode for process in running]
    errors = "\n".join(error[-3000:] for _, error in outputs)
    assert codes == [0] * world, f"exit codes {codes}\n{errors}"
    return [output for output, _ in outputs]
