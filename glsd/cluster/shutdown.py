"""How several ranks end: together after a run that went well, and soon when one of them cannot go on or is gone.

Every rank leaves signs of life among the notes of the run (the process group's store, a TCP server beside rank 0). Rank 0
looks at those of all, the others at rank 0's, and what ends the run is noted once, for all to read. All this happens in
threads of its own, because the main thread may wait for ever in a collective that nobody answers.
"""

import contextlib
import os
import platform
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from glsd.cluster import collectives, dist
from glsd.cluster.heartbeat import Progress, Signs, waits
from glsd.cluster.verdict import Verdict, propose, read
from glsd.errors import UserError, one_line

EXIT_LOST = 75  # sysexits.h EX_TEMPFAIL: nothing is wrong with the run, start it again
LOST_AFTER = 60.0  # seconds
BEAT_EVERY = 0.5  # seconds between two signs of life; more with very many ranks
BEATS_TO_MISS = 6  # after a connection broke: a rank that is silent for so many signs is taken for the cause
WAIT_FOR_OTHERS = 10.0  # seconds
EARLY = 10  # times lost_after, in which ranks may all wait for each other before the second step


class Watch:
    """Looks after the other ranks of a process group, in two threads, until ``stop``."""

    def __init__(self, lost_after: float):
        self.lost_after = lost_after
        self.period = min(BEAT_EVERY * max(1.0, dist.world_size() / 128), lost_after / 5)
        self.done = threading.Event()  # this process needs no watching any more
        self.ending = threading.Lock()  # held by the thread that ends this process
        self.trouble = threading.Event()  # the main thread's connection to another rank broke
        # Restarted ranks may meet in the same store: notes of before must not end them.
        name = f"glsd_end/{dist.broadcast_object(secrets.token_hex(8))}"
        self.notes, self.main_notes = dist.notes(name), dist.notes(name)  # the second for the main thread
        self.doing = "-"  # of the main thread: the number of steps done, or something else
        self.step, self.num_steps = "", 0  # the last step done, and how many this process has done
        self.notes.set(_beat(dist.rank()), "0 -/")
        self.hosts = dist.gather_objects(platform.node())  # and from here on every rank has left a sign
        watched = range(dist.world_size()) if dist.is_main() else range(1)
        self.signs = Signs([rank for rank in watched if rank != dist.rank()])
        self.progress = Progress()
        self.talked = time.monotonic()  # when the notes were last read
        self.talking = threading.Thread(target=self._talk, daemon=True, name="watch_others")
        self.talking.start()
        threading.Thread(target=self._listen, daemon=True, name="watch_the_notes").start()

    def stop(self) -> None:
        """Come back when no thread uses the notes: it would abort the process if they went in the meantime."""
        self.done.set()
        self.talking.join(WAIT_FOR_OTHERS)

    def patience(self) -> float:
        """How long a rank may be silent, in seconds."""
        quick = BEATS_TO_MISS * self.period
        return min(quick, self.lost_after) if self.trouble.is_set() else self.lost_after

    def _talk(self) -> None:
        """Leave signs of life, read those of others, end with them."""
        try:
            for count in self._rounds():
                began = time.monotonic()
                self.notes.set(_beat(dist.rank()), f"{count} {self._state()}")
                if self.notes.check(["end"]):
                    self._end(lambda: read(self.notes))
                if self.notes.check(["trouble"]):
                    self.trouble.set()
                beats = self.notes.multi_get([_beat(rank) for rank in self.signs.ranks])
                self._forgive_if_late(began)
                self._look(beats)
                self.talked = time.monotonic()
        except RuntimeError:  # the process that keeps the notes is gone
            # Maybe only a launcher, of the signal that the ranks got too: while they can talk, they may save and stop.
            while not (self.done.is_set() or self.trouble.wait(self.period / 5)):
                if time.monotonic() - self.talked > self.lost_after:
                    break
            self._judge_notes()

    def _listen(self) -> None:
        """End when the notes do not answer: over a link that was cut a question waits for ever."""
        for _ in self._rounds():
            if time.monotonic() - self.talked > self.patience() + self.period:
                self._judge_notes()

    def _rounds(self) -> Iterator[int]:
        """Count the rounds of a thread, one a period; if it overslept (the job was suspended), nobody is to blame."""
        count, last = 0, time.monotonic()
        while not self.done.wait(self.period):
            self._forgive_if_late(last)
            last = time.monotonic()
            count += 1
            yield count
            last = max(last, self.talked)  # a question may have waited for its answer

    def _forgive_if_late(self, since: float) -> None:
        late = time.monotonic() - since > min(self.lost_after, 4 * self.period + 1)
        if late and not self.trouble.is_set():
            self.signs.forgive()
            self.progress.forgive()
            self.talked = time.monotonic()

    def _look(self, beats: list[bytes]) -> None:
        """Judge the ranks that this one looks after by their newest signs."""
        self.signs.note(dict(zip(self.signs.ranks, beats, strict=True)))
        silent = self.signs.silent(self.patience())
        if silent:  # and those that were lost with them, whose last sign came a little later
            silent = self.signs.silent(self.patience() - 2 * self.period)
        if seconds := max(silent.values(), default=0.0) or self._still(beats):
            verdict = self._lost(tuple(silent), seconds)
            self._end(lambda: propose(self.notes, verdict))

    def _still(self, beats: list[bytes]) -> float:
        """Return for how long too long no rank has come further, as rank 0 knows; 0 if they do."""
        if not dist.is_main():
            return 0.0
        num_steps = self.num_steps  # before the states, which may be of a later step then
        states = [self._state(), *(beat.decode().partition(" ")[2] for beat in beats)]
        self.progress.note(states)
        if num_steps > 1:
            return self.progress.still(self.lost_after)
        # With the second step it is known how long a step takes: the first one may compile. Until then, and where nobody counts
        # steps, only ranks that all wait for each other are looked at, the first time over connections that are still made.
        return self.progress.still(EARLY * self.lost_after) if all(map(waits, states)) else 0.0

    def _state(self) -> str:
        """What the main thread does, as Progress wants it."""
        return f"{self.doing}/{collectives.now()}"

    def _judge_notes(self) -> None:
        """Take rank 0's host for lost: the notes lie there."""
        if not self.done.is_set() and self.ending.acquire(blocking=False):
            self._say(self._lost((0,), time.monotonic() - self.talked))
            os._exit(EXIT_LOST)

    def _lost(self, missing: tuple[int, ...], seconds: float) -> Verdict:
        since = time.time() - seconds
        return Verdict(by=dist.rank(), code=EXIT_LOST, missing=missing, seconds=seconds, since=since)

    def _end(self, find: Callable[[], Verdict]) -> None:
        """End this process as the verdict says, which may have to be asked for; come back if another thread does."""
        if not self.ending.acquire(blocking=False):
            return
        try:
            verdict = find()
        except RuntimeError:  # rank 0 has gone with its notes in this very moment
            verdict = self._lost((0,), time.monotonic() - self.talked)
        self.leave(self.notes, verdict)

    def leave(self, notes: Any, verdict: Verdict) -> NoReturn:
        """End this process; rank 0, which may keep the notes, when nobody needs them any more."""
        self._say(verdict)
        with contextlib.suppress(RuntimeError):
            notes.add("left", 1)
            if dist.is_main():
                _wait(notes, dist.world_size() - len({*verdict.missing} - {0}))
        os._exit(verdict.code)  # the main thread may wait for ever in a collective

    def _say(self, verdict: Verdict) -> None:
        if line := verdict.line(dist.rank(), self.hosts):
            print(f"error: {line}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()


_watch: Watch | None = None


def watch_others(lost_after: float = LOST_AFTER) -> None:
    """From now on end this process soon after another rank has said ``end_others`` or is lost; until ``finish``.

    A rank that ends on its own leaves the others in a collective that nobody answers, for half an hour by default.
    lost_after: seconds without a sign of life after which a rank counts as lost; where a connection to it broke, a few
    seconds are enough. Every rank still there then says who is missing, in one line, and ends with EXIT_LOST. They do so too
    when all are alive and get nowhere (see Progress). Every rank calls. Raises UserError for less than a second.
    """
    global _watch
    if not lost_after >= 1:
        raise UserError(f"cluster.lost_after is {lost_after}: expected 1 or more")
    _watch = Watch(lost_after) if dist.world_size() > 1 else None


def doing(what: str) -> str:
    """Note what the main thread does, the number of steps done or something else, for Progress; return what it was before."""
    if _watch is None:
        return ""
    before, _watch.doing = _watch.doing, what
    if what.isdecimal() and what != _watch.step:
        _watch.step, _watch.num_steps = what, _watch.num_steps + 1
    return before


def end_others(code: int) -> bool:
    """Have all ranks end with this exit code; return True where this rank should say why: the first one to call.

    It returns when the others have ended, or after a few seconds; on another rank it does not return, the process ends
    with the code of the first. A launcher that wants this rank to end, because others have, must wait: SIGTERM is ignored.
    """
    watch = _watch
    if watch is None or watch.done.is_set():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not watch.ending.acquire(blocking=False):
        time.sleep(2 * WAIT_FOR_OTHERS)  # the watching thread ends this process
        return False
    watch.stop()

    def tell() -> None:
        notes = watch.main_notes
        verdict = propose(notes, Verdict(by=dist.rank(), code=code))
        if verdict.by != dist.rank():
            watch.leave(notes, verdict)
        # Rank 0 may keep the notes: it goes when nobody needs them any more.
        _wait(notes, dist.world_size() - (1 if dist.is_main() else 2))
        notes.add("left", 1)

    _in_time(tell, 2 * WAIT_FOR_OTHERS)
    return True


def end_with_lost(problem: Exception) -> NoReturn:
    """End this process, whose connection to another rank broke: with the line that says who is missing.

    When none is found missing, because only the connection broke or was never made, ``problem`` is part of the line.
    """
    watch = _watch
    what, advice = "a connection between ranks broke although all are alive", "start again"
    if watch is None:
        what = "the ranks did not find each other"
        advice = "check MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME (launch/doctor.py looks at them), start again"
    elif not watch.done.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        watch.trouble.set()
        # One of the two threads ends this process in the meantime.
        started = time.monotonic()
        _in_time(lambda: watch.main_notes.set("trouble", str(dist.rank())), WAIT_FOR_OTHERS)
        time.sleep(max(0, started + WAIT_FOR_OTHERS + 2 * BEATS_TO_MISS * watch.period - time.monotonic()))
    if end_others(EXIT_LOST):
        rank = dist.rank() if watch else os.environ.get("RANK", "0")
        print(f"error: rank {rank}: {what}: {one_line(problem)}; {advice}", file=sys.stderr)
        sys.stderr.flush()
    os._exit(EXIT_LOST)


def finish(code: int = 0) -> None:
    """End a run that went well: wait for all ranks, then leave the process group.

    code: what this process will end with; it does so here if another rank is lost while they part, when all is done.
    """
    dist.barrier()  # until here another rank may fail, and have this one end
    if _watch is None:
        dist.leave()
        return
    _watch.stop()
    sys.stdout.flush()
    sys.stderr.flush()
    overdue = threading.Timer(_watch.lost_after, os._exit, [code])
    overdue.daemon = True
    overdue.start()
    try:
        dist.leave()
    except RuntimeError as problem:
        if not dist.is_broken_connection(problem):
            raise
        os._exit(code)
    overdue.cancel()


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _in_time(work: Callable[[], None], seconds: float) -> None:
    """Ask the notes something, which may have gone with the rank that kept them, or may never answer."""

    def asked() -> None:
        with contextlib.suppress(RuntimeError):
            work()

    thread = threading.Thread(target=asked, daemon=True)
    thread.start()
    thread.join(seconds)


def _wait(notes: Any, num_left: int) -> None:
    deadline = time.monotonic() + WAIT_FOR_OTHERS
    while notes.add("left", 0) < num_left and time.monotonic() < deadline:
        time.sleep(0.05)
