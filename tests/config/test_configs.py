"""Every YAML loads and survives a round trip; every mistake is one line that names the key and its nearest neighbor."""

from pathlib import Path

import pytest
import yaml

from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import (
    differences,
    dump,
    load,
    load_file,
)
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from tests.helpers.dotted_keys import dotted_keys

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
Config = PretrainConfig | FinetuneConfig
KINDS: dict[str, type[Config]] = {
    "pretrain": PretrainConfig,
    "demo": PretrainConfig,
    "dml": FinetuneConfig,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_loads(path, tmp_path):
    cfg: Config = load_file(KINDS[path.parent.name], path)
    (tmp_path / "again.yaml").write_text(dump(cfg))
    assert load_file(type(cfg), tmp_path / "again.yaml") == cfg


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_config_is_a_delta_with_a_claim(path):
    """A YAML holds only what differs from the defaults, and its header says how to run it and what to expect."""
    text = path.read_text()
    header = "".join(line for line in text.splitlines(keepends=True) if line.startswith("#")).lower()
    for word in ("command:", "hardware:", "hours:", "expected:"):
        assert word in header, f"{path.name}: header lacks {word}"
    cfg: Config = load_file(KINDS[path.parent.name], path)
    said, different = set(dotted_keys(yaml.safe_load(text))), set(differences(cfg))
    superfluous = {key for key in said if not any(d == key or d.startswith(f"{key}.") for d in different)}
    assert not superfluous, f"{path.name} repeats defaults: {superfluous}"


def test_flags_override_files_override_defaults(tmp_path):
    (tmp_path / "a.yaml").write_text("optim: {lr: 0.1, epochs: 7}\n")
    cfg = load(
        PretrainConfig,
        ["--config", str(tmp_path / "a.yaml"), "--optim.epochs", "9", "--model.timm_args.depth=3"],
    )
    assert (cfg.optim.lr, cfg.optim.epochs, cfg.optim.min_lr) == (0.1, 9, PretrainConfig().optim.min_lr)
    assert differences(cfg) == {"optim.lr": 0.1, "optim.epochs": 9, "model.timm_args.depth": 3}


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--optim.lrr", "1"], "unknown flag --optim.lrr; did you mean '--optim.lr'?"),
        (["--lr", "1"], "did you mean '--optim.lr'?"),
        (["--optim.epochs", "many"], "--optim.epochs is 'many': expected a whole number"),
        (["--matching", "geometrical"], "'geometric', 'similarity', 'both', 'none'"),
        (["--data.global_scale", "[0.1]"], "data.global_scale"),
        (["--config", "no_such.yaml"], "cannot read config file no_such.yaml"),
        (["--config", "smal_data"], "unknown recipe 'smal_data': expected one of small_data,"),
        (["--config", "smal_data"], "did you mean 'small_data'?"),
        (["stray"], "stray"),
    ],
)
def test_wrong_flags_are_one_clear_line(argv, expected):
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, argv)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim: {lrr: 1}", "unknown key 'optim.lrr'; did you mean 'optim.lr'?"),
        ("lr: 1", "did you mean 'optim.lr'?"),
        ("optim: 3", "key 'optim' must hold"),
        ("just words", "the file must hold"),
        ("optim: [", "not valid YAML"),
        (
            "model: {timm_args: {x: {class_path: os.system, init_args: {command: 'touch EXECUTED'}}}}",
            "model.timm_args",
        ),
    ],
)
def test_wrong_files_are_one_clear_line(tmp_path, monkeypatch, text, expected):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(PretrainConfig, ["--config", str(tmp_path / "bad.yaml")])
    assert expected in str(caught.value)
    assert "bad.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "EXECUTED").exists(), "a config must never run code"


def test_a_recipe_has_a_name(tmp_path, monkeypatch):
    """A name finds the recipe of its stage wherever the command is run; a file of that name comes first."""
    monkeypatch.chdir(tmp_path)
    for argv in (["--config", "small_data"], ["--config=small_data"]):
        assert load(PretrainConfig, argv) == load_file(
            PretrainConfig, ROOT / "configs/pretrain/small_data.yaml"
        )
    assert load(FinetuneConfig, ["--config", "digits"]).sd.weight == 100
    assert load(PretrainConfig, ["--config", "digits"]).data.global_size != 224
    (tmp_path / "small_data").write_text("seed: 7")
    assert load(PretrainConfig, ["--config", "small_data"]).seed == 7


def test_every_recipe_is_found_by_its_name():
    for path in CONFIGS:
        kind = KINDS[path.parent.name]
        assert load(kind, ["--config", path.stem]) == load_file(kind, path)
