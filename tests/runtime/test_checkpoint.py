"""Checkpoints: exact, atomic, verified, and honest about damage."""

import json
import os

import pytest
import torch
from torch import nn

from glsd.errors import UserError
from glsd.runtime import checkpoint
from glsd.runtime.checkpoint import (
    load,
    load_latest,
    point_best,
    restore,
    save,
)
from tests.helpers.ranks import run_ranks


def network(width: int = 3) -> nn.Sequential:
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(4, width), nn.BatchNorm1d(width))


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model = network()
    optimizer = torch.optim.AdamW([{"params": list(model.parameters()), "names": ["a", "b"]}], lr=0.1)
    model(torch.randn(8, 4)).pow(2).sum().backward()
    optimizer.step()
    return model, optimizer


def save_step(folder, step, *, keep=2, fill=None, keep_every=0):
    model, optimizer = trained()
    tensors = {"student": model.state_dict(), "centers": {"image": torch.full((5,), float(fill or step))}}
    state = {"samples": step * 8, "loss": 1 / 3}
    more = {"keep": keep, "keep_every": keep_every}
    return save(folder, step=step, tensors=tensors, state=state, optimizer=optimizer.state_dict(), **more)


def newest_step(folder) -> int:
    newest = load_latest(folder)
    assert newest is not None
    return newest.step


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_best_one_and_every_nth_stay(tmp_path):
    scores = {0: 9.0, 2: 0.5, 3: 0.7, 4: 0.7, 5: float("nan"), 6: 0.1}
    for step in range(1, 10):
        save_step(tmp_path, step, keep=1, keep_every=4)
        point_best(tmp_path, {at: score for at, score in scores.items() if at <= step})
    assert names(tmp_path) == [
        "best",
        "latest",
        "step_00000003",
        "step_00000004",
        "step_00000008",
        "step_00000009",
    ]
    assert load(tmp_path / "best").step == 3  # 0 has no checkpoint, 4 is as good but later
    assert newest_step(tmp_path) == 9
    save_step(tmp_path, 2, keep=1)  # the run went back and comes by again
    assert names(tmp_path) == ["best", "latest", "step_00000002"]
    point_best(tmp_path, {0: 9.0})
    assert names(tmp_path) == ["latest", "step_00000002"]
    point_best(tmp_path, {2: 0.5})
    assert load(tmp_path / "best").step == 2


def test_round_trip_is_bitwise(tmp_path):
    model, optimizer = trained()
    path = save(
        tmp_path / "checkpoints",
        step=12,
        tensors={"student": model.state_dict()},
        state={"samples": 96, "third": 1 / 3, "list": [1, {"a": None}]},
        optimizer=optimizer.state_dict(),
        keep=1,
    )
    assert path.name == "step_00000012"
    for loaded in (load(path), load(tmp_path / "checkpoints" / "latest"), load_latest(path.parent)):
        assert loaded is not None
        assert (loaded.path, loaded.step) == (path.resolve(), 12)
        assert loaded.state == {"samples": 96, "third": 1 / 3, "list": [1, {"a": None}]}
        assert loaded.tensors["student"].keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(loaded.tensors["student"][name], tensor)
            assert loaded.tensors["student"][name].dtype == tensor.dtype
        fresh = network()
        other = torch.optim.AdamW([{"params": list(fresh.parameters()), "names": ["a", "b"]}], lr=0.5)
        other.load_state_dict(loaded.optimizer)
        expected, actual = optimizer.state_dict(), other.state_dict()
        assert expected["param_groups"] == actual["param_groups"]
        for index, moments in expected["state"].items():
            for name, tensor in moments.items():
                assert torch.equal(tensor, actual["state"][index][name])


def test_shared_and_strided_tensors_are_written_once_each(tmp_path):
    head = nn.Linear(3, 2)
    both = nn.ModuleDict({"global": head, "local": head})
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "student": both.state_dict(),
        "odd": {
            "transposed": base.T,
            "row": base[1],
            "all": base,
            "scalar": torch.tensor(3),
            "none": base[:0],
        },
    }
    path = save(tmp_path, step=1, tensors=tensors, state={}, optimizer={}, keep=1)
    loaded = load(path).tensors
    for name, named in tensors.items():
        for key, tensor in named.items():
            assert torch.equal(loaded[name][key], tensor), key


