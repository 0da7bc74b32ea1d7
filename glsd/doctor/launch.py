"""Which rank runs where, and whether that is what the launcher announced."""

import fcntl
import os
import socket
import struct
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glsd.cluster import dist
from glsd.doctor.line import Line, ranges, who

ANNOUNCED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")
LAUNCHERS = "let accelerate launch, torchrun or launch/slurm set all of them"
NAMED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SIOCGIFADDR = 0x8915
SCRIPT = "launch/doctor.py"


def announced() -> tuple[int, int]:
    """Return (rank, world size) of an environment without silent_mistakes, (0, 1) where nothing is announced."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Return this process's number on its host, 0 where none that can be read is announced."""
    said = os.environ.get("LOCAL_RANK", "")
    return int(said) if said.isdecimal() else 0


def silent_mistakes() -> list[Line]:
    """Return what is wrong with the launch line before any other rank was heard of."""
    said = {name: os.environ.get(name, "") for name in NUMBERS}
    wrong = [f"{name} is {word!r}" for name, word in said.items() if word and not word.isdecimal()]
    world = os.environ.get("WORLD_SIZE")
    if wrong or (world is not None and not world.strip("0")):
        found = f"{', '.join(wrong) or f'WORLD_SIZE is {world!r}'}: no number of ranks, or of a rank"
        return [Line("FIX", "launch", found, LAUNCHERS)]
    rank = int(said["RANK"] or 0)
    if world is not None:
        return _announced_mistakes(rank, int(world))
    if "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ:
        found = "accelerate was asked for several processes but started one (it does so with --cpu)"
        line = dist.CPU_LAUNCH_LINE.format(n="N", script=SCRIPT)
        return [Line("FIX", "launch", found, f"N ranks on CPUs: '{line}'; one: --num_processes 1")]
    tasks = int(said["SLURM_STEP_NUM_TASKS"] or 1)
    if tasks > 1:
        found = f"srun started {tasks} tasks that do not know of each other (no WORLD_SIZE): each would train alone"
        return [
            Line("FIX", "launch", found, "start with launch/slurm/*.sbatch, or accelerate launch in each")
        ]
    if rank:
        found = f"RANK={rank} is announced, but no WORLD_SIZE: this process would train alone"
        return [Line("FIX", "launch", found, f"{LAUNCHERS}; for a single process unset RANK")]
    return []


def _announced_mistakes(rank: int, world: int) -> list[Line]:
    if rank >= world:
        found = f"RANK={rank} is announced, but WORLD_SIZE={world}: ranks go from 0 to {world - 1}"
        fix = "count all processes of all hosts in WORLD_SIZE; a RANK left by another job: unset it"
        return [Line("FIX", "launch", found, fix)]
    missing = [name for name in ANNOUNCED if not os.environ.get(name)] if world > 1 else []
    if missing:
        found = f"WORLD_SIZE={world} is announced, but not {', '.join(missing)}"
        return [Line("FIX", "launch", found, LAUNCHERS)]
    port = os.environ["MASTER_PORT"] if world > 1 else "1"
    if not (port.isdecimal() and 0 < int(port) < 1 << 16):
        return [Line("FIX", "launch", f"MASTER_PORT is {port!r}: expected 1 to 65535", LAUNCHERS)]
    return []


def facts() -> dict[str, Any]:
    """Return where this rank is: JSON, for judge."""
    host = os.uname().nodename
    master = os.environ.get("MASTER_ADDR", "")
    addresses = _interfaces()
    address = _own_address(master, addresses)
    return {
        "host": host,
        # A name may be there twice, a kernel or a network of its own says so.
        "machine": f"{_read('/proc/sys/kernel/random/boot_id')} {os.readlink('/proc/self/ns/net')}",
        "pid": os.getpid(),
        "local_rank": local_rank(),
        "master": master,
        "master_resolved": _resolve(master),
        "own_name_resolved": _resolve(host),
        "address": address,
        "interface": next((name for name, own in addresses.items() if own == address), ""),
        "interfaces": sorted(name for _, name in socket.if_nameindex()),
        "named": {name: os.environ[name] for name in NAMED if os.environ.get(name)},
    }


def _read(path: str) -> str:
    return Path(path).read_text().strip() if os.path.exists(path) else ""


def _resolve(name: str) -> str:
    try:
        return socket.gethostbyname(name) if name else ""
    except OSError:
        return ""


def _own_address(master: str, addresses: Mapping[str, str]) -> str:
    """The address from which this host reaches another: nothing is sent for it."""
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((master or "127.0.0.1", 9))
            address = str(probe.getsockname()[0])
    except OSError:
        address = ""
    outer = [own for own in addresses.values() if not own.startswith("127.")]
    # On its own host, MASTER_ADDR may be a name that means 127.0.1.1.
    by_name = master and not master.startswith("127.") and master != "localhost"
    return outer[0] if by_name and address not in outer and len(outer) == 1 else address


def _interfaces() -> dict[str, str]:
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            try:
                found[name] = socket.inet_ntoa(fcntl.ioctl(probe, SIOCGIFADDR, request)[20:24])
            except OSError:
                continue  # without an address
    return found


def rank_map(found: Mapping[int, Mapping[str, Any]], devices: Mapping[int, str]) -> list[str]:
    """Return a line per host: its ranks, local ranks, processes, devices and address."""
    lines = []
    for host, ranks in by_host(found).items():
        local = ranges(found[rank]["local_rank"] for rank in ranks)
        pids = ", ".join(str(found[rank]["pid"]) for rank in ranks)
        on = ", ".join(dict.fromkeys(devices.get(rank, "?") for rank in ranks))
        first = found[ranks[0]]
        at = f"{first['address']} ({first['interface'] or 'no interface'})" if first["master"] else "alone"
        lines.append(f"{host}  {at}  rank {ranges(ranks)}  local {local}  pid {pids}  {on}")
    return lines


