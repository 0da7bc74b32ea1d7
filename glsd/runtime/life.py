"""Which of the others are alive, by signs that change as long as they are; and whether all of them still get on."""

import time
from collections.abc import Callable, Sequence

STEPS = 10  # a step may take as many times the longest one so far before it counts as standing still


class Signs:
    """When each rank's sign was last seen to change, by this process's own clock: those of hosts may differ.

    ranks: whom to look after; clock: seconds, never going back.
    """

    def __init__(self, ranks: Sequence[int], *, clock: Callable[[], float] = time.monotonic):
        self.ranks = tuple(ranks)
        self._clock = clock
        self._signs: dict[int, bytes] = {}
        self.forgive()

    def forgive(self) -> None:
        """Begin anew: this process itself stood still, and cannot know who did not."""
        self._changed = dict.fromkeys(self.ranks, self._clock())

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


class Progress:
    """For how long ranks that are all alive have not come any further, as when the link between two of them is cut.

    Nothing is said of times in which a rank does something else than steps (saves, waits for data), nor of the first step.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._steps: tuple[str, ...] = ()
        self._since: float | None = None
        self._longest = 0.0

    def note(self, steps: Sequence[str]) -> None:
        """Take how many steps every rank has done; anything but a number: it does something else."""
        now = self._clock()
        if not all(step.isdecimal() for step in steps):
            self._since = None
        elif self._since is None or self._steps != tuple(steps):
            if self._since is not None:
                self._longest = max(self._longest, now - self._since)
            self._steps, self._since = tuple(steps), now

    def still(self, patience: float) -> float:
        """Return the seconds since the last step if they are more than ``patience`` and ten of the longest step, else 0."""
        if self._since is None or not self._longest:
            return 0.0
        seconds = self._clock() - self._since
        return seconds if seconds > patience + STEPS * self._longest else 0.0
