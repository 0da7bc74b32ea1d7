"""What an examination of shards says of one topic."""

from typing import Literal, NamedTuple


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "note", "FIX"]  # FIX: training or measuring with these shards goes wrong
    topic: str
    text: str
    items: tuple[tuple[str, str], ...] = ()  # where, and what is there


def some(count: int, what: str, plural: str = "") -> str:
    """Return ``1 image`` or ``1,234 images``."""
    return f"{count:,} {what if count == 1 else plural or what + 's'}"
