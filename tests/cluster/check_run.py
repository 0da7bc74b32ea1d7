"""Proves from its records that a pretraining run lost and doubled nothing, whatever it went through.

    python tests/cluster/check_run.py RUN [--like OTHER] [--shards PATTERN]

RUN is the folder of a run with ``--watch.sample_log true`` that has ended, early or not. --like: another run that must be the
same to the bit, but for its times; --shards: the shards it was made with, to compare with the order of their samples.
One line for each check; exit code 0 when all hold, 1 when one does not, 2 when there is nothing to check.
"""

import argparse
import collections
import functools
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from glsd.data.order import EpochOrder, epoch_length, epoch_samples
from glsd.errors import UserError
from glsd.runtime import checkpoint
from glsd.runtime.sections import board_name, numbers
from tests.cluster.run_record import (
    Record,
    WrongRecord,
    read_record,
    rows,
    same,
    same_tree,
)


def check_steps(record: Record) -> str:
    """Steps 1, 2, ... to the last one, each once, in order."""
    same("samples.jsonl, steps", [row["step"] for row in record.samples], range(1, record.last + 1))
    if record.planned is not None and record.last > record.planned:
        raise WrongRecord(f"samples.jsonl goes to step {record.last}, the run ends at {record.planned}")
    known = "" if record.planned is None else f" of {record.planned}"
    return f"steps 1 to {record.last}{known}, each once"


def check_metrics(record: Record) -> str:
    """A row at every watch.log_every steps and at the end of the run."""
    steps = [row["step"] for row in record.metrics if "probe" not in row]
    every = record.config["watch"]["log_every"]
    expected = list(range(every, record.last + 1, every))
    at_the_end = record.planned == record.last if record.planned is not None else record.last in steps
    if at_the_end and record.last % every:
        expected.append(record.last)  # a run that was stopped early has none there
    same("metrics.jsonl, steps", steps, expected)
    in_order = [row["step"] for row in record.metrics]
    same("metrics.jsonl, order of rows", in_order, sorted(in_order))
    return f"{len(steps)} rows of metrics, each once"


def check_probes(record: Record) -> str:
    """Each probe once, where it is due."""
    steps = [row["step"] for row in record.metrics if "probe" in row]
    every = record.config["watch"]["probe_every"]
    expected = list(range(0, record.last + 1, every)) if every else []
    if every and record.last % every and record.last in (record.planned, *steps):
        expected.append(record.last)
    stopped_early = record.planned is None or record.last < record.planned
    if stopped_early and expected[-1:] == [record.last] and record.last not in steps:
        expected.pop()  # it is made when the run goes on
    same("metrics.jsonl, probes at", steps, expected)
    return f"{len(steps)} probes, each once"


def check_samples(record: Record) -> str:
    """Whole batches, each of one epoch, epochs one after the other, no sample twice in one, only ragged tails missing."""
    size = record.batch_size
    for row in record.samples:
        epochs = {epoch for epoch, _ in row["samples"]}
        if len(row["samples"]) != size or len(epochs) != 1:
            raise WrongRecord(
                f"step {row['step']} has {len(row['samples'])} samples of epochs {sorted(epochs)}, "
                f"expected {size} of one"
            )
    by_epoch = record.epochs()
    turns = [row["samples"][0][0] for row in record.samples]
    same("samples.jsonl, epochs", turns, sorted(turns))
    same("samples.jsonl, epochs", list(by_epoch), range(len(by_epoch)))
    if record.config["data"]["weights"]:
        return f"{len(turns)} batches of {size} (weighted: see the order)"
    # Without shards: whatever any epoch has used.
    known = collections.Counter(_every_key(record) or {key for keys in by_epoch.values() for key in keys})
    for epoch, keys in by_epoch.items():
        used = collections.Counter(keys)
        if twice := used - known:
            raise WrongRecord(f"epoch {epoch} uses {_some(twice)} too often")
        missing = known.total() - used.total()
        whole = epoch < len(by_epoch) - 1 or (record.planned == record.last and not _cut_short(record))
        if whole and missing >= size:
            raise WrongRecord(
                f"epoch {epoch} has not used {missing} samples, such as {_some(known - used)}: less than {size} may be left over"
            )
    return f"{len(turns)} batches of {size} in {len(by_epoch)} epochs, every sample once in each"


def _every_key(record: Record) -> list[str]:
    shards = record.shards
    return [] if shards is None else [shards.key(index) for index in range(len(shards))]


