"""Downloads in the background: shards that are needed next are fetched while the current ones are read."""

import os
import threading
from collections.abc import Callable, Sequence

from glsd.errors import UserError


class Prefetcher:
    """One thread per process that fetches the numbers of the latest request.

    A failed fetch ends the request without an error: the reader fetches the same shard again and reports it.
    """

    def __init__(self, fetch: Callable[[int], None]):
        self._fetch = fetch
        self._process = -1
        self._thread: threading.Thread | None = None

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these numbers in this order, instead of what is left of the request before."""
        # A forked process has no thread, and its copy of the lock may be locked. A bug in fetch ends the thread, too.
        if self._process != os.getpid() or self._thread is None or not self._thread.is_alive():
            self._process = os.getpid()
            self._left: list[int] = []
            self._changed = threading.Condition()
            self._thread = threading.Thread(target=self._work, daemon=True, name="prefetch")
            self._thread.start()
        with self._changed:
            self._left = list(reversed(numbers))
            self._changed.notify()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._left)
                number = self._left.pop()
            try:
                self._fetch(number)
            except UserError:
                with self._changed:
                    self._left = []  # do not add requests to a server that fails
            except RuntimeError as error:
                if "shutdown" not in str(error):
                    raise
                return  # the process is ending

    def __getstate__(self) -> dict:
        return {"_fetch": self._fetch, "_process": -1, "_thread": None}
