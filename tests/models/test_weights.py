"""Weights into a backbone: every form that people have, every way in which they do not fit."""

import argparse
import contextlib
import math
import pickle
import random
import re
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file

from glsd.errors import UserError
from glsd.models.backbone import build_backbone
from glsd.models.weights import (
    load_weights,
    read_weights,
)

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def small(image_size=64, name="vit_tiny_patch16_224", seed=1, **options):
    return build_backbone(name, image_size=image_size, timm_args={**SMALL, **options}, seed=seed)


def same_weights(first, second) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def prefixed(state, prefix):
    return {prefix + name: tensor for name, tensor in state.items()}


def dino_checkpoint(state):
    """The layout of DINO's full checkpoints: both networks with heads, the optimizer, the command line."""
    heads = {
        "module.head.mlp.0.weight": torch.zeros(3, 3),
        "module.head.last_layer.weight_g": torch.ones(3, 1),
    }
    student = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    return {
        "student": prefixed(student, "module.backbone.") | heads,
        "teacher": prefixed(state, "backbone.") | {"head.mlp.0.weight": torch.zeros(3, 3)},
        "optimizer": {"state": {}, "param_groups": []},
        "epoch": 3,
        "args": argparse.Namespace(arch="vit_small"),
    }


FORMS = {
    "timm": lambda state: state,
    "timm with a classifier": lambda state: state | {"head.weight": torch.zeros(1000, 48)},
    "DINO full checkpoint": dino_checkpoint,
    "DINOv2 teacher": lambda state: {
        "teacher": prefixed(state, "backbone.") | {"dino_head.mlp.0.bias": torch.zeros(1)}
    },
    "DINOv2 backbone": lambda state: state | {"mask_token": torch.zeros(1, 48)},
    "wrapped by DDP and compile": lambda state: {"model": prefixed(state, "module._orig_mod.")},
    "both networks flat": lambda state: (
        prefixed(state, "teacher.backbone.")
        | prefixed({name: tensor * 0 for name, tensor in state.items()}, "student.backbone.")
    ),
    "ours": lambda state: prefixed(state, "backbone.net.") | {"global_head.mlp.0.weight": torch.zeros(3, 3)},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_fills_every_tensor(form, tmp_path):
    source, target = small(), small(seed=2)
    assert not same_weights(source, target)
    torch.save(FORMS[form](dict(source.net.state_dict())), tmp_path / "weights.pth")
    loaded = small(seed=2)
    report = load_weights(loaded.net, read_weights(tmp_path / "weights.pth"), source="weights.pth")
    assert (report.matched, report.missing, report.unexpected) == (len(source.net.state_dict()), (), ())
    assert same_weights(source, loaded)
    built = build_backbone(
        "vit_tiny_patch16_224", image_size=64, timm_args=SMALL, seed=2, init=str(tmp_path / "weights.pth")
    )
    assert same_weights(source, built)
    assert f"{report.total} of {report.total} tensors matched" in str(built.load_report)


def test_our_checkpoint_folder_gives_the_teacher(tmp_path):
    teacher, student = small(seed=3), small(seed=4)
    save_file(prefixed(teacher.state_dict(), "backbone."), tmp_path / "teacher.safetensors")
    save_file(prefixed(student.state_dict(), "backbone."), tmp_path / "student.safetensors")
    for path, source in ((tmp_path, teacher), (tmp_path / "student.safetensors", student)):
        loaded = small()
        load_weights(loaded.net, read_weights(path), source=str(path))
        assert same_weights(source, loaded)


def test_position_embedding_of_another_grid_is_resampled_as_in_the_forward_pass():
    source, target = small(image_size=224), small(image_size=96)
    load_weights(target.net, source.net.state_dict(), source="x")
    image = torch.randn(1, 3, 96, 96)
    torch.testing.assert_close(target(image)[1], source(image)[1], rtol=1e-5, atol=1e-6)


def test_dinov2_with_registers_folds_the_class_position_into_the_token():
    name = "vit_small_patch14_reg4_dinov2"
    source, target = small(name=name, patch_size=16), small(name=name, patch_size=16, seed=5)
    torch.nn.init.normal_(source.net.cls_token, generator=torch.Generator().manual_seed(0))
    state = dict(source.net.state_dict())
    offset = torch.randn(1, 1, 48)
    state["register_tokens"] = state.pop("reg_token")
    state["cls_token"] = state["cls_token"] - offset
    state["pos_embed"] = torch.cat([offset, state["pos_embed"]], dim=1)
    state["mask_token"] = torch.zeros(1, 48)
    load_weights(target.net, state, source="x")
    image = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(target(image)[0], source(image)[0], rtol=1e-5, atol=1e-5)


def published_swin(state):
    """Published Swin checkpoints count the downsampling to the stage before."""
    return {
        re.sub(r"layers\.(\d)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", name): tensor
        for name, tensor in state.items()
    }


def test_swin_of_the_published_layout():
    """They also keep index buffers."""
    options = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)}

    def swin(seed):
        return build_backbone("swin_tiny_patch4_window7_224", image_size=224, timm_args=options, seed=seed)

    source, target = swin(1), swin(2)
    state = published_swin(source.net.state_dict())
    state["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    state["head_dense.mlp.0.weight"] = torch.zeros(3, 3)
    load_weights(target.net, state, source="x")
    assert same_weights(source, target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: {k: v for k, v in s.items() if "blocks.1" not in k}, "12 missing .blocks.1.norm1.weight"),
        (lambda s: s | {"blocks.2.norm1.weight": torch.ones(48)}, "1 unexpected .blocks.2.norm1.weight"),
        (lambda s: s | {"reg_token": torch.ones(1, 4, 48)}, "1 unexpected .reg_token"),
        (
            lambda s: s | {"norm.weight": torch.ones(3)},
            r"1 mismatched .norm.weight: \(3,\) in the file, \(48,\)",
        ),
        (
            lambda s: s | {"patch_embed.proj.weight": torch.ones(48, 3, 8, 8)},
            "mismatched .patch_embed.proj.weight",
        ),
        (lambda s: s | {"pos_embed": torch.ones(1, 12, 48)}, r"shape \(1, 12, 48\) is of no square grid"),
        (lambda s: s | {"pos_embed": torch.ones(17)}, r"shape \(17,\) is of no square grid"),
        (lambda s: {"conv1.weight": torch.ones(3)}, "0 of 30 tensors matched"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    source, target = small(), small(seed=2)
    with pytest.raises(UserError, match=message) as caught:
        load_weights(target.net, change(dict(source.net.state_dict())), source="x.pth")
    assert "'x.pth'" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same_weights(target, small(seed=2))  # untouched


def shortened(state):
    """One block instead of two, another final norm, a block that the network lacks."""
    state = {name: tensor for name, tensor in state.items() if "blocks.1" not in name}
    return state | {
        "norm.weight": torch.ones(3),
        "blocks.7.norm1.bias": torch.ones(48),
        "head.bias": torch.ones(9),
    }


def test_what_fits_partly_is_refused_unless_allowed():
    source, target, untouched = small(), small(seed=2), small(seed=2)
    state = shortened(dict(source.net.state_dict()))
    with pytest.raises(UserError) as caught:
        load_weights(target.net, state, source="x.pth", allow_partial=False)
    assert same_weights(target, untouched)
    with pytest.raises(UserError) as not_offered:
        load_weights(target.net, state, source="x.pth")
    assert "allow_partial" not in str(not_offered.value)
    words = (
        "'x.pth' are not of this network: 17 of 30 tensors matched (cls_token, pos_embed, patch_embed.proj.weight, ...)",
        "12 missing (blocks.1.norm1.weight, blocks.1.norm1.bias, blocks.1.attn.qkv.weight, ...)",
        "1 mismatched (norm.weight: (3,) in the file, (48,) in the network)",
        "1 unexpected (blocks.7.norm1.bias)",
        "1 of heads and the like left out",
        "(allow_partial true loads what fits)",
    )
    assert [word for word in words if word not in str(caught.value)] == []
    report = load_weights(target.net, state, source="x.pth", allow_partial=True)
    assert (report.matched, report.total, len(report.missing), report.complete) == (17, 30, 12, False)
    for name, tensor in target.net.state_dict().items():
        taken = name in report.matched_names
        assert taken == ("blocks.1" not in name and name != "norm.weight")
        assert torch.equal(tensor, (source if taken else untouched).net.state_dict()[name])
    assert str(report) in str(caught.value)


def test_build_passes_on_what_is_allowed(tmp_path):
    save_file(shortened(dict(small().net.state_dict())), tmp_path / "w.safetensors")
    options: dict[str, Any] = {"image_size": 64, "timm_args": SMALL, "init": str(tmp_path / "w.safetensors")}
    with pytest.raises(UserError, match="17 of 30"):
        build_backbone("vit_tiny_patch16_224", **options)
    loaded = build_backbone("vit_tiny_patch16_224", **options, allow_partial=True)
    assert loaded.load_report is not None
    assert loaded.load_report.matched == 17


@pytest.mark.parametrize("shape", [(1, 12, 48), (1, 17, 24), (1, 16, 48), (17,)])
def test_positions_that_do_not_fit_are_left_out_when_allowed(shape):
    """Without norm.bias, timm's renaming is asked, which would resample positions in its own way."""
    source, target = small(), small(seed=2)
    state = dict(source.net.state_dict()) | {"pos_embed": torch.ones(shape)}
    del state["norm.bias"]
    report = load_weights(target.net, state, source="x", allow_partial=True)
    assert (report.matched, report.missing) == (28, ("norm.bias",))
    assert report.mismatched == (f"pos_embed: {shape} in the file, (1, 17, 48) in the network",)
    assert torch.equal(target.net.pos_embed, small(seed=2).net.pos_embed)
    assert torch.equal(target.net.cls_token, source.net.cls_token)


@pytest.mark.parametrize("allow_partial", [False, True])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "resnet10t"])
def test_weights_of_another_kind_of_network_are_one_line(name, allow_partial):
    """Nothing can be allowed there; timm's own renaming stumbles over some of them."""
    args = TINY_RESNET if name == "resnet10t" else SMALL
    target = build_backbone(name, image_size=64, timm_args=args)
    state = {
        "conv1.weight": torch.ones(64, 3, 7, 7),
        "layer1.0.bn1.weight": torch.ones(64),
        "mask_token": torch.ones(1),
    }
    state |= {"register_tokens": torch.ones(1, 4, 48), "layer1.0.bn1.num_batches_tracked": torch.tensor(3)}
    if name == "resnet10t":
        state = dict(small().net.state_dict())
    with pytest.raises(UserError, match=r"0 of [0-9]+ tensors matched, [0-9]+ missing") as caught:
        load_weights(target.net, state, source="x", allow_partial=allow_partial)
    assert "\n" not in str(caught.value)
    assert "allow_partial" not in str(caught.value)  # it would not help


