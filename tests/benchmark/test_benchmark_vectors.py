"""The benchmarks of embed and search at toy sizes: both sides do the same work, and the figures are whole."""

import json

from safetensors.torch import save_file

from glsd.models.backbone import build_backbone
from launch.benchmark import embed as benchmark_embed
from launch.benchmark import main as benchmark


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
