"""Whether all ranks share the run folder, how much room its disk has, and how fast it writes."""

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glsd.doctor.line import Line, who
from glsd.errors import one_line
from glsd.files import expand, flush, replacing, try_lock

# Within this time a file of another host must be seen: network disks cache that it was missing.
SEE_SECONDS = 20.0
RENAME_SECONDS = 1.0
WRITTEN = 64 << 20  # bytes
LITTLE, NEEDED = 20e9, 2e9  # free bytes: below the first a note, below the second to fix
FEW_INODES = 10_000
SLOW = 50e6  # bytes a second
BLOCK = 1 << 14  # bytes of the file that is replaced
POLL = 0.02


def prepare(out: Path, token: str) -> dict[str, Any]:
    """Make a folder of the doctor's own below ``out`` with a token, on rank 0; return what ``clean`` needs, JSON."""
    folder = out.absolute() / f".doctor-{token}"
    made = [str(path) for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True)
    try:
        replace(folder / "lock", token)
        replace(folder / "turn", "0" * BLOCK)
        replace(folder / "from_0", token)
    except OSError:
        clean(made)
        raise
    return {"folder": str(folder), "made": made}


def clean(made: list[str]) -> None:
    """Remove the folder that ``prepare`` made, and new empty folders above it."""
    shutil.rmtree(made[0], ignore_errors=True)
    for folder in made[1:]:
        with contextlib.suppress(OSError):  # another run uses it by now
            Path(folder).rmdir()


def replace(path: Path, text: str) -> None:
    """Write a text the way a run writes its files: under a temporary name, then renamed."""
    with replacing(path) as file:
        file.write(text.encode())


def see(folder: Path, token: str, rank: int) -> dict[str, Any]:
    """Wait for rank 0's token and write one of this rank; return JSON for ``judge_sharing``."""
    began = time.monotonic()
    said = "not there"
    while time.monotonic() - began < SEE_SECONDS:
        try:
            os.listdir(folder)  # makes a network disk look again
            if (folder / "from_0").read_text() == token:
                break
            said = "has other content"
        except OSError as problem:
            said = one_line(problem)
        time.sleep(POLL)
    else:
        return {"seen": False, "why": said}
    found = {"seen": True, "seconds": time.monotonic() - began, "why": ""}
    try:
        if rank:
            replace(folder / f"from_{rank}", token)
    except OSError as problem:
        found["why"] = f"cannot write there: {one_line(problem)}"
    return found


def seen_back(folder: Path, token: str, ranks: list[int]) -> list[int]:
    """Return the ranks whose token does not appear in time, on rank 0."""
    deadline, missing = time.monotonic() + SEE_SECONDS, set(ranks)
    while missing and time.monotonic() < deadline:
        os.listdir(folder)
        for rank in sorted(missing):
            path = folder / f"from_{rank}"
            if path.exists() and path.read_text() == token:
                missing.remove(rank)
        time.sleep(POLL)
    return sorted(missing)


def turns(folder: Path, rank: int) -> dict[str, Any]:
    """Replace a file again and again on rank 0 while the other ranks read it; return JSON for ``judge_turns``.

    Rank 0 also holds a lock, which the other ranks must not get.
    """
    path, began = folder / "turn", time.monotonic()
    if rank == 0:
        with open(folder / "lock", "r+b") as file:
            held = _locked(file)
            (folder / "held").touch()
            turn = 0
            while time.monotonic() - began < RENAME_SECONDS:
                turn += 1
                replace(path, str(turn % 10) * BLOCK)
            replace(path, "x" * BLOCK)
            # The other ranks try the lock meanwhile.
            time.sleep(RENAME_SECONDS)
        return {"torn": 0, "gone": 0, "last": True, "lock": held, "turns": turn}
    torn, gone, last, lock = 0, 0, False, ""
    while time.monotonic() - began < SEE_SECONDS and not last:
        try:
            text = path.read_text()
        except OSError as problem:
            gone += problem.errno == errno.ENOENT
            continue
        torn += len(text) != BLOCK or len(set(text)) != 1
        last = text[:1] == "x"
        if not lock and (folder / "held").exists():
            with open(folder / "lock", "r+b") as file:
                lock = {"": "none"}.get(tried := _locked(file), tried)
    return {"torn": torn, "gone": gone, "last": last, "lock": lock or "untried"}


