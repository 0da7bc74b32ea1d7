"""Hosts on one machine: each has its own network address, host name, /etc/hosts and processes; one switch joins them.

Nothing has a name in the machine itself: a host is a set of anonymous namespaces that live as long as its first process
(a shell), and this one dies with the process that made it. So there is nothing to clean up, also after kill -9 of a test.
Inside a host its own name means 127.0.1.1, as on a Debian machine that was installed by hand.
"""

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.namespaces import (
    entering,
    first_process,
    pids_in,
    stat_of,
)

NETWORK = "10.232.5"  # only inside the namespaces: every set of hosts may have the same
DEVICE = "eth0"
# The first process of a host: adopts and buries orphans as an init does, and says when the host is up.
BOOT = """
set -e
mount --make-rprivate /
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount --bind "$1" /etc/hosts
hostname "$0"
ip link set lo up
echo up
while :; do sleep 1000000; done
"""


@functools.cache
def why_not() -> str:
    """Return why this machine cannot have hosts, "" if it can."""
    if missing := [name for name in ("ip", "nsenter") if not shutil.which(name)]:
        return f"no command {' or '.join(missing)}: install the packages iproute2 and util-linux"
    if os.geteuid() != 0:
        return "hosts are made of namespaces: run as root"
    # Both rights, to make namespaces and to make devices in them, may be missing in a container.
    script = "mount -t proc proc /proc && ip link add br0 type bridge"
    try:
        with first_process(["sh", "-c", f"mount --make-rprivate / && {script}"]) as tried:
            problem = tried.communicate()[1].decode().strip()
    except (OSError, subprocess.SubprocessError) as error:
        return f"no namespaces here: {error}"
    return f"no namespaces here: {problem}" if tried.returncode else ""


@dataclass
class Started:
    """A command that runs on a host; its pid is the machine's."""

    pid: int
    log: Path
    poll: Callable[[], int | None]  # the exit code as subprocess has it, None while it runs
    code: int | None = None
    ended: float = 0.0  # time.time() when the end was seen

    def running(self) -> bool:
        """Return whether it runs still."""
        if self.code is None:
            self.code = self.poll()
            self.ended = time.time()
        return self.code is None

    def wait(self, seconds: float) -> int:
        """Return the exit code; AssertionError with what was said if it takes longer."""
        wait_until(lambda: not self.running(), seconds, lambda: f"the end of {self.log.name}: {self.said()}")
        assert self.code is not None
        return self.code

    def kill(self) -> float:
        """Kill -9 this one process, wait for its end and return when it was killed."""
        moment = time.time()
        if self.running():
            os.kill(self.pid, signal.SIGKILL)
            self.wait(20)
        return moment

    def said(self) -> str:
        """Return what it has written so far, both streams."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


@dataclass
class Host:
    """One host; it ends with its first process."""

    name: str
    address: str
    first: subprocess.Popen
    port: str  # of the switch
    switch: int  # the first process there
    started: list[Started] = field(default_factory=list)

    def run(self, argv: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> Started:
        """Start a command here, in a session of its own; ``env`` is added to this process's environment."""
        with log.open("ab") as file, entering(self.first.pid) as enter:
            process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                preexec_fn=enter,
                start_new_session=True,
            )
        self.started.append(Started(process.pid, log, process.poll))
        return self.started[-1]

    def alive(self) -> bool:
        """Return whether it was not killed."""
        return self.first.poll() is None

    def pids(self) -> dict[int, str]:
        """Return the processes here but the first one and its sleep, as pid -> state and command; Z is a zombie."""
        found = {}
        for pid in pids_in(self.first.pid):
            stat = stat_of(pid)
            if (
                stat is not None
                and pid != self.first.pid
                and (stat.parent, stat.name) != (self.first.pid, "sleep")
            ):
                found[pid] = f"{stat.state} {stat.name}"
        return found

    def kill(self) -> float:
        """Kill -9 everything at once and return when; the host is gone (its system lives long enough to say goodbye)."""
        moment = time.time()
        self.first.kill()  # the kernel kills what is in its namespace with it
        for started in self.started:
            started.wait(20)
        self.first.communicate(timeout=20)
        return moment

    def cut(self) -> float:
        """Pull the cable and return when: nobody is told, packets vanish."""
        _ip(self.switch, "link", "set", self.port, "down")
        return time.time()

    def join(self) -> None:
        """Plug the cable in again."""
        _ip(self.switch, "link", "set", self.port, "up")

    def lose(self, other: "Host") -> float:
        """Send nothing to one other host any more, as where a switch between them fails, and return when."""
        _ip(self.first.pid, "route", "add", "blackhole", f"{other.address}/32")
        return time.time()

    def power_off(self) -> float:
        """End without a goodbye: the peers hear nothing any more. Returns when."""
        moment = self.cut()
        self.kill()
        return moment

    def freeze(self) -> float:
        """Stop everything (SIGSTOP) and return when."""
        moment = time.time()
        for pid in self.pids():
            os.kill(pid, signal.SIGSTOP)
        stopped = lambda: all(state[0] in "TZ" for state in self.pids().values())  # noqa: E731
        wait_until(stopped, 5, lambda: f"{self.name} to freeze: {self.pids()}")
        return moment

    def thaw(self) -> None:
        """Let everything go on (SIGCONT)."""
        for pid in self.pids():
            os.kill(pid, signal.SIGCONT)

    def traffic(self) -> tuple[int, int]:
        """Return how many bytes its interface has received and sent."""
        for line in Path(f"/proc/{self.first.pid}/net/dev").read_text().splitlines():
            name, _, numbers = line.partition(":")
            if name.strip() == DEVICE:
                words = numbers.split()
                return int(words[0]), int(words[8])
        raise AssertionError(f"{self.name} has no {DEVICE}")


