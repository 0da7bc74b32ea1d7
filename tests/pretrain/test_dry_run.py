"""The dry run: what it prints, that it keeps nothing, that it refuses what training refuses."""

import os
import subprocess
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState

from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.pretrain import dry_run as forecast_module
from glsd.pretrain.dry_run import Forecast, forecast
from glsd.pretrain.train import pretrain
from tests.helpers.warm_python import warm_python

SCRIPT = Path(__file__).parents[2] / "launch" / "pretrain.py"


@pytest.fixture(autouse=True)
def _brief(monkeypatch):
    monkeypatch.setattr(forecast_module, "MEASURE_SECONDS", 0.0)
    AcceleratorState._reset_state()


def look(argv: list[str]) -> Forecast:
    return forecast(load(PretrainConfig, argv))


def test_it_says_what_a_run_needs_and_keeps_nothing(tiny_run, tmp_path, capsys):
    found = look(tiny_run("run"))
    out = capsys.readouterr().out
    for word in ("parameters:", "memory:", "images/s", "hours", "activations and loss"):
        assert word in out
    assert list(tmp_path.iterdir()) == []
    assert found.steps_left == 4 * (48 // 8)
    assert found.hours == pytest.approx(found.steps_left * found.step_s / 3600)
    assert found.images_per_s == pytest.approx(8 / found.step_s, rel=1e-3)
    assert 0 <= found.data_wait < 1


def test_its_parts_are_those_of_the_networks(tiny_run):
    found = look(tiny_run("run"))
    parameters = sum(found.parameters.values())
    frozen = 2 * 64  # the gains of both heads' prototypes
    assert found.memory["weights"] == found.memory["teacher"] == 4 * parameters
    assert found.memory["gradients"] == 4 * (parameters - frozen)
    # Two moments of each trained parameter, prototypes too although the first epoch freezes them; counters of steps.
    moments = 2 * 4 * (parameters - frozen)
    assert moments <= found.memory["optimizer state"] < 1.1 * moments


def test_an_occupied_folder_is_no_obstacle_and_stays_as_it_is(tiny_run):
    AcceleratorState._reset_state()
    run = pretrain(load(PretrainConfig, tiny_run("run", optim__max_steps=2)))
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert look(tiny_run("run", optim__max_steps=5)).steps_left == 5
    assert look(tiny_run("run", optim__max_steps=5, resume="auto")).steps_left == 3
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"data__shards": "none-*.tar"}, "none-*.tar"),
        ({"optim__batch_size": 64}, "optim.batch_size"),
        ({"watch__probe_every": 5, "watch__probe_val_shards": "some-*.tar"}, "probe_train_shards"),
        ({"model__backbone": "no_such_net"}, "no_such_net"),
    ],
)
def test_it_refuses_what_training_refuses(tiny_run, changes, says):
    with pytest.raises(UserError) as dry:
        look(tiny_run("run", **changes))
    assert says in str(dry.value)
    AcceleratorState._reset_state()
    with pytest.raises(UserError) as trained:
        pretrain(load(PretrainConfig, tiny_run("run", **changes)))
    assert str(dry.value) == str(trained.value)


def test_what_does_not_fit_is_said_in_one_line(tiny_run, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(forecast_module, "train_step", full)
    with pytest.raises(UserError, match=r"optim.batch_size 8 does not fit"):
        look(tiny_run("run"))


def test_other_errors_of_torch_stay_errors(tiny_run, monkeypatch):
    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(forecast_module, "train_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        look(tiny_run("run"))


def dry_run(argv: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [warm_python(), str(SCRIPT), "--dry_run", *argv]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_flag_of_the_script(tiny_run, tmp_path):
    done = dry_run(tiny_run("run"))
    assert done.returncode == 0, done.stderr
    assert "to the end: 24 steps" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_bad_configuration_ends_with_code_2(tiny_run):
    done = dry_run([*tiny_run("run"), "--optim.batch_sise=8"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: unknown flag --optim.batch_sise")
