"""A real SLURM cluster on one Debian machine: a controller and nodes that are hosts of their own, up in about two seconds.

Every host is a network namespace with its own address, host name and /etc/hosts; they meet on a bridge, as on a switch.
Needs root, no systemd and no cgroups. Nothing of the machine is changed but the namespaces and the bridge, which go
with ``down``; all daemons and jobs live in these namespaces, so that what is ours is known without a name or a pid file.
"""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.cluster.spaces import (
    find,
    ip,
    kill_all,
    undertaker,
)

PORT = 27817  # of slurmctld; slurmd of node i listens on PORT + i, in its own namespace
CONTROLLER = "ctld"
CPUS, GPUS = 16, 2  # that each node claims to have
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare")
# States that a job does not leave by itself.
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}


def why_not() -> str:
    """Return why no cluster can be brought up here, in one sentence; empty if nothing is known to be in the way."""
    if not Path("/proc/self/ns/net").exists():
        return "no Linux namespaces here"
    if os.geteuid() != 0:
        return "not root: a cluster of network namespaces needs it"
    absent = [name for name in PROGRAMS if find(name) is None]
    if absent:
        return f"no {' '.join(absent)}: run tests/cluster/install.sh"
    space = f"glsd-try-{os.getpid()}"  # others may try at the same time
    tried = ip("netns", "add", space, check=False)
    if tried.returncode != 0:
        return f"network namespaces are refused: {tried.stderr.strip()}"
    ip("netns", "del", space)
    return ""


@dataclass
class Cluster:
    """A cluster that is up: two partitions, ``main`` and ``high``, whose jobs push those of ``main`` away."""

    state: Path
    tag: str
    subnet: str  # first three numbers of the addresses
    nodes: tuple[str, ...]
    daemons: list[subprocess.Popen] = field(default_factory=list)
    undertaker: subprocess.Popen | None = None

    @property
    def environment(self) -> dict[str, str]:
        """What a program needs to talk to this cluster."""
        return {"SLURM_CONF": str(self.state / "slurm.conf")}

    def call(self, *command: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> str:
        """Run a client program and return what it printed; AssertionError with what it said if it fails."""
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=60,
            env={**(os.environ if env is None else env), **self.environment},
        )
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}: {done.stdout}{done.stderr}"
        return done.stdout

    def job(self, job: str) -> dict[str, str]:
        """Return the fields that ``scontrol show job`` prints."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "--oneliner", "show", "job", job)))

    def wait_for(self, what: str, look: Callable[[], object], seconds: float = 60) -> None:
        """Wait until ``look()`` is true; AssertionError with what was waited for, the queue and the logs' ends otherwise."""
        deadline = time.monotonic() + seconds
        while not look():
            if time.monotonic() > deadline:
                queue = self.call("squeue", "--format=%i %j %T %r %S %N")
                raise AssertionError(f"waited {seconds} s for {what}\n{queue}{self.said()}")
            time.sleep(0.2)  # to look means to start a program, mostly

    def wait_for_end(self, job: str, seconds: float = 60) -> dict[str, str]:
        """Wait until a job has ended for good and return its fields."""
        self.wait_for(f"the end of job {job}", lambda: self.job(job)["JobState"] in ENDED, seconds)
        return self.job(job)

    def said(self, lines: int = 15) -> str:
        """Return the last lines of the daemons' logs."""
        logs = sorted(self.state.glob("*.log"))
        ends = ["\n".join(log.read_text(errors="replace").splitlines()[-lines:]) for log in logs]
        return "".join(f"--- {log.name}\n{end}\n" for log, end in zip(logs, ends, strict=True))

    def power_off(self, node: str) -> None:
        """Kill whatever runs on a node, at once and without a word."""
        kill_all(self.namespace(node))

    def power_on(self, node: str) -> None:
        """Start the daemon of a node."""
        command = f"exec slurmd -D -f {self.state}/slurm.conf -N {node}"
        self.daemons.append(self.start(node, command))

    def start(self, host: str, command: str) -> subprocess.Popen:
        """Start a shell command on a host, as a process group of its own."""
        prepare = f"mount --bind {self.state}/hosts /etc/hosts && hostname {host} && {command}"
        inside = ["nsenter", f"--net=/run/netns/{self.namespace(host)}", "unshare", "--mount", "--uts"]
        with (self.state / "daemons.log").open("a") as log:
            return subprocess.Popen(
                [*inside, "sh", "-c", prepare],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin", **self.environment},
            )

    def wait_for_daemons(self, what: str, look: Callable[[], object], seconds: float = 30) -> None:
        """Wait for what the daemons do when they start; AssertionError with their logs if one ends or it takes too long."""
        deadline = time.monotonic() + seconds
        while not look():
            ended = [daemon.args for daemon in self.daemons if daemon.poll() is not None]
            assert not ended, f"{ended} ended\n{self.said()}"
            assert time.monotonic() < deadline, f"waited {seconds} s for {what}\n{self.said()}"
            time.sleep(0.05)

    def namespace(self, host: str) -> str:
        return f"{self.tag}-{host}"


