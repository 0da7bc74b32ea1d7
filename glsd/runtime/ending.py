"""How several ranks end: together after a run that went well, and soon when one of them cannot go on or is gone.

Every rank leaves signs of life among the notes of the run (the process group's store, a TCP server beside rank 0). Rank 0
looks at those of all, the others at rank 0's, and what ends the run is noted once, for all to read. All this happens in
threads of its own, because the main thread may wait for ever in a collective that nobody answers.
"""

import contextlib
import json
import os
import platform
import secrets
import signal
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from glsd.runtime import dist
from glsd.runtime.life import Signs

EXIT_LOST = 75  # sysexits.h EX_TEMPFAIL: nothing is wrong with the run, start it again
LOST_AFTER = 60.0  # seconds
BEAT_EVERY = 0.5  # seconds between two signs of life; more with very many ranks
BEATS_TO_MISS = 6  # after a connection broke: a rank that is silent for so many signs is taken for the cause
WAIT_FOR_OTHERS = 10.0  # seconds


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Why a run ends: noted by the first rank that knows, read by all others."""

    by: int  # the rank that found it
    code: int  # exit code of all ranks
    missing: tuple[int, ...] = ()  # ranks that are gone; none: the rank that found it says why itself
    since: float = 0.0  # seconds since the epoch, when the missing were heard of last
    silent: float = 0.0  # seconds, until they were given up


class Watch:
    """Looks after the other ranks of a process group, in two threads, until ``stop``."""

    def __init__(self, lost_after: float):
        self.lost_after = lost_after
        self.period = min(BEAT_EVERY * max(1.0, dist.world_size() / 128), lost_after / 5)
        self.done = threading.Event()  # this process needs no watching any more
        self.ending = threading.Lock()  # held by the thread that ends this process
        self.trouble = threading.Event()  # the main thread's connection to another rank broke
        # Restarted ranks may meet in the same store: notes of before must not end them.
        self.name = f"glsd_end/{dist.broadcast_object(secrets.token_hex(8))}"
        self.notes = dist.notes(self.name)
        self.notes.set(_beat(dist.rank()), "0")
        self.hosts = dist.gather_objects(platform.node())  # and from here on every rank has left a sign
        watched = range(dist.world_size()) if dist.is_main() else range(1)
        self.signs = Signs([rank for rank in watched if rank != dist.rank()])
        self.talked = time.monotonic()  # when the notes were last read
        self.talking = threading.Thread(target=self._talk, daemon=True, name="watch_others")
        for thread in (
            self.talking,
            threading.Thread(target=self._listen, daemon=True, name="watch_the_notes"),
        ):
            thread.start()

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
        count = 0
        try:
            while not self.done.wait(self.period):
                count += 1
                self.notes.set(_beat(dist.rank()), str(count))
                if self.notes.check(["end"]) and self.ending.acquire(blocking=False):
                    self._leave(self.notes, _read(self.notes))
                if self.notes.check(["trouble"]):
                    self.trouble.set()
                found = self.notes.multi_get([_beat(rank) for rank in self.signs.ranks])
                self.signs.note(dict(zip(self.signs.ranks, found, strict=True)))
                self.talked = time.monotonic()
                self._judge(self.signs.silent(self.patience()))
        except RuntimeError:  # the process that keeps the notes is gone
            # Maybe only a launcher, of the signal that the ranks got too: while they can talk, they may save and stop.
            while not (self.done.is_set() or self.trouble.wait(self.period / 5)):
                if time.monotonic() - self.talked > self.lost_after:
                    break
            self._judge_notes()

    def _listen(self) -> None:
        """End when the notes do not answer: over a link that was cut a question waits for ever."""
        while not self.done.wait(self.period):
            if time.monotonic() - self.talked > self.patience() + self.period:
                self._judge_notes()

    def _judge(self, silent: dict[int, float]) -> None:
        if silent and self.ending.acquire(blocking=False):
            seconds = max(silent.values())
            verdict = Verdict(
                by=dist.rank(),
                code=EXIT_LOST,
                missing=tuple(silent),
                since=time.time() - seconds,
                silent=seconds,
            )
            self._leave(self.notes, _propose(self.notes, verdict))

    def _judge_notes(self) -> None:
        """Take rank 0's host for lost: the notes lie there."""
        if not self.done.is_set() and self.ending.acquire(blocking=False):
            seconds = time.monotonic() - self.talked
            since = time.time() - seconds
            self._say(Verdict(by=dist.rank(), code=EXIT_LOST, missing=(0,), since=since, silent=seconds))
            os._exit(EXIT_LOST)

    def _leave(self, notes: Any, verdict: Verdict) -> NoReturn:
        """End this process as the verdict says; rank 0, which may keep the notes, when nobody needs them any more."""
        self._say(verdict)
        with contextlib.suppress(RuntimeError):
            notes.add("left", 1)
            if dist.is_main():
                _wait(notes, dist.world_size() - len(verdict.missing))
        os._exit(verdict.code)  # the main thread may wait for ever in a collective

    def _say(self, verdict: Verdict) -> None:
        if verdict.missing:
            print(f"error: {self._line(verdict)}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()

    def _line(self, verdict: Verdict) -> str:
        stops = f"rank {dist.rank()} on {self.hosts[dist.rank()]} stops"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(verdict.since))
        seconds = f"{verdict.silent:.1f} s without a sign of life"
        advice = "start again (training: with --resume auto, the last checkpoint is whole)"
        if dist.rank() in verdict.missing:
            return f"{stops}: the others gave it up, they had not heard of it since {since} ({seconds}); {advice}"
        who = " and ".join(f"rank {rank} on {self.hosts[rank]}" for rank in verdict.missing[:8])
        more = f" and {len(verdict.missing) - 8} more" if len(verdict.missing) > 8 else ""
        are = "is" if len(verdict.missing) == 1 else "are"
        return (
            f"{stops}: {who}{more} {are} missing since {since} ({seconds}): killed, or the host or its network is down; "
            f"{advice}"
        )