def _cut_short(record: Record) -> bool:
    """Whether the plan itself ends in the middle of an epoch."""
    assert record.shards is not None
    return (
        record.last
        % (epoch_samples(record.shards.shard_sizes, record.shards.shard_weights) // record.batch_size)
        != 0
    )


def check_order(record: Record) -> str:
    """The batches are those of the order, which is a function of seed, epoch and shards."""
    if record.shards is None:
        return "order not compared (--shards)"
    length = epoch_length(
        epoch_samples(record.shards.shard_sizes, record.shards.shard_weights), record.batch_size
    )
    for epoch, keys in record.epochs().items():
        order = EpochOrder(
            record.shards.shard_sizes,
            seed=record.config["seed"],
            epoch=epoch,
            window_shards=record.config["data"]["window_shards"],
            shard_weights=record.shards.shard_weights,
        )
        if len(keys) > length:
            raise WrongRecord(f"epoch {epoch} has {len(keys)} samples, expected {length}")
        same(f"epoch {epoch}, keys", keys, [record.shards.key(order[i]) for i in range(len(keys))])
    return "every batch is the one of the order"


def check_quarantine(record: Record) -> str:
    """No broken sample is written down twice, or for a later step."""
    path = record.folder / "quarantine.jsonl"
    broken = rows(path) if path.exists() else []
    places = [(row["epoch"], row["position"]) for row in broken]
    same("quarantine.jsonl, (epoch, position)", places, sorted(set(places)))
    if broken and broken[-1]["step"] > record.last:
        raise WrongRecord(f"quarantine.jsonl goes to step {broken[-1]['step']}, the run to {record.last}")
    return f"{len(broken)} broken samples, each once"


def check_tensorboard(record: Record) -> str:
    """TensorBoard shows the rows of metrics.jsonl, each once, after what came after a resumed step is purged."""
    from tensorboard.backend.event_processing.event_accumulator import (  # type: ignore[import-untyped]  # a second
        EventAccumulator,
    )

    board = EventAccumulator(
        str(record.folder / "tensorboard"), size_guidance={"scalars": 0}, purge_orphaned_data=True
    )
    board.Reload()
    expected: dict[str, list[tuple[int, str]]] = {}
    for row in record.metrics:
        # Infinities and nan are texts in JSON.
        told = {
            name: float(value) if value in ("nan", "inf", "-inf") else value for name, value in row.items()
        }
        for name, value in numbers(told).items():
            if (shown_as := board_name(name)) is not None:
                expected.setdefault(shown_as, []).append((row["step"], _single(value)))
    shown = {tag: [(e.step, _single(e.value)) for e in board.Scalars(tag)] for tag in board.Tags()["scalars"]}
    same("tensorboard, names", sorted(shown), sorted(expected))
    for name, points in expected.items():
        same(f"tensorboard {name}, (step, value)", shown[name], points)
    return f"{len(shown)} curves of TensorBoard with {sum(map(len, shown.values()))} points, each once"


def _single(value: float) -> str:
    """A number as single precision has it, in a form in which nan is equal to nan."""
    return str(np.float32(value))


def check_checkpoints(record: Record) -> str:
    """All checkpoints are intact by their checksums, and the newest is the last step."""
    folder = record.folder / "checkpoints"
    paths = sorted(folder.glob("step_*"))
    try:
        steps = [checkpoint.load(path).step for path in paths]
    except UserError as problem:
        raise WrongRecord(str(problem)) from problem
    if not steps or max(steps) != record.last:
        raise WrongRecord(
            f"the newest of {len(steps)} checkpoints is of step {max(steps, default=0)}, not {record.last}"
        )
    if (folder / "latest").resolve() != paths[-1].resolve():
        raise WrongRecord(f"checkpoints/latest is {(folder / 'latest').resolve().name}, not {paths[-1].name}")
    return f"checkpoints of steps {', '.join(map(str, steps))} intact"


CHECKS: tuple[Callable[[Record], str], ...] = (
    check_steps,
    check_metrics,
    check_probes,
    check_samples,
    check_order,
    check_quarantine,
    check_tensorboard,
    check_checkpoints,
)


def check_alike(record: Record, other: Record) -> str:
    """The same samples, rows (without times) and final checkpoint, to the bit."""
    same(f"samples of {other.folder}", record.samples, other.samples)
    same(f"rows of {other.folder}", *map(_untimed, (record, other)))
    mine, theirs = (checkpoint.load(run.folder / "checkpoints" / "latest") for run in (record, other))
    same_tree(
        "checkpoint",
        [mine.step, mine.tensors, mine.optimizer],
        [theirs.step, theirs.tensors, theirs.optimizer],
    )
    return f"the same as {other.folder}, to the bit"


def _untimed(record: Record) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if name != "timing"} for row in record.metrics]


def _some(keys: Iterable[str]) -> str:
    return " ".join(sorted(keys)[:5])


def main(argv: list[str]) -> int:
    """Check a run; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--like", type=Path)
    parser.add_argument("--shards")
    words = parser.parse_args(argv)
    try:
        record = read_record(words.run, words.shards)
        other = read_record(words.like, words.shards) if words.like else None
    except UserError as problem:
        print(f"error: {problem}", file=sys.stderr)
        return 2
    except WrongRecord as problem:
        print(f"WRONG {problem}")
        return 1
    checks: list[Callable[[Record], str]] = [
        *CHECKS,
        *([functools.partial(check_alike, other=other)] if other else []),
    ]
    code = 0
    for check in checks:
        try:
            print(f"ok    {check(record)}")
        except WrongRecord as problem:
            print(f"WRONG {problem}")
            code = 1
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
