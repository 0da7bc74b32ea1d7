"""What a pretraining run wrote down, read again."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from glsd.data.order import epoch_samples
from glsd.errors import UserError
from glsd.shards.store import ShardSet, open_shards


class WrongRecord(Exception):
    """What a check found."""


@dataclass(frozen=True)
class Record:
    """What a run wrote down."""

    folder: Path
    config: dict[str, Any]
    samples: list[dict[str, Any]]
    metrics: list[dict[str, Any]]
    shards: ShardSet | None

    @property
    def batch_size(self) -> int:
        return self.config["optim"]["batch_size"]

    @property
    def last(self) -> int:
        """The last step."""
        return self.samples[-1]["step"] if self.samples else 0

    @property
    def planned(self) -> int | None:
        """Where the run ends that nobody stops; None if it is not known how many samples there are."""
        if self.shards is None:
            return None
        optim = self.config["optim"]
        total = optim["epochs"] * (
            epoch_samples(self.shards.shard_sizes, self.shards.shard_weights) // self.batch_size
        )
        return min(total, optim["max_steps"] or total)

    def epochs(self) -> dict[int, list[str]]:
        """The keys of every epoch, in order."""
        found: dict[int, list[str]] = {}
        for row in self.samples:
            for epoch, key in row["samples"]:
                found.setdefault(epoch, []).append(key)
        return found


def read_record(folder: Path, shards: str | None = None) -> Record:
    """Read what a run wrote down; UserError where there is nothing to read, WrongRecord for a line that is not whole."""
    for name in ("config.yaml", "metrics.jsonl", "samples.jsonl"):
        if not (folder / name).is_file():
            raise UserError(
                f"{folder} has no {name}: expected the folder of a run with --watch.sample_log true"
            )
    config = yaml.safe_load((folder / "config.yaml").read_text())
    weights = config["data"]["weights"]
    if weights and not shards:
        raise UserError(f"{folder} weighs its shards: how often a sample comes needs --shards")
    return Record(
        folder=folder,
        config=config,
        samples=rows(folder / "samples.jsonl"),
        metrics=rows(folder / "metrics.jsonl"),
        shards=open_shards(shards, weights=weights) if shards else None,
    )


def rows(path: Path) -> list[dict[str, Any]]:
    """Read a .jsonl; WrongRecord for a line that is not whole or has no step."""
    found = []
    for number, line in enumerate(path.read_text(errors="replace").splitlines(), start=1):
        try:
            found.append(json.loads(line))
            found[-1]["step"] += 0  # there is one, a number
        except (ValueError, KeyError, TypeError) as problem:
            raise WrongRecord(f"{path.name} line {number} is not a whole row") from problem
    return found


def same(what: str, found: Iterable[Any], expected: Iterable[Any]) -> None:
    """WrongRecord naming the entry where two lists differ first."""
    found, expected = list(found), list(expected)
    if found == expected:
        return
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            raise WrongRecord(f"{what}: entry {place} is {_brief(one)}, expected {_brief(other)}")
    rest = (
        f"{_brief(found[len(expected)])} too much"
        if len(found) > len(expected)
        else f"{_brief(expected[len(found)])} missing"
    )
    raise WrongRecord(f"{what}: {len(found)} entries, expected {len(expected)}: {rest}")


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def same_tree(where: str, mine: Any, theirs: Any) -> None:
    """WrongRecord naming the place where two nested values with tensors in them differ first."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        same(f"{where}, names", list(mine), list(theirs))
        for name, value in mine.items():
            same_tree(f"{where}/{name}", value, theirs[name])
    elif isinstance(mine, list | tuple) and isinstance(theirs, list | tuple):
        same(f"{where}, number", [len(mine)], [len(theirs)])
        for number, value in enumerate(mine):
            same_tree(f"{where}/{number}", value, theirs[number])
    elif isinstance(mine, torch.Tensor) and isinstance(theirs, torch.Tensor):
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            raise WrongRecord(f"{where} is not the same")
    else:
        same(where, [mine], [theirs])
