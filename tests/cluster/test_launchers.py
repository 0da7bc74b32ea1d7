"""A run that is asked to stop under a launcher saves, says so with its exit code, and goes on as if nothing had happened."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass

import check_run
import pytest
from host_ranks import assert_all_end, assert_nobody_left, ranks_of, start_ranks, wait_for_step
from hosts import Host, Started, made_hosts
from launch_lines import ENVIRONMENT, accelerate_launch, torchrun
from tiny_run import argv_of, steps_written

pytestmark = [pytest.mark.slow, pytest.mark.multinode]

LAUNCHERS: dict[str, Callable] = {"accelerate launch": accelerate_launch, "torchrun": torchrun}
TRAP = ["sh", "-c", "trap '' USR1; exec \"$@\"", "sh"]


@dataclass(frozen=True)
class Stop:
    """A launcher, who gets which signal ("all": the launcher and the ranks), and the launcher's exit code."""

    launcher: str
    number: signal.Signals
    to: str
    code: int
    trap: bool = False


STOPS = [
    Stop("accelerate launch", signal.SIGUSR1, "all", 0, trap=True),
    Stop("accelerate launch", signal.SIGUSR1, "all", -signal.SIGUSR1),
    Stop("accelerate launch", signal.SIGTERM, "launcher", 1),
    Stop("accelerate launch", signal.SIGTERM, "one rank", 0),
    Stop("torchrun", signal.SIGUSR1, "all", 0, trap=True),
    Stop("torchrun", signal.SIGTERM, "launcher", 1),
]


def send(stop: Stop, launcher: Started, host: Host) -> None:
    ranks = ranks_of(launcher, host)
    assert len(ranks) == 2
    pids = {"all": [launcher.pid, *ranks], "launcher": [launcher.pid], "one rank": ranks[1:]}
    for pid in pids[stop.to]:
        os.kill(pid, stop.number)


def test_stops_under_a_launcher_change_nothing(tmp_path, forks, uneven_shards):
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
            forks, [host, host], argv_of(twin, uneven_shards, **changes), tmp_path / "twin_logs", port=29600
        )
        assert_all_end(straight)
        for number, stop in enumerate(STOPS):
            line = LAUNCHERS[stop.launcher](argv, address=host.address, port=29500 + number, each=2)
            log = tmp_path / f"{number}.log"
            launcher = host.run([*TRAP, *line] if stop.trap else line, log, ENVIRONMENT)
            before = steps_written(run)
            wait_for_step(run, before + 3, [launcher])
            moment = time.time()
            send(stop, launcher, host)
            assert launcher.wait(30) == stop.code, launcher.said()
            assert_nobody_left([host])
            seconds = time.time() - moment
            print(f"{stop}: all ended after {seconds:.1f} s")
            assert f"stopped by {stop.number.name} after step" in launcher.said()
            assert check_run.main([str(run)]) == 0  # also: the last checkpoint is of the last step
        assert_all_end(start_ranks(forks, [host, host], argv, tmp_path / "logs", port=29601))
    assert check_run.main([str(run), "--shards", uneven_shards, "--like", str(twin)]) == 0