def test_swin_of_more_blocks_and_other_windows_is_loaded_in_part():
    def swin(depths, window, **options):
        args = {"depths": depths, "embed_dim": 24, "num_heads": (1, 2, 2, 4), "window_size": window}
        return build_backbone("swin_tiny_patch4_window7_224", image_size=224, timm_args=args, **options)

    source, target = swin((1, 1, 3, 1), 4, seed=1), swin((1, 1, 1, 1), 7, seed=2)
    state = {name: t for name, t in source.net.state_dict().items() if name != "norm.bias"}
    state = published_swin(state)
    report = load_weights(target.net, state, source="x", allow_partial=True)
    assert report.missing == ("norm.bias",)
    assert [name.split(":")[0][-28:] for name in report.mismatched] == ["relative_position_bias_table"] * 4
    assert all(name.startswith("layers.2.blocks.") for name in report.unexpected)
    assert report.matched == report.total - 5


TINY_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
OLD_RESNETS = {
    "torchvision": lambda state: state,
    "before counters": lambda state: {k: v for k, v in state.items() if "num_batches_tracked" not in k},
    "pretrainedmodels": lambda state: {k.replace("fc.", "last_linear."): v for k, v in state.items()},
    "ours": lambda state: {
        f"backbone.net.{k}".replace("backbone.net.fc", "head"): v for k, v in state.items()
    },
}