def up(state: Path, *, num_nodes: int = 2) -> Cluster:
    """Bring up a cluster that keeps everything in the folder ``state``; AssertionError with the logs if it does not come."""
    tag = f"gs{zlib.crc32(str(state).encode()) & 0xFFFF:04x}"
    nodes = tuple(f"node{number}" for number in range(1, num_nodes + 1))
    cluster = Cluster(state, tag, f"10.217.{int(tag[2:], 16) % 200 + 20}", nodes)
    down(cluster)  # what a test session that was killed has left under this name
    shutil.rmtree(state, ignore_errors=True)
    state.mkdir(parents=True)
    state.chmod(0o755)  # munged refuses folders that others may write to
    cluster.undertaker = undertaker(cluster.tag, [cluster.namespace(host) for host in (*nodes, CONTROLLER)])
    try:
        build_network(cluster)
        write_configuration(cluster)
        munge = f"munged --foreground --force --num-threads=2 --key-file={state}/munge.key --socket={state}/munge.sock"
        munge += f" --pid-file={state}/munge.pid --log-file={state}/munge.log --seed-file={state}/munge.seed"
        cluster.daemons.append(cluster.start(CONTROLLER, f"exec {munge}"))
        cluster.wait_for_daemons("munged", lambda: (state / "munge.sock").exists())
        cluster.daemons.append(cluster.start(CONTROLLER, f"exec slurmctld -D -i -f {state}/slurm.conf"))
        for node in nodes:
            cluster.power_on(node)
        cluster.wait_for_daemons("idle nodes", lambda: idle_nodes(cluster) == set(nodes))
    except BaseException:
        down(cluster)
        raise
    return cluster


def idle_nodes(cluster: Cluster) -> set[str]:
    """Return the names of the nodes that wait for work; none while the controller does not answer."""
    command = ["sinfo", "--noheader", "--Node", "--states=idle", "--responding", "--format=%N"]
    with contextlib.suppress(AssertionError):
        return set(cluster.call(*command).split())
    return set()


def build_network(cluster: Cluster) -> None:
    """Make one namespace for each host and join them by a bridge, on which this machine has an address too."""
    ip("link", "add", cluster.tag, "type", "bridge")
    ip("address", "add", f"{cluster.subnet}.254/24", "dev", cluster.tag)
    ip("link", "set", cluster.tag, "up")
    hosts = "127.0.0.1 localhost\n"
    for number, host in enumerate((*cluster.nodes, CONTROLLER), start=1):
        space, cable = cluster.namespace(host), f"{cluster.tag}v{number}"
        ip("netns", "add", space)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", cable, "master", cluster.tag, "up")
        ip("-n", space, "address", "add", f"{cluster.subnet}.{number}/24", "dev", "eth0")
        for link in ("lo", "eth0"):
            ip("-n", space, "link", "set", link, "up")
        hosts += f"{cluster.subnet}.{number} {host}\n"
    (cluster.state / "hosts").write_text(hosts)


