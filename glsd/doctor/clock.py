"""Clock differences between hosts, corrected for the travel time of the messages."""

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

from glsd.doctor.line import Line

SECONDS, TRIES = 30.0, 3
PATIENCE = 5.0  # seconds for one answer of one rank
SKEWED, WRONG = 1.0, 60.0  # seconds


def compare(store: Any, clock: Callable[[], float], *, rank: int, asked: Sequence[int]) -> float | None:
    """Return by how many seconds this rank's clock is ahead of rank 0's; None on rank 0 and on ranks that are not asked.

    Every rank calls it, with its own clone of the store. Raises RuntimeError if rank 0 does not answer.
    """
    if rank == 0:
        for other, number in itertools.product(asked, range(TRIES)):
            store.set(f"turn/{other}/{number}", "")
            if _came(store, f"asks/{other}/{number}"):
                store.set(f"time/{other}/{number}", repr(clock()))
        return None
    if rank not in asked:
        return None
    tries = []
    for number in range(TRIES):
        store.wait([f"turn/{rank}/{number}"], timedelta(seconds=SECONDS))
        before = clock()
        store.set(f"asks/{rank}/{number}", "")
        store.wait([f"time/{rank}/{number}"], timedelta(seconds=SECONDS))
        after = clock()
        there = float(store.get(f"time/{rank}/{number}"))
        tries.append((after - before, (before + after) / 2 - there))
    return min(tries)[1]  # the shortest round trip is the most accurate


def _came(store: Any, key: str) -> bool:
    try:
        store.wait([key], timedelta(seconds=PATIENCE))
    except RuntimeError:  # the store says so when nothing came
        return False
    return True


def judge(ahead: Mapping[int, float], hosts: Mapping[int, str]) -> Line:
    """Return the line about clocks, from the seconds by which one rank of each host is ahead of rank 0."""
    # If most hosts are ahead by the same amount, rank 0's own clock is wrong.
    middle = statistics.median_low([0.0, *ahead.values()])
    off = {rank: seconds - middle for rank, seconds in ({0: 0.0} | dict(ahead)).items()}
    worst = max(off, key=lambda rank: abs(off[rank]))
    skew = abs(off[worst])
    if skew <= SKEWED:
        return Line("ok", "clock", f"{len(off)} hosts within {max(skew * 1e3, 0.1):.1f} ms")
    said = f"{hosts[worst]} is {skew:.1f} s {'ahead of' if off[worst] > 0 else 'behind'} the other hosts"
    others = sum(abs(seconds) > SKEWED for seconds in off.values()) - 1
    said += f"; {others} more hosts are off" if others else ""
    fix = "start a time service there (chrony, ntpd): signed addresses of object stores and file times depend on the clock"
    return Line("FIX" if skew > WRONG else "note", "clock", said, fix)
