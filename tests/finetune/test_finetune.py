"""The metric-learning story end to end: exact resume, signals, evaluation before and after, the user's mistakes."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from glsd.cluster.launch import start
from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import load
from glsd.config.parse import load_file as load_config
from glsd.errors import UserError
from glsd.evaluate.run import evaluate
from glsd.finetune.networks import build, resolve
from glsd.finetune.objective import batch_losses
from glsd.finetune.plan import rates_at
from glsd.finetune.train import finetune
from glsd.losses.mdr import mean_normalize
from glsd.models.weights import read_weights
from glsd.runtime import checkpoint
from launch.benchmark import main as benchmark
from tests.helpers.runs import (
    ROOT,
    rows,
    train,
    wait_for,
)
from tests.helpers.warm_python import warm_python


def tune(argv: list[str]) -> Path:
    AcceleratorState._reset_state()  # it keeps the first precision of a process
    return finetune(load(FinetuneConfig, argv))


def out_of(argv: list[str]) -> Path:
    return Path(argv[0].removeprefix("--out="))


def without_clock(row: dict) -> dict:
    return {key: value for key, value in row.items() if key != "timing"}


def assert_same_run(one: Path, two: Path) -> None:
    """Metrics, measurements and all that a checkpoint holds are equal to the bit."""
    assert [without_clock(row) for row in rows(one)] == [without_clock(row) for row in rows(two)]
    ours, theirs = (checkpoint.load_latest(folder / "checkpoints") for folder in (one, two))
    assert ours is not None
    assert theirs is not None
    assert ours.step == theirs.step
    assert ours.state["scores"] == theirs.state["scores"]
    assert ours.tensors.keys() == theirs.tensors.keys()
    for name, tensors in ours.tensors.items():
        assert tensors.keys() == theirs.tensors[name].keys()
        for key, tensor in tensors.items():
            assert torch.equal(tensor, theirs.tensors[name][key]), f"{name}.{key}"
    for number, mine in ours.optimizer["state"].items():
        for key, value in mine.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(theirs.optimizer["state"][number][key])
            )


@pytest.mark.slow
def test_it_learns_to_retrieve_unseen_classes(tiny_finetune, many_digits, capsys):
    options = {"reg": "obdsd", "sd__weight": 10.0, "model__pool": "mean", "optim__batch_size": 24}
    options |= {"data__scale": "[0.7,1.0]", "data__flip_prob": 0.0, "watch__eval_every": 4}
    options |= {f"data__{part}_shards": f"{many_digits}/{part}-*.tar" for part in ("train", "test")}
    folder = tune(tiny_finetune(**options, optim__epochs=8))
    assert "final     test cosine, epoch 0 -> 8: Recall@1" in capsys.readouterr().out
    (record,) = json.loads((folder / "evals.json").read_text())
    before, after = (record[name]["test"]["cosine"] for name in ("epoch 0", "epoch 8"))
    assert after["map_at_r"] > before["map_at_r"] + 0.1
    assert "excluded by index" in record["protocol"]["cosine"]
    assert "frozen test" in record["epoch 0"]
    probes = [row for row in rows(folder) if "probe" in row]
    per_epoch = 600 // 24
    assert [row["step"] for row in probes] == [0, 4 * per_epoch, 8 * per_epoch]
    trained = [row for row in rows(folder) if "loss" in row]
    assert ["sd" in row for row in trained] == [row["step"] > per_epoch for row in trained], (
        "the first epoch has no teacher"
    )
    assert all(row["sd"] > 0 for row in trained[per_epoch:])
    # The same numbers from outside.
    shards = f"--data.test_shards={load_config(FinetuneConfig, folder / 'config.yaml').data.test_shards}"
    flags = ["--protocol=retrieval", shards, "--recall_at=[1,2]", "--nmi_seeds=1", "--data.num_workers=0"]
    for features, expected in (("student", after), ("initial", before)):
        found = evaluate(load(EvalConfig, [f"--model={folder}", f"--features={features}", *flags]))
        result = found["result"]["cosine"]
        assert {key: result[key] for key in expected} == expected
        assert 0 < result["nmi"] <= 1
    capsys.readouterr()
    benchmark.main(["table", str(folder), str(folder)])
    lines = capsys.readouterr().out.splitlines()
    share = f"{100 * after['recall@1']:.2f} ± 0.00 %"
    assert any(f"| obdsd | test, end | cosine | 2 | {share}" in line for line in lines)
    with pytest.raises(UserError, match=r"evals\.json"):
        benchmark.main(["table", str(folder.parent)])


@pytest.mark.slow
@pytest.mark.parametrize("reg", ["obdsd+mdr", "none"])
def test_stop_and_resume_in_mid_epoch_is_the_straight_run(tiny_finetune, reg):
    """4 steps an epoch; stopped after 6, in the middle of the second, when a teacher exists and statistics have moved."""
    options = {
        "reg": reg,
        "loss": "margin",
        "optim__epochs": 3,
        "model__drop_path": 0.3,
        "watch__log_every": 4,
    }
    straight = tune(tiny_finetune("straight", **options))
    tune(tiny_finetune("stopped", **options, optim__max_steps=6))
    saved = checkpoint.load_latest(out_of(tiny_finetune("stopped")) / "checkpoints")
    assert saved is not None
    assert saved.step == 6
    assert ("teacher" in saved.tensors) == (reg != "none")
    stopped = out_of(tiny_finetune("stopped"))
    tune(tiny_finetune("stopped", **options, resume="auto"))
    ours, theirs = (checkpoint.load_latest(folder / "checkpoints") for folder in (straight, stopped))
    assert ours is not None
    assert theirs is not None
    for name, tensors in ours.tensors.items():
        for key, tensor in tensors.items():
            assert torch.equal(tensor, theirs.tensors[name][key]), f"{name}.{key}"
    assert ours.optimizer["param_groups"] == theirs.optimizer["param_groups"]
    for number, mine in ours.optimizer["state"].items():
        for key, value in mine.items():
            assert torch.equal(
                torch.as_tensor(value), torch.as_tensor(theirs.optimizer["state"][number][key])
            )
    last = [[row for row in rows(folder) if "probe" in row][-1] for folder in (straight, stopped)]
    assert last[0] == last[1]
    assert last[0]["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_killed_twice_it_goes_on_as_if_nothing_happened(tiny_finetune, workers):
    options = {
        "reg": "obdsd+mdr",
        "loss": "triplet",
        "optim__epochs": 6,
        "watch__checkpoint_every": 3,
        "watch__log_every": 2,
        "watch__eval_every": 2,
        "data__num_workers": workers,
        "model__drop_path": 0.3,
    }
    straight = tune(tiny_finetune("straight", **options))
    killed = out_of(tiny_finetune("killed"))
    for step in (6, 15):
        argv = tiny_finetune("killed", **options, resume="auto")
        process = start_process(argv)
        wait_for(killed / "checkpoints" / f"step_{step:08d}", process)
        process.kill()
        process.communicate()
    newest = checkpoint.load_latest(killed / "checkpoints")
    assert newest is not None
    assert newest.step < 24, "the run ended before it was killed: nothing is shown"
    tune(tiny_finetune("killed", **options, resume="auto"))
    assert_same_run(straight, killed)


def start_process(argv: list[str]) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    command = [warm_python(), str(ROOT / "launch" / "finetune_dml.py"), *argv]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
def test_a_signal_saves_and_the_resumed_run_is_the_straight_one(tiny_finetune):
    options = {"reg": "obdsd+mdr", "optim__epochs": 40, "optim__max_steps": 60, "watch__eval_every": 100}
    straight = tune(tiny_finetune("straight", **options))
    process = start_process(tiny_finetune("stopped", **options))
    stopped = out_of(tiny_finetune("stopped"))
    wait_for(stopped / "metrics.jsonl", process)
    while len((stopped / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.005)
    process.send_signal(signal.SIGUSR1)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "stopped by SIGUSR1 after step" in output
    tune(tiny_finetune("stopped", **options, resume="auto"))
    assert_same_run(straight, stopped)


def parts(tiny_finetune, **changes):
    """A configuration, its state, and embeddings with labels of one batch."""
    AcceleratorState._reset_state()
    cfg, source = resolve(load(FinetuneConfig, tiny_finetune(**changes)))
    state = build(cfg, source, 6, start("no", "x"))
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(16, 16, generator=generator, requires_grad=True)
    return cfg, state, embeddings, torch.arange(4).repeat_interleave(4)


def test_the_total_is_the_sum_of_its_parts(tiny_finetune):
    cfg, state, embeddings, labels = parts(tiny_finetune, reg="obdsd+mdr", loss="multi_similarity")
    teacher = embeddings.detach() + 0.1
    found = batch_losses(cfg, state, embeddings, labels, teacher, sd_weight=3.0, seed=0)
    p = found.parts
    levels = cfg.mdr.level_weight * sum(level**2 for level in cfg.mdr.levels)
    expected = p["ranking"] + 3.0 * p["sd"] + cfg.mdr.weight * p["mdr"] + levels
    assert float(found.loss) == pytest.approx(float(expected), rel=1e-6)
    assert int(found.mdr_statistics.num_updates) == 1
    assert int(state.mdr_statistics.num_updates) == 0, "losses never mutate"


def test_a_triplet_loss_beside_mdr_sees_mean_normalized_embeddings(tiny_finetune):
    cfg, state, embeddings, labels = parts(tiny_finetune, reg="mdr", loss="triplet")
    found = batch_losses(cfg, state, embeddings, labels, None, sd_weight=0.0, seed=5)
    direct = state.ranking(mean_normalize(embeddings), labels, seed=5)
    assert float(found.parts["ranking"]) == float(direct)
    without = dataclasses.replace(cfg, reg="none")
    unit = state.ranking(torch.nn.functional.normalize(embeddings), labels, seed=5)
    assert float(batch_losses(without, state, embeddings, labels, None, sd_weight=0.0, seed=5).loss) == float(
        unit
    )
    assert float(unit) != float(direct)


def test_the_ramp_and_the_milestones_follow_the_epoch(tiny_finetune):
    cfg, _, _, _ = parts(tiny_finetune, reg="psd", optim__milestones="[2,3]", optim__epochs=4, sd__weight=8.0)
    from glsd.finetune.plan import make_plan

    plan = make_plan(cfg, 72, 6)
    assert plan.steps_per_epoch == 4
    found = [rates_at(cfg, plan, step) for step in (0, 4, 8, 15)]
    assert [rates.sd_weight for rates in found] == [0.0, 2.0, 4.0, 6.0]
    assert [rates.scale for rates in found] == pytest.approx([1.0, 1.0, 0.3, 0.09])


def test_it_starts_from_a_pretraining_run_and_from_its_own(tiny_run, tiny_finetune, capsys):
    run = train(tiny_run("pretrained", optim__max_steps=1))
    options = {"model__backbone": "", "model__timm_args": "{}", "optim__max_steps": 1}
    first = tune(tiny_finetune("first", init=run, **options))
    assert "weights from" in capsys.readouterr().out
    cfg = load_config(FinetuneConfig, first / "config.yaml")
    assert (cfg.model.backbone, cfg.data.crop) == ("vit_tiny_patch16_224", 32)
    assert cfg.model.timm_args["depth"] == 2
    teacher = load_file(run / "checkpoints/latest/teacher.safetensors")
    start_of = build_from(first, tiny_finetune("x", init=run, **options))
    assert torch.equal(start_of["backbone.net.cls_token"], teacher["backbone.net.cls_token"])
    tuned = load_file(first / "checkpoints/latest/student.safetensors")
    again = build_from(first, tiny_finetune("y", init=first, **options))
    from_folder = read_weights(first / "checkpoints/latest")["cls_token"]
    assert torch.equal(from_folder, tuned["backbone.net.cls_token"])
    assert torch.equal(again["backbone.net.cls_token"], tuned["backbone.net.cls_token"])


def build_from(_folder: Path, argv: list[str]) -> dict[str, torch.Tensor]:
    AcceleratorState._reset_state()
    cfg, source = resolve(load(FinetuneConfig, argv))
    return build(cfg, source, 6, start("no", "x")).student.state_dict()


def test_val_classes_choose_the_epoch(tiny_finetune, capsys):
    argv = tiny_finetune(data__val_share=0.34, optim__epochs=2, watch__eval_every=1, optim__batch_size=16)
    folder = tune(argv)
    (record,) = json.loads((folder / "evals.json").read_text())
    assert "val" in record["epoch 0"]
    assert any(key.endswith("chosen by val") for key in record)
    output = capsys.readouterr().out
    assert "the best MAP@R of the held-out classes" in output
    assert "24 held out" in output


def test_query_and_gallery_and_mdr_in_its_own_geometry(tiny_finetune, class_shards, tmp_path):
    argv = tiny_finetune(reg="mdr", loss="triplet", optim__max_steps=2)
    argv = [flag for flag in argv if not flag.startswith("--data.test_shards")]
    copy = tmp_path / "other.tar"
    copy.write_bytes((class_shards / "test-000000.tar").read_bytes())
    folder = tune(
        [*argv, f"--data.query_shards={class_shards}/test-000000.tar", f"--data.gallery_shards={copy}"]
    )
    (record,) = json.loads((folder / "evals.json").read_text())
    assert set(record["epoch 0"]["test"]) == {"euclidean", "cosine"}
    assert record["epoch 0"]["test"]["euclidean"]["recall@1"] == 1.0, "every query is in this gallery"
    assert "searched in the gallery" in record["protocol"]["euclidean"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"init": ""}, "init is not set"),
        ({"init": "nowhere"}, "init 'nowhere': no such run"),
        ({"loss": "multisimilarity"}, "did you mean 'multi_similarity'"),
        ({"loss_args": "{bta: 3}"}, "loss_args.bta"),
        ({"optim__batch_size": 32}, "6 classes to learn from, fewer than the 8 of a batch"),
        ({"optim__batch_size": 18}, "is not a multiple of data.images_per_class 4"),
        ({"optim__batch_size": 4}, "two classes or more: use 8"),
        ({"data__images_per_class": 1}, "data.images_per_class is 1"),
        ({"reg": "obdsd", "sd__w": 1.0}, "sd.w"),
        ({"reg": "obdsd", "sd__tau": 0.0}, "sd.tau"),
        ({"data__crop": 30}, "data.crop 30 is not a multiple"),
        ({"data__crop": 0}, "data.crop is 0"),
        ({"data__resize": 20}, "data.resize is 20: expected 32 or more"),
        ({"mdr__levels": "[.nan]"}, "mdr.levels is '[.nan]': expected numbers"),
        ({"optim__lr": ".inf"}, "optim.lr is inf"),
        ({"data__train_shards": ""}, "data.train_shards is not set"),
        ({"data__test_shards": ""}, "nothing to measure"),
        ({"data__val_share": 0.95}, "data.val_share"),
        ({"optim__milestones": "[0]"}, "optim.milestones is 0"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(tiny_finetune, changes, expected):
    argv = tiny_finetune(**changes)
    with pytest.raises(UserError) as caught:
        tune(argv)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not out_of(argv).exists()


def test_the_same_classes_in_training_and_test_are_refused(tiny_finetune, class_shards, tmp_path):
    copy = tmp_path / "copy.tar"
    copy.write_bytes((class_shards / "train-000000.tar").read_bytes())
    with pytest.raises(UserError, match="share 6 classes, as label 0"):
        tune(tiny_finetune(data__test_shards=str(copy)))


def test_weights_that_fit_only_partly_stop_unless_allowed(tiny_run, tiny_finetune, tmp_path, capsys):
    run = train(tiny_run("pretrained", optim__max_steps=1))
    whole = load_file(run / "checkpoints/latest/teacher.safetensors")
    part = {name: tensor for name, tensor in whole.items() if ".blocks.1." not in name}
    save_file({**part, "backbone.net.blocks.7.norm1.weight": torch.ones(32)}, tmp_path / "part.safetensors")
    argv = tiny_finetune(init=tmp_path / "part.safetensors", optim__max_steps=1)
    with pytest.raises(UserError) as caught:
        tune(argv)
    for word in ("matched", "missing", "unexpected", "--model.allow_partial true"):
        assert word in str(caught.value)
    assert not out_of(argv).exists()
    tune([*argv, "--model.allow_partial=true"])
    assert "missing" in capsys.readouterr().out


def test_a_resume_with_other_settings_is_refused_and_changes_nothing(tiny_finetune, class_shards, tmp_path):
    folder = tune(tiny_finetune(optim__max_steps=2))
    copy = tmp_path / "gallery.tar"
    copy.write_bytes((class_shards / "test-000000.tar").read_bytes())
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    shards = load_config(FinetuneConfig, folder / "config.yaml").data.test_shards
    refused: dict[str, dict[str, Any]] = {
        "seed": {"seed": 1},
        "reg": {"reg": "mdr"},
        "optim.epochs": {"optim__epochs": 5},
        "loss": {"loss": "margin"},
        "head": {"model__embed_dim": 8},
        "optim.optimizer": {"optim__optimizer": "adamw"},
        "watch.recall_at": {"watch__recall_at": "[2]"},
        "mdr.levels": {"mdr__levels": "[-2,2]"},
        "data.test_shards": {
            "data__test_shards": "",
            "data__query_shards": shards,
            "data__gallery_shards": copy,
        },
        "raise optim.max_steps": {"optim__max_steps": 1},
    }
    for word, changes in refused.items():
        with pytest.raises(UserError) as caught:
            tune(tiny_finetune(**changes, resume="auto"))
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_class_with_one_image_and_missing_labels(tiny_finetune, class_shards, tmp_path):
    from glsd.packing.write import pack_samples
    from glsd.shards.store import open_shards

    train_set = open_shards(f"{class_shards}/train-*.tar")

    def samples(labels):
        for number, label in enumerate(labels):
            yield train_set.read(number), "png", label

    pack_samples(samples([0, 0, 1, 1, 2]), tmp_path / "lone")
    pack_samples(samples([None] * 4), tmp_path / "unlabeled")
    options = {"optim__batch_size": 4, "data__images_per_class": 2, "optim__max_steps": 1}
    with pytest.raises(
        UserError,
        match=r"data.train_shards: 1 of 3 .*class 2, image 00000004.*data.drop_lone_classes true",
    ):
        tune(tiny_finetune(data__train_shards=f"{tmp_path}/lone/*.tar", **options))
    with pytest.raises(UserError, match="4 of 4 images have no label"):
        tune(tiny_finetune(data__train_shards=f"{tmp_path}/unlabeled/*.tar", **options))
    tune(tiny_finetune(data__train_shards=f"{tmp_path}/lone/*.tar", data__drop_lone_classes=True, **options))


@pytest.mark.slow
def test_the_benchmark_compares_every_regularizer(capsys):
    AcceleratorState._reset_state()
    flags = ["--backbone=vit_tiny_patch16_224", "--size=32", "--batch_size=8", "--embed_dim=8", "--rounds=2"]
    benchmark.main(["dml", *flags])
    output = capsys.readouterr().out
    for name in ("none", "psd", "obdsd", "mdr", "obdsd+mdr", "teacher forward"):
        assert f"\n{name} " in output


def test_the_teacher_is_the_student_at_the_end_of_the_previous_epoch(tiny_finetune):
    """4 steps an epoch, a checkpoint after each: the teacher changes after steps 4 and 8 only."""
    argv = tiny_finetune(
        reg="psd", optim__epochs=3, optim__max_steps=10, watch__checkpoint_every=1, watch__keep_checkpoints=20
    )
    folder = tune(argv) / "checkpoints"

    def network(step: int, name: str) -> dict[str, torch.Tensor]:
        return load_file(folder / f"step_{step:08d}" / f"{name}.safetensors")

    students = {step: network(step, "student") for step in range(1, 11)}
    assert not torch.equal(students[4]["head.weight"], students[5]["head.weight"])
    for step in range(4, 11):
        expected = students[4 if step < 8 else 8]
        teacher = network(step, "teacher")
        assert all(torch.equal(teacher[name], tensor) for name, tensor in expected.items())
    first = network(1, "teacher")
    assert not torch.equal(first["head.weight"], students[1]["head.weight"])
    assert torch.equal(first["head.weight"], network(3, "teacher")["head.weight"])


def test_mdr_uses_the_statistics_that_this_batch_has_moved(tiny_finetune):
    """Two batches, the second twice as spread around the mean distance, against the published order of the steps."""
    cfg, state, embeddings, labels = parts(tiny_finetune, reg="mdr", loss="triplet")
    second = torch.cat([embeddings[:8].detach() * 3, embeddings[8:].detach()]).requires_grad_()
    moved: list[torch.Tensor] = []  # running mean and deviation
    for batch in (embeddings, second):
        found = batch_losses(cfg, state, batch, labels, None, sd_weight=0.0, seed=0)
        state.mdr_statistics = found.mdr_statistics
        distances = torch.cdist(batch.detach().double(), batch.detach().double())
        distances = distances / (distances.sum() / (16 * 15))
        now = torch.stack([distances.mean(), distances.std()])
        moved.append(0.1 * now + 0.9 * moved[-1] if moved else now)
        mean, std = moved[-1]
        z = (distances - mean) / std
        gaps = torch.stack([(z - level).abs() for level in cfg.mdr.levels]).amin(dim=0)
        expected = (gaps.sum() - gaps.diagonal().sum()) / (16 * 15)
        assert float(found.parts["mdr"]) == pytest.approx(float(expected), rel=1e-5)


def test_settings_that_may_change_take_effect_on_resume(tiny_finetune):
    options = {"optim__epochs": 4, "watch__checkpoint_every": 1}
    tune(tiny_finetune(**options, optim__max_steps=1, optim__weight_decay=0.5))
    folder = tune(
        tiny_finetune(**options, optim__max_steps=2, optim__weight_decay=0.0, optim__lr=1e-4, resume="auto")
    )
    saved = checkpoint.load_latest(folder / "checkpoints")
    assert saved is not None
    assert {group["weight_decay"] for group in saved.optimizer["param_groups"]} == {0.0}
    assert {group["base_lr"] for group in saved.optimizer["param_groups"]} == {1e-4}


def test_it_goes_on_when_what_it_started_from_is_gone(tiny_run, tiny_finetune):
    run = train(tiny_run("pretrained", optim__max_steps=1))
    options = {"init": run, "model__backbone": "", "model__timm_args": "{}", "optim__epochs": 1}
    folder = tune(tiny_finetune(**options, optim__max_steps=2))
    shutil.rmtree(run)
    tune(tiny_finetune(**options, resume="auto"))
    cfg = load_config(FinetuneConfig, folder / "config.yaml")
    assert cfg.init.endswith("step_00000001"), "the very checkpoint, not a run that may train on"
    again = len(json.loads((folder / "evals.json").read_text()))
    tune(tiny_finetune(**options, resume="auto"))
    assert len(json.loads((folder / "evals.json").read_text())) == again, "a finished run has nothing to add"


def test_measurements_are_float32_under_bf16_training(tiny_finetune):
    folder = tune(tiny_finetune(optim__max_steps=2, optim__precision="bf16"))
    AcceleratorState._reset_state()
    shards = load_config(FinetuneConfig, folder / "config.yaml").data.test_shards
    flags = [f"--model={folder}", "--protocol=retrieval", f"--data.test_shards={shards}", "--recall_at=[1,2]"]
    found = evaluate(load(EvalConfig, [*flags, "--nmi_seeds=0", "--data.num_workers=0"]))["result"]["cosine"]
    last = [row for row in rows(folder) if "probe" in row][-1]["probe"]["test"]["cosine"]
    assert found == last


def test_batch_norm_that_learns_is_refused_on_several_ranks(tiny_finetune, monkeypatch):
    argv = tiny_finetune(model__backbone="resnet10t", model__timm_args="{}", model__freeze_batch_norm=False)
    monkeypatch.setattr("glsd.finetune.networks.dist.world_size", lambda: 2)
    cfg, source = resolve(load(FinetuneConfig, argv))
    with pytest.raises(UserError, match=r"model\.freeze_batch_norm is false on several ranks"):
        build(cfg, source, 6, start("no", "x"))


def test_a_batch_too_small_for_diffusion(tiny_finetune):
    from glsd.finetune.plan import check_ranges

    cfg = load(FinetuneConfig, tiny_finetune(reg="obdsd", optim__batch_size=2, data__images_per_class=2))
    with pytest.raises(UserError, match=r"optim\.batch_size is 2: expected 3 or more"):
        check_ranges(cfg)


@pytest.mark.slow
def test_the_script_ends_with_one_line_and_code_2(tiny_finetune):
    process = start_process(tiny_finetune(loss="tripplet"))
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 2
    assert [line for line in output.splitlines() if line] == [output.strip()]
    assert "did you mean 'triplet'" in output
