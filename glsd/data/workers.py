"""How loader processes behave: the training process decides when they end, an error stays one line."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from glsd.errors import UserError

LOOK_EVERY = 2.0  # seconds between two looks whether the training process is still there


def make_loader(
    dataset: Any,
    batches: Iterable[list],
    *,
    collate: Callable[[Any], Any],
    num_workers: int,
    pin_memory: bool,
) -> DataLoader:
    """Return the DataLoader over ``batches``; what comes out does not depend on the number of workers."""
    if num_workers < 0:
        raise UserError(f"num_workers is {num_workers}: expected 0 (read in the training process) or more")
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=obey_only_the_parent,
        generator=torch.Generator(),  # the DataLoader would draw from the global one otherwise
    )


def raised(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items; a UserError that a worker handed over as a value is raised here."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def obey_only_the_parent(worker: int) -> None:
    """Make a loader process deaf to signals meant for the run: the training process saves, then ends it.

    Schedulers signal every process of a job; a worker that dies of it would take the training process down
    before it saved. SIGTERM from the training process itself is obeyed, so that a stuck worker can still be
    ended.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, which has no schedulers either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """End when the parent says so, or is no longer there: who writes into a pipe that nobody reads would wait for ever."""
    parent = multiprocessing.parent_process()
    while parent is not None:
        told = signal.sigtimedwait({signal.SIGTERM}, LOOK_EVERY)
        if told is None and os.getppid() != parent.pid:
            os._exit(1)
        if told is not None and told.si_pid == parent.pid:
            os._exit(0)  # as torch does: anything else is reported as a crash
