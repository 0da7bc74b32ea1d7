"""One answer to what a path names, and nothing of fine-tuning is imported for it."""

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import dump
from glsd.errors import UserError
from glsd.loading import find_weights, identify, load_network
from glsd.models.backbone import build_backbone
from glsd.runtime import checkpoint
from tests.helpers.trained import NAME, TINY, TRAINED, trained_networks, write_run


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return trained_networks(tmp_path_factory.mktemp("load"))


def same(ours, theirs) -> bool:
    ours, theirs = ours.state_dict(), theirs.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_pretraining_run_is_its_teacher_unless_another_network_is_asked_for(world):
    run = world["root"] / "pretrained"
    for path in (run, run / "checkpoints" / "step_00000007", run / "checkpoints" / "latest"):
        loaded = load_network(str(path))
        assert same(loaded.network, world["teacher"])
        assert (loaded.name, loaded.step, loaded.run) == (f"teacher of {run}", 7, run)
        assert (loaded.crop, loaded.resize, loaded.config) == (32, None, TRAINED)
    assert same(load_network(str(run), role="student").network, world["student"])
    initial = load_network(str(run), role="initial")
    assert same(initial.network, build_backbone(NAME, image_size=32, timm_args=TINY, seed=TRAINED.seed))
    assert (initial.name, initial.step) == (f"initial network of {run}", 0)
    images = torch.rand(2, 3, 32, 32)
    # The run looks at the mean of the patches.
    assert torch.equal(loaded.features(images), world["teacher"](images)[1].mean(dim=1))
    assert torch.equal(load_network(str(run), pool="cls").features(images), world["teacher"](images)[0])


def starts_from_the_teacher(run, world) -> bool:
    initial = load_network(str(run), role="initial").network.state_dict()
    patches = "net.patch_embed.proj.weight"
    return torch.equal(initial[f"backbone.{patches}"], world["teacher"].state_dict()[patches])


def test_a_metric_learning_run_is_its_student_with_the_embedding(world):
    run = world["root"] / "tuned"
    loaded = load_network(str(run))
    assert same(loaded.network, world["embedder"])
    assert (loaded.name, loaded.step, loaded.crop, loaded.resize) == (f"student of {run}", 3, 40, 50)
    assert loaded.features(torch.rand(2, 3, 40, 40)).shape == (2, 6)
    # Its start is the teacher of the run that it was given.
    assert starts_from_the_teacher(run, world)


def test_the_start_of_a_resumed_run_is_still_what_it_was_given(world, tmp_path):
    """Its own folder holds checkpoints by now, and these are not its start."""
    run = tmp_path / "run"
    config = identify(str(world["root"] / "tuned")).config
    assert isinstance(config, FinetuneConfig)
    write_run(run, replace(config, resume="auto", out=str(run)), {"student": world["embedder"]}, step=4)
    assert starts_from_the_teacher(run, world)


def test_the_start_of_a_run_does_not_depend_on_the_present_folder(world, tmp_path, monkeypatch):
    """A relative path, as older config.yaml files hold it, would be another file elsewhere."""
    monkeypatch.chdir(world["root"])
    config = replace(TRAINED, model=replace(TRAINED.model, init="weights.safetensors"))
    write_run(tmp_path / "run", config, {}, step=1)
    with pytest.raises(
        UserError, match=r"config.yaml says that the run began with 'weights.safetensors', but not in which"
    ):
        load_network(str(tmp_path / "run"), role="initial")
    whole = str(world["root"] / "weights.safetensors")
    config = replace(config, model=replace(config.model, init=whole))
    (tmp_path / "run" / "config.yaml").write_text(dump(config))
    assert same(load_network(str(tmp_path / "run"), role="initial").network, world["teacher"])


def test_a_checkpoint_that_is_not_finite_is_named(world, tmp_path):
    bad = {name: x.clone() for name, x in world["teacher"].state_dict().items()}
    bad["net.norm.weight"][3] = torch.nan
    tensors = {"teacher": {f"backbone.{name}": x for name, x in bad.items()}}
    (tmp_path / "config.yaml").write_text(dump(TRAINED))
    saved = checkpoint.save(tmp_path / "checkpoints", step=1, tensors=tensors, state={}, optimizer={}, keep=1)
    with pytest.raises(
        UserError, match=rf"{saved}: tensor 'net.norm.weight' holds NaN or infinity in 1 of 32 numbers"
    ):
        load_network(str(tmp_path))


def test_weights_are_those_to_go_on_with(world):
    root = world["root"]
    for path, network in (("pretrained", world["teacher"]), ("tuned", world["embedder"].backbone)):
        weights = find_weights(identify(str(root / path)))
        size = 40 if path == "tuned" else 32
        assert same(build_backbone(NAME, image_size=size, timm_args=TINY, init=weights), network)
    assert find_weights(identify("timm:some_network")) == "timm"
    file = str(root / "weights.safetensors")
    assert find_weights(identify(file, backbone=NAME)) == file
    assert identify("random", backbone=NAME).architecture.backbone == NAME


def test_mistakes_are_named(world, tmp_path):
    run, tuned, file = (str(world["root"] / name) for name in ("pretrained", "tuned", "weights.safetensors"))
    cases: tuple[tuple[dict[str, Any], str], ...] = (
        ({"path": ""}, "path is not set: give a run folder"),
        ({"path": "no/such"}, "path 'no/such': no such run, checkpoint or weights file, and not timm:NAME"),
        (
            {"path": "vit_small_patch16_224.dino"},
            "not timm:NAME; did you mean 'timm:vit_small_patch16_224.dino'?",
        ),
        ({"path": file}, "does not say which network it is: set backbone"),
        ({"path": file, "backbone": NAME, "role": "student"}, "role 'student': .* is not a run"),
        ({"path": "timm:a", "backbone": "b"}, "'timm:a' and backbone 'b' name two networks"),
        ({"path": run, "role": "tutor"}, "unknown .*'tutor'"),
        ({"path": run, "which": "first"}, "unknown which 'first'"),
        ({"path": run, "which": "best"}, "has no best checkpoint"),
        ({"path": f"{run}/checkpoints/latest", "which": "best"}, "is not the folder of one"),
        ({"path": file, "backbone": NAME, "which": "best"}, "is not the folder of one"),
        ({"path": tuned, "role": "teacher"}, "role 'teacher': .* is a metric-learning run"),
        ({"path": tuned, "pool": "mean"}, "pool 'mean': .* is a metric-learning run"),
    )
    for arguments, says in cases:
        with pytest.raises(UserError, match=says):
            load_network(**arguments)
    (tmp_path / "config.yaml").write_text(dump(TRAINED))
    with pytest.raises(UserError, match=r"no checkpoint yet \(role 'initial' is"):
        load_network(str(tmp_path))


def test_a_frozen_backbone_imports_no_fine_tuning():
    code = (
        "import sys, glsd.loading\n"
        "unwanted = {'pytorch_metric_learning', 'scipy.stats', 'sklearn', 'glsd.finetune', 'glsd.losses'}\n"
        "assert not unwanted & sys.modules.keys(), unwanted & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
