"""Downloads in the background: what the order will need next is fetched while the present is read."""

import os
import threading
from collections.abc import Callable, Sequence

from glsd.errors import UserError


class Prefetcher:
    """One thread a process that fetches what was wanted last; where it fails, the reader finds out, and says so."""

    def __init__(self, fetch: Callable[[int], None]):
        self._fetch = fetch
        self._process = -1
        self._thread: threading.Thread | None = None

    def want(self, numbers: Sequence[int]) -> None:
        """Fetch these, in this order, instead of what is still left of the list before."""
        # After a fork there is no thread, and its lock may be locked for ever; an error that is a bug ends it, too.
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
                    self._left = []  # the server is in trouble: no more requests than the reader makes
            except RuntimeError as error:
                if "shutdown" not in str(error):
                    raise
                return  # the process is ending, and takes no more work from anybody

    def __getstate__(self) -> dict:
        return {"_fetch": self._fetch, "_process": -1, "_thread": None}
