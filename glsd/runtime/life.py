"""Which of the others are alive, by signs that change as long as they are."""

import time
from collections.abc import Callable, Sequence


class Signs:
    """When each rank's sign was last seen to change, by this process's own clock: those of hosts may differ.

    ranks: whom to look after; clock: seconds, never going back.
    """

    def __init__(self, ranks: Sequence[int], *, clock: Callable[[], float] = time.monotonic):
        self.ranks = tuple(ranks)
        self._clock = clock
        self._signs: dict[int, bytes] = {}
        self._changed = dict.fromkeys(self.ranks, clock())

    def note(self, signs: dict[int, bytes]) -> None:
        """Take what every rank's sign is now."""
        now = self._clock()
        for rank, sign in signs.items():
            if self._signs.get(rank) != sign:
                self._signs[rank], self._changed[rank] = sign, now

    def silent(self, longer_than: float) -> dict[int, float]:
        """Return the ranks whose sign has not changed for longer than so many seconds, with how many."""
        now = self._clock()
        return {rank: now - at for rank, at in self._changed.items() if now - at > longer_than}
