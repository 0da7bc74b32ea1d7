"""Collective operations of torch.distributed, and the process group they run in.

Everything works in a single process without a process group, too. With several ranks each function that exchanges data is a
collective call: every rank makes it.
"""

import atexit
import functools
import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, ParamSpec, TypeVar

import torch
import torch.distributed as torch_dist
from jaxtyping import Float, Shaped
from torch import Tensor

from glsd.errors import UserError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
Object = TypeVar("Object")
PIECE_BYTES = 64 * 2**20  # gather_rows takes at most this many bytes from each rank at once


class _Activity:
    """What the main thread does, for the threads that watch the ranks."""

    doing = "-"  # the number of steps done, or another activity
    last_step, num_steps = "", 0  # the last step done, and how many this process has done
    call, num_calls = "", 0  # the collective call that it is in, "" outside of one


activity = _Activity()


def collective(call: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Mark a collective call: a function that returns once the other ranks have called it too.

    A marked function must not call another one.
    """

    @functools.wraps(call)
    def marked(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        activity.num_calls += 1
        activity.call = str(activity.num_calls)
        try:
            return call(*args, **kwargs)
        finally:
            activity.call = ""

    return marked


def doing(what: str) -> str:
    """Set the activity of the main thread, the number of steps done or a word; return the one before."""
    before, activity.doing = activity.doing, what
    if what.isdecimal() and what != activity.last_step:
        activity.last_step, activity.num_steps = what, activity.num_steps + 1
    return before


def _has_group() -> bool:
    return torch_dist.is_available() and torch_dist.is_initialized()


def rank() -> int:
    """Return the rank of this process, 0 in a single process."""
    return torch_dist.get_rank() if _has_group() else 0


def world_size() -> int:
    """Return the number of ranks, 1 in a single process."""
    return torch_dist.get_world_size() if _has_group() else 1


def is_main() -> bool:
    """Tell whether this is rank 0, which writes files and prints."""
    return rank() == 0


@collective
def barrier() -> None:
    """Wait until every rank has called it."""
    if world_size() > 1:
        torch_dist.barrier()


def all_reduce_sum(tensor: Shaped[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
    """Return the sum over ranks, a new tensor without gradient; a single process returns the input itself."""
    return _all_reduce(tensor, "SUM")


def all_reduce_mean(tensor: Shaped[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
    """Return the mean over ranks, a new tensor without gradient; a single process returns the input itself."""
    return tensor if world_size() == 1 else _all_reduce(tensor, "SUM") / world_size()


def all_reduce_max(tensor: Shaped[Tensor, "*s"]) -> Shaped[Tensor, "*s"]:
    """Return the elementwise maximum over ranks, a new tensor without gradient; a single process returns the input itself."""
    return _all_reduce(tensor, "MAX")


@collective
def _all_reduce(tensor: Tensor, operation: str) -> Tensor:
    if world_size() == 1:
        return tensor
    # A contiguous copy, because the collective overwrites its argument.
    result = tensor.detach().clone(memory_format=torch.contiguous_format)
    torch_dist.all_reduce(result, op=getattr(torch_dist.ReduceOp, operation))
    return result


def gather_rows(tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Return the rows of all ranks in rank order; their number may differ between ranks."""
    if world_size() == 1:
        return tensor
    counts = gather_objects(len(tensor))
    padded = tensor.new_zeros((max(counts), *tensor.shape[1:]))
    padded[: len(tensor)] = tensor.detach()
    # In pieces: a rank that stays in one call for very long counts as stuck (see heartbeat.Progress).
    pieces = [_all_gather(piece) for piece in padded.split(max(1, PIECE_BYTES // max(1, padded[:1].nbytes)))]
    if padded.is_cuda:
        collective(torch.cuda.synchronize)()
    of_ranks = [torch.cat(parts) for parts in zip(*pieces, strict=True)]
    return torch.cat([rows[:count] for rows, count in zip(of_ranks, counts, strict=True)])


def gather_equal(tensor: Shaped[Tensor, "n ..."]) -> Shaped[Tensor, "m ..."]:
    """Return the rows of all ranks in rank order; every rank has the same number of rows, so it is not exchanged."""
    if world_size() == 1:
        return tensor
    return torch.cat(_all_gather(tensor.detach().contiguous()))


@collective
def _all_gather(tensor: Tensor) -> list[Tensor]:
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    torch_dist.all_gather(parts, tensor)
    return parts


class _GatherRows(torch.autograd.Function):
    """Rows of all ranks in rank order; the gradient of a row is the sum of its gradients on all ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.rows = len(tensor)
        return gather_equal(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return all_reduce_sum(gradients[0])[rank() * ctx.rows : (rank() + 1) * ctx.rows]


def gather_with_grad(tensor: Float[Tensor, "b e"]) -> Float[Tensor, "m e"]:
    """Return the rows of all ranks in rank order, with gradient; every rank has the same number of rows.

    If each of the R ranks computes the same loss of the result, their gradients add up to R times the gradient of the global
    batch. DDP's mean over ranks is then the gradient that one process with the global batch would have.
    """
    if world_size() == 1:
        return tensor
    return _GatherRows.apply(tensor)


@collective
def gather_objects(obj: Object) -> list[Object]:
    """Return the objects of all ranks in rank order (small host objects, not for every step)."""
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
    """Raise a UserError on every rank if any rank has one (that of the lowest rank), so that no rank waits for one that stopped."""
    first = next((message for message in gather_objects(str(error) if error else None) if message), None)
    if first is not None:
        raise UserError(first)


def together(prepare: Callable[[], Object]) -> Object:
    """Return what ``prepare`` returns on this rank; a UserError of any rank is raised on all ranks."""
    result, error = None, None
    try:
        result = prepare()
    except UserError as problem:
        error = problem
    raise_together(error)
    return result  # type: ignore[return-value]  # None only if prepare returned it


def begin_max(number: int) -> Callable[[], int]:
    """Start to compute the maximum of a number over ranks; the returned function waits for the result.

    The numbers travel between hosts, so that no device is synchronized.
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
    """The group for tensors in host memory, None if the default group is one; the first call is collective."""
    return None if torch_dist.get_backend() == "gloo" else torch_dist.new_group(backend="gloo")


def is_broken_connection(problem: Exception) -> bool:
    """Tell whether an error of a collective call means that another rank could not be reached."""
    return isinstance(problem, torch_dist.DistError) or (
        isinstance(problem, RuntimeError) and "gloo" in str(problem)
    )


def shared_store(name: str) -> torch_dist.Store:
    """Return a key-value store that all ranks read and write without waiting for each other; needs a process group."""
    # A client of its own: a client serves one thread at a time, and the main thread may wait in it for another rank.
    return torch_dist.PrefixStore(name, torch_dist.distributed_c10d._get_default_store()).clone()


def leave() -> None:
    """Wait for all ranks, then destroy the process group, if there is one."""
    if not _has_group():
        return
    soften_exit()
    barrier()
    torch_dist.destroy_process_group()


def soften_exit() -> None:
    """Give gloo's threads a moment before the interpreter ends.

    They take the Python lock once more when their last work object dies. If the interpreter is already being torn down then,
    the process aborts with exit code -6 after a good run (10-50 % of CPU runs, upstream pytorch #190489).
    """
    if _has_group() and torch_dist.get_backend() != "nccl":
        _sleep_at_exit()


@functools.cache
def _sleep_at_exit() -> None:
    atexit.register(time.sleep, 0.2)


def open_store(name: str, seconds: float) -> torch_dist.Store:
    """Return the key-value store at MASTER_ADDR and MASTER_PORT, without waiting for other ranks.

    Rank 0 hosts it unless the launcher does. name: prefix of its keys. Raises RuntimeError if it cannot be reached in these
    seconds.
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
    """Make the process group of all ranks from a store; a call that takes longer than these seconds raises RuntimeError."""
    # Otherwise NCCL ends the process instead.
    os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
    torch_dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=torch_dist.PrefixStore("group", store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=seconds),
    )


def send(tensor: Shaped[Tensor, "*s"], to: int) -> None:
    """Send a tensor to one rank, which must call ``receive``."""
    torch_dist.send(tensor, to)


def receive(tensor: Shaped[Tensor, "*s"], source: int) -> None:
    """Fill a tensor with what one rank sends."""
    torch_dist.recv(tensor, source)
