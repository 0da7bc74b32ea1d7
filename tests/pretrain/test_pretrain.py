"""The first story end to end: exact resume, independence of workers, signals, watching, the user's mistakes."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glsd.errors import UserError
from glsd.runtime import checkpoint
from tests.helpers.runs import ROOT, assert_same_run, rows, train, wait_for
from tests.helpers.warm_python import warm_python


def start_process(argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [warm_python(), str(ROOT / "launch" / "pretrain.py"), *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_two_steps_resume_two_steps_is_four_steps(tiny_run):
    straight = train(tiny_run("straight", optim__max_steps=4))
    train(tiny_run("resumed", optim__max_steps=2))
    resumed = train(tiny_run("resumed", optim__max_steps=4, resume="auto"))
    assert len(rows(straight)) == 4
    assert_same_run(straight, resumed)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_runs_go_on_as_if_nothing_had_happened(tiny_run, workers):
    """kill -9 in mid-run, twice; meters are flushed every 3 steps, so that a window is open at most checkpoints."""
    options = {
        "optim__max_steps": 23,
        "watch__checkpoint_every": 2,
        "watch__log_every": 3,
        "data__num_workers": workers,
        "model__drop_path": 0.3,
    }
    straight = train(tiny_run("straight", **options))
    killed = Path(tiny_run("killed")[0].removeprefix("--out="))
    for step in (4, 10):
        process = start_process(tiny_run("killed", **options, resume="auto"))
        wait_for(killed / "checkpoints" / f"step_{step:08d}", process)
        process.kill()
        process.communicate()
        newest = checkpoint.load_latest(killed / "checkpoints")
        assert newest is not None
        assert newest.step < 23, "the run ended before it was killed: nothing is shown"
    train(tiny_run("killed", **options, resume="auto"))
    assert_same_run(straight, killed)


@pytest.mark.slow
def test_the_number_of_workers_changes_nothing(tiny_run):
    runs = [train(tiny_run(f"workers{n}", optim__max_steps=4, data__num_workers=n)) for n in (0, 1, 3)]
    assert_same_run(runs[0], runs[1])
    assert_same_run(runs[0], runs[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_signal_saves_and_ends_cleanly(tiny_run, name):
    options = {"optim__epochs": 50, "optim__warmup_epochs": 0, "optim__max_steps": 60}
    straight = train(tiny_run("straight", **options))
    process = start_process(tiny_run("stopped", **options))
    stopped = Path(tiny_run("stopped")[0].removeprefix("--out="))
    wait_for(stopped / "metrics.jsonl", process)
    while len((stopped / "metrics.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.Signals[name])
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert f"stopped by {name} after step" in output
    saved = checkpoint.load_latest(stopped / "checkpoints")
    assert saved is not None
    assert 2 <= saved.step < 60
    train(tiny_run("stopped", **options, resume="auto"))
    assert_same_run(straight, stopped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("matching", "extra"),
    [
        ("geometric", {}),
        ("similarity", {}),
        ("both", {"loss__geometric_weight": 0.7, "loss__similarity_weight": 0.3}),
        ("none", {}),
        ("geometric", {"loss__centering": "sinkhorn", "optim__precision": "bf16"}),
        ("geometric", {"head__shared": "true", "data__num_local": 0, "loss__local_mean": "accepted"}),
        ("geometric", {"model__pool": "mean", "head__batch_norm": "true", "optim__micro_batch": 4}),
    ],
)
def test_every_kind_of_loss_trains(tiny_run, matching, extra):
    run = train(tiny_run(matching=matching, optim__max_steps=8, optim__freeze_prototypes_epochs=0, **extra))
    values = rows(run)
    assert [row["step"] for row in values] == list(range(1, 9))
    assert all(isinstance(value, int | float) for row in values for value in row.values())
    assert ("local_loss" in values[0]) == (matching != "none")
    weights = (1.0, 0.0) if matching == "none" else (0.5, 0.5)
    for row in values:
        total = weights[0] * row["global_loss"] + weights[1] * row.get("local_loss", 0.0)
        assert row["loss"] == pytest.approx(total, rel=1e-5)
    before, after = (checkpoint.load_latest(run / "checkpoints"), load_initial(tiny_run, matching, extra))
    assert before is not None
    moved = [
        name for name, tensor in before.tensors["student"].items() if not torch.equal(tensor, after[name])
    ]
    assert any("backbone" in name for name in moved)
    assert any("prototypes" in name for name in moved)


def load_initial(tiny_run, matching: str, extra: dict) -> dict[str, torch.Tensor]:
    """The student's weights before the first step: a run whose learning rate and decay are 0."""
    still = {
        **extra,
        "optim__lr": 0,
        "optim__min_lr": 0,
        "optim__weight_decay": 0,
        "optim__weight_decay_end": 0,
    }
    run = train(tiny_run("still", matching=matching, optim__max_steps=1, **still))
    return load_file(run / "checkpoints" / "latest" / "student.safetensors")


