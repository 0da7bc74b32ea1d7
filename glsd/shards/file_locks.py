"""Files that several processes of one machine fill and remove without getting in each other's way: locks of the kernel (flock).

A lock ends with its process; a note says to those who wait why somebody has failed.
"""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from glsd.errors import UserError
from glsd.shards.remote import TIMEOUT_VARIABLE, patience

FAILED = ".failed"  # suffix of the notes
POLL = 0.05  # seconds between two looks at what another process does


def removed_if_abandoned(part: Path) -> bool:
    """Remove a download that nobody is at; tell whether that was so."""
    try:
        with open(part, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # While it is locked: the next one could begin to fill it otherwise.
            if removed := _same(file, part):
                part.unlink()
            return removed
    except (FileNotFoundError, BlockingIOError):
        return False


@contextlib.contextmanager
def noted(part: Path) -> Iterator[None]:
    """Leave a note of why a download failed to those who wait for it."""
    try:
        yield
    except UserError as error:
        note = part.with_suffix(f"{FAILED}.new")
        with contextlib.suppress(OSError):
            note.write_text(str(error))
            os.replace(note, part.with_suffix(FAILED))
        raise


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Keep all other processes and threads out; UserError if one of them stays in for longer than ``patience()``."""
    started = time.monotonic()
    with open(path, "ab") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - started > patience():
                    raise UserError(f"{path} is locked by another process: end that one") from None
                time.sleep(POLL)
        try:
            yield
        finally:
            fcntl.flock(lock, fcntl.LOCK_UN)  # a process that was forked meanwhile has the file open, too


@contextlib.contextmanager
def locked(part: Path, address: str, *, wait: bool, unless: Path) -> Iterator[BinaryIO | None]:
    """Give the file ``part``, locked by us, or None: as soon as ``unless`` exists, or it is locked and ``wait`` is False.

    The lock goes with the file, also when it is renamed, and with the process when that dies.
    """
    inode, blocks, last_progress, began = -1, 0, time.monotonic(), time.time()
    failed = part.with_suffix(FAILED)
    while True:
        with contextlib.suppress(FileNotFoundError):
            if wait and failed.stat().st_mtime > began:
                raise UserError(failed.read_text())  # it has failed for us too
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                pass
            else:
                # Renamed or removed by the one that had the lock: then this is no longer the file of that name.
                if _same(file, part):
                    try:
                        yield file
                    finally:
                        fcntl.flock(file, fcntl.LOCK_UN)
                    return
                continue
            status = os.fstat(file.fileno())
        if unless.exists() or not wait:
            yield None
            return
        # Bytes that arrive are progress; another process that starts from nothing is not.
        if status.st_ino == inode and status.st_blocks > blocks:
            last_progress = time.monotonic()
        inode, blocks = status.st_ino, status.st_blocks
        # Who downloads gives up before, and says why.
        if time.monotonic() - last_progress > 2 * patience():
            raise UserError(
                f"cannot read {address}: another process holds {part}, without progress for {2 * patience():.0f} s "
                f"({TIMEOUT_VARIABLE}): end that process"
            )
        time.sleep(POLL)


def _same(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