_watch: Watch | None = None


def watch_others(lost_after: float = LOST_AFTER) -> None:
    """From now on end this process soon after another rank has said ``end_others`` or is lost; until ``finish``.

    A rank that ends on its own leaves the others in a collective that nobody answers, for half an hour by default.
    lost_after: seconds without a sign of life after which a rank counts as lost; where a connection to it broke, a few
    seconds are enough. Every rank still there then says who is missing, in one line, and ends with EXIT_LOST. Every rank calls.
    """
    global _watch
    _watch = Watch(lost_after) if dist.world_size() > 1 else None


def end_others(code: int) -> bool:
    """Have all ranks end with this exit code; return True where this rank should say why: the first one to call.

    It returns when the others have ended, or after a few seconds; on another rank it does not return, the process ends
    with the code of the first. A launcher that wants this rank to end, because others have, must wait: SIGTERM is ignored.
    """
    if _watch is None or _watch.done.is_set():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not _watch.ending.acquire(blocking=False):
        time.sleep(2 * WAIT_FOR_OTHERS)  # the watching thread ends this process
        return False
    _watch.stop()
    with contextlib.suppress(RuntimeError):  # the notes went with the rank that kept them
        notes = dist.notes(_watch.name)
        verdict = _propose(notes, Verdict(by=dist.rank(), code=code))
        if verdict.by != dist.rank():
            _watch._leave(notes, verdict)
        # Rank 0 may keep the notes: it goes when nobody needs them any more.
        _wait(notes, dist.world_size() - (1 if dist.is_main() else 2))
        notes.add("left", 1)
    return True


def end_with_lost(problem: Exception) -> NoReturn:
    """End this process, whose connection to another rank broke: with the line that says who is missing.

    When none is found missing, because only the connection broke or was never made, ``problem`` is part of the line.
    """
    what, advice = "a connection between ranks broke although all are alive", "start again"
    if _watch is None:
        what = "the ranks did not find each other"
        advice = "check MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME (launch/doctor.py looks at them), start again"
    elif not _watch.done.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _watch.trouble.set()
        with contextlib.suppress(RuntimeError):
            dist.notes(_watch.name).set("trouble", str(dist.rank()))
        # One of the two threads ends this process.
        time.sleep(WAIT_FOR_OTHERS + 2 * BEATS_TO_MISS * _watch.period)
    if end_others(EXIT_LOST):
        text = " ".join(str(problem).split())
        rank = dist.rank() if _watch else os.environ.get("RANK", "0")
        print(f"error: rank {rank}: {what}: {text}; {advice}", file=sys.stderr)
        sys.stderr.flush()
    os._exit(EXIT_LOST)


def finish() -> None:
    """End a run that went well: wait for all ranks, then leave the process group."""
    dist.barrier()  # until here another rank may fail, and have this one end
    if _watch is not None:
        _watch.stop()
    dist.leave()


def _beat(rank: int) -> str:
    return f"beat/{rank}"


def _propose(notes: Any, verdict: Verdict) -> Verdict:
    """Note why the run ends, unless another rank was first; return what holds."""
    notes.compare_set("end", "", json.dumps(asdict(verdict)))
    return _read(notes)


def _read(notes: Any) -> Verdict:
    values = json.loads(notes.get("end"))
    return Verdict(**{**values, "missing": tuple(values["missing"])})


def _wait(notes: Any, num_left: int) -> None:
    deadline = time.monotonic() + WAIT_FOR_OTHERS
    while notes.add("left", 0) < num_left and time.monotonic() < deadline:
        time.sleep(0.05)
