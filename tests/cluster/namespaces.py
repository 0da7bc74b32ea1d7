"""Linux namespaces from Python: processes that begin in other ones than this process's, and who is in which."""

import contextlib
import ctypes
import os
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Kinds of namespaces, as the kernel numbers them.
MOUNTS, NAMES, NETWORKS, PIDS = 0x00020000, 0x04000000, 0x40000000, 0x20000000
FILES = {MOUNTS: "mnt", NAMES: "uts", NETWORKS: "net", PIDS: "pid"}
DIE_WITH_PARENT = 1
libc = ctypes.CDLL(None, use_errno=True)


@contextlib.contextmanager
def entering(inside: int) -> Iterator[Callable[[], None]]:
    """Within the block children of this thread begin among the processes of a host, one of whose pids is ``inside``.

    Yields what such a child calls to be on the host in every other respect; the child may leave the block too.
    """
    files = {kind: os.open(f"/proc/{inside}/ns/{name}", os.O_RDONLY) for kind, name in FILES.items()}
    folder, is_child = Path.cwd(), False

    def enter() -> None:
        nonlocal is_child
        is_child = True
        for kind in (NETWORKS, NAMES, MOUNTS):
            _check(libc.setns(files[kind], kind))
        os.chdir(folder)

    try:
        with _children_in(lambda: libc.setns(files[PIDS], PIDS), go_back=lambda: not is_child):
            yield enter
    finally:
        for file in files.values():
            os.close(file)


def is_elsewhere(inside: int) -> bool:
    """Tell whether a process is in other namespaces than this one; where it is not, nobody needs to be root."""
    return any(
        os.readlink(f"/proc/{inside}/ns/{name}") != os.readlink(f"/proc/self/ns/{name}")
        for name in FILES.values()
    )


def first_process(argv: Sequence[str]) -> subprocess.Popen:
    """Start a command in new namespaces of its own; it ends with this process."""

    def leave() -> None:
        _check(libc.prctl(DIE_WITH_PARENT, signal.SIGKILL))
        _check(libc.unshare(MOUNTS | NAMES | NETWORKS))

    with _children_in(lambda: libc.unshare(PIDS)):
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            preexec_fn=leave,
            start_new_session=True,  # Ctrl-C is for the tests
        )


@contextlib.contextmanager
def _children_in(enter: Callable[[], int], go_back: Callable[[], bool] = lambda: True) -> Iterator[None]:
    """Within the block this thread's children begin in another pid namespace."""
    own = os.open("/proc/self/ns/pid", os.O_RDONLY)
    try:
        _check(enter())
        yield
    finally:
        if go_back():
            _check(libc.setns(own, PIDS))
        os.close(own)


def _check(answer: int) -> None:
    if answer != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


@dataclass
class Stat:
    """A process: its program, its state (one letter, Z is a zombie), its parent."""

    name: str
    state: str
    parent: int


def stat_of(pid: int) -> Stat | None:
    """Return what the kernel says of a process; None if it has just gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    name, _, rest = text.partition(" (")[2].rpartition(") ")
    state, parent = rest.split()[:2]
    return Stat(name, state, int(parent))


def pids_in(inside: int) -> list[int]:
    """Return all processes of the pid namespace of a process; zombies tell theirs too."""
    wanted = os.readlink(f"/proc/{inside}/ns/pid")
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{entry}/ns/pid") == wanted:
                    found.append(int(entry))
    return found