@pytest.mark.parametrize("form", OLD_RESNETS)
def test_resnet_of_torchvision(form, tmp_path):
    source = torchvision.models.resnet.ResNet(
        torchvision.models.resnet.Bottleneck, [1, 1, 1, 1], num_classes=5
    )
    source(torch.randn(2, 3, 32, 32))  # so that the statistics are some
    torch.save(OLD_RESNETS[form](source.state_dict()), tmp_path / "r.pth")
    loaded = build_backbone(
        "resnet50",
        image_size=32,
        timm_args={"layers": (1, 1, 1, 1)},
        init=str(tmp_path / "r.pth"),
        pool="mean",
    ).eval()
    source.fc = torch.nn.Identity()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(loaded(image)[0], source.eval()(image))
    report = loaded.load_report
    assert report is not None
    counters = [name for name in loaded.net.state_dict() if name.endswith("num_batches_tracked")]
    assert (report.complete, len(report.ignored)) == (True, 2)
    assert report.matched == report.total == len(loaded.net.state_dict()) - len(counters)
    assert loaded.net.bn1.num_batches_tracked == (0 if form == "before counters" else 1)


def test_resnet50_has_torchvisions_names_and_shapes():
    with torch.device("meta"):
        shapes = torchvision.models.resnet50().state_dict()
    state = {name: torch.zeros(x.shape, dtype=x.dtype) for name, x in shapes.items()}
    net = timm.create_model("resnet50", num_classes=0)
    report = load_weights(net, state, source="x")
    assert (report.matched, report.ignored) == (265, ("fc.weight", "fc.bias"))


