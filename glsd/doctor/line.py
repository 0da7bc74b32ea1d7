"""One line of the doctor's table: a verdict, what was found, how to fix it. Needs only Python 3.8."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

VERDICTS = ("ok", "note", "FIX")
HOSTS_SHOWN = 4


@dataclass(frozen=True)
class Line:
    """The result of one check."""

    verdict: str  # one of VERDICTS
    name: str
    found: str
    fix: str = ""  # what to do, unless the verdict is ok

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS or (self.verdict == "FIX" and not self.fix):
            raise ValueError(f"not a line of the table: {self}")


def table(lines: Iterable[Line]) -> list[str]:
    """Return the table as text, one line for each result."""
    rows = list(lines)
    width = max((len(row.name) for row in rows), default=0)
    return [
        plain(f"{row.verdict:4}  {row.name:{width}}  {row.found}{' -> ' + row.fix if row.fix else ''}")
        for row in rows
    ]


def summary(lines: Iterable[Line]) -> str:
    """Return the last line: how many results have which verdict, and what to do next."""
    counts = dict.fromkeys(VERDICTS, 0)
    for line in lines:
        counts[line.verdict] += 1
    said = f"{counts['ok']} ok, {counts['note']} to note, {counts['FIX']} to fix"
    return f"{said}: {'fix the lines marked FIX first' if counts['FIX'] else 'ready'}"


def plain(text: object) -> str:
    """Return a text as one line of printable characters."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def ranges(numbers: Iterable[int]) -> str:
    """Return a list of numbers as ranges: ``0-3, 5`` for 0 1 2 3 5."""
    parts: list[list[int]] = []
    for number in sorted(set(numbers)):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)


def who(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """Return ranks by host, such as ``h1 (ranks 0-3), h2 (rank 5)``; ranks of unknown hosts stand alone."""
    places: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        places.setdefault(hosts.get(rank, ""), []).append(rank)
    said = []
    for host, here in places.items():
        numbers = f"{'rank' if len(here) == 1 else 'ranks'} {ranges(here)}"
        said.append(f"{host} ({numbers})" if host else numbers)
    more = len(said) - HOSTS_SHOWN
    return ", ".join(said[:HOSTS_SHOWN]) + (f" and {more} more" if more > 0 else "")
