"""The checker passes a record without damage and names every kind of damage."""

import copy
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.utils.tensorboard import SummaryWriter

from glsd.data.order import EpochOrder, epoch_length
from glsd.runtime import checkpoint
from glsd.runtime.sections import board_name, numbers
from glsd.shards.store import open_shards
from tests.cluster import check_run
from tests.helpers.uneven_run import pack_uneven

SIZE, EVERY, PROBE_EVERY, STEPS = 12, 3, 7, 45  # two epochs of 20 steps and a quarter of the third
Rows = list[dict[str, Any]]
Parts = dict[str, Rows]


@pytest.fixture(scope="session")
def shards(tmp_path_factory) -> str:
    return pack_uneven(tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="session")
def right(shards) -> Parts:
    """The rows of samples and metrics of a run that nothing happened to."""
    opened = open_shards(shards)
    length = epoch_length(len(opened), SIZE)
    orders = [EpochOrder(opened.shard_sizes, seed=0, epoch=epoch, window_shards=3) for epoch in range(3)]
    samples = []
    for step in range(STEPS):
        places = [divmod(step * SIZE + i, length) for i in range(SIZE)]
        keys = [[epoch, opened.key(orders[epoch][position])] for epoch, position in places]
        samples.append({"step": step + 1, "samples": keys})
    due = {0: ["probe"]}
    for step in range(1, STEPS + 1):
        flushed = step % EVERY == 0 or step == STEPS
        probed = step % PROBE_EVERY == 0 or step == STEPS
        due[step] = ["loss"] * flushed + ["probe"] * probed
    metrics = [row_of(step, kind) for step, kinds in due.items() for kind in kinds]
    return {"samples": samples, "metrics": metrics}


def row_of(step: int, kind: str) -> dict[str, Any]:
    if kind == "probe":
        return {"step": step, "probe": {"top1": 1 / (step + 3)}}
    return {"step": step, "loss": 5 / step, "timing": {"step_s": 0.1}}


