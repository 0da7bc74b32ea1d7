"""How the doctor's ranks come together and part, without a process group: that could not say who is missing."""

import os
import platform
import time
from datetime import timedelta
from typing import Any

from glsd.cluster import dist
from glsd.doctor.line import Line
from glsd.doctor.panel import SLACK, Lost, Panel
from glsd.errors import one_line

OVER_SECONDS = 60.0


def arrive(rank: int, wait: float) -> Any:
    """Return the store of all ranks; Lost if it cannot be reached or another process has this rank's number."""
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    me = f"{platform.node()}, pid {os.getpid()}"
    try:
        restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.meeting_place(f"doctor/{restart}", wait)
        other = store.compare_set(f"seat/{rank}", "", me).decode()
    except (RuntimeError, ValueError) as problem:
        what = "cannot open it for the others" if rank == 0 else "cannot reach it"
        raise Lost(
            f"rank {rank} on {platform.node()} {what} (MASTER_ADDR and MASTER_PORT {place}): {one_line(problem)}"
        ) from problem
    if other != me:
        store.set(f"twice/{store.add('twice', 1)}", f"{rank} {me}")
        raise Lost(f"RANK={rank} is there twice: {other} and {me}; each host needs its own --machine_rank")
    return store


def part(panel: Panel) -> None:
    """Wait until all ranks have heard the end: the store goes with rank 0."""
    if panel.store is None:
        return
    if panel.rank:
        panel.store.wait(["code/told"], timedelta(seconds=OVER_SECONDS))
        panel.store.set(f"left/{panel.rank}", "")
        return
    deadline = time.monotonic() + SLACK
    others = [f"left/{rank}" for rank in panel.alive if rank]
    while others and not panel.store.check(others) and time.monotonic() < deadline:
        time.sleep(0.02)


def twice(panel: Panel) -> list[Line]:
    """Return a line for each process that came with the number of another one."""
    lines: list[Line] = []
    count = 0 if panel.store is None else panel.store.add("twice", 0)
    for number in range(1, count + 1):
        rank, _, process = panel.store.get(f"twice/{number}").decode().partition(" ")
        said = f"RANK={rank} is there twice: {panel.store.get(f'seat/{rank}').decode()} and {process}"
        lines.append(Line("FIX", "launch", said, "give each host its own --machine_rank (--node_rank)"))
    return lines
