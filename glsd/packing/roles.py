"""Several roles of one data set (train and test, or train, query and gallery) as shards with one numbering of the classes."""

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from glsd.errors import BrokenImage, UserError
from glsd.packing.source import image_extension
from glsd.packing.write import (
    Sample,
    staging,
    write_classes,
    write_shards,
)
from glsd.rng import Stream, permutation
from glsd.shards.store import CLASSES_FILE, read_classes


class RoleImage(NamedTuple):
    """An image that is still to be read."""

    source: str  # where it comes from, for the table of sources
    label: int
    read: Callable[[], bytes]  # raises OSError or BrokenImage


@dataclass(frozen=True, kw_only=True)
class RoleSummary:
    """What was packed of one role and what was left out."""

    num_images: int
    num_classes: int
    shards: tuple[Path, ...]
    unreadable: tuple[tuple[str, str], ...] = ()  # source and reason


def pack_roles(
    roles: Mapping[str, Sequence[RoleImage]],
    dst: str | Path,
    *,
    classes: Sequence[str] = (),
    shard_megabytes: int = 256,
    shuffle_seed: int = 0,
    unreadable_hint: str | None = None,
) -> dict[str, RoleSummary]:
    """Pack each role, shuffled, into ``dst/{role}-{000000}.tar``: all roles or, when something fails, none.

    The bytes are packed as they are. An image whose header cannot be read is left out and listed; with
    ``unreadable_hint`` it is an error instead, which ends with the hint. ``classes`` names the classes in the order of
    their labels, of all roles together. Raises UserError if a role has no usable image, ``dst`` cannot be written, has
    shards of one of the roles, or a classes.json that says otherwise.
    """
    dst = Path(dst)
    if len(set(classes)) < len(classes):
        twice = Counter(classes).most_common(1)[0][0]
        raise UserError(f"two classes have the name {twice!r}: expected each name once")
    labels = {image.label for images in roles.values() for image in images}
    if classes and labels and max(labels) >= len(classes):
        raise UserError(f"label {max(labels)} has no name: {len(classes)} class names were given")
    earlier = dst / CLASSES_FILE
    if os.path.isfile(earlier) and read_classes(earlier) != list(classes):
        raise UserError(f"{earlier} of an earlier packing numbers other classes: pack into another folder")
    summaries = {}
    with staging(dst, list(roles)) as work:
        for role, images in roles.items():
            sources: list[str] = []
            seen: set[int] = set()
            unreadable: list[tuple[str, str]] = []
            names, count = write_shards(
                _samples(role, images, shuffle_seed, sources, seen, unreadable, unreadable_hint),
                work,
                role,
                shard_megabytes,
                source=f"role {role}",
                sources=sources,
            )
            summaries[role] = RoleSummary(
                num_images=count,
                num_classes=len(seen),
                shards=tuple(dst / name for name in names),
                unreadable=tuple(unreadable),
            )
        write_classes(work, classes)
    return summaries


def _samples(
    role: str,
    images: Sequence[RoleImage],
    seed: int,
    sources: list[str],
    seen: set[int],
    unreadable: list[tuple[str, str]],
    hint: str | None,
) -> Iterator[Sample]:
    """Read the images in shuffled order, one at a time; fill the lists of what was read and what could not be."""
    order = permutation(len(images), seed=seed, stream=Stream.PACK)
    for number in tqdm(order, f"packing {role}", unit=" images", disable=None):
        source, label, read = images[number]
        try:
            raw = read()
            extension = image_extension(raw)
        except (OSError, BrokenImage) as error:
            if hint is not None:
                raise UserError(f"{source} cannot be read ({error}): {hint}") from error
            unreadable.append((source, str(error)))
            continue
        sources.append(source)
        seen.add(label)
        yield raw, extension, label
