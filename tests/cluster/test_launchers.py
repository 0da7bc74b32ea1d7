"""A run that is asked to stop under a launcher saves, says so with its exit code, and goes on as if nothing had happened."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from tests.cluster import check_run
from tests.cluster.host_ranks import (
    assert_all_end,
    assert_nobody_left,
    ranks_of,
    start_ranks,
    wait_for_step,
)
from tests.cluster.hosts import Host, Started, made_hosts
from tests.cluster.launch_lines import ENVIRONMENT, accelerate_launch, torchrun
from tests.helpers.uneven_run import argv_of, steps_written

pytestmark = [pytest.mark.slow, pytest.mark.multinode]

LAUNCHERS: dict[str, Callable] = {"accelerate launch": accelerate_launch, "torchrun": torchrun}
TRAP = ["sh", "-c", "trap '' USR1; exec \"$@\"", "sh"]


@dataclass(frozen=True)
class Stop:
    """A launcher, who gets which signal ("all": it and the ranks, as from a scheduler), and the launcher's exit code."""

    launcher: str
    number: signal.Signals
    to: str
    code: int
    trap: bool = False


STOPS = [
    Stop("accelerate launch", signal.SIGUSR1, "all", 0, trap=True),
    Stop("accelerate launch", signal.SIGUSR1, "all", -signal.SIGUSR1),
    Stop("accelerate launch", signal.SIGTERM, "launcher", 1),
    Stop("torchrun", signal.SIGTERM, "launcher", 1),
]


def send(stop: Stop, launcher: Started, host: Host) -> None:
    ranks = ranks_of(launcher, host)
    assert len(ranks) == 2
    for pid in [launcher.pid, *ranks] if stop.to == "all" else [launcher.pid]:
        os.kill(pid, stop.number)


def test_stops_under_a_launcher_change_nothing(tmp_path, python, uneven_shards):
    """One run is stopped in every way, one after the other; then it is the one that nobody stopped, to the bit."""
    run, twin = tmp_path / "run", tmp_path / "twin"
    changes = {
        "optim__epochs": 3,
        "watch__checkpoint_every": 50,
    }  # what is saved was saved because of the signal
    argv = argv_of(run, uneven_shards, **changes)
    with made_hosts(1, tmp_path / "hosts") as hosts:
        host = hosts["h1"]
        straight = start_ranks(
            python, [host, host], argv_of(twin, uneven_shards, **changes), tmp_path / "twin_logs", port=29600
        )
        assert_all_end(straight)
        for number, stop in enumerate(STOPS):
            line = LAUNCHERS[stop.launcher](argv, address=host.address, port=29500 + number, each=2)
            log = tmp_path / f"{number}.log"
            # Of the ranks. They end well under the first launcher: there they are the real thing.
            variables = ENVIRONMENT | ({"PYTHON_EXEC": python} if number else {})
            launcher = host.run([*TRAP, *line] if stop.trap else line, log, variables)
            wait_for_step(run, steps_written(run) + 3, [launcher])
            moment = time.time()
            send(stop, launcher, host)
            assert launcher.wait(30) == stop.code, launcher.said()
            assert_nobody_left([host])
            print(f"{stop}: all ended after {time.time() - moment:.1f} s")
            assert f"stopped by {stop.number.name} after step" in launcher.said()
            assert check_run.main([str(run)]) == 0  # also: the last checkpoint is of the last step
        # Without a launcher: one rank alone gets the signal. Then the run is finished.
        ranks = start_ranks(python, [host, host], argv, tmp_path / "one", port=29601)
        wait_for_step(run, steps_written(run) + 3, ranks)
        os.kill(ranks[1].pid, signal.SIGUSR1)
        assert_all_end(ranks)
        assert "stopped by SIGUSR1 after step" in ranks[0].said()
        assert_all_end(start_ranks(python, [host, host], argv, tmp_path / "logs", port=29602))
    assert check_run.main([str(run), "--shards", uneven_shards, "--like", str(twin)]) == 0
