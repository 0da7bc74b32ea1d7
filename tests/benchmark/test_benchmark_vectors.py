"""The benchmarks of embed, search and export at toy sizes: both sides do the same work, and the figures are whole."""

import json

import numpy as np
import pytest
from safetensors.torch import save_file

from glsd.errors import UserError
from glsd.models.backbone import build_backbone
from launch.benchmark import embed as benchmark_embed
from launch.benchmark import export as benchmark_export
from launch.benchmark import main as benchmark
from launch.benchmark.rerank import map_at_r
from tests.helpers.small_shards import scene
from tests.helpers.trained import trained_networks


def test_the_plain_script_gives_our_vectors(tmp_path):
    name = "vit_tiny_patch16_224"
    benchmark_embed.make_folder(tmp_path, 3)
    save_file(build_backbone(name, image_size=224).net.state_dict(), tmp_path / "weights.safetensors")
    args = {"folder": str(tmp_path), "backbone": name, "batch_size": 2, "num_workers": 0}
    benchmark_embed.ours(args)
    benchmark_embed.plain(args)
    assert benchmark_embed.mean_cosine(tmp_path) > 0.999


def test_the_benchmark_of_search_tells_recall_and_speed(capsys):
    benchmark.main(
        [
            "search",
            "--vectors=3000",
            "--dim=16",
            "--classes=100",
            "--queries=20",
            "--rounds=1",
            "--threads=1",
            "--json",
        ]
    )
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["identical"] is True
    assert told["apart"] == 0
    assert set(told["results"]) == {"exact", "flat", "ivf", "hnsw"}
    for kind, result in told["results"].items():
        assert result["recall"] == 1 or (kind in ("ivf", "hnsw") and result["recall"] > 0.8)
        assert result["speed_up"] > 0


def test_map_at_r_of_lists():
    hits = np.array([[True, False, True, False], [False, True, True, True]])
    relevant = np.array([3, 1])
    assert map_at_r(hits, relevant) == pytest.approx([(1 + 2 / 3) / 3, 0])
    assert map_at_r(hits, np.array([2, 9])) == pytest.approx([1 / 2, (1 / 2 + 2 / 3 + 3 / 4) / 4])


def test_the_benchmark_of_reranking(tmp_path, capsys):
    trained_networks(tmp_path)
    for number in range(12):
        path = tmp_path / ["query", "gallery"][number % 4 != 0] / "abc"[number % 3] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number % 3).save(path)
    folders = [f"--{side}={tmp_path / side}" for side in ("query", "gallery")]
    benchmark.main(["rerank", str(tmp_path / "pretrained"), *folders, "--rounds=1", "--threads=1", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["queries"] == 3
    for kind in ("none", "diffusion"):  # copies of the query are found first by either
        assert told["results"][kind]["recall@1"] == told["results"][kind]["map_at_r"] == 1
        assert told["results"][kind]["map_at_r gain"] == 0


def test_the_benchmark_of_exports(monkeypatch, capsys):
    monkeypatch.setattr(benchmark_export, "SIZE", 64)
    benchmark.main(["export", "--networks", "resnet10t", "--forms", "timm", "safetensors", "--json"])
    told = json.loads(capsys.readouterr().out.splitlines()[-1])["results"]
    assert [(row["form"], row["layer"]) for row in told] == [
        ("timm", None), ("safetensors", None), ("timm", 128), ("safetensors", 128)
    ]  # fmt: skip
    assert all(row["same_inputs"] <= row["bound"] and row["levels"] <= 2 for row in told)
    with pytest.raises(UserError, match="--forms has"):
        benchmark.main(["export", "--forms", "tim"])
