"""Pretraining runs in this process, and what they wrote down, without clock values."""

import json
import subprocess
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.pretrain.train import pretrain
from glsd.runtime import checkpoint

ROOT = Path(__file__).parents[2]


def train(argv: list[str]) -> Path:
    AcceleratorState._reset_state()  # it keeps the first precision of a process
    return pretrain(load(PretrainConfig, argv))


def wait_for(path: Path, process: subprocess.Popen, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not path.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.005)


def rows(run: Path) -> list[dict]:
    """All rows of metrics.jsonl without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "timing"} for line in lines]


def assert_same_run(one: Path, other: Path) -> None:
    assert rows(one) == rows(other)
    latest = [checkpoint.load_latest(run / "checkpoints") for run in (one, other)]
    assert latest[0] is not None
    assert latest[1] is not None
    assert latest[0].step == latest[1].step
    for kind, tensors in latest[0].tensors.items():
        for name, tensor in tensors.items():
            assert torch.equal(tensor, latest[1].tensors[kind][name]), f"{kind} {name}"
    moments = [saved.optimizer["state"] for saved in latest if saved is not None]
    assert moments[0].keys() == moments[1].keys()
    for key, values in moments[0].items():
        for name, tensor in values.items():
            assert torch.equal(tensor, moments[1][key][name]), f"optimizer {key} {name}"