def write(folder: Path, parts: Parts, *, last: int = STEPS, resumed_at: int = 0) -> Path:
    """Write a record; with ``resumed_at`` TensorBoard has steps of an attempt that was killed two steps later."""
    folder.mkdir()
    config = {
        "seed": 0,
        "data": {"weights": [], "window_shards": 3},
        "optim": {"epochs": 5, "batch_size": SIZE, "max_steps": STEPS},
        "watch": {"log_every": EVERY, "probe_every": PROBE_EVERY},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    for name, rows in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    attempts = [(0, resumed_at + 2), (resumed_at, STEPS)] if resumed_at else [(0, STEPS)]
    for first, end in attempts:
        shown = [row for row in parts["metrics"] if first <= row["step"] <= end]
        show(folder / "tensorboard", shown, purge_step=first)
    for step in (last - 5, last):
        checkpoint.save(
            folder / "checkpoints",
            step=step,
            tensors={"student": {"weight": torch.arange(6.0)}},
            state={},
            optimizer={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            keep=2,
        )
    return folder


def show(folder: Path, rows: Rows, *, purge_step: int | None) -> None:
    """Write one more event file."""
    before = set(folder.glob("*"))
    with SummaryWriter(str(folder), purge_step=purge_step) as board:
        for row in rows:
            for name, value in numbers(row).items():
                if (shown_as := board_name(name)) is not None:
                    board.add_scalar(shown_as, value, row["step"])
    (made,) = set(folder.glob("*")) - before
    made.rename(folder / f"events.out.tfevents.{len(before):010d}")  # by themselves ordered by the second


def check(folder: Path, capsys, *words: str) -> tuple[int, list[str]]:
    """Run the checker; return its exit code and what it found wrong."""
    code = check_run.main([str(folder), *words])
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(("ok ", "WRONG ")) for line in lines)
    return code, [line for line in lines if line.startswith("WRONG ")]


def test_a_right_record_passes(tmp_path, right, shards, capsys):
    folder = write(tmp_path / "run", right)
    twin = write(tmp_path / "twin", right)
    assert check(folder, capsys) == (0, [])
    assert check(folder, capsys, "--shards", shards, "--like", str(twin)) == (0, [])


@pytest.mark.parametrize("step", [14, 21])
def test_what_a_killed_attempt_showed_is_purged(tmp_path, right, shards, capsys, step):
    """One checkpoint has a probe of its own step, which is made again, one does not."""
    folder = write(tmp_path / "run", right, resumed_at=step)
    assert check(folder, capsys, "--shards", shards) == (0, [])


def test_a_run_that_was_stopped_early_passes(tmp_path, right, shards, capsys):
    """At step 28 a probe is due: it is made when the run goes on."""
    early = {name: [row for row in rows if row["step"] <= 28] for name, rows in right.items()}
    early["metrics"].remove(row_of(28, "probe"))
    folder = write(tmp_path / "run", early, last=28)
    assert check(folder, capsys) == (0, [])
    assert check(folder, capsys, "--shards", shards) == (0, [])


def swap(rows: Rows, one: int, other: int) -> None:
    rows[one], rows[other] = rows[other], rows[one]


def swap_samples(rows: Rows) -> None:
    mine, next_ones = rows[3]["samples"], rows[4]["samples"]
    mine[0], next_ones[0] = next_ones[0], mine[0]


def renumber(rows: Rows) -> None:
    """A batch is gone, and the numbers close the gap."""
    del rows[10]
    for step, row in enumerate(rows, start=1):
        row["step"] = step


DAMAGE: dict[str, tuple[str, Callable[[Rows], Any], str]] = {
    "a batch lost": ("samples", lambda rows: rows.pop(10), "samples.jsonl, steps"),
    "a batch lost, numbers close the gap": ("samples", renumber, "epoch 0"),
    "a batch doubled": ("samples", lambda rows: rows.insert(10, rows[10]), "samples.jsonl, steps"),
    "a batch used again": (
        "samples",
        lambda rows: rows[11].update(samples=rows[10]["samples"]),
        "epoch 0 uses",
    ),
    "batches swapped": ("samples", lambda rows: swap(rows, 10, 11), "samples.jsonl, steps"),
    "a sample twice": (
        "samples",
        lambda rows: rows[3]["samples"].__setitem__(0, rows[2]["samples"][0]),
        "epoch 0 uses",
    ),
    "a sample missing": ("samples", lambda rows: rows[3]["samples"].pop(), "step 4 has 11"),
    "samples swapped": ("samples", swap_samples, "epoch 0, keys"),
    "a sample of another epoch": (
        "samples",
        lambda rows: rows[3]["samples"].__setitem__(0, [1, "0001"]),
        "of epochs [0, 1]",
    ),
    "the last batch lost": ("samples", lambda rows: rows.pop(), "metrics.jsonl, steps"),
    "a batch too much": (
        "samples",
        lambda rows: rows.append({**copy.deepcopy(rows[-1]), "step": STEPS + 1}),
        "samples.jsonl goes to step 46",
    ),
    "a row lost": ("metrics", lambda rows: rows.remove(row_of(9, "loss")), "metrics.jsonl, steps"),
    "the last row lost": ("metrics", lambda rows: rows.remove(row_of(STEPS, "loss")), "metrics.jsonl, steps"),
    "a row doubled": ("metrics", lambda rows: rows.insert(4, rows[4]), "metrics.jsonl, steps"),
    "rows swapped": ("metrics", lambda rows: swap(rows, 4, 5), "metrics.jsonl, steps"),
    "a row where none is due": (
        "metrics",
        lambda rows: rows.insert(5, row_of(10, "loss")),
        "metrics.jsonl, steps",
    ),
    "a row of a later step left over": (
        "metrics",
        lambda rows: rows.append(row_of(48, "loss")),
        "metrics.jsonl, steps",
    ),
    "a probe lost": ("metrics", lambda rows: rows.remove(row_of(14, "probe")), "probes at"),
    "a probe doubled": ("metrics", lambda rows: rows.insert(1, rows[0]), "probes at"),
    "a probe before its time": (
        "metrics",
        lambda rows: rows.insert(2, rows.pop(rows.index(row_of(14, "probe")))),
        "order of rows",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_of_rows_is_found(tmp_path, right, shards, capsys, kind):
    part, damage, words = DAMAGE[kind]
    parts = copy.deepcopy(right)
    damage(parts[part])
    assert parts != right
    folder = write(tmp_path / "run", parts)
    code, wrong = check(folder, capsys, "--shards", shards)
    assert code == 1
    assert any(words in line for line in wrong), wrong


def half_a_line(folder: Path) -> None:
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text()[:-20])


def doubled_step(folder: Path) -> None:
    """A process that went on from step 20 without telling TensorBoard."""
    show(folder / "tensorboard", [row_of(24, "loss")], purge_step=None)


def flipped_byte(folder: Path) -> None:
    path = folder / "checkpoints" / "latest" / "student.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)


def old_checkpoint(folder: Path, name: str) -> None:
    (folder / "checkpoints" / "latest").resolve().rename(folder / name)


BREAK: dict[str, tuple[Callable[[Path], None], str]] = {
    "half a line": (half_a_line, "metrics.jsonl line"),
    "a step twice in TensorBoard": (doubled_step, "tensorboard"),
    "a flipped byte": (flipped_byte, "does not match its checksum"),
    "the last checkpoint lost": (
        functools.partial(old_checkpoint, name="gone"),
        "the newest of 1 checkpoints",
    ),
}


@pytest.mark.parametrize("kind", BREAK)
def test_damage_of_files_is_found(tmp_path, right, shards, capsys, kind):
    folder = write(tmp_path / "run", right)
    damage, words = BREAK[kind]
    damage(folder)
    code, wrong = check(folder, capsys, "--shards", shards)
    assert code == 1
    assert any(words in line for line in wrong), wrong


def test_without_shards_a_lost_batch_of_a_whole_epoch_is_found(tmp_path, right, capsys):
    """What the other epochs have used is missed."""
    parts = copy.deepcopy(right)
    renumber(parts["samples"])
    code, wrong = check(write(tmp_path / "run", parts), capsys)
    assert code == 1
    assert any("epoch 0 has not used" in line for line in wrong), wrong


@pytest.mark.parametrize("what", ["row", "tensor", "samples"])
def test_runs_that_differ_by_one_bit_are_not_alike(tmp_path, right, capsys, what):
    folder, parts = write(tmp_path / "run", right), copy.deepcopy(right)
    if what == "row":
        parts["metrics"][2]["loss"] *= 1 + 2**-52
    if what == "samples":
        swap_samples(parts["samples"])
    other = write(tmp_path / "other", parts)
    if what == "tensor":
        checkpoint.save(
            other / "checkpoints",
            step=STEPS,
            tensors={"student": {"weight": torch.tensor([0, 1, 2, 3, 4, 5 + 2**-21])}},
            state={},
            optimizer={"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]},
            keep=2,
        )
    code, wrong = check(folder, capsys, "--like", str(other))
    assert code == 1
    assert len(wrong) == 1, wrong


def test_nothing_to_check_is_a_mistake(tmp_path, right, capsys):
    assert check_run.main([str(tmp_path / "nowhere")]) == 2
    assert "nowhere has no config.yaml" in capsys.readouterr().err
    folder = write(tmp_path / "run", right)
    (folder / "samples.jsonl").unlink()
    assert check_run.main([str(folder)]) == 2
    assert "--watch.sample_log true" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        check_run.main([])
