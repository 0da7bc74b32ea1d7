"""Runs on two and three hosts that die, lose their network or freeze: who is missing is said, and the rest goes on."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from glsd.cluster.shutdown import EXIT_LOST
from glsd.runtime import checkpoint
from tests.cluster import check_run
from tests.cluster.host_ranks import (
    assert_all_end,
    assert_nobody_left,
    lost_line,
    start_ranks,
    wait_for_step,
)
from tests.cluster.hosts import Hosts, Started, made_hosts
from tests.cluster.launch_lines import ENVIRONMENT, accelerate_launch, torchrun
from tests.helpers.uneven_run import argv_of, steps_written

pytestmark = [pytest.mark.slow, pytest.mark.multinode]

LOST_AFTER = 6.0
QUICK = 5.0  # seconds in which a broken connection is understood; the machine is shared
LATE = 3.0  # seconds beyond LOST_AFTER
LAUNCHER_ENDS = 5.0  # seconds
# Seconds without a link. TCP repeats what was lost after 0.2, 0.6, 1.4, 3.0, 6.2 s: it may find the link again twice as late.
CUT = 2.5


@dataclass(frozen=True)
class Event:
    """What happens to a host; ``tells``: who says what, as host -> the hosts it misses."""

    do: Callable[[Hosts, dict[str, Started]], float]
    tells: dict[str, set[str]]
    bound: float  # seconds until the last of those who tell has ended


def kill(name: str) -> Callable:
    return lambda hosts, ranks: hosts[name].kill()


def kill_worker(name: str) -> Callable:
    return lambda hosts, ranks: ranks[name].kill()


def cut(name: str) -> Callable:
    return lambda hosts, ranks: hosts[name].cut()


def freeze(name: str) -> Callable:
    return lambda hosts, ranks: hosts[name].freeze()


def power_off(name: str) -> Callable:
    return lambda hosts, ranks: hosts[name].power_off()


SILENT = LOST_AFTER + LATE
EVENTS = {
    "kill -9 h2": Event(kill("h2"), {"h1": {"h2"}, "h3": {"h2"}}, QUICK),
    "kill -9 h1": Event(kill("h1"), {"h2": {"h1"}, "h3": {"h1"}}, QUICK),
    "kill -9 worker of h2": Event(kill_worker("h2"), {"h1": {"h2"}, "h3": {"h2"}}, QUICK),
    "h3 without power": Event(power_off("h3"), {"h1": {"h3"}, "h2": {"h3"}}, SILENT),
    "cut h2": Event(cut("h2"), {"h1": {"h2"}, "h3": {"h2"}, "h2": {"h1"}}, SILENT),
    "cut h1": Event(cut("h1"), {"h2": {"h1"}, "h3": {"h1"}, "h1": {"h2", "h3"}}, SILENT),
    "freeze h2": Event(freeze("h2"), {"h1": {"h2"}, "h3": {"h2"}}, SILENT),
}


@dataclass(frozen=True)
class Leg:
    """One start: on which hosts, what happens at which step ("" = nothing, it finishes)."""

    on: tuple[str, ...]
    event: str = ""
    at: int = 0


ALL = ("h1", "h2", "h3")
CHAINS = {
    "killed": (12, [Leg(ALL, "kill -9 h2", 6), Leg(("h1", "h3"), "kill -9 h1", 14), Leg(("h3",))]),
    "store lost": (10, [Leg(ALL, "kill -9 h1", 7), Leg(("h2", "h3"), "h3 without power", 14), Leg(("h2",))]),
    "worker": (10, [Leg(ALL, "kill -9 worker of h2", 6), Leg(ALL, "freeze h2", 15), Leg(("h1", "h3"))]),
    "links": (12, [Leg(ALL, "cut h2", 6), Leg(ALL, "cut h1", 14), Leg(("h3",))]),
}


@pytest.mark.parametrize("name", CHAINS)
def test_the_rest_says_who_is_missing_and_goes_on(tmp_path, python, uneven_shards, name):
    """Every leg has lost a host of the one before; the epoch is finished with every sample exactly once."""
    batch_size, legs = CHAINS[name]
    run = tmp_path / "run"
    argv = argv_of(
        run, uneven_shards, optim__batch_size=batch_size, optim__epochs=2, cluster__lost_after=LOST_AFTER
    )
    with made_hosts(3, tmp_path / "hosts") as hosts:
        for number, leg in enumerate(legs):
            on = [hosts[host] for host in leg.on]
            started = start_ranks(python, on, argv, tmp_path / f"logs{number}", port=29500 + number)
            if not leg.event:
                assert_all_end(started)
                assert "resumed from" in started[0].said()
                continue
            wait_for_step(run, leg.at, started)
            ranks = dict(zip(leg.on, started, strict=True))
            seconds = meet(EVENTS[leg.event], hosts, ranks)
            print(f"{len(leg.on)} hosts, {leg.event}: the last rank ended after {seconds:.1f} s")
            assert_intact(run)
            alive = [host for host in hosts if host.alive()]
            for host in alive:
                host.join()
                host.thaw()
            for rank in started:
                assert rank.wait(10) in (EXIT_LOST, -9), rank.said()  # what was frozen ends when it wakes up
            assert_nobody_left(alive)
    assert check_run.main([str(run), "--shards", uneven_shards]) == 0


def meet(
    event: Event, hosts: Hosts, ranks: dict[str, Started], *, code: int = EXIT_LOST, more: float = 0
) -> float:
    """Let it happen; return the seconds until the last rank that can tell has ended, having told the right thing.

    code, more: exit code and additional seconds of a launcher, if the ranks have one.
    """
    moment = event.do(hosts, ranks)
    tells = {host: missing & ranks.keys() for host, missing in event.tells.items() if host in ranks}
    for host in tells:
        assert ranks[host].wait(event.bound + more + 10) == code, ranks[host].said()
    seconds = max(ranks[host].ended for host in tells) - moment
    for host, missing in tells.items():
        line = lost_line(ranks[host])
        assert (line.host, set(line.missing)) == (host, missing)
        assert abs(line.since - moment) < 2, f"{line} but it happened at {moment}"
    assert seconds < event.bound + more, {host: ranks[host].ended - moment for host in tells}
    return seconds


def assert_intact(run: Path) -> None:
    """The newest checkpoint verifies."""
    assert checkpoint.load(run / "checkpoints" / "latest").step > 0


@pytest.mark.parametrize(("launcher", "event"), [(accelerate_launch, "kill -9 h2"), (torchrun, "cut h1")])
def test_launchers_end_with_their_ranks(tmp_path, uneven_shards, launcher, event):
    """Also on the side of a cut that has lost the launcher of the first host."""
    run = tmp_path / "run"
    argv = argv_of(run, uneven_shards, optim__epochs=5, cluster__lost_after=LOST_AFTER)
    with made_hosts(2, tmp_path / "hosts") as hosts:
        address = hosts["h1"].address
        launchers = {
            host.name: host.run(
                launcher(argv, address=address, port=29500, number=number, of=2),
                tmp_path / f"{host.name}.log",
                ENVIRONMENT,
            )
            for number, host in enumerate(hosts)
        }
        wait_for_step(run, 6, launchers.values(), seconds=120)
        what = EVENTS[event]
        seconds = meet(what, hosts, launchers, code=1, more=LAUNCHER_ENDS)
        print(f"2 hosts, {launcher.__name__}, {event}: the last launcher ended after {seconds:.1f} s")
        for name in what.tells.keys() & launchers.keys():
            assert f"exitcode  : {EXIT_LOST}" in launchers[name].said()
        assert_nobody_left([host for host in hosts if host.alive()])
    assert_intact(run)


@pytest.mark.parametrize("checkpoint_every", [1, 30])
def test_two_hosts_that_cannot_reach_each_other_while_both_reach_the_first(
    tmp_path, python, uneven_shards, checkpoint_every
):
    """Nobody is missing, but nobody gets on: every rank says so within lost_after and ten of the longest step.

    One run saves most of the time, and is mostly cut in a save; the other one saves nothing at that moment.
    """
    run = tmp_path / "run"
    changes = {"optim__epochs": 20, "cluster__lost_after": 3, "watch__checkpoint_every": checkpoint_every}
    argv = argv_of(run, uneven_shards, **changes)
    with made_hosts(3, tmp_path / "hosts") as hosts:
        ranks = start_ranks(python, list(hosts), argv, tmp_path / "logs", port=29500)
        wait_for_step(run, 40, ranks)
        hosts["h2"].lose(hosts["h3"])
        moment = hosts["h3"].lose(hosts["h2"])
        for rank in ranks:
            assert rank.wait(60) == EXIT_LOST, rank.said()
            lines = [line for line in rank.said().splitlines() if line.startswith("error:")]
            assert len(lines) == 1, rank.said()
            assert "all ranks are alive, but none has finished a step since" in lines[0]
        print(
            f"3 hosts, h2 and h3 cut from each other, a checkpoint every {checkpoint_every} steps: "
            f"the last rank ended after {time.time() - moment:.1f} s"
        )
        assert_nobody_left(list(hosts))
    assert_intact(run)


def test_a_link_that_comes_back_in_time_changes_nothing(tmp_path, python, uneven_shards):
    run = tmp_path / "run"
    argv = argv_of(run, uneven_shards, cluster__lost_after=LOST_AFTER)
    with made_hosts(2, tmp_path / "hosts") as hosts:
        ranks = start_ranks(python, list(hosts), argv, tmp_path / "logs", port=29500)
        wait_for_step(run, 6, ranks)
        hosts["h2"].cut()
        time.sleep(CUT)
        assert steps_written(run) < 40, "it was over before the cut: nothing is shown"
        hosts["h2"].join()
        assert_all_end(ranks)
    assert check_run.main([str(run), "--shards", uneven_shards]) == 0
