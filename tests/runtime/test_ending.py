"""What one rank's end does to the others."""

import os
import socket
import subprocess
import sys
import textwrap
import time

import pytest

PROLOGUE = """
import sys, time
import torch
import torch.distributed as torch_dist
from datetime import timedelta
from glsd.contracts import UserError
from glsd.runtime import dist, ending
torch_dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.rank()
ending.watch_others()
dist.barrier()
"""


def ended(body: str, *, world: int = 3) -> tuple[list[int], list[str], float]:
    """Run ``body`` on every rank; return exit codes, what they printed, and the seconds it took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
    }
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROLOGUE + textwrap.dedent(body)],
            env={**os.environ, **common, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        said = [process.communicate(timeout=60)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said, time.monotonic() - started


STOP = "if ending.end_others(2): print('because', rank, flush=True)\n    sys.exit(2)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("waiting", "culprit"),
    [
        ("torch_dist.all_reduce(torch.ones(1))", 0),
        (
            "torch_dist.distributed_c10d._get_default_store().get('never')",
            2,
        ),  # as before NCCL's first collective
        ("ending.finish()", 1),
    ],
)
def test_others_end_quietly_wherever_they_are(waiting, culprit):
    codes, said, seconds = ended(f"""
if rank == {culprit}:
    time.sleep(0.3)
    {STOP}
{waiting}
""")
    assert codes == [2, 2, 2], said
    assert [text for text in said if text] == [f"because {culprit}\n"]
    assert seconds < 30


@pytest.mark.slow
def test_several_that_stop_say_it_once():
    codes, said, _ = ended(STOP.replace("\n    ", "\n"))
    assert codes == [2, 2, 2], said
    assert "".join(said).count("because") == 1


@pytest.mark.slow
def test_a_run_that_goes_well_ends_with_zero():
    codes, said, _ = ended("ending.finish()")
    assert (codes, said) == ([0, 0, 0], ["", "", ""])
