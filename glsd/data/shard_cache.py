"""Copies of remote shards on this machine: as many as fit, the least recently used one goes first.

Any number of processes share one folder. A copy is there only when it is whole and is the shard that its index was made
for; what a crash leaves half-way is taken over or swept away by the next one. Every lock is the kernel's (flock), so none
outlives its process: the folder belongs on a local disk.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from glsd.contracts import UserError
from glsd.data.remote import TIMEOUT_VARIABLE, copy_to, look_up, patience, shown
from glsd.data.shard_index import IndexHeader, marks_digest

FOLDER_VARIABLE, SIZE_VARIABLE = "GLSD_CACHE", "GLSD_CACHE_GB"
DEFAULT_GIGABYTES = 100.0
WHOLE, PART, FAILED = ".tar", ".part", ".failed"
TOUCH_EVERY = 10.0  # seconds between two notes that a copy is in use
POLL = 0.05  # seconds between two looks at a download of another process


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cached files below ``$GLSD_CACHE``, by default ``~/.cache/glsd``."""
    return Path(os.environ.get(FOLDER_VARIABLE) or Path.home() / ".cache" / "glsd") / kind


def cache_bytes() -> int:
    """Return how much all copies may take: ``$GLSD_CACHE_GB`` (10^9 bytes), by default 100."""
    raw = os.environ.get(SIZE_VARIABLE) or DEFAULT_GIGABYTES
    try:
        gigabytes = float(raw)
    except ValueError:
        gigabytes = 0.0
    if not 0 < gigabytes < float("inf"):
        raise UserError(f"{SIZE_VARIABLE} is {raw!r}: expected gigabytes above 0")
    return int(gigabytes * 1e9)


class ShardCache:
    """The copies in one folder, never more than ``max_bytes`` of them together with what is being downloaded."""

    def __init__(self, folder: Path, *, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self._touched: dict[Path, float] = {}

    def read(self, address: str, header: IndexHeader, offset: int, size: int) -> bytes:
        """Return bytes of a shard, downloaded first if need be; UserError if it cannot be had or ends too early."""
        path = self._path(address, header)
        while True:
            try:
                # Opened for each read: a file that was removed meanwhile would go on taking its room otherwise.
                with open(path, "rb", buffering=0) as file:
                    raw = os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                self.fetch(address, header)
                continue
            except OSError as error:
                raise _cannot_use(path, error) from error
            self._touch(path)
            return raw

    def fetch(self, address: str, header: IndexHeader, *, wait: bool = True) -> None:
        """Make sure that a shard is here; with ``wait`` False leave one alone that another process is downloading.

        Raises UserError when the server cannot be read, has another file than the index says, the shard is larger than
        the cache, the disk is full, or another process has downloaded nothing for ``patience()`` seconds.
        """
        path = self._path(address, header)
        part = path.with_suffix(PART)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked(part, shown(address), wait=wait, unless=path) as file:
                if file is not None and path.exists():
                    part.unlink()  # made by us while another process finished
                elif file is not None:
                    self._download(address, header, file, part)
                    os.replace(part, path)
                    part.with_suffix(FAILED).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_use(part, error) from error

    def check_room(self, needed: int, what: str) -> None:
        """Raise UserError if ``needed`` bytes at a time do not fit; ``what``: what needs them."""
        if needed > self.max_bytes:
            raise UserError(
                f"{SIZE_VARIABLE} allows {self.max_bytes / 1e9:.3g} GB of copies of remote shards but {what} take "
                f"{needed / 1e9:.3g} GB: every one would be downloaded again and again; raise {SIZE_VARIABLE}"
            )

    def _download(self, address: str, header: IndexHeader, file: BinaryIO, part: Path) -> None:
        try:
            (found,) = look_up([address])
            if found is None:
                raise UserError(
                    f"cannot read {shown(address)}: HTTP status 404, it is no longer there: restore it"
                )
            check_size(address, found.size, header)
            self._make_room(file, header.shard_bytes)
            copy_to(file, address, header.shard_bytes)
            file.flush()
            os.fsync(file.fileno())
            check_digest(address, part, header)
        except BaseException as error:
            if isinstance(error, UserError):  # those who wait for this file read it
                note = part.with_suffix(f"{FAILED}.new")
                note.write_text(str(error))
                os.replace(note, part.with_suffix(FAILED))
            part.unlink(missing_ok=True)  # it holds room; bytes that were refused are of no use
            raise

    def _make_room(self, file: BinaryIO, size: int) -> None:
        """Give ``file`` its full size, so that others count it, after removing what was not used for longest."""
        with open(self.folder / ".lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            os.ftruncate(file.fileno(), 0)
            others = sorted(self._entries(), key=lambda entry: entry[1])
            free = self.max_bytes - sum(bytes for _, _, bytes in others)
            for path, _, bytes in others:
                if free >= size:
                    break
                if path.suffix == WHOLE or _abandoned(path):
                    path.unlink(missing_ok=True)
                    free += bytes
            if free < size:
                raise UserError(
                    f"a shard of {size / 1e9:.3g} GB does not fit into {self.folder} beside what is being downloaded: "
                    f"raise {SIZE_VARIABLE} ({self.max_bytes / 1e9:.3g})"
                )
            os.ftruncate(file.fileno(), size)

    def _entries(self) -> Iterator[tuple[Path, float, int]]:
        for entry in os.scandir(self.folder):
            if entry.name.endswith((WHOLE, PART)):
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat()
                    yield Path(entry.path), status.st_mtime, status.st_size

    def _path(self, address: str, header: IndexHeader) -> Path:
        # The content is part of the name: what was replaced on the server is another file here.
        name = hashlib.sha256(f"{address}\0{header.shard_bytes}\0{header.digest}".encode()).hexdigest()[:32]
        return self.folder / f"{name}{WHOLE}"

    def _touch(self, path: Path) -> None:
        now = time.monotonic()
        if now - self._touched.get(path, -TOUCH_EVERY) >= TOUCH_EVERY:
            self._touched[path] = now
            with contextlib.suppress(FileNotFoundError):
                os.utime(path)


def check_size(address: str, size: int, header: IndexHeader) -> None:
    """Raise UserError unless a shard has the size that its index says."""
    if size != header.shard_bytes:
        raise UserError(
            f"shard {shown(address)} has {size} bytes but {header.shard_bytes} by its index {header.path}: it is truncated "
            "or was replaced; restore it, or write its index again with: python launch/pack.py index"
        )


def check_digest(address: str, path: str | Path, header: IndexHeader) -> None:
    """Raise UserError unless the file at ``path`` is the shard that the index was made for."""
    if marks_digest(path, header.marks) != header.digest:
        raise UserError(
            f"shard {shown(address)} is not the one that its index {header.path} was made for: restore it, or write its "
            "index again with: python launch/pack.py index"
        )


def _cannot_use(path: Path, error: OSError) -> UserError:
    hint = f"lower {SIZE_VARIABLE}, or " if error.errno == errno.ENOSPC else ""
    return UserError(
        f"cannot use the shard cache: {path}: {error.strerror or error}: {hint}name another folder in {FOLDER_VARIABLE}"
    )


def _abandoned(part: Path) -> bool:
    """Tell whether nobody is downloading into a file."""
    try:
        with open(part, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return True
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def _locked(part: Path, address: str, *, wait: bool, unless: Path) -> Iterator[BinaryIO | None]:
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
                    yield file
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
