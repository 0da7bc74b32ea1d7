"""OpenCV without its thread pool."""

from collections.abc import Iterator
from contextlib import contextmanager

import cv2


@contextmanager
def single_threaded() -> Iterator[None]:
    """Let OpenCV work in the calling thread only, then as before.

    A pool that it started in the training process would hang in loader processes forked later, and in those, one pool
    each would be too many. What it computes does not depend on it.
    """
    before = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(before)
