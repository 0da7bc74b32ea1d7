"""How several ranks end: together after a run that went well, and at once when one of them cannot go on."""

import contextlib
import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

from glsd.runtime import dist

NAME = "glsd_end"  # of the ranks' notes
WATCH_EVERY = 0.5  # seconds between two looks whether another rank has ended the run
WAIT_FOR_OTHERS = 10.0  # seconds

_done = threading.Event()  # this process needs no watching any more
_watching: list[threading.Thread] = []
_ending = threading.Lock()  # held by the thread that ends this process


def watch_others() -> None:
    """From now on end this process, quietly, soon after another rank has said ``end_others``; until ``finish``.

    A rank that stops on its own leaves the others in a collective that nobody answers, for half an hour by default.
    """
    if dist.world_size() > 1:
        _done.clear()
        thread = threading.Thread(
            target=_end_with_others, args=(dist.notes(NAME),), daemon=True, name="watch_others"
        )
        thread.start()
        _watching.append(thread)


def end_others(code: int) -> bool:
    """Have all ranks end with this exit code; return True where this rank should say why: the first one to call.

    It returns when the others have ended, or after a few seconds; on another rank it does not return, the process ends
    with the code of the first. A launcher that wants this rank to end, because others have, must wait: SIGTERM is ignored.
    """
    if dist.world_size() == 1 or _done.is_set():
        return True
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not _ending.acquire(blocking=False):
        time.sleep(WAIT_FOR_OTHERS)  # the watching thread ends this process
        return False
    _stop_watching()
    notes = dist.notes(NAME)
    with contextlib.suppress(RuntimeError):  # the notes went with the rank that kept them
        mine = f"{dist.rank()} {code}".encode()
        if notes.compare_set("end", "", mine.decode()) != mine:
            _leave(notes)
        # Rank 0 may keep the notes: it goes when nobody needs them any more.
        _wait(notes, dist.world_size() - (1 if dist.is_main() else 2))
        notes.add("left", 1)
    return True


def _stop_watching() -> None:
    """Come back when the thread no longer uses the notes: it would abort the process if they went in the meantime."""
    _done.set()
    while _watching:
        _watching.pop().join(WAIT_FOR_OTHERS)


def _end_with_others(notes: Any) -> None:
    with contextlib.suppress(RuntimeError):
        while not _done.wait(WATCH_EVERY):
            if notes.check(["end"]) and _ending.acquire(blocking=False):
                _leave(notes)


def _leave(notes: Any) -> NoReturn:
    code = int(notes.get("end").split()[1])
    sys.stdout.flush()
    sys.stderr.flush()
    notes.add("left", 1)
    if dist.is_main():
        _wait(notes, dist.world_size())
    os._exit(code)  # the main thread may wait for ever in a collective


def _wait(notes: Any, num_left: int) -> None:
    deadline = time.monotonic() + WAIT_FOR_OTHERS
    while notes.add("left", 0) < num_left and time.monotonic() < deadline:
        time.sleep(0.05)


def finish() -> None:
    """End a run that went well: wait for all ranks, then leave the process group."""
    dist.barrier()  # until here another rank may fail, and have this one end
    _stop_watching()
    dist.leave()
