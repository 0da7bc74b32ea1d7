"""Two gloo processes give what one process gives with the joined batch, started by the README's own launch line."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from tests.helpers.launched import HERE, ROOT, compare, launch_line, run, warm_launch_line
from tests.helpers.runs import assert_same_run, rows
from tests.helpers.warm_python import warm_python









@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "options"),
    [
        (2, {"matching": "geometric"}),
        (2, {"matching": "both", "optim__micro_batch": 2, "optim__clip_grad": 0.0}),
        (2, {"matching": "geometric", "loss__local_mean": "accepted", "head__shared": "true"}),
        (2, {"matching": "none", "loss__koleo_weight": 0.3}),
        (2, {"matching": "similarity", "loss__centering": "sinkhorn", "optim__clip_mode": "global"}),
        # Of 8 images ranks have 3, 3 and 2, here in passes of 2 and 1, 2 and 1, 1 and 1.
        (3, {"matching": "both", "optim__micro_batch": 2, "optim__clip_mode": "global"}),
        (3, {"matching": "geometric", "loss__centering": "sinkhorn"}),
    ],
    ids=["geometric", "both", "accepted", "koleo", "sinkhorn", "uneven both", "uneven sinkhorn"],
)
def test_ranks_are_one_rank_with_the_joined_batch(tiny_run, tmp_path, world, options):
    argv = tiny_run(
        model__drop_path=0.0, optim__freeze_prototypes_epochs=0, optim__warmup_epochs=0, **options
    )
    body = str(HERE / "joined_batch.py")
    alone = run([warm_python(), body, str(tmp_path / "one.pt"), *argv])
    assert alone.returncode == 0, alone.stderr
    environment, command = warm_launch_line()
    command[command.index("--num_processes") + 1] = str(world)
    together = run([*command, body, str(tmp_path / "two.pt"), *argv], environment)
    assert together.returncode == 0, together.stderr
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    assert (one["world"], two["world"]) == (1, world)
    assert one["keys"] == two["keys"]
    assert len(one["gradients"]) == len(two["gradients"]) == 3
    compared = 0
    for name in ("values", "centers", "student", "teacher"):
        assert one[name].keys() == two[name].keys()
        compared += compare(one[name], two[name])
    for first, second in zip(one["gradients"], two["gradients"], strict=True):
        assert first.keys() == second.keys()
        compared += compare(first, second)
    assert compared > 100




@pytest.mark.slow
def test_the_readme_launch_line_trains_on_two_ranks_and_resumes(tiny_run):
    """The whole program, float32: two ranks, stop, go on; close to one rank, and no row lost or doubled."""
    environment, command = launch_line()
    script = str(ROOT / "launch" / "pretrain.py")
    options = {"model__drop_path": 0.0, "watch__checkpoint_every": 2}
    for extra in ({"optim__max_steps": 3}, {"optim__max_steps": 6, "resume": "auto"}):
        done = run([*command, script, *tiny_run("two", **options, **extra)], environment)
        assert done.returncode == 0, done.stderr
        assert "2 ranks x 1 x 4 images" in done.stdout
    done = run([warm_python(), script, *tiny_run("one", **options, optim__max_steps=6)])
    assert done.returncode == 0, done.stderr
    two, one = (rows(Path(tiny_run(name)[0].removeprefix("--out="))) for name in ("two", "one"))
    assert [row["step"] for row in two] == [row["step"] for row in one] == [1, 2, 3, 4, 5, 6]
    for mine, theirs in zip(two, one, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)


@pytest.mark.slow
def test_a_launch_line_that_starts_one_rank_in_silence_is_refused(tiny_run):
    accelerate = launch_line()[1][0]
    flags = ["--cpu", "--num_processes", "2", "--mixed_precision", "no", "--dynamo_backend", "no"]
    launcher = [accelerate, "launch", *flags]
    done = run([*launcher, str(ROOT / "launch" / "pretrain.py"), *tiny_run()])
    assert done.returncode != 0
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu" in done.stderr


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_both_and_they_go_on(tiny_run):
    """USR1 reaches one worker only: both save the same step, exit 0, and the resumed run is the straight one."""
    environment, command = warm_launch_line()
    script = str(ROOT / "launch" / "pretrain.py")
    options = {"model__drop_path": 0.2, "optim__epochs": 60, "optim__max_steps": 150, "watch__log_every": 2}
    straight, stopped = (tiny_run(name, **options) for name in ("straight", "stopped"))
    assert run([*command, script, *straight], environment).returncode == 0
    process = subprocess.Popen(
        [*command, script, *stopped],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    folder = Path(stopped[0].removeprefix("--out="))
    metrics = folder / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    workers = [
        child
        for child in psutil.Process(process.pid).children()
        if "pretrain.py" in " ".join(child.cmdline())
    ]
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGUSR1)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert "stopped by SIGUSR1 after step" in output
    done = run([*command, script, *stopped, "--resume=auto"], environment)
    assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout
    assert_same_run(Path(straight[0].removeprefix("--out=")), folder)
