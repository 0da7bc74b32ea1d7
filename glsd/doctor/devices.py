"""The device each rank computes on, and the limits of its system."""

import os
import resource
import shutil
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from glsd.doctor.launch import local_rank
from glsd.doctor.line import Line, plain, who
from glsd.errors import one_line

FILES_NEEDED, FILES_WISHED = 512, 4096  # open files of a process
SHM_NEEDED, SHM_WISHED = 128e6, 512e6  # bytes of a rank: two loader processes with two batches of crops each
MEMORY_WISHED = 4e9  # bytes of a rank
THREADS_WISHED = 1024


def facts() -> dict[str, Any]:
    """Return the device and the limits of this rank, JSON for ``judge``."""
    return {"cuda": _cuda(), "visible": os.environ.get("CUDA_VISIBLE_DEVICES"), **_host()}


def _cuda() -> dict[str, Any]:
    found: dict[str, Any] = {
        "files": len(list(Path("/dev").glob("nvidia[0-9]*"))),
        "build": torch.version.cuda or "",
        "hip": torch.version.hip or "",
        "count": 0,
        "why_not": "",
    }
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if torch.cuda.is_available():
            found["count"] = torch.cuda.device_count()
        elif found["build"]:
            try:
                torch.cuda.init()
            except (RuntimeError, AssertionError) as problem:
                found["why_not"] = one_line(problem)
    found["why_not"] = found["why_not"] or " ".join(one_line(w.message) for w in said)
    number = local_rank()
    if number < found["count"]:
        properties = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        found |= {
            "name": properties.name,
            "memory": total,
            "taken": total - free,
            "capability": [properties.major, properties.minor],
            "bf16": properties.major >= 8 or bool(found["hip"]),
            "uuid": str(getattr(properties, "uuid", number)),
        }
    return found


def _host() -> dict[str, Any]:
    allowed = [_number(path) for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/pids.max")]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    threads = resource.getrlimit(resource.RLIMIT_NPROC)[0]
    shm = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    locked = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return {
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],  # -1 = no limit
        "processes": min([n for n in (threads, allowed[1]) if n > 0], default=-1),
        "memory": min([n for n in (memory, allowed[0]) if n > 0]),
        "shm": shm,
        "infiniband": os.path.isdir("/sys/class/infiniband") and bool(os.listdir("/sys/class/infiniband")),
        "locked_memory": locked,
    }


def _number(path: str) -> int:
    """The number in a limit file, -1 for no limit."""
    text = Path(path).read_text().strip() if os.path.exists(path) else "max"
    return int(text) if text.isdigit() else -1


def short_name(here: Mapping[str, Any]) -> str:
    """Return the name of the device that a rank computes on."""
    cuda = here["cuda"]
    return cuda.get("name", "no GPU left") if cuda["count"] else f"CPU ({here['threads']} threads)"


