"""Network namespaces by name, as the program ip has them: whatever runs in one, and how it all ends."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

# What remains when the process that made namespaces is killed: waits until its standard input ends, which that process holds
# open. The words: the bridge, the namespaces.
UNDERTAKER = """
cat >/dev/null
bridge=$1; shift
for space; do
    while [ -e "/run/netns/$space" ] && pids=$(ip netns pids "$space") && [ -n "$pids" ]; do kill -KILL $pids; sleep 0.05; done
    ip netns del "$space"
done
ip link del "$bridge"
"""


def find(program: str) -> str | None:
    """Return the path of a program, also of one for administrators."""
    return shutil.which(program, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess:
    """Run the program ip; AssertionError with what it said where it fails, if that is to be checked."""
    program = find("ip")
    assert program is not None
    done = subprocess.run([program, *words], capture_output=True, text=True)
    assert done.returncode == 0 or not check, f"ip {' '.join(words)}: {done.stderr}"
    return done


def undertaker(bridge: str, spaces: list[str]) -> subprocess.Popen:
    """Start what removes a bridge and namespaces when this process ends without doing so, be it by kill -9."""
    return subprocess.Popen(
        ["sh", "-c", UNDERTAKER, "undertaker", bridge, *spaces],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is for the tests
        env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"},
    )


def kill_all(space: str, seconds: float = 10) -> None:
    """Kill -9 all processes of a network namespace, until there is none; AssertionError if one stays."""
    deadline = time.monotonic() + seconds
    while pids := ip("netns", "pids", space).stdout.split():
        for pid in map(int, pids):
            # By a handle on the process that is surely in the namespace: a number alone may be another one's by now.
            with contextlib.suppress(ProcessLookupError, FileNotFoundError), _handle(pid) as handle:
                if Path(f"/proc/{pid}/ns/net").stat().st_ino == Path(f"/run/netns/{space}").stat().st_ino:
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
        assert time.monotonic() < deadline, f"{space} still has the processes {pids}"
        time.sleep(0.02)


@contextlib.contextmanager
def _handle(pid: int) -> Iterator[int]:
    handle = os.pidfd_open(pid)
    try:
        yield handle
    finally:
        os.close(handle)