@pytest.mark.slow
def test_probes_are_repeated_exactly_on_resume(tiny_run, digit_shards):
    """The checkpoint of a step is saved before its probe; a run killed in between probes again, once."""
    options = {
        "watch__probe_every": 2,
        "watch__probe_k": 5,
        "watch__probe_train_shards": f"{digit_shards}/train-*.tar",
        "watch__probe_val_shards": f"{digit_shards}/val-*.tar",
    }
    straight = train(tiny_run("straight", optim__max_steps=6, **options))
    for steps in (3, 4):
        train(tiny_run("resumed", optim__max_steps=steps, resume="auto", **options))
    resumed = train(tiny_run("resumed", optim__max_steps=6, resume="auto", **options))
    assert_same_run(straight, resumed)
    assert len([row for row in rows(resumed) if "probe" in row]) == 4


@pytest.mark.slow
def test_a_run_that_dies_in_a_probe_has_lost_no_step(tiny_run, digit_shards, monkeypatch):
    """What a scheduler leaves between its signal and the end may be shorter than a probe."""
    import glsd.pretrain.train as story

    options = {
        "watch__probe_every": 2,
        "watch__probe_k": 5,
        "watch__probe_train_shards": f"{digit_shards}/train-*.tar",
        "watch__probe_val_shards": f"{digit_shards}/val-*.tar",
        "watch__checkpoint_every": 100,
    }
    straight = train(tiny_run("straight", optim__max_steps=6, **options))
    probe = story.probe

    def dies(t, sets):
        if t.state.step == 4:
            raise TimeoutError("the time is up")
        return probe(t, sets)

    monkeypatch.setattr(story, "probe", dies)
    with pytest.raises(TimeoutError):
        train(tiny_run("resumed", optim__max_steps=6, **options))
    monkeypatch.setattr(story, "probe", probe)
    saved = checkpoint.load_latest(straight.with_name("resumed") / "checkpoints")
    assert saved is not None
    assert saved.step == 4
    resumed = train(tiny_run("resumed", optim__max_steps=6, resume="auto", **options))
    assert_same_run(straight, resumed)


@pytest.mark.slow
def test_a_collapsed_probe_names_the_knob(tiny_run, digit_shards, monkeypatch, capsys):
    import glsd.pretrain.probe as report

    monkeypatch.setattr(report, "rankme", lambda features: 1.0)
    options = {"watch__probe_train_shards": f"{digit_shards}/train-*.tar", "optim__warmup_epochs": 0}
    options |= {"watch__probe_val_shards": f"{digit_shards}/val-*.tar", "optim__freeze_prototypes_epochs": 0}
    train(tiny_run(watch__probe_every=1, watch__probe_k=5, optim__max_steps=2, **options))
    printed = capsys.readouterr().out
    assert printed.count("RankMe 1.0 of 32") == 1
    assert "optim.lr" in printed


@pytest.mark.slow
def test_accumulation_is_one_large_batch(tiny_run):
    whole = train(tiny_run("whole", optim__max_steps=3, model__drop_path=0))
    parts = train(tiny_run("parts", optim__max_steps=3, model__drop_path=0, optim__micro_batch=3))
    for one, other in zip(rows(whole), rows(parts), strict=True):
        assert one == pytest.approx(other, rel=2e-5, abs=1e-7)


@pytest.mark.slow
def test_prototypes_are_frozen_at_the_start_then_free(tiny_run):
    """6 steps an epoch: frozen through step 6, moving at step 7."""
    runs = {n: train(tiny_run(f"run{n}", optim__max_steps=n)) for n in (1, 6, 8)}
    weights = {n: load_file(run / "checkpoints/latest/student.safetensors") for n, run in runs.items()}
    for name in ("global_head.prototypes.direction", "local_head.prototypes.direction"):
        assert torch.equal(weights[1][name], weights[6][name])
        assert not torch.equal(weights[6][name], weights[8][name])


