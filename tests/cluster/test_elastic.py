"""Launchers that start again by themselves: the hosts or ranks that are left finish the epoch."""

import os
import signal
import time

import pytest

from tests.cluster import check_run
from tests.cluster.host_ranks import assert_nobody_left, ranks_of, wait_for_step
from tests.cluster.hosts import made_hosts, wait_until
from tests.cluster.launch_lines import (
    RENDEZVOUS,
    RESTARTS,
    accelerate_launch,
    elastic,
)
from tests.helpers.uneven_run import argv_of, steps_written

pytestmark = [pytest.mark.slow, pytest.mark.multinode]


def test_the_hosts_that_are_left_start_again_by_themselves(tmp_path, python, uneven_shards):
    """Of three hosts the one that keeps the rendezvous and another one stay."""
    run = tmp_path / "run"
    argv = argv_of(run, uneven_shards, optim__epochs=4, cluster__lost_after=6)
    with made_hosts(3, tmp_path / "hosts") as hosts:
        launchers = {
            # By name: with an address h1, whose name means 127.0.1.1 to itself, would not know that it is meant.
            host.name: host.run(
                elastic(argv, address="h1", port=29400, nodes="1:3"),
                tmp_path / f"{host.name}.log",
                RESTARTS | {"PYTHON_EXEC": python},  # of the ranks
            )
            for host in hosts
        }
        left = [launchers["h1"], launchers["h3"]]
        # A host that is late joins those that have begun.
        wait_until(lambda: "3 ranks" in left[0].said(), 120, lambda: f"three hosts: {left[0].said()}")
        before = left[0].said().count("resumed from")
        wait_for_step(run, steps_written(run) + 6, launchers.values(), seconds=60)
        moment = hosts["h2"].kill()
        wait_until(
            lambda: left[0].said().count("resumed from") > before,
            90,
            lambda: f"the next start: {[launcher.said() for launcher in left]}",
        )
        print(f"torchrun, 3 hosts, kill -9 h2: trains again after {time.time() - moment:.1f} s")
        for launcher in left:
            assert launcher.wait(90) == 0, launcher.said()
            assert "rank 1 on h2 is missing since" in launcher.said()
        assert_nobody_left([hosts["h1"], hosts["h3"]])
    told = left[0].said()
    assert "3 ranks x 1 x 4 images" in told
    assert "2 ranks x 1 x 6 images" in told
    assert check_run.main([str(run), "--shards", uneven_shards]) == 0


def test_a_killed_rank_is_started_again(tmp_path, python, uneven_shards):
    run = tmp_path / "run"
    argv = argv_of(run, uneven_shards, cluster__lost_after=6)
    with made_hosts(1, tmp_path / "hosts") as hosts:
        host = hosts["h1"]
        extra = ["--max_restarts", "3", "--rdzv_backend", "c10d", "--rdzv_conf", RENDEZVOUS]
        line = accelerate_launch(argv, address="h1", port=29500, each=2, extra=extra)
        launcher = host.run(line, tmp_path / "h1.log", RESTARTS | {"PYTHON_EXEC": python})
        wait_for_step(run, 6, [launcher], seconds=120)
        moment = time.time()
        (_, victim) = ranks_of(launcher, host)
        os.kill(victim, signal.SIGKILL)
        wait_until(
            lambda: "resumed from" in launcher.said(), 90, lambda: f"the second start: {launcher.said()}"
        )
        print(
            f"accelerate launch --max_restarts, kill -9 of a rank: trains again after {time.time() - moment:.1f} s"
        )
        assert launcher.wait(90) == 0, launcher.said()
        assert launcher.said().count("2 ranks x 1 x 6 images") == 2, "it was started more than twice"
        assert_nobody_left([host])
    assert check_run.main([str(run), "--shards", uneven_shards]) == 0
