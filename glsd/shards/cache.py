"""Local copies of remote shards: as many as fit; the least recently used copy is removed first.

Any number of processes of one machine share the folder, which belongs on a local disk. A copy appears under its name only
when it is whole and is the shard that its index was made for. A download locks its own part file: the lock follows the file
when it is renamed and ends with its process, so the next process takes over or removes what a crash left.
"""

import contextlib
import errno
import hashlib
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from glsd import files
from glsd.errors import UserError, one_line
from glsd.files import expand, flush, replacing, try_lock, unlock
from glsd.shards.index import REBUILD, IndexHeader, marks_digest
from glsd.shards.remote import (
    TIMEOUT_VARIABLE,
    copy_to,
    from_environment,
    identity,
    look_up,
    patience,
    shown,
)

FOLDER_VARIABLE, SIZE_VARIABLE = "GLSD_CACHE", "GLSD_CACHE_GB"
DEFAULT_GIGABYTES = 100.0
WHOLE, PART = ".shard", ".part"
FAILED = ".failed"  # why a download failed, for the processes that wait for it
OURS = re.compile(rf"[0-9a-f]{{32}}({WHOLE}|{PART})".replace(".", r"\."))
TOUCH_EVERY = 10.0  # seconds between two updates of a copy's time of use
POLL = 0.05  # seconds between two looks at another process's download


def cache_folder(kind: str) -> Path:
    """Return the folder of one kind of cached files: below ``$GLSD_CACHE``, or ``~/.cache/glsd``.

    Raises UserError if the user has neither.
    """
    if named := os.environ.get(FOLDER_VARIABLE):
        return Path(expand(named)) / kind
    try:
        return Path.home() / ".cache" / "glsd" / kind
    except RuntimeError as problem:
        raise UserError(
            f"this user has no home folder for indices and copies of shards: set {FOLDER_VARIABLE} to a folder"
        ) from problem


def cache_bytes() -> int:
    """Return the largest size of all copies together: ``$GLSD_CACHE_GB`` (10^9 bytes), 100 by default."""
    return int(from_environment(SIZE_VARIABLE, DEFAULT_GIGABYTES, "gigabytes") * 1e9)


class ShardCache:
    """The copies in one folder, at most ``max_bytes`` together with running downloads."""

    def __init__(self, folder: Path, *, max_bytes: int):
        self.folder = folder
        self.max_bytes = max_bytes
        self._touched: dict[Path, float] = {}

    def read(self, address: str, header: IndexHeader, offset: int, size: int) -> bytes:
        """Return bytes of a shard, after a download if there is no copy or it is truncated.

        Raises UserError as ``fetch`` does.
        """
        path = self._path(address, header)
        damaged = False
        while True:
            try:
                # Opened for each read: an open file keeps its disk space after it is removed.
                with open(path, "rb", buffering=0) as file:
                    raw = os.pread(file.fileno(), size, offset)
            except FileNotFoundError:
                self.fetch(address, header)
                continue
            except OSError as error:
                raise _cannot_use(path, error) from error
            if len(raw) == size:
                self._touch(path, every=TOUCH_EVERY)
                return raw
            if damaged:
                raise UserError(f"shard {shown(address)} ends before byte {offset + size}: restore it")
            damaged = True
            path.unlink(missing_ok=True)

    def fetch(self, address: str, header: IndexHeader, *, wait: bool = True) -> None:
        """Download a shard unless its copy exists, and mark the copy as used.

        Without ``wait`` nothing happens where another process downloads it or the cache is full. Raises UserError when the
        server cannot be read or has another file than the index says, the shard is larger than the cache, the disk is full,
        or another process's download makes no progress for ``patience()`` seconds.
        """
        path = self._path(address, header)
        part = path.with_suffix(PART)
        if path.exists():
            self._touch(path)
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with _locked_part(part, shown(address), wait=wait, unless=path) as file:
                if file is not None and path.exists():
                    part.unlink()  # created here while another process finished its download
                elif file is not None and self._download(address, header, file, part, wait=wait):
                    os.replace(part, path)
                    part.with_suffix(FAILED).unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_use(part, error) from error

    def check_room(self, needed: int, what: str) -> None:
        """Raise UserError if ``needed`` bytes do not fit at the same time; what: their owner, for the message."""
        if needed > self.max_bytes:
            raise UserError(
                f"{SIZE_VARIABLE} allows {self.max_bytes / 1e9:.3g} GB of copies of remote shards but {what} take "
                f"{needed / 1e9:.3g} GB: they would be downloaded again and again; raise {SIZE_VARIABLE}"
            )

    def _download(self, address: str, header: IndexHeader, file: BinaryIO, part: Path, *, wait: bool) -> bool:
        """Download a shard into ``file`` and return True; False if there is no room and ``wait`` is False."""
        done = False
        try:
            with _noted(part):
                (found,) = look_up([address])
                if found is None:
                    raise UserError(
                        f"cannot read {shown(address)}: HTTP status 404, it was removed: restore it"
                    )
                check_size(address, found.size, header)
            if self._make_room(file, header.shard_bytes, wait=wait):
                with _noted(part):
                    copy_to(file, address, header.shard_bytes)
                    flush(file)
                    check_digest(address, part, header)
                done = True
        finally:
            if not done:
                part.unlink(missing_ok=True)  # it takes up room, and its bytes are not to be used
        return done

    def _make_room(self, file: BinaryIO, size: int, *, wait: bool) -> bool:
        """Give ``file`` its full size, which other processes count, after removing the least recently used copies."""
        if size > self.max_bytes:
            raise UserError(
                f"a shard of {size / 1e9:.3g} GB does not fit into {self.folder}: raise {SIZE_VARIABLE} "
                f"({self.max_bytes / 1e9:.3g})"
            )
        seen, last_change = None, time.monotonic()
        while True:
            with _folder_locked(self.folder / ".lock"):
                os.ftruncate(file.fileno(), 0)
                if self._free(size) >= size:
                    os.ftruncate(file.fileno(), size)
                    return True
                downloads = [(e.path, e.stat.st_blocks) for e in self._entries() if e.path.suffix == PART]
            if not wait:
                return False
            if downloads != seen:
                seen, last_change = downloads, time.monotonic()
            if time.monotonic() - last_change > patience():
                raise UserError(
                    f"no room in {self.folder} for a shard of {size / 1e9:.3g} GB beside running downloads, which make no "
                    f"progress: raise {SIZE_VARIABLE} ({self.max_bytes / 1e9:.3g})"
                )
            time.sleep(POLL)

    def _free(self, wanted: int) -> int:
        """Return the free bytes, after removing the least recently used copies until ``wanted`` are free."""
        entries = sorted(self._entries(), key=lambda entry: entry.stat.st_mtime)
        free = self.max_bytes - sum(entry.stat.st_size for entry in entries)
        for entry in entries:
            if free >= wanted:
                break
            if entry.path.suffix == WHOLE:
                entry.path.unlink(missing_ok=True)
                free += entry.stat.st_size
            elif _removed_if_abandoned(entry.path):
                free += entry.stat.st_size
        return free

    def _entries(self) -> Iterator["_Entry"]:
        """Yield the cache's files; a user may keep others in the same folder."""
        for entry in os.scandir(self.folder):
            if OURS.fullmatch(entry.name):
                with contextlib.suppress(FileNotFoundError):
                    yield _Entry(Path(entry.path), os.stat(entry.path))

    def _path(self, address: str, header: IndexHeader) -> Path:
        # The content is part of the name: a shard replaced on the server gets another copy.
        content = f"{identity(address)}\0{header.shard_bytes}\0{header.digest}"
        return self.folder / f"{hashlib.sha256(content.encode()).hexdigest()[:32]}{WHOLE}"

    def _touch(self, path: Path, *, every: float = 0.0) -> None:
        now = time.monotonic()
        if now - self._touched.get(path, -every) >= every:
            self._touched[path] = now
            with contextlib.suppress(OSError):  # it was removed, or belongs to another user
                os.utime(path)


