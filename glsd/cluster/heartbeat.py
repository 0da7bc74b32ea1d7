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

    Nothing is said while a rank does something else than steps (saves, waits for data) and waits for no other rank.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._longest = 0.0
        self.forgive()

    def forgive(self) -> None:
        """Begin anew: this process itself stood still, and cannot know for how long the others did."""
        self._states: tuple[str, ...] = ()
        self._since: float | None = None

    def note(self, states: Sequence[str]) -> None:
        """Take what every rank does: ``steps/call``, the number of steps done or a word, and which collective call it is in.

        A rank that works on a step, or waits in a call, should come further; one with a word and no call takes its time.
        """
        if self._states == tuple(states):
            return
        now, since = self._clock(), self._since
        if since is not None:
            self._longest = max(self._longest, now - since)
        self._states = tuple(states)
        self._since = now if all(map(_counts, states)) else None

    def still(self, patience: float) -> float:
        """Return the seconds since a rank came further if they are more than ``patience`` and ten of the longest so far, else 0."""
        since = self._since  # another thread may forgive
        if since is None:
            return 0.0
        seconds = self._clock() - since
        return seconds if seconds > patience + STEPS * self._longest else 0.0


def waits(state: str) -> bool:
    """Tell whether a rank in this state waits for others."""
    return not state.endswith("/")


def _counts(state: str) -> bool:
    return waits(state) or state.removesuffix("/").isdecimal()
