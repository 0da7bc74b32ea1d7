"""Checks on all ranks that never wait for a rank that hangs or is dead.

Every rank runs a check and writes its answer into the store, and rank 0 collects the answers that come in time. A rank that misses
one answer is reported and not asked again.
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
SLACK = 5.0  # seconds that rank 0 waits for answers after the time for a check is over


class Lost(Exception):
    """This rank cannot reach rank 0 any more; the message is one line that says why."""


@dataclass(frozen=True)
class Answer:
    """What one rank found, or the error that kept it from finding anything."""

    value: Any = None
    error: str = ""


@dataclass
class Panel:
    """The ranks that answer, and rank 0's table; a single process has no store."""

    rank: int = 0
    world: int = 1
    store: Any = None
    hosts: dict[int, str] = field(default_factory=dict)  # on rank 0, once they have arrived
    alive: list[int] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)  # rank 0's table

    def __post_init__(self) -> None:
        self.alive = self.alive or list(range(self.world))

    def ask(self, name: str, work: Callable[[], Any], seconds: float) -> dict[int, Answer]:
        """Run ``work`` on every rank for at most these seconds; return the answers by rank, on rank 0 only.

        work: returns JSON. Raises Lost on a rank that answers too late, or that cannot reach rank 0.
        """
        began = time.monotonic()
        own = bounded(work, seconds)
        if self.store is None:
            return {0: own}
        with self._reaching_rank_0(name, 2 * (seconds + 2 * SLACK)):
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
        """Return on every rank what ``make`` returns on rank 0, JSON."""
        if self.store is None:
            return make()
        if self.rank == 0:
            value = make()
            self.store.set(f"{name}/told", json.dumps(value))
            return value
        with self._reaching_rank_0(name, 4 * SLACK):
            return json.loads(self._wait(f"{name}/told", 2 * SLACK))

    def who(self, ranks: Any) -> str:
        return who(ranks, self.hosts)

    def sort_out(self, name: str, answers: dict[int, Answer], fix: str) -> dict[int, Any]:
        """Return the values without errors, and add a line to the table for each kind of error."""
        errors: dict[str, list[int]] = {}
        for rank, answer in sorted(answers.items()):
            if answer.error:
                errors.setdefault(answer.error, []).append(rank)
        for error, ranks in errors.items():
            where = f"{self.who(ranks)}: " if self.world > 1 else ""
            alive = "check whether that process and its host still run; their own messages may say why"
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
            except RuntimeError:  # the store says so when nothing came
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
    def _reaching_rank_0(self, name: str, seconds: float) -> Iterator[None]:
        """Turn the store's error when rank 0 is gone into Lost; end the process if the store hangs, as over a cut link."""

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
    """Return the answer of ``work``; work that takes longer, as on a disk that does not answer, is left behind in its thread."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(work)
    pool.shutdown(wait=False)
    try:
        return Answer(value=future.result(seconds))
    except (UserError, OSError, RuntimeError) as problem:
        if isinstance(problem, TimeoutError) and not future.done():
            return Answer(error=f"not done within {seconds:.0f} s")
        return Answer(error=one_line(str(problem) or type(problem).__name__))
