"""A packing that goes on where it was killed: finished shards wait in the hidden folder, a journal says what they hold.

The journal's first line tells what is packed and how; then follows a line for every finished shard, written when the shard
is safe on disk, and one at the end. What is in the folder beyond that is of a shard that was not finished.
"""

import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from glsd.errors import UserError, one_line
from glsd.files import flush, sync
from glsd.packing.source import Loaded
from glsd.packing.write import (
    JOURNAL_FILE,
    Sample,
    fill_shards,
    publish,
    refuse_shards,
    sample_key,
    table_row,
    work_folder,
)
from glsd.shards.find import SOURCES_SUFFIX
from glsd.shards.index import index_path

VERSION = 1


@dataclass(kw_only=True)
class Progress:
    """What the finished shards hold."""

    shards: list[str] = field(default_factory=list)
    num_images: int = 0
    next: int = 0  # place in the reading order of the first image that is not in them
    table_bytes: int = 0  # length of the table of sources
    resized: int = 0
    unreadable: list[tuple[str, str]] = field(default_factory=list)  # name and reason
    complete: bool = False

    def add(self, line: Mapping[str, Any]) -> None:
        """Take a line of the journal into account."""
        if "shard" in line:
            self.shards.append(str(line["shard"]))
            self.num_images += int(line["images"])
            self.next, self.table_bytes = int(line["next"]), int(line["table_bytes"])
            self.resized += int(line["resized"])
        self.complete = self.complete or "complete" in line
        self.unreadable += [(str(name), str(reason)) for name, reason in line["unreadable"]]


class _Taken(NamedTuple):
    """A sample that was given to the writer."""

    place: int  # in the reading order
    name: str
    was: str


class Packing:
    """A packing at work in its hidden folder."""

    def __init__(self, work: Path, prefix: str, progress: Progress):
        self.work, self.prefix, self.progress = work, prefix, progress

    def write(
        self,
        images: Iterable[Loaded],
        names: Sequence[str],
        labels: Sequence[int] | None,
        megabytes: int,
        note_sizes: bool,
    ) -> list[tuple[str, str]]:
        """Write the rest of the shards from ``images``, which start at ``progress.next``, and the table of sources.

        ``note_sizes``: give the table a column with the size of what was resized. Returns name and reason of the images
        that were left out behind the last shard, for ``finish``.
        """
        taken: deque[_Taken] = deque()
        left_out: deque[tuple[int, str, str]] = deque()
        done = self.progress

        def samples() -> Iterator[Sample]:
            for place, image in enumerate(images, done.next):
                if image.reason:
                    left_out.append((place, names[image.number], image.reason))
                    continue
                taken.append(_Taken(place, names[image.number], image.was))
                label = labels[image.number] if labels is not None else -1
                yield image.raw, image.extension, label if label >= 0 else None

        head = table_row("key", "file", "resized_from") if note_sizes else table_row("key", "file")
        with open(self.work / f"{self.prefix}{SOURCES_SUFFIX}", "ab") as file:
            file.truncate(done.table_bytes)
            file.write(b"" if done.table_bytes else head)
            shards = fill_shards(
                samples(),
                self.work,
                self.prefix,
                megabytes,
                first_shard=len(done.shards),
                first_key=done.num_images,
            )
            for shard, count in shards:
                rows = [taken.popleft() for _ in range(count)]
                for key, row in enumerate(rows, done.num_images):
                    file.write(table_row(sample_key(key), row.name, *([row.was] if note_sizes else [])))
                flush(file)
                following = rows[-1].place + 1
                gone = []
                while left_out and left_out[0][0] < following:
                    gone.append(left_out.popleft()[1:])
                self._note(
                    shard=shard,
                    images=count,
                    next=following,
                    table_bytes=file.tell(),
                    resized=sum(bool(row.was) for row in rows),
                    unreadable=gone,
                )
        return [(name, reason) for _, name, reason in left_out]

    def finish(self, left_out: Sequence[tuple[str, str]]) -> None:
        """Note that every file of the packing is in the folder."""
        for path in self.work.iterdir():
            if path.suffix == ".json":
                sync(path)
        sync(self.work)
        self._note(complete=True, unreadable=left_out)

    def _note(self, **line: Any) -> None:
        with open(self.work / JOURNAL_FILE, "ab") as file:
            file.write(json.dumps(line).encode() + b"\n")
            flush(file)
        self.progress.add(line)


