"""A checkpoint is the same files whoever wrote it: any number of ranks, with whole or cut parameters, goes on from it."""

import hashlib
import json
import time
from pathlib import Path

import pytest
import torch
from tests.dist.rank_processes import HERE, close, kill, run_ranks, started
from tests.helpers.runs import assert_same_run

SCRIPT = HERE.parents[1] / "launch" / "pretrain.py"


def digests(folder: Path) -> dict[str, str]:
    return {
        p.name: hashlib.sha256(p.read_bytes()).hexdigest()
        for p in (folder / "checkpoints" / "latest").iterdir()
    }


def runs_of(world: int, runs: list, folder: Path, argv: list[str]) -> dict:
    out = folder / f"out{world}.pt"
    run_ranks(world, HERE / "sharded_checkpoint.py", str(out), json.dumps(runs), *argv)
    found = torch.load(out, weights_only=True)
    assert found["world"] == world
    return found["runs"]


@pytest.mark.slow
def test_any_world_goes_on_from_any_other(tiny_run, tmp_path):
    argv = tiny_run(
        model__drop_path=0.0,
        optim__freeze_prototypes_epochs=0,
        optim__warmup_epochs=0,
        optim__clip_mode="global",
        head__shared="true",
    )
    two, again, four, whole = (str(tmp_path / name) for name in ("two", "again", "four", "whole"))
    of_two = [
        ["straight", "fsdp", "", two],
        ["resumed", "fsdp", two, again],
        ["to ddp", "ddp", two, whole],
        ["from ddp", "fsdp", whole, ""],
    ]
    found = runs_of(2, of_two, tmp_path, argv)
    found["four"] = runs_of(4, [["four", "fsdp", two, four]], tmp_path, argv)["four"]
    found["one"] = runs_of(1, [["one", "fsdp", four, ""]], tmp_path, argv)["one"]
    straight = found.pop("straight")
    for name, values in found["resumed"].items():
        assert torch.equal(values, straight[name]), name
    for name, values in found.items():
        assert close(straight, values, name, 1e-9) >= 5
    written = digests(Path(two))
    assert {"student.safetensors", "teacher.safetensors", "optimizer.pt"} < written.keys()
    for other in (again, four, whole):
        assert digests(Path(other)) == written, other


@pytest.mark.slow
def test_a_killed_run_in_parts_goes_on_as_if_nothing_had_happened(tiny_run):
    """The whole program: kill -9 of all ranks, then --resume auto; pictures and probe included, with shares of 4 and 3 images."""
    shards = next(flag for flag in tiny_run() if flag.startswith("--data.shards=")).split("=", 1)[1]
    options = {
        "cluster__parallel": "fsdp",
        "optim__batch_size": 7,
        "optim__max_steps": 12,
        "watch__checkpoint_every": 2,
        "watch__probe_every": 4,
        "watch__probe_train_shards": shards,
        "watch__probe_val_shards": shards.replace("train-*", "val-*"),
        "watch__probe_k": 3,
    }
    straight, killed = (tiny_run(name, **options) for name in ("straight", "killed"))
    run_ranks(2, SCRIPT, *straight)
    folder = Path(killed[0].removeprefix("--out="))
    with started(2, SCRIPT, *killed) as process:
        deadline = time.monotonic() + 120
        while not (folder / "checkpoints" / "step_00000004").exists():
            assert time.monotonic() < deadline, "no checkpoint of step 4 within 120 s"
            assert process.poll() is None, process.communicate()[1]
            time.sleep(0.005)
        kill(process)
    assert not (folder / "checkpoints" / "step_00000012").exists(), "killed too late to show anything"
    output = run_ranks(2, SCRIPT, *killed, "--resume=auto")
    assert "resumed from" in output
    assert_same_run(Path(straight[0].removeprefix("--out=")), folder)
    assert (folder / "first_batch_local.png").stat().st_size > 1000
