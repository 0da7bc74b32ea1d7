"""Trackers get what people watch, go on in the same run, and never end a training."""

import json
import sys

import pytest

from glsd.errors import UserError
from glsd.runtime.sections import SECTIONS, board_name, watched
from glsd.runtime.trackers import Trackers, tracker_names
from tests.helpers.runs import rows, train


def test_names():
    assert tracker_names("tensorboard, wandb,") == ["tensorboard", "wandb"]
    assert tracker_names(["mlflow"]) == ["mlflow"]
    assert tracker_names("") == []
    with pytest.raises(UserError, match=r"unknown entry of trackers 'wandbb': .*did you mean 'wandb'"):
        tracker_names("wandbb")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"the package mlflow is missing: pip install 'glsd\[mlflow\]'"):
        tracker_names("mlflow")


def test_sections_come_in_the_order_people_read_them():
    names = [
        "lr",
        "epoch",
        "probe.teacher_cls.rankme",
        "loss",
        "probe.test.cosine.tie_gap",
        "timing.data_wait",
        "grad_norm",
    ]
    shown = sorted(name for name in map(board_name, names) if name)
    assert shown == [
        "1_loss/loss",
        "2_health/grad_norm",
        "3_probe/teacher_cls/rankme",
        "4_rates/lr",
        "5_timing/data_wait",
    ]
    found = watched([{"step": 1, "lr": 1.0, "loss": 2.0, "epoch": 0}, {"step": 2, "loss": 1.0}])
    assert found == {"Loss": {"loss": [(1, 2.0), (2, 1.0)]}, "Rates": {"lr": [(1, 1.0)]}}


def test_all_that_a_run_writes_is_watched_but_for_a_few(tiny_run):
    """A new metric must not be forgotten."""
    run = train(tiny_run(optim__max_steps=2, watch__probe_every=2))
    names = {name for row in rows(run) for name in row if name not in ("step", "epoch")}
    assert {name for name in names if board_name(name) is None} == {"probe"}
    assert {(board_name(name) or "").split("/")[0] for name in names - {"probe"}} == {
        f"{number}_{title.lower()}"
        for number, title in enumerate(SECTIONS, 1)
        if title in ("Loss", "Health", "Rates")
    }


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """Both trackers write into the test's folder and ask nobody."""
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "MLFLOW_TRACKING_URI": f"file:{tmp_path}/mlruns",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_a_run_and_its_resumption_are_one_run_of_each_tracker(tiny_run, offline, tmp_path):
    import mlflow

    def start(steps: int):
        return train(tiny_run(optim__max_steps=steps, watch__trackers="wandb,mlflow", resume="auto"))

    run = start(2)
    ids = json.loads((run / "trackers.json").read_text())
    assert start(4) == run
    assert json.loads((run / "trackers.json").read_text()) == ids
    assert not (run / "tensorboard").exists()
    losses = [row["loss"] for row in rows(run) if "loss" in row]
    client = mlflow.MlflowClient()
    history = client.get_metric_history(ids["mlflow"], "1_loss/loss")
    assert [(entry.step, entry.value) for entry in history] == list(enumerate(losses, 1))
    assert client.get_run(ids["mlflow"]).data.params["optim.batch_size"] == "8"
    folders = sorted((run / "wandb").glob(f"offline-run-*-{ids['wandb']}"))
    assert folders
    assert all((folder / f"run-{ids['wandb']}.wandb").stat().st_size > 0 for folder in folders)


def test_one_that_fails_is_left_out_and_the_run_goes_on(tmp_path, monkeypatch):
    class Dies:
        class run:
            id = "x"

        def store_init_configuration(self, values):
            assert values == {"optim.lr": 1.0}

        def log(self, values, step):
            raise ConnectionError("the server\nis gone")

    said: list[str] = []
    monkeypatch.setattr("glsd.runtime.trackers._START", {"wandb": lambda folder, run: Dies()})
    trackers = Trackers(["wandb"], tmp_path, "optim: {lr: 1.0}", say=said.append)
    for step in (1, 2):
        trackers.log({"1_loss/loss": 1.0}, step)
    trackers.close()
    assert said == [
        "warning: tracker wandb failed and is left out: the server is gone; metrics.jsonl has all"
    ]


def test_one_that_cannot_start_is_one_line(tmp_path, monkeypatch):
    def fails(folder, run):
        raise ConnectionError("no route")

    monkeypatch.setattr("glsd.runtime.trackers._START", {"wandb": fails})
    with pytest.raises(UserError, match=r"^tracker wandb cannot start: no route; mend it, or leave it out"):
        Trackers(["wandb"], tmp_path, "", say=print)