def test_resnet_of_another_depth_is_refused():
    target = build_backbone("resnet18", image_size=64, timm_args=TINY_RESNET)
    source = build_backbone("resnet18", image_size=64, timm_args=TINY_RESNET | {"layers": (1, 2, 1, 1)})
    with pytest.raises(UserError, match=r"unexpected \(layer2.1.conv1.weight.*allow_partial true loads"):
        load_weights(target.net, source.net.state_dict(), source="x", allow_partial=False)
    report = load_weights(target.net, source.net.state_dict(), source="x", allow_partial=True)
    assert (report.matched, report.total, report.missing) == (report.total, report.total, ())
    assert not any("num_batches_tracked" in name for name in report.unexpected)


class RunsCode:
    def __reduce__(self):
        return (print, ("code from a weights file was run",))


def write_bytes(path, content):
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pth", lambda p: None, "no such file"),
        ("a.pth", lambda p: write_bytes(p, b""), "cannot be read"),
        ("a.pth", lambda p: write_bytes(p, b"not a checkpoint"), "cannot be read"),
        ("a.pth", lambda p: torch.save({"model": RunsCode()}, p), "cannot be read .*print"),
        ("a.pth", lambda p: write_bytes(p, pickle.dumps(RunsCode())), "cannot be read"),
        ("a.safetensors", lambda p: write_bytes(p, b"\x00" * 20), "cannot be read"),
        ("a.pth", lambda p: torch.save({"epoch": 3, "lr": [0.1]}, p), "hold no network"),
        ("a.pth", lambda p: torch.save([torch.zeros(3)], p), "hold no network"),
        (
            "a.pth",
            lambda p: torch.save({"net.norm.weight": torch.ones(1), "module.norm.weight": torch.ones(1)}, p),
            "two tensors that would be 'norm.weight'",
        ),
    ],
)
def test_bad_files_are_one_line(name, write, message, tmp_path, capsys):
    write(tmp_path / name)
    with pytest.raises(UserError, match=message) as caught:
        read_weights(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)
    assert str(caught.value).isprintable()
    assert "was run" not in capsys.readouterr().out


@pytest.mark.timeout(30)
def test_a_checkpoint_that_holds_itself_has_no_end(tmp_path):
    content: dict = {}
    content["model"] = {"teacher": content}
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(UserError, match="hold no network"):
        read_weights(tmp_path / "a.pth")


