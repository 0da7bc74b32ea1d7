"""Starts the ranks of a test without a launcher: one process imports everything, which takes longest, and forks them.

python rank_processes.py WORLD BODY ARGV... : runs the script BODY as ranks 0 .. WORLD - 1; exit code 0 if all have.
"""

import contextlib
import os
import runpy
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

HERE = Path(__file__).parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def started(world: int, body: Path, *argv: str) -> Iterator[subprocess.Popen]:
    """Run a script as ``world`` ranks on CPUs, in a process group of their own that is killed at the end."""
    environment = {
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    process = subprocess.Popen(
        [sys.executable, __file__, str(world), str(body), *argv],
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        kill(process)


def kill(process: subprocess.Popen) -> None:
    """Kill -9 all ranks at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def run_ranks(world: int, body: Path, *argv: str, seconds: float = 300) -> str:
    """Run a script as ``world`` ranks and return what they printed; AssertionError if one does not exit with 0."""
    with started(world, body, *argv) as process:
        output, errors = process.communicate(timeout=seconds)
    assert process.returncode == 0, f"exit code {process.returncode}\n{errors[-6000:]}"
    return output


def close(one: dict, two: dict, what: str, tolerance: float, floor: float = 1e-12) -> int:
    assert one.keys() == two.keys(), what
    for name, tensor in one.items():
        assert tensor.dtype == two[name].dtype == torch.float64, name
        assert tensor.shape == two[name].shape, name
        error = (tensor - two[name]).abs().max() / tensor.abs().max().clamp_min(floor)
        assert error < tolerance, f"{what}: {name}: {error:.1e}"
    return len(one)



def main(world: int, body: str, *argv: str) -> None:
    import glsd.pretrain.train

    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            sys.argv, sys.path[0] = [body, *argv], str(Path(body).parent)
            runpy.run_path(body, run_name="__main__")
            return
        pids.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    sys.exit(next((abs(code) for code in codes if code), 0))


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
