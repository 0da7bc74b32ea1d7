"""Finding what is wrong with shards: the terms of a report. No heavy import, because help texts need them."""

from typing import Literal, NamedTuple

NEAR_BITS = 6  # default: the hashes of two near-duplicates differ in at most this many of 64 bits


class Finding(NamedTuple):
    """One line of the report."""

    level: Literal["ok", "note", "FIX"]  # FIX: training or measuring with these shards goes wrong
    topic: str
    text: str
    items: tuple[tuple[str, str], ...] = ()  # the images or shards: where, and what is there


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return ``1 image`` or ``1,234 images``."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def have(count: int, noun: str, plural: str = "") -> str:
    """Return ``1 image has`` or ``1,234 images have``."""
    return f"{counted(count, noun, plural)} {'has' if count == 1 else 'have'}"
