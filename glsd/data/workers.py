"""Loader processes: a UserError stays one line, the training process decides when they end, OpenCV starts no threads."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

from glsd.errors import UserError

POLL_EVERY = 2.0  # seconds between two checks that the training process is still there


def make_loader(
    dataset: Any,
    batches: Iterable[list],
    *,
    collate: Callable[[list], Any],
    num_workers: int,
    pin_memory: bool,
) -> Iterator[Any]:
    """Return an iterator over the collated samples of ``batches``, the same for any number of worker processes.

    A UserError of the dataset is raised here as it is; the DataLoader alone would wrap it in a traceback.
    """
    if num_workers < 0:
        raise UserError(f"num_workers is {num_workers}: expected 0 (read in the training process) or more")
    loader = DataLoader(
        _Samples(dataset),
        batch_sampler=batches,
        collate_fn=partial(_collated, collate),
        num_workers=num_workers,
        pin_memory=pin_memory,
        worker_init_fn=ignore_signals_of_the_run,
        generator=torch.Generator(),  # the DataLoader would draw from the global one otherwise
    )
    return raised(loader)


class _Samples(Dataset):
    """The dataset, read a batch at a time; a UserError is handed on as a value."""

    def __init__(self, dataset: Any):
        self._dataset = dataset

    def __getitems__(self, places: Sequence[Any]) -> list | UserError:
        try:
            return [self._dataset[place] for place in places]
        except UserError as error:
            return error


def _collated(collate: Callable[[list], Any], samples: list | UserError) -> Any:
    try:
        return samples if isinstance(samples, UserError) else collate(samples)
    except UserError as error:
        return error


def raised(items: Iterable[Any]) -> Iterator[Any]:
    """Yield the items; raise the first that is a UserError."""
    for item in items:
        if isinstance(item, UserError):
            raise item
        yield item


def ignore_signals_of_the_run(worker: int) -> None:
    """Make a loader process ignore the signals of a stop: the training process saves first, then ends its workers.

    Schedulers signal every process of a job. A worker that died of it would stop the training process before it saved.
    SIGTERM from the training process itself still ends a worker, even one that is stuck.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    if hasattr(signal, "sigtimedwait"):  # not on macOS, which has no schedulers either
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_the_parent, daemon=True).start()


def _end_with_the_parent() -> None:
    """End this process when the parent asks for it or is gone; a write into a pipe that nobody reads would block forever."""
    parent = multiprocessing.parent_process()
    while parent is not None:
        received = signal.sigtimedwait({signal.SIGTERM}, POLL_EVERY)
        if received is None and os.getppid() != parent.pid:
            os._exit(1)
        if received is not None and received.si_pid == parent.pid:
            os._exit(0)  # as torch does: anything else is reported as a crash


@contextmanager
def single_threaded() -> Iterator[None]:
    """Run OpenCV in the calling thread only: its thread pool would hang in loader processes that are forked later."""
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
