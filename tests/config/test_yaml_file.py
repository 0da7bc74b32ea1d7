"""A YAML is read as it was written: no key twice, no type but that of the key, nothing that names a class."""

import pytest

from glsd.config.parse import differences, load_file
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.loading import is_finetuned


@pytest.fixture
def read(tmp_path):
    """Read a text as a configuration file; return what differs from the defaults."""

    def call(text: str) -> dict:
        (tmp_path / "c.yaml").write_text(text)
        return differences(load_file(PretrainConfig, tmp_path / "c.yaml"))

    return call


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", {}),
        ("# nothing\n", {}),
        ("optim:\ndata: {}\nloss: ~\n", {}),
        ("model:\n  timm_args:\n", {}),
        ("optim.epochs: 7\n", {"optim.epochs": 7}),
        ("optim.epochs: 7\noptim: {lr: 1}\n", {"optim.epochs": 7, "optim.lr": 1.0}),
        (
            "model.timm_args: {depth: 3}\nmodel: {timm_args.embed_dim: 4}\n",
            {"model.timm_args.depth": 3, "model.timm_args.embed_dim": 4},
        ),
        ("optim: {precision: no, grad_compression: bf16}\nloss: {hinge: no}\n",
         {"optim.grad_compression": "bf16", "loss.hinge": False}),
        ("loss: {hinge: off}\nmodel: {compile: yes, activation_checkpointing: on}\n",
         {"loss.hinge": False, "model.compile": True, "model.activation_checkpointing": True}),
        ("optim: {lr: 1e-3}\n", {"optim.lr": 0.001}),
        ("data:\n  global_scale: (0.3, 1)\n", {"data.global_scale": (0.3, 1.0)}),
        ("data:\n  weights: 1, 2\n", {"data.weights": [1.0, 2.0]}),
        ("data: {weights: 1}\n", {"data.weights": [1.0]}),
        ("out: 2024-01-01\n", {"out": "2024-01-01"}),
        ("out: no\nseed: 1_000\n", {"out": "no", "seed": 1000}),
        ("data: {shards: [a.tar, 7]}\n", {"data.shards": ["a.tar", "7"]}),
        ("data: {shards: 'null'}\n", {"data.shards": "null"}),
        ("model: {timm_args: {a: '1', b: 1, c: 1e-3, d: no, e: none, f: ~, g: [1, 2.5, x]}}\n",
         {f"model.timm_args.{k}": v for k, v in
          {"a": "1", "b": 1, "c": 0.001, "d": False, "e": "none", "f": None, "g": [1, 2.5, "x"]}.items()}),
        # An anchor is a value with a name; a key beside << wins over what << merges in.
        ("watch: {probe_train_shards: &s a.tar, probe_val_shards: *s}\n",
         {"watch.probe_train_shards": "a.tar", "watch.probe_val_shards": "a.tar"}),
        ("optim: {lr: 2, <<: {lr: 1, epochs: 3}}\n", {"optim.lr": 2.0, "optim.epochs": 3}),
        ("optim: {<<: [{lr: 1}, {lr: 5, epochs: 3}]}\n", {"optim.lr": 1.0, "optim.epochs": 3}),
        ("\ufeffseed: 3\n", {"seed": 3}),
    ],
)  # fmt: skip
def test_what_a_file_says_is_taken(read, text, expected):
    assert read(text) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optim:\n  lr: 1\nseed: 1\noptim:\n  epochs: 2\n", "key 'optim' stands twice, in line 1 and in line 4"),
        ("optim:\n  lr: 1\n  epochs: 2\n  lr: 1\n", "key 'lr' stands twice, in line 2 and in line 4"),
        ("model:\n  timm_args:\n    depth: 1\n    depth: 2\n", "key 'depth' stands twice, in line 3 and in line 4"),
        ("data:\n  shards:\n  - {a: 1, a: 2}\n", "key 'a' stands twice, in line 3"),
        ("optim: {lr: 1,\n  'lr': 2}\n", "key 'lr' stands twice, in line 1 and in line 2"),
        ("optim.lr: 1\noptim:\n  lr: 2\n", "key 'optim.lr' stands twice, in line 1 (optim.lr) and in line 3 (optim.lr)"),
        ("optim:\n  batch_size: 1\n  batch-size: 2\n", "line 2 (optim.batch_size) and in line 3 (optim.batch-size)"),
        ("optim:\n  <<: {lr: 1}\n  <<: {epochs: 1}\n", "key '<<' stands twice, in line 2 and in line 3"),
        ("optim: {<<: &b {lr: 1, lr: 2}}\n", "key 'lr' stands twice"),
        ("optim:\n  epochs:\n", "line 2: optim.epochs is empty: expected a whole number (leave the key out"),
        ("out:\n", "out is empty: expected a path (leave the key out"),
        ("out: ''\n", "out is empty: expected a path (leave it out for 'runs/pretrain')"),
        ("optim: {epochs: 7, Epochs: 8}\n", "unknown key 'optim.Epochs'; did you mean 'optim.epochs'?"),
        ("optim: {learning_rate: 8}\n", "unknown key 'optim.learning_rate'; did you mean 'optim.lr'?"),
        ("data: {global_scale: (0.4, 1.0)}\n", "write a list with square brackets"),
        ("data:\n  global_scale: [0.4]\n",
         "line 2: data.global_scale is [0.4]: expected 2 numbers, e.g. data.global_scale: [0.4, 1.0]"),
        ("data:\n  weights:\n  - 1\n  -\n", "data.weights is [1, ]: expected numbers"),
        ("data: {shards: {a: 1}}\n", "data.shards is {a: '1'}: expected a text or texts, e.g. data.shards: [a.tar, b.tar]"),
        ("optim: {lr: {a: 1}}\n", "optim.lr is {a: '1'}: expected a number"),
        ("optim: {lr: [[1]]}\n", "optim.lr is [[1]]: expected a number"),
        ("- a\n", "line 1: the file must hold 'key: value' lines, not [a]"),
        ("optim: {<<: 3}\n", "line 1: << takes an alias"),
        ("optim: &a {lr: 1, x: *a}\n", "an anchor holds itself"),
        ("out: !!python/object/apply:os.system [touch EXECUTED]\n", "the tag !!python/object/apply:os.system is not taken"),
        ("? [a, b]\n: 3\n", "a key must be a name"),
        ("seed: 1\n---\nseed: 2\n", "line 2, is not valid YAML"),
        ("seed: 1\n\tx: 2\n", "line 2, is not valid YAML"),
        ("a: " + "[" * 5000, "is not valid YAML"),
    ],
)  # fmt: skip
def test_what_a_file_says_twice_or_wrongly_is_one_line(read, text, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        read(text)
    assert str(caught.value).startswith(f"config file {tmp_path / 'c.yaml'}")
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "EXECUTED").exists()


def test_the_config_of_a_run_is_read_as_strictly(tmp_path):
    """The kind of a run is told by its keys."""
    (tmp_path / "config.yaml").write_text("reg: none\n")
    assert is_finetuned(tmp_path)
    (tmp_path / "config.yaml").write_text("out: x\n")
    assert not is_finetuned(tmp_path)
    (tmp_path / "config.yaml").write_text("out: x\nout: y\n")
    with pytest.raises(UserError, match="'out' stands twice, in line 1 and in line 2"):
        is_finetuned(tmp_path)
