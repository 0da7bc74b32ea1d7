"""The benchmark of learning at a toy size: its table, its curves, and that it goes on where it stopped."""

import json

import pytest

from glsd.errors import UserError
from launch.benchmark import learn
from launch.benchmark import main as benchmark

TINY = (
    "--data.global_size 32 --data.local_size 16 --data.num_local 2 --model.timm_args.depth 1 --model.timm_args.embed_dim 32 "
    "--model.timm_args.num_heads 2 --head.num_prototypes 16 --head.hidden_dim 16 --head.bottleneck_dim 8 --optim.batch_size 8"
)


def test_last_flag_counts():
    args = type("Args", (), {"extra": ""})()
    assert learn.batch_size(args) == 64
    args.extra = "--optim.batch_size 8"
    assert learn.batch_size(args) == 8


@pytest.mark.slow
def test_a_table_of_recipes_goes_on(digit_shards, tmp_path, capsys, monkeypatch):
    out = tmp_path / "learn"
    argv = [
        *("learn", "--shards", f"{digit_shards}/train-*.tar", "--val", f"{digit_shards}/val-*.tar"),
        *("--out", str(out), "--seeds", "0", "1", "--extra", TINY, "--minutes", "0.001", "--json"),
    ]
    benchmark.main([*argv, "--arms", "published", "--plot", str(tmp_path / "x.png")])
    printed = capsys.readouterr().out
    told = json.loads(printed.splitlines()[-1])
    assert set(told["pixels"]) == {"pixels", "pixels, mean-centered"}
    assert all(0 < share <= 1 for share in told["pixels"].values())
    curves = told["curves"]["published"]
    assert len(curves) == 2
    for curve in curves:
        seconds = [point["seconds"] for point in curve]
        assert seconds == sorted(seconds)
        assert seconds[0] == 0
        assert all(0 <= point["teacher"] <= 1 <= point["rankme"] <= 32 for point in curve)
    assert (tmp_path / "x.png").stat().st_size > 5000
    monkeypatch.setattr(learn, "pretrained", lambda *_, **__: pytest.fail("a finished run was repeated"))
    benchmark.main([*argv, "--arms", "published"])
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["curves"] == told["curves"]
    with pytest.raises(UserError, match="entry of --arms"):
        benchmark.main([*argv, "--arms", "publishd"])