def judge(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    """Return the lines about devices and limits, from the facts of each rank."""
    lines = _gpus(found, hosts) if any(here["cuda"]["count"] for here in found.values()) else []
    lines += _why_no_gpu(found, hosts)
    if not lines:
        lines.append(Line("ok", "device", "CPU: there is no GPU"))
    return [*lines, *_threads(found, hosts), *_limits(found, hosts)]


def _gpus(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    with_gpu = {rank: here["cuda"] for rank, here in found.items() if here["cuda"]["count"]}
    crowded = [rank for rank, cuda in with_gpu.items() if "name" not in cuda]
    if crowded:
        count = with_gpu[crowded[0]]["count"]
        fix = f"--num_processes: {count} a host; or make more GPUs visible"
        return [Line("FIX", "device", f"{who(crowded, hosts)}: more ranks than GPUs ({count}) there", fix)]
    lines = []
    places = Counter((hosts.get(rank, ""), cuda["uuid"]) for rank, cuda in with_gpu.items())
    shared = [rank for rank, cuda in with_gpu.items() if places[hosts.get(rank, ""), cuda["uuid"]] > 1]
    if shared:
        fix = "give each rank of a host its own LOCAL_RANK, and all ranks the same CUDA_VISIBLE_DEVICES"
        lines.append(Line("FIX", "device", f"{who(shared, hosts)} share a GPU: NCCL refuses that", fix))
    kinds: dict[str, list[int]] = {}
    for rank, cuda in with_gpu.items():
        kind = f"{cuda['name']}, {cuda['memory'] / 2**30:.0f} GiB, capability {'.'.join(map(str, cuda['capability']))}"
        kinds.setdefault(kind, []).append(rank)
    if len(kinds) > 1:
        parts = "; ".join(f"{kind} on {who(ranks, hosts)}" for kind, ranks in kinds.items())
        fix = "ask for one kind (SLURM: --constraint, --gres=gpu:KIND:N): the slowest GPU sets the pace"
        lines.append(Line("note", "device", f"different GPUs: {parts}", fix))
    old = [rank for rank, cuda in with_gpu.items() if not cuda["bf16"]]
    if old:
        lines.append(Line("note", "device", f"{who(old, hosts)} without bf16", "train with precision no"))
    taken = [rank for rank, cuda in with_gpu.items() if cuda["taken"] > 0.1 * cuda["memory"] + 1e9]
    if taken:
        fix = "nvidia-smi names the process: end it, or ask for other GPUs"
        lines.append(Line("note", "device", f"GPU memory of {who(taken, hosts)} is in use already", fix))
    if not lines:
        kind = next(iter(kinds))
        lines.append(
            Line("ok", "device", f"{len(with_gpu)} x {kind}, bf16, CUDA {found[min(found)]['cuda']['build']}")
        )
    return lines


def _why_no_gpu(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    others = any(here["cuda"]["count"] for here in found.values())
    reasons: dict[Line, list[int]] = {}
    for rank, here in found.items():
        cuda, hidden = here["cuda"], here["visible"]
        if cuda["count"]:
            continue
        verdict = "FIX" if others else "note"
        if hidden is not None and hidden.strip() in ("", "-1", "NoDevFiles") and (cuda["files"] or others):
            said, fix = (
                f"CUDA_VISIBLE_DEVICES={hidden!r} hides the GPUs",
                "unset it (SLURM: ask for --gres=gpu:N)",
            )
        elif cuda["files"] and not cuda["build"] and not cuda["hip"]:
            verdict = "FIX"
            said, fix = (
                "a GPU is there, but this torch is built for CPUs",
                "pip install a CUDA build of torch and torchvision",
            )
        elif cuda["files"]:
            verdict = "FIX"
            said = f"a GPU is there, but CUDA {cuda['build']} cannot use it: {plain(cuda['why_not'])}"
            fix = "a newer driver, or a torch built for the CUDA of this driver (nvidia-smi names it)"
        elif others:
            said, fix = (
                "no GPU here, other ranks have one",
                "ask for GPUs on every host (SLURM: --gres=gpu:N)",
            )
        else:
            continue
        reasons.setdefault(Line(verdict, "device", said, fix), []).append(rank)
    return [
        Line(line.verdict, "device", f"{line.found}: {who(ranks, hosts)}" if hosts else line.found, line.fix)
        for line, ranks in reasons.items()
    ]


def _threads(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    asked = Counter[str]()
    for rank, here in found.items():
        asked[hosts.get(rank, "")] += here["threads"]
    first = {hosts.get(rank, ""): here for rank, here in reversed(list(found.items()))}
    ranks_of = Counter(hosts.get(rank, "") for rank in found)
    crowded = [host for host, threads in asked.items() if threads > max(first[host]["cores"], ranks_of[host])]
    if crowded:
        host = crowded[0]
        said = f"{asked[host]} threads of {ranks_of[host]} ranks for {first[host]['cores']} cores"
        where = f" on {host}" + (f" and {len(crowded) - 1} more" if len(crowded) > 1 else "") if host else ""
        fix = f"export OMP_NUM_THREADS={max(1, first[host]['cores'] // ranks_of[host])}"
        return [Line("note", "threads", said + where, fix)]
    threads = sorted({here["threads"] for here in found.values()})
    cores = sorted({here["cores"] for here in found.values()})
    said = f"{' or '.join(map(str, threads))} threads per rank, {' or '.join(map(str, cores))} cores per host"
    return [Line("ok", "threads", said)]


def _limits(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    ranks_of = Counter(hosts.get(rank, "") for rank in found)
    shares = {rank: ranks_of[hosts.get(rank, "")] for rank in found}
    lines: list[Line] = []

    def look(
        name: str, values: dict[int, Any], needed: int | float, wished: int | float, said: str, fix: str
    ) -> None:
        for verdict, bound in (("FIX", needed), ("note", wished)):
            low = [rank for rank, value in values.items() if 0 <= value < bound]
            if low:
                where = f" on {who(low, hosts)}" if any(hosts.values()) else ""
                lines.append(Line(verdict, name, said.format(min(values[rank] for rank in low)) + where, fix))
                return

    files = {rank: here["open_files"] for rank, here in found.items()}
    look(
        "limits", files, FILES_NEEDED, FILES_WISHED, "{:.0f} open files", f"ulimit -n {FILES_WISHED} or more"
    )
    threads = {rank: here["processes"] for rank, here in found.items()}
    look(
        "limits",
        threads,
        128,
        THREADS_WISHED,
        "{:.0f} processes and threads",
        "raise ulimit -u (or pids.max)",
    )
    shm = {rank: here["shm"] / shares[rank] / 1e6 for rank, here in found.items()}
    fix = "a larger /dev/shm (docker: --shm-size 8g), or num_workers 0"
    look("limits", shm, SHM_NEEDED / 1e6, SHM_WISHED / 1e6, "/dev/shm has {:.0f} MB free per rank", fix)
    memory = {rank: here["memory"] / shares[rank] / 1e9 for rank, here in found.items()}
    fix = "ask for more memory (SLURM: --mem), or fewer ranks on a host"
    look("limits", memory, 1.0, MEMORY_WISHED / 1e9, "{:.1f} GB of memory per rank", fix)
    rdma = {rank: here["locked_memory"] for rank, here in found.items() if here["infiniband"]}
    look(
        "limits",
        rdma,
        0,
        1 << 30,
        "{:.0f} bytes of memory may be locked, InfiniBand needs more",
        "ulimit -l unlimited",
    )
    if not lines:
        least = found[min(found, key=lambda rank: memory[rank])]
        said = f"{least['open_files'] if least['open_files'] >= 0 else 'any number of'} open files"
        said += f", {min(memory.values()):.1f} GB of memory and {min(shm.values()) / 1e3:.1f} GB of /dev/shm per rank"
        lines.append(Line("ok", "limits", said))
    return lines
