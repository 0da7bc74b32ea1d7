"""How several ranks end: together after a run that went well, and soon after one of them has failed or is lost.

Every rank writes heartbeats into the store of the process group, a TCP server beside rank 0. Rank 0 watches all ranks, the
other ranks watch rank 0. The reason to end is written once, and all ranks read it. This happens in threads of its own, because
the main thread may wait for ever in a collective call that no other rank answers.
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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NoReturn

from glsd.cluster import dist
from glsd.cluster.heartbeat import Heartbeats, Progress, in_collective
from glsd.errors import UserError, one_line

EXIT_LOST = 75  # sysexits.h EX_TEMPFAIL: nothing is wrong with the run, start it again
BEAT_EVERY = 0.5  # seconds between two heartbeats; more with very many ranks
BEATS_TO_MISS = 6  # after a connection broke, a rank that misses so many heartbeats counts as lost
WAIT_FOR_RANKS = 10.0  # seconds
EARLY = 10  # times lost_after, during which all ranks may wait for each other before the second step
ADVICE = "start again (training: with --resume auto, the last checkpoint is whole)"


@dataclass(frozen=True, kw_only=True)
class EndReason:
    """Why all ranks end; without ``missing`` and ``seconds`` the rank that found it explains it itself."""

    by: int  # the rank that found it
    code: int  # exit code of all ranks
    missing: tuple[int, ...] = ()  # lost ranks
    seconds: float = (
        0.0  # since the last heartbeat of the missing ranks, or without missing ranks since the last progress
    )
    since: float = 0.0  # time.time() when these seconds began

    def message(self, rank: int, hosts: Sequence[str]) -> str:
        """Return what a rank prints when it ends, "" for nothing; hosts: of all ranks."""
        if not self.seconds:
            return ""
        stops = f"rank {rank} on {hosts[rank]} stops"
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.since))
        if not self.missing:
            return (
                f"{stops}: all ranks are alive, but none has finished a step since {since} ({self.seconds:.1f} s): the network "
                f"between two of their hosts is down, or one hangs; {ADVICE}"
            )
        seconds = f"{self.seconds:.1f} s without a heartbeat"
        if rank in self.missing:
            return f"{stops}: the other ranks gave it up, without a heartbeat of it since {since} ({seconds}); {ADVICE}"
        who = " and ".join(f"rank {lost} on {hosts[lost]}" for lost in self.missing[:8])
        more = f" and {len(self.missing) - 8} more" if len(self.missing) > 8 else ""
        are = "is" if len(self.missing) == 1 else "are"
        return (
            f"{stops}: {who}{more} {are} missing since {since} ({seconds}): killed, or the host or its network is down; "
            f"{ADVICE}"
        )


def _propose_end(store: Any, reason: EndReason) -> EndReason:
    """Write the reason to end, unless another rank was first; return the one that holds."""
    store.compare_set("end", "", json.dumps(asdict(reason)))
    return _read_end(store)


def _read_end(store: Any) -> EndReason:
    values = json.loads(store.get("end"))
    return EndReason(**{**values, "missing": tuple(values["missing"])})


class Watch:
    """Two threads that watch the other ranks of a process group, until ``stop``."""

    def __init__(self, lost_after: float):
        self.lost_after = lost_after
        self.period = min(BEAT_EVERY * max(1.0, dist.world_size() / 128), lost_after / 5)
        self.done = threading.Event()  # this process needs no watch any more
        self.ending = threading.Lock()  # held by the thread that ends this process
        self.trouble = threading.Event()  # the main thread's connection to another rank broke
        # Restarted ranks may share the store of an earlier start, whose reason to end must not end them.
        name = f"glsd_end/{dist.broadcast_object(secrets.token_hex(8))}"
        self.store = dist.shared_store(name)
        self.main_store = dist.shared_store(name)  # for the main thread
        self.store.set(_beat(dist.rank()), "0 -/")
        self.hosts = dist.gather_objects(platform.node())  # from here on every rank has a heartbeat
        watched = range(dist.world_size()) if dist.is_main() else range(1)
        self.beats = Heartbeats([rank for rank in watched if rank != dist.rank()])
        self.progress = Progress()
        self.talked = time.monotonic()  # when the store last answered
        self.talking = threading.Thread(target=self._talk, daemon=True, name="watch_others")
        self.talking.start()
        threading.Thread(target=self._watch_store, daemon=True, name="watch_store").start()

    def stop(self) -> None:
        """Return when no thread uses the store: a thread that uses it while it goes away would abort the process."""
        self.done.set()
        self.talking.join(WAIT_FOR_RANKS)

    def patience(self) -> float:
        """The seconds a rank may be silent."""
        quick = BEATS_TO_MISS * self.period
        return min(quick, self.lost_after) if self.trouble.is_set() else self.lost_after

    def _talk(self) -> None:
        """Write heartbeats, read those of the watched ranks, end when the run ends."""
        try:
            for count in self._rounds():
                began = time.monotonic()
                self.store.set(_beat(dist.rank()), f"{count} {self._state()}")
                if self.store.check(["end"]):
                    self._end(lambda: _read_end(self.store))
                if self.store.check(["trouble"]):
                    self.trouble.set()
                beats = self.store.multi_get([_beat(rank) for rank in self.beats.ranks])
                self._reset_if_late(began)
                self._judge(beats)
                self.talked = time.monotonic()
        except RuntimeError:  # the process that hosts the store is gone
            # It may be only a launcher that got the same signal as the ranks. While they are connected they may save and stop.
            while not (self.done.is_set() or self.trouble.wait(self.period / 5)):
                if time.monotonic() - self.talked > self.lost_after:
                    break
            self._lose_store()

    def _watch_store(self) -> None:
        """End when the store does not answer: over a link that was cut a request waits for ever."""
        for _ in self._rounds():
            if time.monotonic() - self.talked > self.patience() + self.period:
                self._lose_store()

    def _rounds(self) -> Iterator[int]:
        """Count the rounds of a thread, one a period; after a round that came late (the job was suspended) no rank is blamed."""
        count, last = 0, time.monotonic()
        while not self.done.wait(self.period):
            self._reset_if_late(last)
            last = time.monotonic()
            count += 1
            yield count
            last = max(last, self.talked)  # a request may have waited for its answer

    def _reset_if_late(self, since: float) -> None:
        late = time.monotonic() - since > min(self.lost_after, 4 * self.period + 1)
        if late and not self.trouble.is_set():
            self.beats.reset()
            self.progress.reset()
            self.talked = time.monotonic()

    def _judge(self, beats: list[bytes]) -> None:
        """End the run if a watched rank is silent or all ranks are stuck, by the newest heartbeats."""
        self.beats.note(dict(zip(self.beats.ranks, beats, strict=True)))
        silent = self.beats.silent(self.patience())
        if (
            silent
        ):  # with the ranks that were lost together with them, whose last heartbeat came a little later
            silent = self.beats.silent(self.patience() - 2 * self.period)
        if seconds := max(silent.values(), default=0.0) or self._stuck(beats):
            reason = self._lost(tuple(silent), seconds)
            self._end(lambda: _propose_end(self.store, reason))

    def _stuck(self, beats: list[bytes]) -> float:
        """Return the seconds without progress on rank 0 if they are too many, else 0."""
        if not dist.is_main():
            return 0.0
        num_steps = dist.activity.num_steps  # read before the states, which may be of a later step
        states = [self._state(), *(beat.decode().partition(" ")[2] for beat in beats)]
        self.progress.note(states)
        if num_steps > 1:
            return self.progress.stuck(self.lost_after)
        # The second step shows how long a step takes: the first one may compile. Until then, and where steps are not counted,
        # ranks count as stuck only if all of them wait in collective calls. The first calls still make connections.
        return self.progress.stuck(EARLY * self.lost_after) if all(map(in_collective, states)) else 0.0

    def _state(self) -> str:
        """The state of the main thread, for Progress."""
        return f"{dist.activity.doing}/{dist.activity.call}"

    def _lose_store(self) -> None:
        """End because rank 0, which hosts the store, counts as lost."""
        if not self.done.is_set() and self.ending.acquire(blocking=False):
            self._say(self._lost((0,), time.monotonic() - self.talked))
            os._exit(EXIT_LOST)

    def _lost(self, missing: tuple[int, ...], seconds: float) -> EndReason:
        since = time.time() - seconds
        return EndReason(by=dist.rank(), code=EXIT_LOST, missing=missing, seconds=seconds, since=since)

    def _end(self, find: Callable[[], EndReason]) -> None:
        """End this process for the reason that ``find`` returns; return if another thread ends it."""
        if not self.ending.acquire(blocking=False):
            return
        try:
            reason = find()
        except RuntimeError:  # rank 0 has just gone, and the store with it
            reason = self._lost((0,), time.monotonic() - self.talked)
        self.leave(self.store, reason)

    def leave(self, store: Any, reason: EndReason) -> NoReturn:
        """End this process; rank 0, which may host the store, once no other rank needs it."""
        self._say(reason)
        with contextlib.suppress(RuntimeError):
            store.add("left", 1)
            if dist.is_main():
                _wait_until_left(store, dist.world_size() - len({*reason.missing} - {0}))
        os._exit(reason.code)  # the main thread may wait for ever in a collective call

    def _say(self, reason: EndReason) -> None:
        if message := reason.message(dist.rank(), self.hosts):
            print(f"error: {message}", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()


_watch: Watch | None = None


def watch_others(lost_after: float) -> None:
    """Watch the other ranks until ``finish``: end this process soon after another rank called ``end_others`` or is lost.

    Without it, a rank that ends leaves the other ranks in a collective call for half an hour. A rank counts as lost after
    ``lost_after`` seconds without a heartbeat, or after a few seconds if a connection to it broke. Every remaining rank then says
    in one line which rank is missing, and exits with EXIT_LOST. So they do when all are alive but stuck (see Progress).
    A collective call. Raises UserError for less than a second.
    """
    global _watch
    if not lost_after >= 1:
        raise UserError(f"lost_after is {lost_after}: expected 1 or more")
    _watch = Watch(lost_after) if dist.world_size() > 1 else None


def end_others(code: int) -> bool:
    """End all ranks with this exit code; return True on the first rank to call, which should say why.

    It returns when the other ranks have ended, or after a few seconds. On another rank it does not return: the process ends
    with the code of the first. SIGTERM is ignored, so that a launcher that ends this rank, because others ended, must wait.
    """
    watch = _watch
    if watch is None or watch.done.is_set():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not watch.ending.acquire(blocking=False):
        time.sleep(2 * WAIT_FOR_RANKS)  # a thread of the watch ends this process
        return False
    watch.stop()

    def tell() -> None:
        store = watch.main_store
        reason = _propose_end(store, EndReason(by=dist.rank(), code=code))
        if reason.by != dist.rank():
            watch.leave(store, reason)
        # Rank 0 may host the store: it leaves last.
        _wait_until_left(store, dist.world_size() - (1 if dist.is_main() else 2))
        store.add("left", 1)

    _in_time(tell, 2 * WAIT_FOR_RANKS)
    return True


def end_with_lost(problem: Exception) -> NoReturn:
    """End this process, whose connection to another rank broke, with a line that says which rank is missing.

    If none is missing, because only the connection broke or was never made, the line names ``problem``.
    """
    watch = _watch
    what, advice = "a connection between ranks broke although all are alive", "start again"
    if watch is None:
        what = "the ranks did not find each other"
        advice = "check MASTER_ADDR, MASTER_PORT and GLOO_SOCKET_IFNAME (launch/doctor.py looks at them), start again"
    elif not watch.done.is_set():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        watch.trouble.set()
        # Meanwhile one of the two threads ends this process.
        started = time.monotonic()
        _in_time(lambda: watch.main_store.set("trouble", str(dist.rank())), WAIT_FOR_RANKS)
        time.sleep(max(0, started + WAIT_FOR_RANKS + 2 * BEATS_TO_MISS * watch.period - time.monotonic()))
    if end_others(EXIT_LOST):
        rank = dist.rank() if watch else os.environ.get("RANK", "0")
        print(f"error: rank {rank}: {what}: {one_line(problem)}; {advice}", file=sys.stderr)
        sys.stderr.flush()
    os._exit(EXIT_LOST)


def finish(code: int = 0) -> None:
    """End a run that went well: wait for all ranks, then leave the process group.

    code: the exit code of this process, also if another rank is lost from here on, when everything is done.
    """
    dist.barrier()  # up to here a rank that fails ends this one
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
    """Do some work with the store, which may have gone with rank 0 or may never answer."""

    def attempt() -> None:
        with contextlib.suppress(RuntimeError):
            work()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)


def _wait_until_left(store: Any, num_left: int) -> None:
    deadline = time.monotonic() + WAIT_FOR_RANKS
    while store.add("left", 0) < num_left and time.monotonic() < deadline:
        time.sleep(0.05)
