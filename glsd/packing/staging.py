"""The hidden folder in which shards are written, and the journal from which the same command resumes after a kill.

The first line of the journal holds the settings. A line follows for every shard, once it is safe on disk, and for the end
of every prefix. Files that the journal does not name belong to an unfinished shard.
"""

import glob
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glsd.errors import UserError, one_line
from glsd.files import flush, locked, sync
from glsd.shards.find import SOURCES_SUFFIX
from glsd.shards.index import index_path
from glsd.shards.labels import CLASSES_FILE

VERSION = 2
JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = ".packing.lock"
LOCK_SECONDS = 3.0  # worker processes of a killed packing hold its lock until they end, two seconds later


@dataclass(kw_only=True)
class Progress:
    """The finished shards of one prefix."""

    shards: list[str] = field(default_factory=list)  # file names
    num_images: int = 0
    next_place: int = 0  # in the reading order: the first image behind the last shard
    table_bytes: int = 0  # length of the table of source files
    num_resized: int = 0
    unreadable: list[tuple[int, str]] = field(default_factory=list)  # image number and reason
    is_complete: bool = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Add a line of the journal."""
        if "shard" in line:
            self.shards.append(str(line["shard"]))
            self.num_images += int(line["images"])
            self.next_place, self.table_bytes = int(line["next"]), int(line["table_bytes"])
            self.num_resized += int(line["resized"])
        self.is_complete = "shard" not in line
        self.unreadable += [(int(number), str(reason)) for number, reason in line["unreadable"]]


class Staging:
    """A packing in its hidden folder."""

    def __init__(self, folder: Path, prefixes: Sequence[str], settings: Mapping[str, Any] | None):
        self.folder = folder
        self.progress = {prefix: Progress() for prefix in prefixes}
        self._settings = None if settings is None else {"version": VERSION, **settings}
        self._journal_bytes = 0

    @property
    def shards(self) -> list[str]:
        """The finished shards of all prefixes."""
        return [name for done in self.progress.values() for name in done.shards]

    @property
    def is_complete(self) -> bool:
        """Whether every prefix is complete."""
        return all(done.is_complete for done in self.progress.values())

    @property
    def can_resume(self) -> bool:
        """Whether the same command could go on after the finished shards."""
        return self._settings is not None and bool(self.shards)

    def note(self, prefix: str, **line: Any) -> None:
        """Add a shard, or the end of a prefix, to the journal. Its files must be safe on disk."""
        if self._settings is not None:
            self._journal_bytes = append(self.folder / JOURNAL_FILE, _json_line({"prefix": prefix, **line}))
        self.progress[prefix].add(line)

    def begin(self, classes: Sequence[str]) -> None:
        """Make the folder, with ``classes.json`` unless there are no classes, and the journal."""
        self.folder.mkdir()
        if classes:
            append(self.folder / CLASSES_FILE, f"{json.dumps(list(classes), indent=1)}\n".encode())
        if self._settings is not None:
            self._journal_bytes = append(self.folder / JOURNAL_FILE, _json_line(self._settings))
        sync(self.folder)

    def recover(self) -> bool:
        """Read the journal of an interrupted packing and sweep its folder; tell whether there is one."""
        journal = self.folder / JOURNAL_FILE
        raw = journal.read_bytes() if journal.is_file() else b""
        lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)  # a kill may cut the last one
        if not lines:
            self.remove()
            return False
        if self._settings is None:
            raise UserError(
                f"{self.folder} holds an unfinished packing: finish it with the command that began it, or delete the "
                "folder"
            )
        try:
            begun, *rest = map(json.loads, lines)
            self._check_settings(dict(begun))
            for line in rest:
                self.progress[line["prefix"]].add(line)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{journal} is damaged ({error!r}): delete {self.folder} and start again"
            ) from error
        self._journal_bytes = sum(map(len, lines))
        if not self.is_complete:  # otherwise some files are published already
            missing = [name for name in self.shards if not (self.folder / name).is_file()]
            if missing:
                raise UserError(
                    f"{self.folder} lacks {missing[0]}, which its journal calls finished: delete the folder and start again"
                )
            self.sweep()
        return True

    def _check_settings(self, begun: dict[str, Any]) -> None:
        now = self._settings or {}
        changed = [name for name in {**begun, **now} if begun.get(name) != now.get(name)]
        if not changed:
            return
        name = changed[0]
        was = f"with {name} {begun.get(name)!r}, now {now.get(name)!r}"
        if name == "images":
            was = "of other images, labels or classes"
        raise UserError(
            f"{self.folder} holds an unfinished packing {was}: to finish it, give the same command as then; to start "
            "anew, delete that folder"
        )

    def sweep(self) -> None:
        """Remove everything that is not part of a finished shard."""
        lengths = {f"{prefix}{SOURCES_SUFFIX}": done.table_bytes for prefix, done in self.progress.items()}
        lengths[JOURNAL_FILE] = self._journal_bytes
        keep = {CLASSES_FILE, *self.shards, *(index_path(name).name for name in self.shards)}
        for path in self.folder.iterdir():
            if path.name in lengths:
                os.truncate(path, lengths[path.name])
            elif path.name not in keep:
                path.unlink()

    def publish(self, dst: Path) -> None:
        """Move the files to ``dst``, the tars last: a shard never lies there without its index."""
        files = [path for path in self.folder.iterdir() if path.name != JOURNAL_FILE]
        for path in sorted(files, key=lambda path: (path.suffix == ".tar", path.name)):
            os.replace(path, dst / path.name)
        sync(dst)

    def remove(self) -> None:
        """Remove the hidden folder."""
        shutil.rmtree(self.folder, ignore_errors=True)


@contextmanager
def staged(
    dst: Path, prefixes: Sequence[str], *, settings: Mapping[str, Any] | None, classes: Sequence[str]
) -> Iterator[Staging]:
    """Stage shards in a hidden folder of ``dst`` and publish them there on success.

    Ended early, the finished shards stay in that folder, and the next call with the same settings resumes after them.
    settings: JSON values that decide which bytes are written; None = nothing stays.
    Raises UserError if ``dst`` cannot be written, is locked by another process, has shards of one of the prefixes, or
    holds an unfinished packing with other settings.
    """
    for prefix in prefixes:
        if not prefix or "/" in prefix or prefix.startswith("."):
            raise UserError(f"prefix {prefix!r}: expected the beginning of a file name, such as train")
    with _writing_to(dst), _locked(dst):
        staging = Staging(dst / f".{prefixes[0]}.packing", prefixes, settings)
        has_begun = staging.recover()
        _refuse_shards(dst, prefixes, ours=staging.shards if staging.is_complete else ())
        try:
            if not has_begun:
                staging.begin(classes)
            yield staging
        except BaseException as error:
            if not staging.can_resume:
                staging.remove()
                raise
            staging.sweep()
            kept = f"finished shards kept: {len(staging.shards)}; the same command resumes after them"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped; {kept}") from error
            if isinstance(error, OSError | UserError):
                raise UserError(f"{_message(error, dst)} ({kept})") from error
            raise
        staging.publish(dst)
        staging.remove()


@contextmanager
def _writing_to(dst: Path) -> Iterator[None]:
    """Make ``dst``; turn an OSError within the block into a UserError that names it."""
    try:
        dst.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        raise UserError(_message(error, dst)) from error


def _message(error: OSError | UserError, dst: Path) -> str:
    if isinstance(error, UserError):
        return str(error)
    is_no_folder = os.path.exists(dst) and not os.path.isdir(dst)
    return f"cannot write to {dst}: {'it is not a folder' if is_no_folder else one_line(error)}"


@contextmanager
def _locked(dst: Path) -> Iterator[None]:
    """Lock ``dst`` within the block; UserError if another process packs into it."""
    path = dst / LOCK_FILE
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=LOCK_SECONDS))
        except TimeoutError as error:
            raise UserError(
                f"another process is packing into {dst}: wait for it, or choose another folder"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is locked: the next process makes another file


def _refuse_shards(dst: Path, prefixes: Sequence[str], *, ours: Sequence[str]) -> None:
    for prefix in prefixes:
        old = {path.name for path in dst.glob(f"{glob.escape(prefix)}-[0-9]*.tar")} - set(ours)
        if old:
            raise UserError(f"{dst} already has {min(old)}: choose another prefix or an empty folder")


def append(path: Path, data: bytes) -> int:
    """Append to a file, flush it to disk and return its length."""
    with open(path, "ab") as file:
        file.write(data)
        flush(file)
        return file.tell()


def _json_line(values: Mapping[str, Any]) -> bytes:
    return json.dumps(values).encode() + b"\n"
