"""What one rank's end does to the others."""

import os
import re
import socket
import subprocess
import sys
import textwrap
import time
from datetime import datetime

import pytest

from glsd.cluster.heartbeat import Heartbeats, Progress
from tests.helpers.warm_python import warm_python

PROLOGUE = """
import sys, time
import torch
import torch.distributed as torch_dist
from datetime import timedelta
from glsd.errors import UserError
from glsd.cluster import dist, shutdown
torch_dist.init_process_group("gloo", timeout=timedelta(seconds=60))
rank = dist.rank()
shutdown.watch_others(PATIENCE)
dist.barrier()
"""
PATIENCE = 4.0  # seconds


def ended(body: str, *, world: int = 3, python: str = "") -> tuple[list[int], list[str], float]:
    """Run ``body`` on every rank; return exit codes, what they printed, and the seconds it took.

    python: what runs them, a warm one by default.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [
                python or warm_python(),
                "-c",
                PROLOGUE.replace("PATIENCE", str(PATIENCE)) + textwrap.dedent(body),
            ],
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


STOP = "if shutdown.end_others(2): print('because', rank, flush=True)\n    sys.exit(2)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("waiting", "culprit"),
    [
        ("torch_dist.all_reduce(torch.ones(1))", 0),
        (
            "torch_dist.distributed_c10d._get_default_store().get('never')",
            2,
        ),  # as before NCCL's first collective
        ("shutdown.finish()", 1),
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
    codes, said, _ = ended("shutdown.finish()", python=sys.executable)  # the interpreter's own end included
    assert (codes, said) == ([0, 0, 0], ["", "", ""])


WORK = """
try:
    for number in range(1000):
        if number == 20 and rank == {victim}:
            os.kill(os.getpid(), signal.{how})
        torch_dist.all_reduce(torch.ones(1))
        time.sleep(0.02)
except Exception as problem:
    assert dist.is_broken_connection(problem), problem
    shutdown.end_with_lost(problem)
"""


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_all_that_are_left_say_who_was_killed(victim):
    codes, said, seconds = ended("import os, signal" + WORK.format(victim=victim, how="SIGKILL"))
    assert codes == [-9 if rank == victim else 75 for rank in range(3)], said
    for rank in {0, 1, 2} - {victim}:
        found = re.fullmatch(
            rf"error: rank {rank} on (\S+) stops: rank {victim} on \1 is missing since (.{{19}}) \(([\d.]+) s without .*\n",
            said[rank],
        )
        assert found, said[rank]
        assert 0 <= (datetime.now() - datetime.fromisoformat(found[2])).total_seconds() < 30
        assert float(found[3]) <= PATIENCE
    assert seconds < 30


@pytest.mark.slow
def test_a_rank_that_stands_still_is_given_up_and_told_so():
    codes, said, _ = ended(
        """
import os, signal, subprocess
if rank == 0:  # wakes it up when the others are gone
    subprocess.Popen(["sh", "-c", f"sleep {PATIENCE + 5}; kill -CONT {os.getpid()}"])
""".replace("PATIENCE", str(PATIENCE))
        + WORK.format(victim=0, how="SIGSTOP")
    )
    assert codes == [75, 75, 75], said
    assert "rank 1 on" in said[1]
    assert all("rank 0 on" in text and f"({PATIENCE:.0f}." in text for text in said[1:]), said
    assert said[0].count("error: rank 0 on") == 1


@pytest.mark.slow
def test_a_connection_that_breaks_between_ranks_that_live_is_said():
    codes, said, _ = ended(
        """
shutdown.WAIT_FOR_RANKS = 1.0
try:
    raise RuntimeError("gloo: made up")
except RuntimeError as problem:
    shutdown.end_with_lost(problem)