@contextmanager
def resumable_staging(dst: Path, prefix: str, settings: Mapping[str, Any]) -> Iterator[Packing]:
    """Give the packing of ``prefix`` in a hidden folder of ``dst``, as far as it has come; at the end its files move up.

    ``settings``: what decides the bytes that are written, JSON values. Stopped by an exception, the finished shards stay for
    the next time; without one, nothing stays. Raises UserError as ``staging`` does, and if the folder holds an unfinished
    packing of something else.
    """
    with work_folder(dst, [prefix]) as work:
        progress = _recover(work, {"version": VERSION, **settings})
        if not (work / JOURNAL_FILE).exists():
            shutil.rmtree(work, ignore_errors=True)  # nobody vouches for what is there
        refuse_shards(dst, [prefix], ours=progress.shards if progress.complete else ())
        try:
            if not (work / JOURNAL_FILE).exists():
                work.mkdir()
                _begin(work, {"version": VERSION, **settings})
            yield Packing(work, prefix, progress)
        except BaseException as error:
            if not progress.shards:
                shutil.rmtree(work, ignore_errors=True)
                raise
            _sweep(work, prefix, progress)
            kept = f"{len(progress.shards)} finished shards are kept: the same command goes on after them"
            if isinstance(error, KeyboardInterrupt):
                raise KeyboardInterrupt(f"stopped; {kept}") from error
            if isinstance(error, OSError | UserError):
                raise UserError(f"{_line(error, dst)} ({kept})") from error
            raise
        publish(work, dst)
        shutil.rmtree(work, ignore_errors=True)


def _line(error: OSError | UserError, dst: Path) -> str:
    return str(error) if isinstance(error, UserError) else f"cannot write to {dst}: {one_line(error)}"


def _begin(work: Path, settings: Mapping[str, Any]) -> None:
    with open(work / JOURNAL_FILE, "wb") as file:
        file.write(json.dumps(settings).encode() + b"\n")
        flush(file)
    sync(work)


def _recover(work: Path, settings: Mapping[str, Any]) -> Progress:
    """Read the journal, cut off a line that was not finished, remove what is not of finished shards."""
    progress = Progress()
    journal = work / JOURNAL_FILE
    if not journal.is_file():
        return progress
    whole = journal.read_bytes()
    lines = whole[: whole.rfind(b"\n") + 1].splitlines()
    if not lines:  # killed before anything was said
        journal.unlink()
        return progress
    try:
        begun, rest = json.loads(lines[0]), [json.loads(line) for line in lines[1:]]
        if not isinstance(begun, dict):
            raise TypeError("no object")
        for line in rest:
            progress.add(line)
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{journal} is damaged ({error!r}): delete {work} and start again") from error
    changed = [name for name in {**begun, **settings} if begun.get(name) != settings.get(name)]
    if changed:
        raise UserError(
            f"{work} holds an unfinished packing {_difference(changed[0], begun, settings)}: to finish it, "
            "give the same command as then; to start anew, delete that folder"
        )
    os.truncate(journal, sum(len(line) + 1 for line in lines))
    missing = [name for name in progress.shards if not (work / name).is_file()]
    if missing and not progress.complete:
        raise UserError(
            f"{work} lacks {missing[0]}, which its journal calls finished: delete {work} and start again"
        )
    if not progress.complete:
        _sweep(work, str(settings["prefix"]), progress)
    return progress


def _difference(name: str, begun: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    if name == "images":
        return "whose images, labels or classes were others than now"
    return f"with {name} {begun.get(name)!r}, now {settings.get(name)!r}"


def _sweep(work: Path, prefix: str, progress: Progress) -> None:
    """Remove all files of the hidden folder that are not of finished shards, and the end of the table."""
    table = f"{prefix}{SOURCES_SUFFIX}"
    keep = {JOURNAL_FILE, table, *progress.shards, *(index_path(name).name for name in progress.shards)}
    for path in work.iterdir():
        if path.name not in keep:
            path.unlink()
    if (work / table).exists():
        os.truncate(work / table, progress.table_bytes)