def test_the_newest_are_kept_and_nothing_else_stays(tmp_path):
    for step in (1, 2, 3):
        save_step(tmp_path, step)
    assert names(tmp_path) == ["latest", "step_00000002", "step_00000003"]
    assert os.readlink(tmp_path / "latest") == "step_00000003"


def test_every_file_has_the_mode_of_a_new_file(tmp_path):
    before = os.umask(0o022)
    try:
        path = save_step(tmp_path, 1)
    finally:
        os.umask(before)
    assert {file.name: oct(file.stat().st_mode & 0o777) for file in path.iterdir()} == dict.fromkeys(
        FILES, "0o644"
    )


def test_the_same_step_again_replaces_it(tmp_path):
    save_step(tmp_path, 1, fill=5)
    path = save_step(tmp_path, 1, fill=7)
    assert load(path).tensors["centers"]["image"].tolist() == [7.0] * 5
    assert names(tmp_path) == ["latest", "step_00000001"]


def test_leftovers_of_a_killed_save_are_ignored_and_removed(tmp_path):
    save_step(tmp_path, 1)
    (tmp_path / "step_00000002.tmp-77").mkdir()
    (tmp_path / "step_00000002.tmp-77" / "student.safetensors").write_bytes(b"half")
    (tmp_path / "latest.tmp-77").symlink_to("step_00000002")
    assert newest_step(tmp_path) == 1
    save_step(tmp_path, 3)
    assert names(tmp_path) == ["latest", "step_00000001", "step_00000003"]


def test_nothing_there_is_none(tmp_path):
    assert load_latest(tmp_path / "missing") is None
    assert load_latest(tmp_path) is None


FILES = ("student.safetensors", "centers.safetensors", "optimizer.pt", "state.json", "manifest.json")


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["cut", "flip", "missing", "empty"])
def test_a_damaged_file_falls_back_to_the_one_before(tmp_path, capsys, name, damage):
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    assert set(FILES) == set(names(newest))
    file = newest / name
    content = bytearray(file.read_bytes())
    if damage == "missing":
        file.unlink()
    elif damage == "empty":
        file.write_bytes(b"")
    elif damage == "cut":
        file.write_bytes(content[:-7])
    else:
        # In the manifest the last byte is white space that means nothing: take one that means something.
        place = content.index(b'"sha256": "') + 15 if name == "manifest.json" else len(content) - 2
        content[place] ^= 1
        file.write_bytes(content)
    assert newest_step(tmp_path) == 1
    line = capsys.readouterr().err
    assert line.startswith(f"warning: checkpoint {newest} is not intact: ")
    assert line.endswith("; going back to step_00000001\n")
    assert name in line or name == "manifest.json"
    with pytest.raises(UserError, match="is not intact"):
        load(newest)


def test_every_flipped_byte_of_the_weights_is_noticed(tmp_path):
    save_step(tmp_path, 1)
    file = save_step(tmp_path, 2) / "centers.safetensors"
    content = file.read_bytes()
    for place in range(0, len(content), 7):
        file.write_bytes(content[:place] + bytes([content[place] ^ 128]) + content[place + 1 :])
        assert newest_step(tmp_path) == 1
    file.write_bytes(content)
    assert newest_step(tmp_path) == 2


def test_a_damaged_later_one_does_not_displace_good_ones(tmp_path):
    for step in (1, 2):
        save_step(tmp_path, step)
    (save_step(tmp_path, 3, keep=3) / "state.json").unlink()
    assert newest_step(tmp_path) == 2
    save_step(tmp_path, 2, keep=1)  # the run went back and comes by again
    assert names(tmp_path) == ["latest", "step_00000002"]
    assert newest_step(tmp_path) == 2


def test_none_intact_is_an_error(tmp_path):
    for step in (1, 2):
        (save_step(tmp_path, step) / "optimizer.pt").write_bytes(b"")
    with pytest.raises(UserError, match=r"step_00000002 is not intact: optimizer\.pt has 0 bytes"):
        load_latest(tmp_path)


