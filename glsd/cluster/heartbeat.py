"""Heartbeats of ranks: which ranks have gone silent, and whether ranks that are all alive still make progress."""

import time
from collections.abc import Callable, Sequence

LONGEST_STEPS = 10  # a step may take this many times the longest one so far before it counts as stuck


class Heartbeats:
    """When the heartbeat of each rank last changed, by this process's own clock: clocks of hosts differ.

    ranks: those to watch. clock: seconds, never going back.
    """

    def __init__(self, ranks: Sequence[int], *, clock: Callable[[], float] = time.monotonic):
        self.ranks = tuple(ranks)
        self._clock = clock
        self._beats: dict[int, bytes] = {}
        self.reset()

    def reset(self) -> None:
        """Count from now on: this process itself stood still and cannot know which ranks did."""
        self._changed = dict.fromkeys(self.ranks, self._clock())

    def note(self, beats: dict[int, bytes]) -> None:
        """Take the present heartbeat of every rank."""
        now = self._clock()
        for rank, beat in beats.items():
            if self._beats.get(rank) != beat:
                self._beats[rank], self._changed[rank] = beat, now

    def silent(self, longer_than: float) -> dict[int, float]:
        """Return the ranks that have been silent for longer than so many seconds, with their seconds of silence."""
        now = self._clock()
        return {rank: now - at for rank, at in self._changed.items() if now - at > longer_than}


class Progress:
    """How long ranks that are all alive have made no progress, as when the link between two of them is cut.

    Time does not count while a rank does something other than steps (it saves, or waits for data) outside of collective calls.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._longest = 0.0
        self.reset()

    def reset(self) -> None:
        """Count from now on: this process itself stood still and cannot know for how long the other ranks did."""
        self._states: tuple[str, ...] = ()
        self._since: float | None = None

    def note(self, states: Sequence[str]) -> None:
        """Take the state of every rank: ``activity/call``.

        activity: the number of steps done, or a word for anything else. call: the number of the collective call that the rank is
        in, empty outside of one. A rank with a word and no call may take its time; any other should make progress.
        """
        if self._states == tuple(states):
            return
        now, since = self._clock(), self._since
        if since is not None:
            self._longest = max(self._longest, now - since)
        self._states = tuple(states)
        self._since = now if all(map(_must_progress, states)) else None

    def stuck(self, patience: float) -> float:
        """Return the seconds without progress if they exceed ``patience`` and ten times the longest step so far, else 0."""
        since = self._since  # another thread may reset it
        if since is None:
            return 0.0
        seconds = self._clock() - since
        return seconds if seconds > patience + LONGEST_STEPS * self._longest else 0.0


def in_collective(state: str) -> bool:
    """Tell whether a rank in this state waits in a collective call."""
    return not state.endswith("/")


def _must_progress(state: str) -> bool:
    return in_collective(state) or state.removesuffix("/").isdecimal()
