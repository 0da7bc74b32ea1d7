"""Metric learning on two gloo processes is metric learning on one with the whole batch, for every loss and regularizer."""

from pathlib import Path

import pytest
import torch
from tests.helpers.runs import rows
from tests.helpers.launched import (
    HERE,
    ROOT,
    compare,
    run,
    warm_launch_line,
)
from tests.helpers.warm_python import warm_python

from glsd.losses.ranking import RANKING


@pytest.mark.slow
def test_two_ranks_are_one_rank_for_every_loss(tiny_finetune, tmp_path):
    argv = tiny_finetune(optim__steps_per_epoch=2, optim__epochs=4, optim__lr=1e-3, sd__weight=20.0)
    body = str(HERE / "joined_dml.py")
    alone = run([warm_python(), body, str(tmp_path / "one.pt"), *argv])
    assert alone.returncode == 0, alone.stderr
    environment, command = warm_launch_line()
    together = run([*command, body, str(tmp_path / "two.pt"), *argv], environment)
    assert together.returncode == 0, together.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert (one["world"], two["world"]) == (1, 2)
    assert one["cases"].keys() == two["cases"].keys()
    assert {case.split()[0] for case in one["cases"]} == set(RANKING)
    for case, mine in one["cases"].items():
        theirs = two["cases"][case]
        assert mine["keys"] == theirs["keys"], case
        assert float(mine["values"]["loss"][0]) > 0, f"{case}: nothing to learn, nothing shown"
        for name in ("values", "statistics", "losses"):
            compare(mine[name], theirs[name])
        # Attention does not depend on its key biases: Adam makes steps of the rounding errors that are their gradients.
        compare(mine["student"], theirs["student"], tolerance=1e-6)
        assert len(mine["gradients"]) == len(theirs["gradients"]) == 4
        for first, second in zip(mine["gradients"], theirs["gradients"], strict=True):
            assert first.keys() == second.keys()
            largest = max(float(gradient.abs().max()) for gradient in first.values())
            assert largest > 0, case
            # MDR does not see a shift of all embeddings: the gradients of some biases are rounding errors.
            compare(first, second, floor=1e-6 * largest)


@pytest.mark.slow
def test_the_launch_line_fine_tunes_on_two_ranks_and_resumes_in_mid_epoch(tiny_finetune):
    """The whole program in float32: two ranks, stop, go on; close to one rank, no row lost or doubled."""
    environment, command = warm_launch_line()
    script = str(ROOT / "launch" / "finetune_dml.py")
    options = {
        "reg": "obdsd+mdr",
        "optim__steps_per_epoch": 2,
        "watch__checkpoint_every": 3,
        "optim__epochs": 3,
    }
    for extra in ({"optim__max_steps": 3}, {"resume": "auto"}):
        done = run([*command, script, *tiny_finetune("two", **options, **extra)], environment)
        assert done.returncode == 0, done.stderr
        assert "over 2 ranks" in done.stdout
    done = run([warm_python(), script, *tiny_finetune("one", **options)])
    assert done.returncode == 0, done.stderr
    assert "final     test" in done.stdout
    two, one = (rows(Path(tiny_finetune(name)[0].removeprefix("--out="))) for name in ("two", "one"))
    steps = [[row["step"] for row in run_rows if "loss" in row] for run_rows in (two, one)]
    assert steps == [[1, 2, 3, 4, 5, 6]] * 2
    for mine, theirs in zip(two, one, strict=False):
        if "loss" in mine and "loss" in theirs:
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