def test_a_manifest_of_another_form_is_not_intact(tmp_path):
    for content in ("[]", "{}", "null", '{"version": 1, "step": 1, "files": {}}'):
        path = save_step(tmp_path, 1)
        (path / "manifest.json").write_text(content)
        with pytest.raises(UserError, match=r"manifest\.json"):
            load(path)
    path = save_step(tmp_path, 1)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(UserError, match="version 99, expected 1"):
        load(path)


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*manifest.json: No such file"):
        load(tmp_path)


def test_a_disk_that_refuses_leaves_earlier_ones_intact(tmp_path, monkeypatch):
    save_step(tmp_path, 1)

    def full(path):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "sync", full)
    with pytest.raises(UserError, match=r"No space left on device.*earlier checkpoints are intact"):
        save_step(tmp_path, 2)
    assert names(tmp_path) == ["latest", "step_00000001"]
    assert newest_step(tmp_path) == 1


class Killed(BaseException):
    """Stands for kill -9: nothing in save may catch it."""


@pytest.mark.parametrize("same_step", [False, True])
def test_a_kill_at_any_moment_leaves_an_intact_checkpoint(tmp_path, capsys, monkeypatch, same_step):
    names_of_calls = [(os, "rename"), (os, "replace"), (checkpoint, "sync"), (checkpoint.shutil, "rmtree")]
    originals = {(place, name): getattr(place, name) for place, name in names_of_calls}
    for deadly in range(1, 30):
        folder = tmp_path / str(deadly)
        for step in (1, 2):
            save_step(folder, step)
        calls = 0

        def count(original, deadly=deadly):
            def call(*args, **kwargs):
                nonlocal calls
                calls += 1
                if calls == deadly:
                    raise Killed
                return original(*args, **kwargs)

            return call

        with monkeypatch.context() as patch:
            for (place, name), original in originals.items():
                patch.setattr(place, name, count(original))
            try:
                save_step(folder, 2 if same_step else 3)
                survived = True
            except Killed:
                survived = False
        assert newest_step(folder) in ((1, 2) if same_step else (2, 3))
        assert capsys.readouterr().err == "", "an unfinished checkpoint was taken for a finished one"
        save_step(folder, 4)
        assert names(folder)[0] == "latest"
        assert names(folder)[-1] == "step_00000004"
        assert not [name for name in names(folder) if "tmp" in name]
        if survived:
            break
    assert survived
    assert deadly > 10


def test_an_unwritable_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write checkpoint"):
        save_step(tmp_path / "file" / "checkpoints", 1)


def test_weights_of_another_architecture_name_tensor_and_shapes():
    model, source = network(3), "step_1/student.safetensors"
    with pytest.raises(
        UserError, match=r"student.safetensors: tensor 0.weight is \(5, 4\), expected \(3, 4\)"
    ):
        restore(model, network(5).state_dict(), source=source)
    saved = network(3).state_dict()
    with pytest.raises(UserError, match=r"has no tensor 0.bias, expected \(3,\)"):
        restore(model, {k: v for k, v in saved.items() if k != "0.bias"}, source=source)
    with pytest.raises(UserError, match=r"has a tensor extra \(2,\) that this model lacks"):
        restore(model, {**saved, "extra": torch.zeros(2)}, source=source)
    other = network(3)
    nn.init.zeros_(other.get_parameter("0.weight"))
    restore(other, saved, source=source)
    assert torch.equal(other.get_parameter("0.weight"), saved["0.weight"])


@pytest.mark.slow
def test_two_ranks_write_once_and_load_the_same(tmp_path):
    outputs = run_ranks(
        """
        from glsd.runtime.checkpoint import load_latest, save
        for step in (1, 2):
            tensors = {"student": {"weight": torch.full((2,), float(step + 10 * rank))}}
            save(folder / "c", step=step, tensors=tensors, state={}, optimizer={}, keep=2)
        assert load_latest(folder / "c").tensors["student"]["weight"].tolist() == [2.0, 2.0]
        dist.barrier()
        if rank == 0:
            (folder / "c" / "step_00000002" / "state.json").unlink()
        dist.barrier()
        assert load_latest(folder / "c").step == 1
        try:
            save(folder / "rendezvous" / "no", step=1, tensors={}, state={}, optimizer={}, keep=2)
        except UserError as error:
            print("refused" if "cannot write checkpoint" in str(error) else error)
        """,
        tmp_path,
    )
    assert outputs == ["refused\n"] * 2
