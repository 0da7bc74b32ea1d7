"""The ranks of one run on several hosts: started, brought to a step, and what they say when one of them is lost."""

import re
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import Host, Started, wait_until
from tests.cluster.launch_lines import SCRIPT
from tests.cluster.namespaces import stat_of
from tests.helpers.uneven_run import steps_written

ERROR = re.compile(
    r"^error: rank (\d+) on (\w+) stops: (.*) (?:is|are) missing since (\d+-\d+-\d+ \d+:\d+:\d+) \(([\d.]+) s"
)


def start_ranks(
    python: str,
    hosts: Sequence[Host],
    argv: Sequence[str],
    logs: Path,
    *,
    port: int,
    environment: Mapping[str, str] | None = None,
) -> list[Started]:
    """Start a rank on each host as a launcher would, several where a host comes several times; return them by rank.

    What rank r says goes to ``logs/rank<r>.log``, which is new.
    """
    logs.mkdir(parents=True)
    started = []
    for rank, host in enumerate(hosts):
        alone = {"ACCELERATE_USE_CPU": "true", **(environment or {})}
        joined = {
            "RANK": str(rank),
            "WORLD_SIZE": str(len(hosts)),
            "LOCAL_RANK": str(sum(other is host for other in hosts[:rank])),
            "LOCAL_WORLD_SIZE": str(sum(other is host for other in hosts)),
            "MASTER_ADDR": hosts[0].address,
            "MASTER_PORT": str(port),
        }
        variables = alone | joined if len(hosts) > 1 else alone
        started.append(host.run([python, SCRIPT, *argv], logs / f"rank{rank}.log", variables))
    return started


def ranks_of(launcher: Started, host: Host) -> list[int]:
    """Return the pids of the ranks that a launcher has started on its host."""
    found = []
    for pid in host.pids():
        stat = stat_of(pid)
        if stat is not None and stat.parent == launcher.pid:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            found += [pid] * (SCRIPT.encode() in words)
    return found


def wait_for_step(run: Path, step: int, ranks: Iterable[Started], seconds: float = 180) -> None:
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
    assert "Traceback" not in said.partition("failed (exitcode")[0], (
        said
    )  # but for what a launcher says of it
    assert "--resume auto" in lines[0]
    found = ERROR.match(lines[0])
    assert found, lines
    who = re.findall(r"rank \d+ on (\w+)", found[3])
    since = time.mktime(time.strptime(found[4], "%Y-%m-%d %H:%M:%S"))
    return Said(int(found[1]), found[2], tuple(who), since, float(found[5]))


def assert_nobody_left(hosts: Sequence[Host], seconds: float = 20) -> None:
    """No process is left on any of the hosts, no zombie either; one that ends takes seconds for it on a busy machine."""

    def left() -> dict[str, dict[int, str]]:
        return {host.name: found for host in hosts if (found := host.pids())}

    wait_until(lambda: not left(), seconds, lambda: f"the end of {left()}")
