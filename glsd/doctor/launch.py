"""Where each rank runs, and whether the launcher announced it so."""

import os
import socket
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glsd.cluster.launch import interface_to, lone_process
from glsd.doctor.line import Line, ranges, who

ANNOUNCED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
NUMBERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS")
LAUNCHERS = "let accelerate launch, torchrun or launch/slurm set all of them"
NAMED = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
SCRIPT = "launch/doctor.py"


def announced() -> tuple[int, int]:
    """Return (rank, world size) from an environment without ``silent_mistakes``, (0, 1) by default."""
    return int(os.environ.get("RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def local_rank() -> int:
    """Return the local rank of this process, 0 if none is announced or it is no number."""
    said = os.environ.get("LOCAL_RANK", "")
    return int(said) if said.isdecimal() else 0


def silent_mistakes() -> list[Line]:
    """Return the mistakes of the launch line that show on a single rank."""
    said = {name: os.environ.get(name, "") for name in NUMBERS}
    wrong = [f"{name} is {word!r}" for name, word in said.items() if word and not word.isdecimal()]
    world = os.environ.get("WORLD_SIZE")
    if wrong or (world is not None and not world.strip("0")):
        found = (
            f"{', '.join(wrong) or f'WORLD_SIZE is {world!r}'}: expected the number of ranks, or of a rank"
        )
        return [Line("FIX", "launch", found, LAUNCHERS)]
    rank = int(said["RANK"] or 0)
    if world is not None:
        return _announced_mistakes(rank, int(world))
    if mistake := lone_process(SCRIPT):
        return [Line("FIX", "launch", *mistake)]
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
    """Return where this rank runs, JSON for ``judge``."""
    host = os.uname().nodename
    master = os.environ.get("MASTER_ADDR", "")
    interface, address = interface_to(master or "127.0.0.1")
    return {
        "host": host,
        # Two hosts may have one name: then their kernels or network namespaces differ.
        "machine": f"{_read('/proc/sys/kernel/random/boot_id')} {os.readlink('/proc/self/ns/net')}",
        "pid": os.getpid(),
        "local_rank": local_rank(),
        "master": master,
        "master_resolved": _resolve(master),
        "own_name_resolved": _resolve(host),
        "address": address,
        "interface": interface,
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


def rank_map(found: Mapping[int, Mapping[str, Any]], devices: Mapping[int, str]) -> list[str]:
    """Return one line for each host: its address, ranks, local ranks, processes and devices."""
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
    """Return the ranks of each host, by its name from ``host_names``."""
    hosts: dict[str, list[int]] = {}
    for rank, name in host_names(found).items():
        hosts.setdefault(name, []).append(rank)
    return hosts


def host_names(found: Mapping[int, Mapping[str, Any]]) -> dict[int, str]:
    """Return the host name of each rank; addresses distinguish hosts of the same name."""
    machines: dict[str, set[str]] = {}
    for here in found.values():
        machines.setdefault(here["host"], set()).add(here["machine"])
    return {
        rank: here["host"] if len(machines[here["host"]]) == 1 else f"{here['host']}@{here['address']}"
        for rank, here in sorted(found.items())
    }


def judge(found: Mapping[int, Mapping[str, Any]], world: int, hosts: Mapping[int, str]) -> list[Line]:
    """Return the lines about ranks and addresses; world: the announced number of ranks."""
    places = by_host(found)
    lines = _ranks(found, world, hosts, places)
    if len({here["host"] for here in found.values()}) < len(places):
        names = ", ".join(sorted(places))
        fix = "give each host its own name: logs and messages cannot tell them apart"
        lines.append(Line("note", "hostnames", f"several hosts have the same name: {names}", fix))
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
            f"and check that each reaches MASTER_ADDR {master}"
        )
        return [Line("FIX", "launch", said, fix)]
    twice = {host: Counter(found[rank]["local_rank"] for rank in ranks) for host, ranks in places.items()}
    same = [host for host, counts in twice.items() if max(counts.values()) > 1]
    if same:
        fix = "let the launcher set LOCAL_RANK: 0, 1, ... on each host"
        return [Line("FIX", "launch", f"several ranks of {', '.join(same)} have the same LOCAL_RANK", fix)]
    sizes = {host: len(ranks) for host, ranks in places.items()}
    said = f"{world} ranks on {len(places)} host{'s' if len(places) > 1 else ''}"
    if len(set(sizes.values())) > 1:
        parts = ", ".join(f"{host} {size}" for host, size in sizes.items())
        return [
            Line(
                "note",
                "launch",
                f"{said}, uneven ranks per host: {parts}",
                "start as many ranks on each host: the slowest host sets the pace",
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
        said += (
            f"; glsd sets GLOO_SOCKET_IFNAME, because the name of {who(unset, hosts)} is a loopback address"
        )
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
    """Tell whether a value of GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names one of these interfaces.

    value: prefixes, separated by commas; with ``=`` in front exact names, with ``^`` all interfaces but these.
    """
    if value.startswith("^"):
        exact = value.startswith("^=")
        names = value.lstrip("^=").split(",")
        return any(name != "lo" and not any(_is(name, n, exact) for n in names) for name in interfaces)
    names = value.lstrip("=").split(",")
    return any(_is(name, n, value.startswith("=")) for name in interfaces for n in names)


def _is(interface: str, name: str, exact: bool) -> bool:
    return interface == name if exact else bool(name) and interface.startswith(name)