def _locked(file: Any) -> str:
    """Try to lock a file: "" if it worked, "held" if another process has the lock, else the error."""
    try:
        return "" if try_lock(file) else "held"
    except OSError as problem:
        return one_line(problem)


def disks(out: str) -> dict[str, Any]:
    """Return the room on the disks of the cache (None without a cache folder) and of the run folder, JSON for ``judge_disks``."""
    cache: Path | None = None
    with contextlib.suppress(
        RuntimeError
    ):  # neither HOME nor an entry of this user among those of the system
        named = os.environ.get("GLSD_CACHE")
        cache = Path(expand(named)) if named else Path.home() / ".cache" / "glsd"
    return {"cache": disk(cache) if cache else None} | ({"out": disk(Path(out))} if out else {})


def disk(folder: Path) -> dict[str, Any]:
    """Return the room on the disk of a folder, or of the nearest folder above it that this user can see, JSON."""
    there, seen = folder.absolute(), True
    while True:
        try:
            os.stat(there)
            break
        except (FileNotFoundError, NotADirectoryError):
            pass
        except PermissionError:
            seen = False
        there = there.parent
    status = os.statvfs(there)
    return {
        "folder": str(folder),
        "free": shutil.disk_usage(there).free,
        "inodes": status.f_favail if status.f_files else -1,  # some file systems do not count them
        "writable": seen and there.is_dir() and os.access(there, os.W_OK | os.X_OK),
    }


def write_speed(folder: Path) -> dict[str, Any]:
    """Write a file of 64 MB with fsync and remove it; return the seconds, or why it failed."""
    path, began = folder / "speed", time.monotonic()
    try:
        with open(path, "wb") as file:
            for _ in range(WRITTEN >> 20):
                file.write(os.urandom(1 << 10) * (1 << 10))
            flush(file)
        return {"seconds": time.monotonic() - began, "why": ""}
    except OSError as problem:
        return {"seconds": 0.0, "why": one_line(problem)}
    finally:
        path.unlink(missing_ok=True)


def judge_sharing(
    found: Mapping[int, Mapping[str, Any]], missing: list[int], out: str, hosts: Mapping[int, str]
) -> list[Line]:
    """Return the lines about a shared folder; missing: the ranks whose token rank 0 did not see."""
    share = f"give an --out on a disk that all hosts share (NFS, Lustre, ...), by the same path: {out} is not"
    blind = [rank for rank, here in found.items() if not here["seen"]]
    lines = []
    if blind:
        said = f"{who(blind, hosts)} cannot see what rank 0 writes to {out} ({found[blind[0]]['why']})"
        lines.append(Line("FIX", "shared out", said, share))
    unable = {rank: here["why"] for rank, here in found.items() if here["seen"] and here["why"]}
    if unable:
        said = f"{who(unable, hosts)} in {out}: {next(iter(unable.values()))}"
        lines.append(
            Line("FIX", "shared out", said, "make it writable for the user of the job on every host")
        )
    lost = [rank for rank in missing if found.get(rank, {}).get("seen") and rank not in unable]
    if lost:
        said = f"rank 0 does not see what {who(lost, hosts)} writes to {out} within {SEE_SECONDS:.0f} s"
        lines.append(Line("FIX", "shared out", said, share))
    if not lines:
        slowest = max(here["seconds"] for here in found.values())
        said = f"all {len(found)} ranks see {out}" + (f", after {slowest:.1f} s" if slowest > 1 else "")
        lines.append(Line("ok", "shared out", said))
    return lines