class _Entry(NamedTuple):
    path: Path
    stat: os.stat_result


def check_size(address: str, size: int, header: IndexHeader) -> None:
    """Raise UserError unless a shard has the size in its index."""
    if size != header.shard_bytes:
        raise UserError(
            f"shard {shown(address)} has {size} bytes but {header.shard_bytes} in its index {header.path}: it is truncated "
            f"or was replaced; restore it, or {REBUILD}"
        )


def check_digest(address: str, path: str | Path, header: IndexHeader) -> None:
    """Raise UserError unless the file at ``path`` is the shard that the index was made for."""
    if marks_digest(path, header.marks) != header.digest:
        raise UserError(
            f"shard {shown(address)} is not the one that its index {header.path} was made for: restore it, or {REBUILD}"
        )


def _cannot_use(path: Path, error: OSError) -> UserError:
    hint = f"lower {SIZE_VARIABLE}, or " if error.errno == errno.ENOSPC else ""
    return UserError(
        f"cannot use the shard cache: {path}: {one_line(error)}: {hint}name another folder in {FOLDER_VARIABLE}"
    )


def _removed_if_abandoned(part: Path) -> bool:
    """Remove a part file whose download was killed; tell whether that was so."""
    try:
        with open(part, "r+b") as file:
            # Removed while it is locked: otherwise the next process could begin to fill it.
            if removed := try_lock(file) and _same(file, part):
                part.unlink()
            return removed
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def _noted(part: Path) -> Iterator[None]:
    """Write down why a download fails, for the processes that wait for it."""
    try:
        yield
    except UserError as error:
        with contextlib.suppress(OSError), replacing(part.with_suffix(FAILED)) as note:
            note.write(str(error).encode())
        raise


@contextlib.contextmanager
def _folder_locked(path: Path) -> Iterator[None]:
    """Hold a lock within the block; UserError if another process holds it longer than ``patience()``."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(path, timeout=patience()))
        except TimeoutError as error:
            raise UserError(f"{path} is locked by another process: end that process") from error
        yield


@contextlib.contextmanager
def _locked_part(part: Path, address: str, *, wait: bool, unless: Path) -> Iterator[BinaryIO | None]:
    """Yield the open and locked file ``part``, or None if another process holds it.

    With ``wait``, None comes only once ``unless`` exists: the other process has finished the download.
    """
    inode, blocks, last_progress, began = -1, 0, time.monotonic(), time.time()
    failed = part.with_suffix(FAILED)
    while True:
        with contextlib.suppress(FileNotFoundError):
            if wait and failed.stat().st_mtime > began:
                raise UserError(failed.read_text())  # the other process's download
        with os.fdopen(os.open(part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644), "r+b") as file:
            if try_lock(file):
                # The process that held the lock may have renamed or removed this file.
                if _same(file, part):
                    try:
                        yield file
                    finally:
                        unlock(file)
                    return
                continue
            status = os.fstat(file.fileno())
        if unless.exists() or not wait:
            yield None
            return
        # Arriving bytes are progress; another process that starts again is not.
        if status.st_ino == inode and status.st_blocks > blocks:
            last_progress = time.monotonic()
        inode, blocks = status.st_ino, status.st_blocks
        # The downloading process fails earlier, and writes down why.
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
