"""What the doctor says of one check: a verdict, what was found, what to do about it. Needs nothing but Python 3.8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

VERDICTS = ("ok", "note", "FIX")
HOSTS_SHOWN = 4


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    verdict: str  # of VERDICTS
    name: str
    found: str
    fix: str = ""  # what to do, for everything that is not ok

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS or (self.verdict == "FIX" and not self.fix):
            raise ValueError(f"not a line of the table: {self}")


def table(lines: Iterable[Line]) -> list[str]:
    """Return the rows as text, each in one line of its own."""
    rows = list(lines)
    width = max((len(row.name) for row in rows), default=0)
    return [
        plain(f"{row.verdict:4}  {row.name:{width}}  {row.found}{' -> ' + row.fix if row.fix else ''}")
        for row in rows
    ]


def summary(lines: Iterable[Line]) -> str:
    """Return the last line: how many of each verdict, and what that means."""
    counts = dict.fromkeys(VERDICTS, 0)
    for line in lines:
        counts[line.verdict] += 1
    said = f"{counts['ok']} ok, {counts['note']} to note, {counts['FIX']} to fix"
    return f"{said}: {'first do what stands behind FIX' if counts['FIX'] else 'ready'}"


def plain(text: object) -> str:
    """Return a text in one line, without what a terminal would do more with than show it."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def ranges(numbers: Iterable[int]) -> str:
    """Return ``0-3, 5`` for 0 1 2 3 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def who(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Return ``h1 (ranks 0-3), h2 (rank 5)``; a rank of which the host is not known stands for itself."""
    places: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        places.setdefault(hosts.get(rank, ""), []).append(rank)
    said = []
    for host, here in places.items():
        numbers = f"{'rank' if len(here) == 1 else 'ranks'} {ranges(here)}"
        said.append(f"{host} ({numbers})" if host else numbers)
    more = len(said) - HOSTS_SHOWN
    return ", ".join(said[:HOSTS_SHOWN]) + (f" and {more} more" if more > 0 else "")
