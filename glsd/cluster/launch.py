"""How a training process joins the other ranks: the network interface, the launcher's promise, accelerate."""

import os
import socket
import warnings
from typing import Any

import psutil
import torch

from glsd.cluster import dist
from glsd.errors import UserError
from glsd.precision import Precision, cpu_multiplies_bf16

INTERFACE_VARIABLE = "GLOO_SOCKET_IFNAME"
LOOPBACK = ("127.0.0.1", "::1")

# What really starts N ranks on CPUs; `accelerate launch --cpu --num_processes N` silently starts one.
CPU_LAUNCH_LINE = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no {script} ..."
)


def start(
    precision: Precision,
    script: str,
    *,
    earlier_precision: str = "",
    static_graph: bool = False,
    grad_compression: str = "no",
) -> Any:
    """Join the other ranks and return accelerate's Accelerator; prepare only the student with it.

    precision: 'no' or 'bf16'; see choose_precision, also for earlier_precision. The Accelerator says which it is. script: named
    in the launch line that an error proposes. static_graph: every step uses the same parameters in the same way, and DDP
    learns it from the first step. grad_compression: 'no' or 'bf16', how gradients travel.
    Raises UserError if the launcher announced several processes but each runs alone.
    """
    # Here: the doctor uses this file where accelerate may be broken.
    from accelerate import Accelerator, PartialState
    from accelerate.utils import DDPCommunicationHookType, DistributedDataParallelKwargs

    choose_interface()
    # glsd.cluster.shutdown says which rank is lost; NCCL would end the process first, without a word.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if precision == "bf16" and not torch.cuda.is_available():
        check_world(PartialState(cpu=True).num_processes, script)
        precision = choose_precision(precision, "cpu", earlier_precision)
    # accelerate knows the argument only by its old name.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    ddp = DistributedDataParallelKwargs(
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
        static_graph=static_graph,
        comm_hook=DDPCommunicationHookType(grad_compression),
    )
    accelerator = Accelerator(
        cpu=not torch.cuda.is_available(), mixed_precision=precision, kwargs_handlers=[ddp]
    )
    check_world(accelerator.num_processes, script)
    return accelerator


def choose_precision(precision: Precision, device_type: str, earlier: str = "") -> Precision:
    """Return 'no' instead of 'bf16' if the CPU of a rank has no bfloat16 instructions, and say so in one line (a collective call).

    earlier: the precision of the run that is resumed, "" for none. A run that began in bf16 goes on in it.
    """
    if precision != "bf16" or device_type != "cpu":
        return precision
    if all(dist.gather_objects(cpu_multiplies_bf16())):
        return precision
    kept = dist.broadcast_object(earlier) == "bf16"
    if dist.is_main():
        done = (
            "it stays, as the run began so: precision no is many times faster" if kept else "float32 instead"
        )
        print(f"precision bf16: this CPU has no bfloat16 instructions: {done}", flush=True)
    return precision if kept else "no"


def check_world(num_processes: int, script: str) -> None:
    """Raise UserError if the launcher announced several processes but each of them runs alone.

    Two launch lines do that silently on CPUs, and N copies of one run would then write into one folder. Call it right after
    accelerate has made its process group. num_processes: as accelerate counts them (1 is possible in a process group of N).
    script: named in the launch line that the error proposes.
    """
    dist.soften_exit()
    announced = os.environ.get("WORLD_SIZE")
    if announced is not None and {int(announced), num_processes, dist.world_size()} != {num_processes}:
        line = CPU_LAUNCH_LINE.format(n=announced, script=script)
        raise UserError(
            f"the launcher announced WORLD_SIZE={announced} but accelerate sees a world of {num_processes}: "
            f"on CPUs start it with '{line}'"
        )
    if num_processes == 1 and (mistake := lone_process(script)):
        raise UserError(": ".join(mistake))


def lone_process(script: str) -> tuple[str, str] | None:
    """Return what is wrong and what to do if accelerate was asked for several processes but started one."""
    # With one process accelerate's launcher sets MASTER_ADDR only if it was asked for more.
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if not launched or "WORLD_SIZE" in os.environ:
        return None
    line = CPU_LAUNCH_LINE.format(n="N", script=script)
    return (
        "accelerate was asked for several processes but started one (it does so with --cpu)",
        f"start N ranks on CPUs with '{line}', or one with --num_processes 1",
    )


def choose_interface() -> None:
    """Set GLOO_SOCKET_IFNAME to the network interface that leads to MASTER_ADDR, if ranks run on several hosts and it is unset.

    By default gloo takes the address of the host's own name. On Debian and Ubuntu that is 127.0.1.1, which no other host can
    reach, and some ranks wait for ever. Raises UserError, with the names to choose from, if the interface is not clear.
    """
    environment = os.environ
    several_hosts = int(environment.get("WORLD_SIZE", "1")) > int(environment.get("LOCAL_WORLD_SIZE", "1"))
    master = environment.get("MASTER_ADDR")
    if (
        INTERFACE_VARIABLE in environment
        or not several_hosts
        or not master
        or _resolve(master)[1] in LOOPBACK
    ):
        return
    name, _ = interface_to(master)
    if not name:
        raise UserError(
            f"MASTER_ADDR {master} does not tell which network interface leads to the other hosts: set {INTERFACE_VARIABLE} to "
            f"one of {', '.join(sorted(_outer_interfaces())) or 'the interfaces (none is up)'}"
        )
    environment[INTERFACE_VARIABLE] = name


def interface_to(host: str) -> tuple[str, str]:
    """Return the network interface and the address from which this machine reaches a host; "" for what is not clear.

    A machine's own name may stand for a loopback address. Then it is the only other interface, if there is just one.
    """
    address, outer = _source_address(host), _outer_interfaces()
    name = next((name for name, own in _addresses().items() if address in own), "")
    if name in outer or _resolve(host)[1] in LOOPBACK:
        return name, address
    if len(outer) != 1:
        return "", address
    ((name, own),) = outer.items()
    return name, next(iter(own), address)


def _source_address(host: str) -> str:
    """The address that packets to a host would come from, "" if it cannot be reached; nothing is sent."""
    family, address = _resolve(host)
    if not address:  # an empty one would mean any address
        return ""
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 1))
            return str(probe.getsockname()[0])
    except OSError:
        return ""


def _resolve(host: str) -> tuple[int, str]:
    """The address family and address of a host; the address is "" for an unknown name."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 1, type=socket.SOCK_DGRAM)[0]
    except OSError:
        return socket.AF_INET, ""
    return family, str(address[0])


def _addresses() -> dict[str, list[str]]:
    """The addresses of each network interface, IPv4 first."""
    return {
        name: [
            entry.address.partition("%")[0]
            for family in (socket.AF_INET, socket.AF_INET6)
            for entry in entries
            if entry.family == family
        ]
        for name, entries in psutil.net_if_addrs().items()
    }


def _outer_interfaces() -> dict[str, list[str]]:
    """The addresses of the interfaces that are up and no loopback."""
    up = {name for name, stats in psutil.net_if_stats().items() if stats.isup}
    return {
        name: addresses
        for name, addresses in _addresses().items()
        if name in up and not any(address.startswith("127.") for address in addresses)
    }