def test_what_a_run_leaves_behind(tiny_run, digit_shards):
    run = train(
        tiny_run(
            optim__max_steps=4,
            watch__probe_every=2,
            watch__probe_k=5,
            watch__probe_train_shards=f"{digit_shards}/train-*.tar",
            watch__probe_val_shards=f"{digit_shards}/val-*.tar",
        )
    )
    for name in ("config.yaml", "env.txt", "metrics.jsonl", "first_batch.png", "first_batch_local.png"):
        assert (run / name).stat().st_size > 0, name
    assert list((run / "tensorboard").glob("events*"))
    probes = [row for row in rows(run) if "probe" in row]
    assert [row["step"] for row in probes] == [0, 2, 4]
    names = {f"{role}_{pool}" for role in ("teacher", "student") for pool in ("cls", "mean")}
    for found in (row["probe"] for row in probes):
        assert found.keys() == {"knn5_top1", "rankme"} | names
        assert {key: found[key] for key in ("knn5_top1", "rankme")} == found["teacher_cls"]
        assert len({json.dumps(found[name]) for name in names}) > 1
    assert probes[0]["probe"]["teacher_mean"] == probes[0]["probe"]["student_mean"]  # they start equal
    assert probes[2]["probe"]["teacher_mean"] != probes[2]["probe"]["student_mean"]
    steps = [row for row in rows(run) if "loss" in row]
    expected = {
        "lr",
        "weight_decay",
        "teacher_momentum",
        "teacher_temp",
        "global_loss",
        "local_loss",
        "grad_norm",
        "num_broken",
    }
    expected |= {"global_teacher_entropy", "local_teacher_entropy", "matched_share", "epoch", "step", "loss"}
    assert set(steps[0]) == expected
    timing = json.loads((run / "metrics.jsonl").read_text().splitlines()[-2])["timing"]
    assert {"images_per_s", "data_wait"} <= timing.keys()


@pytest.mark.slow
def test_a_bad_gradient_stops_before_the_weights_move(tiny_run, monkeypatch):
    """Gradients go bad at the 4th step, the check comes at the 6th: by then the student is still that of step 3."""
    import glsd.pretrain.step as story
    import glsd.runtime.loop as loop

    seen = {}
    real_step, real_check = story.train_step, loop.check_gradients

    def step_with_a_bad_one(t, rates, batches):
        if t.state.step == 3:
            broken = next(t.state.student.parameters())
            handle = broken.register_hook(lambda gradient: gradient * float("nan"))
            try:
                return real_step(t, rates, batches)
            finally:
                handle.remove()
        return real_step(t, rates, batches)

    def check_and_remember(state, *rest):
        seen.update({name: tensor.clone() for name, tensor in state.student.state_dict().items()})
        real_check(state, *rest)

    three = train(tiny_run("three", optim__max_steps=3))
    monkeypatch.setattr(story, "train_step", step_with_a_bad_one)
    monkeypatch.setattr(loop, "check_gradients", check_and_remember)
    with pytest.raises(UserError, match="step 4: the gradient is not finite"):
        train(tiny_run("bad", watch__log_every=6))
    good = load_file(three / "checkpoints/latest/student.safetensors")
    assert seen.keys() == good.keys()
    assert all(torch.equal(seen[name], tensor) for name, tensor in good.items())
    assert not list((three.parent / "bad" / "checkpoints").glob("step_*"))


@pytest.mark.slow
def test_a_diverging_run_names_step_and_samples_and_keeps_the_good_checkpoint(tiny_run):
    """An absurd learning rate makes a later step overflow."""
    argv = tiny_run(optim__lr=1e38, optim__warmup_epochs=0, watch__checkpoint_every=1, watch__log_every=5)
    with pytest.raises(
        UserError, match=r"step \d+: the (loss|gradient) is not finite .* lower optim.lr"
    ) as caught:
        train(argv)
    assert "\n" not in str(caught.value)
    saved = checkpoint.load_latest(Path(argv[0].removeprefix("--out=")) / "checkpoints")
    assert saved is not None
    assert all(torch.isfinite(t).all() for tensors in saved.tensors.values() for t in tensors.values())
    assert f"step {saved.step + 1}:" in str(caught.value)