def by_host(found: Mapping[int, Mapping[str, Any]]) -> dict[str, list[int]]:
    """Return the ranks of each host by the name it is to be called by."""
    hosts: dict[str, list[int]] = {}
    for rank, name in host_names(found).items():
        hosts.setdefault(name, []).append(rank)
    return hosts


def host_names(found: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Return each rank's host; hosts of one name are told apart by their addresses."""
    machines: dict[str, set[str]] = {}
    for here in found.values():
        machines.setdefault(here["host"], set()).add(here["machine"])
    return {
        rank: here["host"] if len(machines[here["host"]]) == 1 else f"{here['host']}@{here['address']}"
        for rank, here in sorted(found.items())
    }


def judge(found: Mapping[int, Mapping[str, Any]], world: int, hosts: Mapping[int, str]) -> list[Line]:
    """Return the lines about ranks and addresses; ``world``: the number announced."""
    places = by_host(found)
    lines = _ranks(found, world, hosts, places)
    if len({here["host"] for here in found.values()}) < len(places):
        names = ", ".join(sorted(places))
        fix = "give each its own hostname: logs and messages cannot tell them apart"
        lines.append(Line("note", "hostnames", f"several hosts have one name: {names}", fix))
    if world > 1:
        lines += _addresses(found, hosts, several=len(places) > 1)
        lines += _named(found, hosts)
    return lines


def _ranks(
    found: Mapping[int, Mapping[str, Any]],
    world: int,
    hosts: Mapping[int, str],
    places: Mapping[str, list[int]],
) -> list[Line]:
    if world == 1:
        return [Line("ok", "launch", "one process, no other ranks")]
    missing = sorted(set(range(world)) - set(found))
    if missing:
        master = found[min(found)]["master"]
        if len(places) == 1 and found[min(found)]["master_resolved"].startswith("127."):
            master += f" ({found[min(found)]['master_resolved']}: no other host can reach that)"
        said = f"WORLD_SIZE={world} is announced, {len(found)} came: {who(missing, hosts)} missing"
        fix = (
            f"compare --num_processes, --num_machines and --machine_rank of all hosts (up: {', '.join(places)}), "
            f"and look whether each reaches MASTER_ADDR {master}"
        )
        return [Line("FIX", "launch", said, fix)]
    twice = {host: Counter(found[rank]["local_rank"] for rank in ranks) for host, ranks in places.items()}
    same = [host for host, counts in twice.items() if max(counts.values()) > 1]
    if same:
        fix = "let the launcher set LOCAL_RANK: 0, 1, ... on each host"
        return [Line("FIX", "launch", f"several ranks of {', '.join(same)} have one LOCAL_RANK", fix)]
    sizes = {host: len(ranks) for host, ranks in places.items()}
    said = f"{world} ranks on {len(places)} host{'s' if len(places) > 1 else ''}"
    if len(set(sizes.values())) > 1:
        parts = ", ".join(f"{host} {size}" for host, size in sizes.items())
        return [
            Line(
                "note",
                "launch",
                f"{said}, not as many on each: {parts}",
                "meant so? the slowest sets the pace",
            )
        ]
    each = next(iter(sizes.values()))
    return [Line("ok", "launch", f"{said}" + (f", {each} on each" if len(places) > 1 else ""))]


def _addresses(
    found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str], *, several: bool
) -> list[Line]:
    masters = {here["master"] for here in found.values()}
    loose = [rank for rank, here in found.items() if here["own_name_resolved"].startswith("127.")]
    unset = [rank for rank in loose if "GLOO_SOCKET_IFNAME" not in found[rank]["named"]]
    used = ", ".join(sorted({here["interface"] or here["address"] for here in found.values()}))
    said = f"MASTER_ADDR {' and '.join(sorted(masters))}, reached over {used}"
    if several and unset:
        said += f"; glsd names it to gloo, as the hostname of {who(unset, hosts)} is a loopback address"
    return [Line("ok", "address", said)]


def _named(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    lines = []
    for variable in NAMED:
        wrong: dict[str, list[int]] = {}
        for rank, here in found.items():
            value = here["named"].get(variable, "")
            if value and not matches(value, here["interfaces"]):
                wrong.setdefault(value, []).append(rank)
        for value, ranks in wrong.items():
            there = ", ".join(name for name in found[ranks[0]]["interfaces"] if name != "lo")
            said = f"{variable}={value} names no interface of {who(ranks, hosts)} (there: {there or 'lo'})"
            lines.append(Line("FIX", "interface", said, f"unset {variable}, or name one that all hosts have"))
    return lines


def matches(value: str, interfaces: list[str]) -> bool:
    """Tell whether ``GLOO/NCCL_SOCKET_IFNAME`` names one of these: prefixes with commas, ``=`` exact, ``^`` all others."""
    if value.startswith("^"):
        exact = value.startswith("^=")
        names = value.lstrip("^=").split(",")
        return any(name != "lo" and not any(_is(name, n, exact) for n in names) for name in interfaces)
    names = value.lstrip("=").split(",")
    return any(_is(name, n, value.startswith("=")) for name in interfaces for n in names)


def _is(interface: str, name: str, exact: bool) -> bool:
    return interface == name if exact else bool(name) and interface.startswith(name)
