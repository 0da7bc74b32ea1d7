"""How the ranks of the doctor meet and part, without a process group, which could not say which rank is missing."""

import os
import platform
import time
from datetime import timedelta
from typing import Any

from glsd.cluster import dist
from glsd.doctor.line import Line
from glsd.doctor.panel import SLACK, Lost, Panel
from glsd.errors import one_line

PART_SECONDS = 60.0


def arrive(rank: int, wait: float) -> Any:
    """Return the store that all ranks share. Raises Lost if it cannot be reached, or if another process has the same rank."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    me = f"{platform.node()}, pid {os.getpid()}"
    try:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.open_store(f"doctor/{restart}", wait)
        other = store.compare_set(f"seat/{rank}", "", me).decode()
    except (RuntimeError, ValueError) as problem:
        what = (
            "cannot open the store for the other ranks" if rank == 0 else "cannot reach the store of rank 0"
        )
        raise Lost(
            f"rank {rank} on {platform.node()} {what} (MASTER_ADDR and MASTER_PORT {place}): {one_line(problem)}"
        ) from problem
    if other != me:
        store.set(f"twice/{store.add('twice', 1)}", f"{rank} {me}")
        raise Lost(f"RANK={rank} is there twice: {other} and {me}; each host needs its own --machine_rank")
    return store


def part(panel: Panel) -> None:
    """Wait until all ranks know the exit code: the store goes away with rank 0."""
    if panel.store is None:
        return
    if panel.rank:
        panel.store.wait(["code/told"], timedelta(seconds=PART_SECONDS))
        panel.store.set(f"left/{panel.rank}", "")
        return
    deadline = time.monotonic() + SLACK
    others = [f"left/{rank}" for rank in panel.alive if rank]
    while others and not panel.store.check(others) and time.monotonic() < deadline:
        time.sleep(0.02)


def twice(panel: Panel) -> list[Line]:
    """Return a line for each process that arrived with the rank of another one."""
    lines: list[Line] = []
    count = 0 if panel.store is None else panel.store.add("twice", 0)
    for number in range(1, count + 1):
        rank, _, process = panel.store.get(f"twice/{number}").decode().partition(" ")
        said = f"RANK={rank} is there twice: {panel.store.get(f'seat/{rank}').decode()} and {process}"
        lines.append(Line("FIX", "launch", said, "give each host its own --machine_rank (--node_rank)"))
    return lines