def judge_turns(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    """Return the lines about renaming and locks, from the ranks that share the folder with rank 0."""
    others = {rank: here for rank, here in found.items() if rank}
    if not others:
        return []
    bad = [rank for rank, here in others.items() if here["torn"] or here["gone"]]
    stale = [rank for rank, here in others.items() if not here["last"]]
    lines = []
    if bad:
        said = f"{who(bad, hosts)} saw a half-written or missing file while rank 0 renamed it"
        lines.append(
            Line("FIX", "rename", said, "use another disk for --out: a half-written checkpoint could be read")
        )
    if stale:
        said = f"{who(stale, hosts)} still saw an old file {SEE_SECONDS:.0f} s after rank 0 had replaced it"
        lines.append(
            Line(
                "FIX",
                "rename",
                said,
                "mount it with a shorter cache time (NFS: actimeo=3, lookupcache=positive)",
            )
        )
    if not lines:
        turns = found[0]["turns"] if 0 in found else 0
        lines.append(
            Line("ok", "rename", f"all ranks see a replaced file, and always a whole one ({turns} times)")
        )
    open_door = [rank for rank, here in others.items() if here["lock"] == "none"]
    odd = {
        rank: here["lock"]
        for rank, here in found.items()
        if here["lock"] not in ("", "none", "held", "untried")
    }
    local = "keep GLSD_CACHE on a disk of each host; glsd needs no locks in --out"
    if odd:
        lines.append(
            Line("note", "locks", f"no file locks on {who(odd, hosts)}: {next(iter(odd.values()))}", local)
        )
    elif open_door:
        lines.append(
            Line("note", "locks", f"a lock of rank 0 does not keep {who(open_door, hosts)} out", local)
        )
    else:
        lines.append(Line("ok", "locks", "a file lock keeps the other ranks out"))
    return lines


def judge_disks(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    """Return a line for each of the folders ``out`` and ``cache`` that ranks checked."""
    lines = []
    homeless = [rank for rank, here in found.items() if "cache" in here and not here["cache"]]
    if homeless:
        said = "no folder for the cache: HOME is not set and this user is unknown to the system"
        said += f" on {who(homeless, hosts)}" if hosts else ""
        lines.append(Line("FIX", "cache disk", said, "set GLSD_CACHE to a folder on a disk of each host"))
    for what in ("out", "cache"):
        disks = {rank: here[what] for rank, here in found.items() if here.get(what)}
        if not disks:
            continue
        least = min(disks, key=lambda rank: disks[rank]["free"])
        here = disks[least]
        at = f"{here['folder']}" + (f" on {who([least], hosts)}" if hosts else "")
        said = f"{at}: {here['free'] / 1e9:.1f} GB free"
        move = "free some space, or name another folder (" + ("--out)" if what == "out" else "GLSD_CACHE)")
        closed = [rank for rank, d in disks.items() if not d["writable"]]
        few = [rank for rank, d in disks.items() if 0 <= d["inodes"] < FEW_INODES]
        if closed:
            said = f"{disks[closed[0]]['folder']} cannot be written" + (
                f" on {who(closed, hosts)}" if hosts else ""
            )
            lines.append(Line("FIX", f"{what} disk", said, "make it writable, or " + move.split(", or ")[1]))
        elif few:
            said = f"{here['folder']}{f' on {who(few, hosts)}' if hosts else ''}: only {disks[few[0]]['inodes']} more files fit"
            lines.append(Line("FIX", f"{what} disk", said, move))
        else:
            verdict = "FIX" if here["free"] < NEEDED else "note" if here["free"] < LITTLE else "ok"
            lines.append(Line(verdict, f"{what} disk", said, "" if verdict == "ok" else move))
    return lines


def judge_speed(here: Mapping[str, Any]) -> Line:
    """Return the line about the speed of writing."""
    if here["why"]:
        return Line(
            "FIX",
            "out write",
            f"64 MB cannot be written: {here['why']}",
            "free some space, or give another --out",
        )
    rate = WRITTEN / max(here["seconds"], 1e-9)
    said = f"{rate / 1e6:,.0f} MB/s with fsync: a checkpoint of 1 GB takes {1e9 / rate:.1f} s"
    if rate < SLOW:
        return Line("note", "out write", said, "a faster disk, or a larger checkpoint_every")
    return Line("ok", "out write", said)
