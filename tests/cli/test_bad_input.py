"""Every mistake a user can make at the door: one clear line that says what to do, exit code 2, earlier checkpoints intact."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from glsd.cli import door as _door
from glsd.cli import pack, pretrain
from glsd.runtime import checkpoint

pytestmark = pytest.mark.slow  # each case starts the whole program up to its mistake


@pytest.fixture
def door(capfd, monkeypatch):
    """Run a launch script's main as the shell would; return (exit code, lines on stderr that are ours)."""

    def call(main, argv: list[str]) -> tuple[int, list[str]]:
        AcceleratorState._reset_state()
        monkeypatch.setattr(sys, "argv", ["script.py", *argv])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            _door.run(main)
        return ended.value.code, [line for line in capfd.readouterr().err.splitlines() if line]  # type: ignore[return-value]

    return call


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return path


def half_a_shard(digit_shards: Path, folder: Path) -> str:
    whole = (digit_shards / "train-a-000000.tar").read_bytes()
    (folder / "half.tar").write_bytes(whole[: len(whole) // 2])
    return str(folder / "half.tar")


def all_unreadable(content: bytes):
    def make(digit_shards: Path, folder: Path) -> str:
        members = [(f"{i:08d}.jpg", content) for i in range(16)]
        return str(tar_of(folder / "bad.tar", members))

    return make


CASES = {
    "missing shard pattern": ({"data.shards": lambda *_: "no/such-{000..003}.tar"}, "no/such-"),
    "no shards given": ({"data.shards": lambda *_: ""}, "no shards given"),
    "shard cut in half": ({"data.shards": half_a_shard}, "half.tar"),
    "images that are text": ({"data.shards": all_unreadable(b"I am not an image")}, "bad.tar"),
    "zero-byte members": ({"data.shards": all_unreadable(b"")}, "bad.tar"),
    "pipe URL": ({"data.shards": lambda *_: "pipe:cat x.tar"}, "pipe:"),
    "config typo": ({"optim.learning_rate": lambda *_: 1}, "optim.learning_rate"),
    "wrong type": ({"optim.epochs": lambda *_: "many"}, "optim.epochs"),
    "global size not divisible": ({"data.global_size": lambda *_: 30}, "data.global_size 30"),
    "local size not divisible": ({"data.local_size": lambda *_: 20}, "data.local_size 20"),
    "unknown backbone": (
        {"model.backbone": lambda *_: "vit_tinny_patch16_224"},
        "did you mean 'vit_tiny_patch16_224'",
    ),
    "batch larger than the data": ({"optim.batch_size": lambda *_: 64}, "optim.batch_size"),
    "negative micro-batch": ({"optim.micro_batch": lambda *_: -1}, "optim.micro_batch is -1"),
    "negative workers": ({"data.num_workers": lambda *_: -1}, "data.num_workers is -1"),
    "no window": ({"data.window_shards": lambda *_: 0}, "data.window_shards is 0: expected at least 1"),
    "no patience": ({"cluster.lost_after": lambda *_: 0}, "cluster.lost_after is 0.0: expected 1 or more"),
    "warm-up longer than the run": ({"optim.warmup_epochs": lambda *_: 9}, "optim.warmup_epochs"),
    "impossible scale": ({"data.global_scale": lambda *_: "[0.9, 0.1]"}, "data.global_scale"),
    "zero temperature": ({"loss.teacher_temp": lambda *_: 0.0}, "loss.teacher_temp"),
    "too few checkpoints": (
        {"watch.keep_checkpoints": lambda *_: 1},
        "watch.keep_checkpoints is 1: expected 2 or more",
    ),
    "negative steps": ({"optim.max_steps": lambda *_: -1}, "optim.max_steps is -1: expected 0 or more"),
    "momentum above 1": (
        {"optim.teacher_momentum": lambda *_: 2.0},
        "optim.teacher_momentum is 2.0: expected 0 to 1",
    ),
    "no Sinkhorn rounds": (
        {"loss.sinkhorn_iterations": lambda *_: 0},
        "loss.sinkhorn_iterations is 0: expected 1 or more",
    ),
    "probe with half of its shards": (
        {"watch.probe_every": lambda *_: 5, "watch.probe_val_shards": lambda *_: "some-*.tar"},
        "watch.probe_train_shards is not set, but watch.probe_val_shards is",
    ),
    "unknown tracker": (
        {"watch.trackers": lambda *_: "tensorboard,wand"},
        "unknown entry of watch.trackers 'wand': expected one of tensorboard, wandb, mlflow; did you mean 'wandb'?",
    ),
    "accepted mean over micro-batches": (
        {"loss.local_mean": lambda *_: "accepted", "optim.micro_batch": lambda *_: 2},
        "loss.local_mean accepted",
    ),
    "weights that do not fit the shards": (
        {"data.weights": lambda *_: "[1, 2]"},
        "data.weights is [1.0, 2.0]: expected one number >= 0 for each of the 1 shard patterns",
    ),
    "no weights file": ({"model.init": lambda *_: "nowhere.safetensors"}, "nowhere.safetensors"),
}


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_exit_code_2(case, door, tiny_run, digit_shards, tmp_path):
    changes, expected = CASES[case]
    made = {key: value(digit_shards, tmp_path) for key, value in changes.items()}
    code, lines = door(pretrain.main, tiny_run("refused", **made))
    assert code == 2
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    assert expected in lines[0]
    assert not list((tmp_path / "refused").rglob("step_*")), "a refused run must leave no checkpoint"


def test_a_folder_that_cannot_be_written(door, tiny_run, tmp_path):
    """A file where the folder should be: unwritable for root too."""
    (tmp_path / "file").write_text("")
    code, lines = door(pretrain.main, tiny_run(out=str(tmp_path / "file" / "run")))
    assert code == 2
    assert len(lines) == 1
    assert str(tmp_path / "file" / "run") in lines[0]


def test_an_existing_run_is_not_overwritten(door, tiny_run):
    argv = tiny_run(optim__max_steps=2)
    assert door(pretrain.main, argv)[0] == 0
    folder = Path(argv[0].removeprefix("--out=")) / "checkpoints"
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    code, lines = door(pretrain.main, argv)
    assert code == 2
    assert len(lines) == 1
    assert "--resume auto" in lines[0]
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            {"model.timm_args": "{patch_size: 8, depth: 2, embed_dim: 64, num_heads: 2}"},
            "another architecture",
        ),
        (
            {"model.timm_args": "{patch_size: 8, depth: 3, embed_dim: 32, num_heads: 2}"},
            "another architecture",
        ),
        ({"head.num_prototypes": 65}, "another architecture"),
        ({"matching": "none"}, "another architecture"),
        ({"head.shared": "true"}, "another architecture"),
        ({"head.trainable_gain": "true"}, "another architecture"),
        ({"seed": 1}, "seed"),
        ({"optim.batch_size": 16}, "optim.batch_size is not what"),
        ({"data.shards": "val"}, "data.shards"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_and_stays(door, tiny_run, digit_shards, change, expected):
    argv = tiny_run(optim__max_steps=2)
    assert door(pretrain.main, argv)[0] == 0
    if "data.shards" in change:
        change = {"data.shards": f"{digit_shards}/val-*.tar"}
    kept = {
        path: path.read_bytes() for path in Path(argv[0].removeprefix("--out=")).rglob("*") if path.is_file()
    }
    code, lines = door(pretrain.main, tiny_run(optim__max_steps=4, resume="auto", **change))
    assert code == 2
    assert expected in lines[-1]
    assert len(lines) == 1, lines
    saved = checkpoint.load_latest(Path(argv[0].removeprefix("--out=")) / "checkpoints")
    assert saved is not None
    assert saved.step == 2
    assert all(path.read_bytes() == before for path, before in kept.items()), (
        "a refused resume changes no file"
    )


def test_a_few_broken_images_are_replaced_and_listed(door, tiny_run, digit_shards, tmp_path):
    """2 of 26 samples are broken: the run goes on, writes each down every time it comes up, and keeps count."""
    with tarfile.open(digit_shards / "train-a-000000.tar") as tar:
        good = [(m.name, tar.extractfile(m).read()) for m in tar if m.name.endswith("png")]  # type: ignore[union-attr]
    members = [*good, ("90000001.jpg", b"text, not an image"), ("90000002.jpg", b"")]
    shard = tar_of(tmp_path / "mixed.tar", members)
    options = {
        "data.shards": str(shard),
        "optim.batch_size": 26,
        "optim.epochs": 2,
        "data.max_bad_fraction": 0.5,
    }
    code, lines = door(pretrain.main, tiny_run(**options))
    assert code == 0, lines
    rows = [json.loads(line) for line in (tmp_path / "run" / "quarantine.jsonl").read_text().splitlines()]
    # Each step is a whole epoch, so both come up in it; a stand-in may be the other broken one, which is one row more.
    for step, epoch in ((1, 0), (2, 1)):
        assert {row["key"] for row in rows if row["step"] == step} == {"90000001", "90000002"}
        assert {row["epoch"] for row in rows if row["step"] == step} == {epoch}
    assert all(row["replaced_by"] < 24 for row in rows)
    assert all(row["reason"] for row in rows)
    saved = checkpoint.load_latest(tmp_path / "run" / "checkpoints")
    assert saved is not None
    assert saved.state["num_broken"] == len(rows)
    code, lines = door(pretrain.main, tiny_run("strict", **{**options, "data.max_bad_fraction": 0.01}))
    assert code == 2
    assert "data.max_bad_fraction" in lines[-1]


@pytest.mark.parametrize("content", [None, {"notes.txt": b"hello"}])
def test_packing_a_folder_without_images(door, tmp_path, content):
    source = tmp_path / "empty"
    source.mkdir()
    for name, data in (content or {}).items():
        (source / name).write_bytes(data)
    code, lines = door(pack.main, [str(source), str(tmp_path / "shards")])
    assert code == 2
    assert len(lines) == 1
    assert str(source) in lines[0]


def test_the_door_really_exits_with_2(tiny_run):
    """Once through a real process: the shell sees the code and one line."""
    script = Path(__file__).parents[2] / "launch" / "pretrain.py"
    argv = tiny_run(**{"data.shards": "missing-*.tar"})
    done = subprocess.run(
        [sys.executable, str(script), *argv], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "Traceback" not in done.stderr
