"""Starts a few gloo processes for a test."""

import os
import subprocess
import textwrap
from pathlib import Path

from tests.helpers.warm_python import warm_python

PROLOGUE = """
import sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as torch_dist
from glsd.errors import UserError
from glsd.cluster import dist
folder, rank, world = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
torch_dist.init_process_group(
    "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world, timeout=timedelta(seconds=120)
)
"""


def run_ranks(body: str, folder: Path, *, world: int = 2, python: str = "") -> list[str]:
    """Run ``body`` in ``world`` processes and return what each printed; AssertionError if one does not exit with 0.

    The body sees torch, dist, UserError, folder, rank and world. python: what runs them, a warm one by default.
    """
    script = folder / "ranks_body.py"
    script.write_text(PROLOGUE + textwrap.dedent(body) + "\ndist.leave()\n")
    command = [python or warm_python(), str(script), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    (folder / "rendezvous").unlink(missing_ok=True)
    running = [
        subprocess.Popen(
            [*command, str(rank), str(world)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(world)
    ]
    try:
        outputs = [process.communicate(timeout=300) for process in running]
    finally:
        for process in running:
            process.kill()  # does nothing to one that has ended
    codes = [process.returncode for process in running]
    assert codes == [0] * world, f"exit codes {codes}\n" + "\n".join(err for _, err in outputs)
    return [out for out, _ in outputs]
