"""How the doctor's checks hear of all ranks without ever waiting for one that hangs or is dead.

Rank 0 asks, every rank works on its own answer and writes it into the store, rank 0 collects what comes in time. A rank that
misses an answer is told of and not asked again.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from glsd.doctor.line import Line, who
from glsd.errors import UserError, one_line

SILENT = "no answer within"
SLACK = 5.0  # seconds between the bound of a check and the end of waiting for its answers


class Lost(Exception):
    """This rank has nobody to answer to any more: one line that says why."""


@dataclass(frozen=True)
class Answer:
    """What one rank found, or why it found nothing."""

    value: Any = None
    error: str = ""


@dataclass
class Panel:
    """The ranks that answer; alone without a store."""

    rank: int = 0
    world: int = 1
    store: Any = None
    hosts: dict[int, str] = field(default_factory=dict)  # known on rank 0 once they have arrived
    alive: list[int] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)  # rank 0's table

    def __post_init__(self) -> None:
        self.alive = self.alive or list(range(self.world))

    def ask(self, name: str, work: Callable[[], Any], seconds: float) -> dict[int, Answer]:
        """Return the answers by rank, on rank 0 only; ``work`` of each rank has these seconds and returns JSON.

        Raises Lost on a rank that is too late for rank 0, or that rank 0 is lost for.
        """
        began = time.monotonic()
        own = bounded(work, seconds)
        if self.store is None:
            return {0: own}
        with self._hearing(name, 2 * (seconds + 2 * SLACK)):
            self.store.set(f"{name}/{self.rank}", json.dumps([own.value, own.error]))
            if self.rank == 0:
                answers = self._collect(name, seconds, began + seconds + SLACK)
                self.store.set(f"{name}/done", json.dumps(self.alive))
                return answers
            self.alive = json.loads(self._wait(f"{name}/done", 2 * (seconds + SLACK)))
        if self.rank not in self.alive:
            raise Lost(f"rank {self.rank} answered too late (check {name!r})")
        return {}

    def tell(self, name: str, make: Callable[[], Any]) -> Any:
        """Return on every rank what rank 0 makes: JSON."""
        if self.store is None:
            return make()
        if self.rank == 0:
            value = make()
            self.store.set(f"{name}/told", json.dumps(value))
            return value
        with self._hearing(name, 4 * SLACK):
            return json.loads(self._wait(f"{name}/told", 2 * SLACK))

    def who(self, ranks: Any) -> str:
        return who(ranks, self.hosts)

    def sort_out(self, name: str, answers: dict[int, Answer], fix: str) -> dict[int, Any]:
        """Return the values, and put a line into the table for each kind of error."""
        errors: dict[str, list[int]] = {}
        for rank, answer in sorted(answers.items()):
            if answer.error:
                errors.setdefault(answer.error, []).append(rank)
        for error, ranks in errors.items():
            where = f"{self.who(ranks)}: " if self.world > 1 else ""
            alive = "see whether that process and its host still run; their own messages may say why"
            self.lines.append(
                Line("FIX", name, f"{where}{error}", alive if error.startswith(SILENT) else fix)
            )
        return {rank: answer.value for rank, answer in sorted(answers.items()) if not answer.error}

    def _collect(self, name: str, seconds: float, deadline: float) -> dict[int, Answer]:
        answers = {}
        for rank in self.alive:
            left = max(0.01, deadline - time.monotonic())
            try:
                self.store.wait([f"{name}/{rank}"], timedelta(seconds=left))
            except RuntimeError:  # that is how the store says that nothing came
                answers[rank] = Answer(error=f"{SILENT} {seconds + SLACK:.0f} s")
            else:
                answers[rank] = Answer(*json.loads(self.store.get(f"{name}/{rank}")))
        late = [rank for rank, answer in answers.items() if answer.error.startswith(SILENT)]
        self.alive = [rank for rank in self.alive if rank not in late]
        return answers

    def _wait(self, key: str, seconds: float) -> bytes:
        self.store.wait([key], timedelta(seconds=seconds))
        return self.store.get(key)

    @contextlib.contextmanager
    def _hearing(self, name: str, seconds: float) -> Iterator[None]:
        """What the store raises when rank 0 is gone becomes Lost; a cut link, where it hangs, ends the process."""

        def end() -> None:
            print(f"error: {gone} (no answer for {seconds:.0f} s)", file=sys.stderr, flush=True)
            os._exit(1)

        gone = f"rank {self.rank} on {self.hosts.get(self.rank, os.uname().nodename)}: rank 0 is gone (check {name!r})"
        timer = threading.Timer(seconds, end)
        timer.daemon = True
        timer.start()
        try:
            yield
        except RuntimeError as problem:
            raise Lost(f"{gone}: {one_line(problem)}") from problem
        finally:
            timer.cancel()


def bounded(work: Callable[[], Any], seconds: float) -> Answer:
    """Return what ``work`` returns; it is left behind where it takes longer, as on a disk that does not answer."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    try:
        return Answer(value=future.result(seconds))
    except (UserError, OSError, RuntimeError) as problem:
        if isinstance(problem, TimeoutError) and not future.done():
            return Answer(error=f"not done within {seconds:.0f} s")
        return Answer(error=one_line(str(problem) or type(problem).__name__))