class Hosts:
    """Hosts h1, h2, ... on one switch; ``hosts["h2"]`` is one of them. All end with ``close``, or with this process."""

    def __init__(self, number: int, folder: Path) -> None:
        self._folder, self._hosts = folder, dict[str, Host]()
        folder.mkdir(parents=True, exist_ok=True)
        self._names = {f"h{i}": f"{NETWORK}.{i}" for i in range(1, 10)}
        self._switch = self._boot("switch")
        _ip(self._switch.pid, "link", "add", "br0", "type", "bridge")
        _ip(self._switch.pid, "link", "set", "br0", "up")
        for name in list(self._names)[:number]:
            self.add(name)

    def add(self, name: str) -> Host:
        """Add a host, also one of that name that was killed; names are h1 to h9."""
        address, port = self._names[name], f"port-{name}"
        if name in self._hosts:
            self._hosts.pop(name).kill()
        first = self._boot(name)
        # The cable of a killed host goes when the kernel gets to it.
        make = ("link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", str(first.pid))
        wait_until(lambda: _try_ip(self._switch.pid, *make) == "", 5, lambda: f"a cable for {name}")
        _ip(self._switch.pid, "link", "set", port, "master", "br0", "up")
        _ip(first.pid, "addr", "add", f"{address}/24", "dev", DEVICE)
        _ip(first.pid, "link", "set", DEVICE, "up")
        self._hosts[name] = Host(name, address, first, port, self._switch.pid)
        return self._hosts[name]

    def _boot(self, name: str) -> subprocess.Popen:
        others = [f"{address} {other}" for other, address in self._names.items() if other != name]
        path = self._folder / f"{name}.hosts"
        path.write_text("\n".join(["127.0.0.1 localhost", f"127.0.1.1 {name}", *others]) + "\n")
        first = first_process(["sh", "-c", BOOT, name, str(path)])
        assert first.stdout is not None
        if first.stdout.readline() != b"up\n":
            raise AssertionError(f"{name} did not come up: {first.communicate()[1].decode()}")
        return first

    def __getitem__(self, name: str) -> Host:
        return self._hosts[name]

    def __iter__(self) -> Iterator[Host]:
        return iter(list(self._hosts.values()))

    def close(self) -> None:
        """End all hosts and the switch."""
        for host in self:
            host.kill()
        self._switch.kill()
        self._switch.communicate(timeout=20)


@contextlib.contextmanager
def made_hosts(number: int, folder: Path) -> Iterator[Hosts]:
    """Hosts for a block."""
    hosts = Hosts(number, folder)
    try:
        yield hosts
    finally:
        hosts.close()


def wait_until(true: Callable[[], bool], seconds: float, what: Callable[[], str]) -> None:
    """Come back when it is true; AssertionError saying what was waited for after that many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what()}"
        time.sleep(0.01)


def _ip(inside: int, *words: str) -> None:
    problem = _try_ip(inside, *words)
    assert not problem, problem


def _try_ip(inside: int, *words: str) -> str:
    # Only the network is entered: a pid given to ip means what it means here.
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{inside}/ns/net", "ip", *words], capture_output=True, text=True
    )
    return "" if done.returncode == 0 else f"ip {' '.join(words)}: {done.stderr}"
