"""A newcomer's hour: a run that is not found, one that was moved, Ctrl-C, and what a command says at its end."""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from glsd.cli import door as _door
from glsd.cli import evaluate, finetune, main, pack, pretrain
from glsd.config.parse import load_file
from glsd.config.pretrain import PretrainConfig
from glsd.runtime import checkpoint
from tests.helpers.pictures import picture
from tests.helpers.runs import ROOT, assert_same_run, wait_for
from tests.helpers.warm_python import warm_python


@pytest.fixture
def door(capfd, monkeypatch):
    """Run a command as the shell would; return its exit code and what it printed."""

    def call(command, argv: list[str]) -> tuple[int, str]:
        AcceleratorState._reset_state()
        monkeypatch.setattr(sys, "argv", ["glsd", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            _door.run(command)
        found = capfd.readouterr()
        return ended.value.code, found.out + found.err  # type: ignore[return-value]

    return call


def words_of_next(out: str) -> list[str]:
    """Return the words of the command that the closing line offers."""
    line = out.splitlines()[-1]
    assert line.startswith("next"), out
    return shlex.split(line.partition(": ")[2])


def test_a_run_that_finds_no_checkpoint_says_so(door, tiny_run, tmp_path):
    argv = tiny_run("run", optim__max_steps=2, resume="auto")
    code, out = door(pretrain.main, argv)
    assert code == 0
    assert f"no checkpoint in {tmp_path}/run/checkpoints: starting at step 0\n" in out
    code, out = door(pretrain.main, argv)
    assert "no checkpoint" not in out
    assert f"resumed from {tmp_path}/run/checkpoints/step_00000002 at step 2\n" in out
    code, out = door(pretrain.main, [*tiny_run("mistyped", resume="auto"), "--dry_run"])
    assert f"no checkpoint in {tmp_path}/mistyped/checkpoints" in out


@pytest.mark.parametrize(
    ("said", "line"), [((), "stopped by Ctrl-C"), (("stopped; 2 kept",), "stopped; 2 kept")]
)
def test_ctrl_c_ends_any_command_in_one_line(door, said, line):
    def main(argv):
        raise KeyboardInterrupt(*said)

    assert door(main, []) == (130, f"{line}\n")


def test_a_run_that_was_moved_goes_on_where_it_is(door, tiny_run, tmp_path, monkeypatch):
    straight = tmp_path / "straight"
    door(pretrain.main, tiny_run("straight", optim__max_steps=4))
    door(pretrain.main, tiny_run("before", optim__max_steps=2))
    moved = tmp_path / "elsewhere" / "after"
    moved.parent.mkdir()
    (tmp_path / "before").rename(moved)
    monkeypatch.chdir(moved.parent)
    flags = ["--config", "after/config.yaml", "--resume", "auto", "--optim.max_steps", "4"]
    code, out = door(pretrain.main, flags)
    assert code == 0, out
    assert "at step 2" in out
    assert "- out:" not in out  # moving a run is no change of its configuration
    assert not (tmp_path / "before").exists()
    assert_same_run(straight, moved)
    assert load_file(PretrainConfig, moved / "config.yaml").out == "after"
    code, out = door(pretrain.main, [*flags, "--out", str(tmp_path / "new")])
    assert f"no checkpoint in {tmp_path}/new/checkpoints: starting at step 0" in out


def test_a_fine_tuning_that_was_moved_goes_on_and_is_measured(door, tiny_finetune, class_shards, tmp_path):
    code, out = door(finetune.main, tiny_finetune("before", optim__max_steps=2))
    assert code == 0, out
    first = next(line for line in out.splitlines() if line.startswith("epoch 0    test"))
    moved = tmp_path / "after"
    (tmp_path / "before").rename(moved)
    flags = [f"--config={moved}/config.yaml", "--resume=auto", "--optim.max_steps=4"]
    code, out = door(finetune.main, flags)
    assert code == 0, out
    assert f"resumed from {moved}/checkpoints/step_00000002 at step 2" in out
    assert not (tmp_path / "before").exists()
    # The command that it offers; its untrained network measures as epoch 0 did.
    words = words_of_next(out)
    assert words[:4] == ["glsd", "evaluate", "--model", str(moved)]
    small = ["--nmi_seeds", "0", "--data.num_workers", "0"]
    code, out = door(evaluate.main, [*words[2:], *small])
    assert (code, f"kept in {moved}/evals.json" in out) == (0, True), out
    words = words_of_next(out)
    assert words[-2:] != ["--features", "teacher"]
    code, out = door(evaluate.main, words[2:])
    assert code == 0
    for share in ("Recall@1", "MAP@R"):
        assert out.partition(f"{share} ")[2].split()[0] == first.partition(f"{share} ")[2].split()[0]


def test_a_pretraining_offers_its_evaluation(door, tiny_run, digit_shards, tmp_path):
    probed = {
        "watch__probe_every": 2,
        "watch__probe_k": 3,
        "watch__probe_train_shards": f"{digit_shards}/train-*.tar",
        "watch__probe_val_shards": f'["{digit_shards}/val-000000.tar"]',
    }
    code, out = door(pretrain.main, tiny_run("a run", optim__max_steps=4, **probed))
    assert code == 0, out
    what, where, _ = out.splitlines()[-3:]
    assert what.startswith("finished after step 4: loss ")
    assert "k-NN (k=3) " in what
    probe = out.rpartition("probe at step 4: k-NN (k=3) ")[2].partition(",")[0]
    assert f"k-NN (k=3) {probe}" in what
    assert where == f"weights, metrics and pictures: {tmp_path}/a run"
    words = words_of_next(out)
    assert words[:4] == ["glsd", "evaluate", "--model", f"{tmp_path}/a run"]
    code, out = door(evaluate.main, [*words[2:], "--k=[3]", "--data.num_workers=0"])
    assert code == 0, out
    assert f"top-1 {probe.replace('%', ' %')}" in out  # the probe's number, from outside
    assert words_of_next(out)[-2:] == ["--k", "[3]"] or "--features" in words_of_next(out)


def test_a_packing_offers_a_pretraining(door, tmp_path):
    (tmp_path / "my photos").mkdir()
    for number in range(3):
        Image.fromarray(picture(seed=number)).save(tmp_path / "my photos" / f"{number}.png")
    code, out = door(pack.main, [str(tmp_path / "my photos"), str(tmp_path / "my shards"), "--workers", "0"])
    assert code == 0, out
    shards = f"{tmp_path}/my shards/train-*.tar"
    words = words_of_next(out)
    assert words == [
        "glsd",
        "pretrain",
        "--config",
        "small_data",
        "--data.shards",
        shards,
        "--out",
        "runs/mine",
    ]
    assert words[1] in main.COMMANDS


def interrupted(argv: list[str], out: Path, times: int) -> tuple[int, str]:
    """Start a pretraining, press Ctrl-C after its second step; return exit code and output."""
    environment = {
        key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "SLURM_JOB_ID")
    }
    process = subprocess.Popen(
        [warm_python(), str(ROOT / "launch" / "pretrain.py"), *argv],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    wait_for(out / "metrics.jsonl", process)
    while len((out / "metrics.jsonl").read_text().splitlines()) < 2:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.3)
    output = process.communicate(timeout=60)[0]
    return process.returncode, output


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_is_answered_and_a_second_one_stops_now(tiny_run, tmp_path, times):
    # A step takes long enough for both signals to come within one.
    heavy = {
        "optim__epochs": 50,
        "optim__warmup_epochs": 0,
        "head__num_prototypes": 65536,
        "data__num_local": 8,
    }
    argv = tiny_run("run", **heavy, optim__batch_size=24, watch__checkpoint_every=1)
    code, output = interrupted(argv, tmp_path / "run", times)
    assert output.count("stopping after this step; press again to stop now") == 1
    assert "Traceback" not in output
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert not list((tmp_path / "run" / "checkpoints").glob("*.tmp*"))
    if times == 1:
        assert (code, f"stopped by SIGINT after step {saved.step}" in output) == (0, True), output
    else:
        assert code == 130, output
        assert output.splitlines()[-1].startswith(
            "stopped at once; --resume auto goes on from the last checkpoint"
        )