def write_configuration(cluster: Cluster) -> None:
    """Write what the daemons read: see the comments for what a machine without systemd and cgroups needs."""
    state, count = cluster.state, len(cluster.nodes)
    key = os.open(state / "munge.key", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    os.write(key, os.urandom(1024))
    os.close(key)
    # Found by itself, it would want /sys/fs/cgroup to be a mount.
    (state / "cgroup.conf").write_text("CgroupAutomount=no\nCgroupPlugin=cgroup/v1\n")
    # SLURM wants to see a device for each GPU; /dev/null by another name will do.
    for number in range(GPUS):
        os.mknod(state / f"gpu{number}", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    (state / "gres.conf").write_text(
        f"NodeName={','.join(cluster.nodes)} Name=gpu File={state}/gpu[0-{GPUS - 1}]\n"
    )
    lines = [
        "ClusterName=glsd",
        f"SlurmctldHost={CONTROLLER}({cluster.subnet}.{count + 1})",
        f"SlurmctldPort={PORT}",
        "SlurmUser=root",
        "SlurmdUser=root",
        "AuthType=auth/munge",
        # A requeued job waits until its old credentials are worthless: 120 s by default, and for any number below 5.
        f"AuthInfo=socket={state}/munge.sock,cred_expire=5",
        f"StateSaveLocation={state}/ctld",
        f"SlurmdSpoolDir={state}/spool-%n",
        f"SlurmctldPidFile={state}/slurmctld.pid",
        f"SlurmdPidFile={state}/slurmd-%n.pid",
        f"SlurmctldLogFile={state}/slurmctld.log",
        f"SlurmdLogFile={state}/slurmd-%n.log",
        "ProctrackType=proctrack/linuxproc",
        "TaskPlugin=task/none",
        "JobAcctGatherType=jobacct_gather/none",
        "AccountingStorageType=accounting_storage/none",
        "MpiDefault=none",
        "GresTypes=gpu",
        "SelectType=select/cons_tres",
        "SelectTypeParameters=CR_Core",
        "SlurmdParameters=config_overrides",  # nodes may claim more cores than there are
        "SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=0",
        "PreemptType=preempt/partition_prio",
        "PreemptMode=REQUEUE",
        "ReturnToService=2",  # a node that comes back is used again
        "KillWait=20",
        "SlurmctldTimeout=10",
        "SlurmdTimeout=10",  # so long may a node be silent before it counts as down
        "TCPTimeout=2",
        "MessageTimeout=10",
        "CompleteWait=0",
        "JobRequeue=1",
        "MinJobAge=3600",  # seconds that an ended job can be asked for
    ]
    for number, node in enumerate(cluster.nodes, start=1):
        where = f"NodeAddr={cluster.subnet}.{number} Port={PORT + number}"
        has = f"Sockets=1 CoresPerSocket={CPUS} RealMemory=16000 Gres=gpu:{GPUS}"
        lines.append(f"NodeName={node} NodeHostname={node} {where} {has} State=UNKNOWN")
    everyone = "Nodes=ALL MaxTime=INFINITE DefaultTime=10 State=UP"
    lines += [
        f"PartitionName=main {everyone} Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30",
        f"PartitionName=high {everyone} Default=NO PriorityTier=10 PreemptMode=OFF",
    ]
    (state / "slurm.conf").write_text("\n".join(lines) + "\n")


def down(cluster: Cluster) -> None:
    """End every process in the namespaces of the cluster, and remove these and the bridge; nothing else is touched."""
    for host in (*cluster.nodes, CONTROLLER):
        space = cluster.namespace(host)
        if Path(f"/run/netns/{space}").exists():
            kill_all(space)
            ip("netns", "del", space)
    for daemon in cluster.daemons:
        daemon.wait(10)
    if cluster.undertaker:
        cluster.undertaker.kill()  # before another cluster may have this name
        cluster.undertaker.communicate()
        cluster.undertaker = None
    # Cables go with their namespaces, but some time later: a cluster of the same name may come up before.
    for link in [
        *Path(f"/sys/class/net/{cluster.tag}/brif").glob("*"),
        Path(f"/sys/class/net/{cluster.tag}"),
    ]:
        ip("link", "del", link.name, check=False)
    assert not Path(f"/sys/class/net/{cluster.tag}").exists(), f"the bridge {cluster.tag} is still there"
