"""Processes that work together: the only file that touches torch.distributed.

Everything here works with one process as well (no process group needed) and is a collective call otherwise:
every rank makes it.
"""

import atexit
import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from jaxtyping import Float, Shaped
from torch import Tensor

from glsd.cluster.collectives import collective
from glsd.errors import UserError

Object = TypeVar("Object")
PIECE_BYTES = 64 * 2**20  # that gather_rows takes from each rank at once

# What really starts N ranks on CPUs; `accelerate launch --cpu --num_processes N` starts one and says nothing.
CPU_LAUNCH_LINE = (
    "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {n} --num_machines 1 "
    "--mixed_precision no --dynamo_backend no {script} ..."
)


def _running() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """Return this process's number, 0 alone."""
    return torch_dist.get_rank() if _running() else 0


def world_size() -> int:
    """Return the number of processes, 1 alone."""
    return torch_dist.get_world_size() if _running() else 1


def is_main() -> bool:
    """Return True on rank 0, the one that writes files and talks."""
    return rank() == 0


@collective
def barrier() -> None:
    """Wait until every rank has come here."""
    if world_size() > 1:
        torch_dist.barrier()


def all_reduce_sum(tensor: Shaped[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
    """Return the sum over ranks; the input itself when alone, else a new tensor without gradient."""
    return _all_reduce(tensor, "sum")


def all_reduce_mean(tensor: Shaped[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
    """Return the mean over ranks; the input itself when alone, else a new tensor without gradient."""
    return tensor if world_size() == 1 else _all_reduce(tensor, "sum") / world_size()


def all_reduce_max(tensor: Shaped[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
    """Return the elementwise largest over ranks; the input itself when alone, else a new tensor without gradient."""
    return _all_reduce(tensor, "max")


@collective
def _all_reduce(tensor: Tensor, operation: str) -> Tensor:
    if world_size() == 1:
        return tensor
    # A contiguous copy: the collective overwrites it, and the caller's tensor must stay as it is.
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    operations = {"sum": torch_dist.ReduceOp.SUM, "max": torch_dist.ReduceOp.MAX}
    torch_dist.all_reduce(result, op=operations[operation])
    return result


def gather_rows(tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Return the rows of all ranks, rank 0's first, on every rank; their number may differ between ranks."""
    if world_size() == 1:
        return tensor
    counts = gather_objects(len(tensor))
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    # In pieces: a rank that waits in one call for very long is taken for stuck (runtime/ending.py).
    pieces = [_all_gather(piece) for piece in padded.split(max(1, PIECE_BYTES // max(1, padded[:1].nbytes)))]
    if padded.is_cuda:
        collective(torch.cuda.synchronize)()
    of_ranks = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    return torch.cat([rows[:count] for rows, count in zip(of_ranks, counts, strict=True)])


def gather_equal(tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Return the rows of all ranks as gather_rows does, but without asking for their number: it is the same on each."""
    if world_size() == 1:
        return tensor
    return torch.cat(_all_gather(tensor.detach().contiguous()))


@collective
def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch_dist.all_gather(parts, tensor)
    return parts


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks, in rank order; the gradient of a row is the sum of what all ranks have for it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather_equal(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0])[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(tensor: Float[Tensor, "b e"]) -> Float[Tensor, "m e"]:
    """Return the rows of all ranks, rank 0's first, on every rank, with gradient; as many rows on each rank.

    When every rank computes the same loss of the result, the ranks' gradients add up to R times the one of the whole
    batch, and DDP's mean over the R ranks is the gradient that one process with the whole batch would have.
    """
    if world_size() == 1:
        return tensor
    return _GatherRows.apply(tensor)


@collective
def gather_objects(obj: Object) -> list[Object]:
    """Return every rank's object, in rank order, on every rank (small host objects, not for the hot path)."""
    if world_size() == 1:
        return [obj]
    gathered: list[Any] = [None] * world_size()
    torch_dist.all_gather_object(gathered, obj)
    return gathered


@collective
def broadcast_object(obj: Object) -> Object:
    """Return rank 0's object on every rank."""
    if world_size() == 1:
        return obj
    box = [obj]
    torch_dist.broadcast_object_list(box, src=0)
    return box[0]


def raise_together(error: UserError | None) -> None:
    """Raise on every rank if any rank has a UserError (the lowest rank's), so that none waits for one that stopped."""
    first = next((message for message in gather_objects(str(error) if error else None) if message), None)
    if first is not None:
        raise UserError(first)


def together(prepare: Callable[[], Object]) -> Object:
    """Return what every rank prepares for itself; a UserError of one rank is raised on all."""
    result, error = None, None
    try:
        result = prepare()
    except UserError as problem:
        error = problem
    raise_together(error)
    return result  # type: ignore[return-value]  # None only where prepare returned it


def check_world(num_processes: int, script: str = "launch/pretrain.py") -> None:
    """Raise UserError if the launcher was asked for several processes but each of them runs alone.

    Call it right after the Accelerator was made. Two launch lines do that silently on CPUs, and N copies of the same run would
    then write into one folder. num_processes: the Accelerator's (it can be 1 although a process group of N exists); script:
    name for the launch line in the message.
    """
    _soften_exit()
    asked = os.environ.get("WORLD_SIZE")
    if asked is not None and {int(asked), num_processes, world_size()} != {num_processes}:
        line = CPU_LAUNCH_LINE.format(n=asked, script=script)
        raise UserError(
            f"the launcher announced WORLD_SIZE={asked} but accelerate sees a world of {num_processes}: "
            f"on CPUs start it with '{line}'"
        )
    # accelerate's one-process launcher leaves a master address behind only if asked for more than one process.
    alone_by_mistake = "ACCELERATE_MIXED_PRECISION" in os.environ and "MASTER_ADDR" in os.environ
    if asked is None and num_processes == 1 and alone_by_mistake:
        line = CPU_LAUNCH_LINE.format(n="N", script=script)
        raise UserError(
            "accelerate was asked for several processes but started one (it does so with --cpu): "
            f"start N ranks on CPUs with '{line}', or one with --num_processes 1"
        )


def begin_max(number: int) -> Callable[[], int]:
    """Begin to find the largest of all ranks' numbers; the function that it returns waits for it, as late as possible.

    It travels between hosts, not devices: no device is waited for.
    """
    if world_size() == 1:
        return lambda: number
    box = torch.tensor(number)
    work = torch_dist.all_reduce(box, op=torch_dist.ReduceOp.MAX, group=_host_group(), async_op=True)

    def largest() -> int:
        work.wait()
        return int(box)

    return largest


@functools.cache
def _host_group() -> Any:
    """The group for tensors in host memory, None where that is the usual one; every rank calls it for the first time."""
    return None if torch_dist.get_backend() == "gloo" else torch_dist.new_group(backend="gloo")


def is_broken_connection(problem: Exception) -> bool:
    """Tell whether an error of a collective says that another rank could not be reached."""
    return isinstance(problem, torch_dist.DistError) or (
        isinstance(problem, RuntimeError) and "gloo" in str(problem)
    )


def notes(name: str) -> torch_dist.Store:
    """Return what all ranks can write small notes into, at any time and without waiting for each other; not alone."""
    # A client of its own: one client answers one thread at a time, and the main thread may wait in it for another rank.
    return torch_dist.PrefixStore(name, torch_dist.distributed_c10d._get_default_store()).clone()


def leave() -> None:
    """Wait for all ranks, then leave the process group, if there is one."""
    if not _running():
        return
    _soften_exit()
    barrier()
    torch_dist.destroy_process_group()


def _soften_exit() -> None:
    """Give gloo's threads a moment before the interpreter goes.

    They take the Python lock once more when their last work object dies; if the interpreter is already being torn down, the
    process aborts with exit code -6 after a good run (10-50 % of CPU runs, upstream pytorch #190489).
    """
    if _running() and torch_dist.get_backend() != "nccl":
        _sleep_at_exit()


@functools.cache
def _sleep_at_exit() -> None:
    atexit.register(time.sleep, 0.2)


def meeting_place(name: str, seconds: float) -> torch_dist.Store:
    """Return a store that the ranks announced by the environment share, made without waiting for any of them.

    Of MASTER_ADDR and MASTER_PORT; rank 0 keeps it unless the launcher does. name: of what is written. Raises RuntimeError
    if it cannot be reached in these seconds.
    """
    store = torch_dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True",
        timeout=timedelta(seconds=seconds),
        wait_for_workers=False,
        multi_tenant=True,
    )
    return torch_dist.PrefixStore(name, store)


def join(
    store: torch_dist.Store, *, device: torch.device, rank: int, world_size: int, seconds: float
) -> None:
    """Make the process group of all ranks over a meeting place; what takes longer than these seconds raises RuntimeError."""
    # Without it NCCL ends the process instead.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch_dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )


def send(tensor: Shaped[Tensor, "*s"], to: int) -> None:
    """Send a tensor to one rank, which calls ``receive``."""
    torch_dist.send(tensor, to)


def receive(tensor: Shaped[Tensor, "*s"], source: int) -> None:
    """Fill a tensor with what a rank sends."""
    torch_dist.recv(tensor, source)