"""
    )
    assert codes == [75, 75, 75]
    assert "".join(said).count("although all are alive: gloo: made up") == 1


def test_signs_of_life():
    now = [100.0]
    beats = Heartbeats([1, 2], clock=lambda: now[0])
    assert beats.silent(0.0) == {}
    now[0] += 3
    beats.note({1: b"1", 2: b"1"})
    now[0] += 3
    beats.note({1: b"2", 2: b"1"})
    assert beats.silent(2.0) == {2: 3.0}
    assert beats.silent(3.0) == {}
    now[0] += 1
    assert beats.silent(0.5) == {1: 1.0, 2: 4.0}
    beats.note({1: b"2", 2: b"9"})
    assert beats.silent(0.5) == {1: 1.0}
    beats.reset()
    assert beats.silent(0.0) == {}


def test_progress_of_ranks_that_are_all_alive():
    now = [0.0]
    progress = Progress(clock=lambda: now[0])

    def after(seconds, *states):
        now[0] += seconds
        progress.note(states)
        return progress.stuck(5.0)

    assert after(0, "7/", "7/") == 0
    assert after(100, "8/", "7/") == 0  # the longest step took 100 s
    assert after(1004, "8/", "7/") == 0
    assert after(2, "8/", "7/") == 1006
    assert after(0, "8/", "aside/") == 0, "rank 1 saves, rank 0 waits for it"
    assert after(9999, "8/", "aside/") == 0
    assert after(0, "aside/11", "aside/10") == 0
    assert after(9, "aside/11", "aside/11") == 0
    assert after(99_999, "aside/11", "aside/11") == 99_999, "both wait for each other"
    assert after(0, "aside/12", "9/") == 0
    assert after(0, "waiting/", "9/") == 0
    assert after(999_999, "waiting/", "9/") == 0
    progress = Progress(clock=lambda: now[0])
    assert after(0, "9/", "9/") == 0
    now[0] += 999_999
    progress.reset()  # all slept
    assert after(0, "9/", "9/") == 0
    assert after(0, "10/", "9/") == 0
    assert after(6, "10/", "9/") == 6, "the sleep was no step"


@pytest.mark.slow
def test_ranks_that_are_suspended_together_go_on():
    """As with scontrol suspend: nobody is to blame for having been silent."""
    codes, said, seconds = ended(
        """
import os, subprocess
pids = " ".join(map(str, dist.gather_objects(os.getpid())))
if rank == 0:
    subprocess.Popen(["sh", "-c", f"sleep 1; kill -STOP {pids}; sleep SLEEP; kill -CONT {pids}"])
for step in range(150):
    dist.doing(str(step))
    torch_dist.all_reduce(torch.ones(1))
    time.sleep(0.02)
shutdown.finish()
""".replace("SLEEP", str(PATIENCE + 2))
    )
    assert (codes, said) == ([0, 0, 0], ["", "", ""])
    assert seconds > PATIENCE + 4


@pytest.mark.slow
def test_ranks_that_wait_for_each_other_before_any_step_say_so():
    codes, said, _ = ended(
        """
from glsd.cluster.dist import collective
shutdown.EARLY = 2
try:
    collective(time.sleep)(1000) if rank == 2 else dist.all_reduce_sum(torch.ones(1))
except RuntimeError as problem:  # the others leave
    shutdown.end_with_lost(problem)
"""
    )
    assert codes == [75, 75, 75], said
    assert all("none has finished a step since" in text for text in said), said
    (seconds,) = re.findall(r"\(([\d.]+) s\)", said[0])
    assert 2 * PATIENCE <= float(seconds) < 4 * PATIENCE


@pytest.mark.slow
@pytest.mark.parametrize("where", ["step", "aside"])
def test_ranks_that_live_but_get_nowhere_say_so(where):
    """As when the link between two ranks is cut, none of which is rank 0: rank 2 never comes to the 60th step, or out of a call
    of the save after it."""
    codes, said, _ = ended(
        """
from glsd.cluster.dist import collective
try:
    for step in range(1, 100):
        dist.doing(str(step))
        if step == 60 and rank == 2:
            if "WHERE" == "aside":
                dist.doing("aside")
            (time.sleep if "WHERE" == "step" else collective(time.sleep))(1000)
        if step == 60 and "WHERE" == "aside":
            dist.doing("aside")
        dist.all_reduce_sum(torch.ones(1))
        time.sleep(0.02)
except RuntimeError as problem:  # the others leave
    shutdown.end_with_lost(problem)
""".replace("WHERE", where)
    )
    assert codes == [75, 75, 75], said
    assert all(text.count("all ranks are alive, but none has finished a step since") == 1 for text in said), (
        said
    )


@pytest.mark.slow
def test_a_rank_that_is_lost_while_they_part_changes_no_exit_code():
    """Rank 1 dies between the two barriers of the end: all is done by then."""
    codes, said, _ = ended(
        """
import os, signal
if rank == 1:
    dist.leave = lambda: os.kill(os.getpid(), signal.SIGKILL)
shutdown.finish(3)
sys.exit(3)
"""
    )
    assert codes == [3, -9, 3], said