def test_wrappers_around_wrappers(tmp_path):
    content: dict = {"norm.weight": torch.ones(1)}
    for key in ("model", "state_dict", "teacher"):
        content = {key: content}
    torch.save(content, tmp_path / "a.pth")
    assert list(read_weights(tmp_path / "a.pth")) == ["norm.weight"]


@pytest.mark.filterwarnings("ignore")  # torch warns of some of what it reads
@pytest.mark.parametrize("form", ["pickle of old", "zip", "safetensors"])
def test_changed_bytes_are_one_line_at_most(form, tmp_path):
    """By itself torch raises AssertionError, IndexError, TypeError and more here."""
    path = tmp_path / ("a.safetensors" if form == "safetensors" else "a.pth")
    state = {"a": torch.ones(3), "b": torch.ones(2)}
    if form == "safetensors":
        save_file(state, path)
    else:
        torch.save({"model": state, "args": [1]}, path, _use_new_zipfile_serialization=form == "zip")
    whole, rng = path.read_bytes(), random.Random(0)
    # Of a zip, the pickle in it: elsewhere its checksums tell.
    span = range(whole.find(b"\x80\x02"), whole.find(b"PK", 60)) if form == "zip" else range(len(whole))
    refused = 0
    for _ in range(300):
        raw = bytearray(whole)
        for place in rng.sample(span, rng.randint(1, 3)):
            raw[place] = rng.randrange(256)
        path.write_bytes(raw)
        with contextlib.suppress(UserError):
            read_weights(path)
            continue
        refused += 1
    assert refused > 20


@pytest.mark.parametrize("error", [AssertionError(), IndexError("pop from\nempty list"), TypeError("x")])
def test_whatever_the_reader_raises_is_one_line(error, tmp_path, monkeypatch):
    def broken(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(torch, "load", broken)
    (tmp_path / "a.pth").write_bytes(b"x")
    text = " ".join(str(error).split()) or "AssertionError"
    with pytest.raises(UserError, match=f"cannot be read as plain tensors: {text}$"):
        read_weights(tmp_path / "a.pth")


def test_an_interrupt_passes(tmp_path, monkeypatch):
    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "load", interrupted)
    (tmp_path / "a.pth").write_bytes(b"x")
    with pytest.raises(KeyboardInterrupt):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b.pth"])
def test_names_that_no_file_can_have(name):
    with pytest.raises(UserError, match="no such file"):
        read_weights(name)


def test_truncated_file_is_one_line(tmp_path):
    torch.save(dict(small().net.state_dict()), tmp_path / "a.pth")
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as plain tensors"):
        read_weights(tmp_path / "a.pth")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e300])
@pytest.mark.parametrize("name", ["blocks.1.attn.qkv.weight", "pos_embed", "norm.bias"])
def test_numbers_that_are_not_finite_are_named(tmp_path, name, value):
    net = small()
    state = {key: x.double().clone() for key, x in net.net.state_dict().items()}
    state[name].view(-1)[5] = value
    file = str(tmp_path / "bad.safetensors")
    save_file(state, file)
    before = {key: x.clone() for key, x in net.net.state_dict().items()}
    with pytest.raises(
        UserError, match=rf"weights '{file}': tensor '{name}' holds NaN or infinity in 1 of \d+ numbers: "
    ):
        load_weights(net.net, read_weights(file), source=file)
    assert all(torch.equal(x, before[key]) for key, x in net.net.state_dict().items())


def test_a_head_that_is_not_used_may_hold_anything(tmp_path):
    state = small(seed=2).net.state_dict() | {"head.weight": torch.full((1000, 48), math.nan)}
    net = small()
    load_weights(net.net, state, source="x")
    assert same_weights(net, small(seed=2))


def test_all_tensors_that_are_not_finite_are_counted():
    state = {name: torch.full_like(x, math.nan) for name, x in small().net.state_dict().items()}
    with pytest.raises(
        UserError, match=r"tensor 'cls_token' .* in 48 of 48 numbers, and \d\d more such tensors"
    ):
        load_weights(small().net, state, source="x")
