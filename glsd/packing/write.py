"""Tar shards as they are written: the samples in their order, an index beside each shard, nothing visible until all is done."""

import glob
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import chain
from pathlib import Path

from webdataset import TarWriter

from glsd.errors import UserError, one_line
from glsd.files import flush, locked, sync
from glsd.shards.find import SOURCES_SUFFIX
from glsd.shards.index import (
    BLOCK,
    build_index,
    index_path,
    write_index,
)
from glsd.shards.store import CLASSES_FILE

SAMPLE_OVERHEAD = 4 * BLOCK  # image header, padding of the image, label header, label
LOCK_FILE = ".packing.lock"
JOURNAL_FILE = "journal.jsonl"  # in the hidden folder of a packing that can go on after it was interrupted

Sample = tuple[bytes, str, int | None]  # bytes of the image file, its extension, its label


def fill_shards(
    samples: Iterable[Sample],
    folder: Path,
    prefix: str,
    shard_megabytes: int,
    *,
    first_shard: int = 0,
    first_key: int = 0,
) -> Iterator[tuple[str, int]]:
    """Write the samples into ``{prefix}-{000000}.tar``; yield the name and the size of each shard once it is safe on disk.

    A shard ends before the sample that would make it larger than ``shard_megabytes``, which has been taken from
    ``samples`` by then. Raises UserError for a shard size below 1; OSError is for ``staging`` to name.
    """
    if shard_megabytes < 1:
        raise UserError(f"shard_megabytes is {shard_megabytes}: expected at least 1")
    limit, number, key = shard_megabytes * 2**20, first_shard, first_key
    rows = iter(samples)
    sample = next(rows, None)
    while sample is not None:
        path = folder / shard_name(prefix, number)
        before, size = key, 0
        with open(path, "wb") as file:
            with TarWriter(file, encoder=False, mtime=0) as tar:
                while sample is not None and (not size or size + len(sample[0]) <= limit):
                    raw, extension, label = sample
                    members = {extension: raw} if label is None else {extension: raw, "cls": b"%d" % label}
                    tar.write({"__key__": sample_key(key), **members})
                    size += len(raw) + SAMPLE_OVERHEAD
                    key += 1
                    sample = next(rows, None)
            flush(file)
        # It also makes the shard's name in the folder durable.
        write_index(build_index(path), index_path(path), shard_name=path.name)
        yield path.name, key - before
        number += 1


def write_shards(
    samples: Iterable[Sample],
    work: Path,
    prefix: str,
    shard_megabytes: int,
    *,
    source: str,
    sources: Sequence[str] = (),
) -> tuple[list[str], int]:
    """Write shards, their indices and the table of ``sources``; return the shards' names and the number of samples.

    ``sources`` is read at the end, so that ``samples`` may fill it. Raises UserError if there is no sample, naming
    ``source``; OSError is for ``staging`` to name.
    """
    shards = list(fill_shards(samples, work, prefix, shard_megabytes))
    if not shards:
        raise UserError(f"no usable image in {source}: nothing was packed")
    if sources:
        rows = (table_row(sample_key(number), path) for number, path in enumerate(sources))
        (work / f"{prefix}{SOURCES_SUFFIX}").write_bytes(b"".join(chain([table_row("key", "file")], rows)))
    return [name for name, _ in shards], sum(count for _, count in shards)


def shard_name(prefix: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{prefix}-{number:06d}.tar"


def sample_key(number: int) -> str:
    """Return the name of a sample inside its shard."""
    return f"{number:08d}"


def table_row(*cells: str) -> bytes:
    r"""Return a line of a table of sources: tabs between the cells; a tab, line end or backslash inside one as \t, \n, \r, \\."""
    return ("\t".join(map(_escaped, cells)) + "\n").encode("utf-8", "surrogateescape")


def _escaped(cell: str) -> str:
    for character, escape in (("\\", r"\\"), ("\t", r"\t"), ("\n", r"\n"), ("\r", r"\r")):
        cell = cell.replace(character, escape)
    return cell


def write_classes(work: Path, classes: Sequence[str]) -> None:
    """Write classes.json, unless there are none."""
    if classes:
        (work / CLASSES_FILE).write_text(json.dumps(list(classes), indent=1) + "\n")


@contextmanager
def staging(dst: Path, prefixes: Sequence[str]) -> Iterator[Path]:
    """Give a hidden folder inside ``dst`` whose files are moved up at the end: half a packing never looks whole.

    What an interrupted packing of the same kind left there is removed first. Raises UserError if ``dst`` cannot be
    written, has shards of one of the prefixes or an unfinished packing that can go on, or another process packs there.
    """
    with work_folder(dst, prefixes) as work:
        if (work / JOURNAL_FILE).exists():
            raise UserError(
                f"{work} holds an unfinished packing: finish it with the command that began it, or delete the folder"
            )
        shutil.rmtree(work, ignore_errors=True)
        refuse_shards(dst, prefixes)
        work.mkdir()
        try:
            yield work
            publish(work, dst)
        finally:
            shutil.rmtree(work, ignore_errors=True)


@contextmanager
def work_folder(dst: Path, prefixes: Sequence[str]) -> Iterator[Path]:
    """Make ``dst`` and hold it against other processes; give the path of the hidden folder for ``prefixes``, not yet made.

    An OSError inside becomes a UserError that names ``dst``.
    """
    for prefix in prefixes:
        if not prefix or "/" in prefix or prefix.startswith("."):
            raise UserError(f"prefix {prefix!r}: expected the beginning of a file name, such as train")
    try:
        dst.mkdir(parents=True, exist_ok=True)
        with _alone(dst):
            yield dst / f".{prefixes[0]}.packing"
    except OSError as error:
        reason = "it is not a folder" if os.path.exists(dst) and not os.path.isdir(dst) else one_line(error)
        raise UserError(f"cannot write to {dst}: {reason}") from error


@contextmanager
def _alone(dst: Path) -> Iterator[None]:
    """Hold the folder's lock within the block; UserError if another process holds it."""
    path = dst / LOCK_FILE
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path, timeout=0.0))
        except TimeoutError as error:
            raise UserError(
                f"another process is packing into {dst}: wait for it, or choose another folder"
            ) from error
        try:
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: the next process makes another file


def refuse_shards(dst: Path, prefixes: Sequence[str], *, ours: Sequence[str] = ()) -> None:
    """Raise UserError if ``dst`` has shards of one of the prefixes, other than ``ours``."""
    for prefix in prefixes:
        old = {path.name for path in dst.glob(f"{glob.escape(prefix)}-[0-9]*.tar")} - set(ours)
        if old:
            raise UserError(f"{dst} already has {min(old)}: choose another prefix or an empty folder")


def publish(work: Path, dst: Path) -> None:
    """Move the files of the hidden folder up, indices first: a shard is there only when its index is."""
    files = [path for path in work.iterdir() if path.name != JOURNAL_FILE]
    for path in sorted(files, key=lambda path: (path.suffix == ".tar", path.name)):
        os.replace(path, dst / path.name)
    sync(dst)
