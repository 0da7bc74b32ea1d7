"""The ranks of one run on several hosts: started, brought to a step, and what they say when one of them is lost."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from forks import Forks
from hosts import Host, Started, wait_until
from tiny_run import steps_written

ERROR = re.compile(
    r"^error: rank (\d+) on (\w+) stops: (.*) (?:is|are) missing since (\d+-\d+-\d+ \d+:\d+:\d+) \(([\d.]+) s"
)


def start_ranks(
    forks: Forks,
    hosts: Sequence[Host],
    argv: Sequence[str],
    logs: Path,
    *,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> list[Started]:
    """Start one rank on each host as a launcher would; what rank r says goes to ``logs/<host>.log``, which is new."""
    logs.mkdir(parents=True)
    common = {
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": hosts[0].address,
        "MASTER_PORT": str(port),
        **(environment or {}),
    }
    if len(hosts) == 1:
        common = {"ACCELERATE_USE_CPU": "true"}
    return [
        forks.start(
            host, argv, logs / f"{host.name}.log", {**common, "RANK": str(rank)} if len(hosts) > 1 else common
        )
        for rank, host in enumerate(hosts)
    ]


def wait_for_step(run: Path, step: int, ranks: Iterable[Started], seconds: float = 60) -> None:
    """Wait until a running run has come to a step; AssertionError with what was said if it ends before or takes too long."""

    def there() -> bool:
        for rank in ranks:
            assert rank.running(), f"ended with {rank.code} before step {step}: {rank.said()}"
        return steps_written(run) >= step

    wait_until(there, seconds, lambda: f"step {step}: {[rank.said() for rank in ranks]}")


def assert_all_end(ranks: Iterable[Started], code: int = 0, seconds: float = 90) -> None:
    """Wait until all have ended, with this exit code."""
    for rank in ranks:
        assert rank.wait(seconds) == code, rank.said()


@dataclass(frozen=True)
class Said:
    """The one line of a rank that lost others."""

    rank: int
    host: str
    missing: tuple[str, ...]  # names of hosts
    since: float  # seconds since the epoch, a whole number
    silent: float


def lost_line(rank: Started) -> Said:
    """Return what a rank said about those it lost; AssertionError unless it is exactly one line, without a traceback."""
    said = rank.said()
    lines = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, said
    assert "Traceback" not in said, said
    assert "--resume auto" in lines[0]
    found = ERROR.match(lines[0])
    assert found, lines
    who = re.findall(r"rank \d+ on (\w+)", found[3])
    since = time.mktime(time.strptime(found[4], "%Y-%m-%d %H:%M:%S"))
    return Said(int(found[1]), found[2], tuple(who), since, float(found[5]))


def assert_nobody_left(hosts: Iterable[Host]) -> None:
    """No process is left on any of the hosts, no zombie either; what was just killed by a launcher may need a moment."""
    for host in hosts:
        wait_until(
            lambda host=host: not host.pids(), 3, lambda host=host: f"{host.name} to be empty: {host.pids()}"
        )
