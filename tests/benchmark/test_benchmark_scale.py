"""The cost model's arithmetic, and the scale benchmark at toy sizes: what ranks sent is what the model expects."""

import json

import pytest

from launch.benchmark import main as benchmark
from launch.benchmark import scale as benchmark_scale
from launch.benchmark.scale_model import (
    Link,
    communication_s,
    expected_bytes,
    link_of,
    ring_bytes,
    step_s,
)


def test_a_ring_sends_what_is_known_of_it():
    assert ring_bytes("all-reduce", 100.0, 4) == pytest.approx(150.0)
    assert ring_bytes("all-gather", 100.0, 4) == ring_bytes("reduce-scatter", 100.0, 4) == pytest.approx(75.0)
    assert all(ring_bytes(kind, 100.0, 1) == 0 for kind in ("all-reduce", "all-gather", "reduce-scatter"))


def test_a_measured_link_gives_back_the_time_it_was_measured_with():
    measured = {"empty_s": 0.001, "full_s": 0.101, "bytes": 2**24}
    links = {"all-reduce": link_of("all-reduce", measured, 4)}
    moved = {"all-reduce": {"calls": 1, "bytes": 2**24}, "broadcast_": {"calls": 3, "bytes": 8}}
    assert communication_s(moved, links, 4) == pytest.approx(0.101)
    twice = {"all-reduce": {"calls": 2, "bytes": 2**25}}
    assert communication_s(twice, links, 4) == pytest.approx(0.202)
    assert communication_s(twice, {"all-reduce": Link(0.0, 1e9)}, 2) == pytest.approx(2**25 / 1e9)


def test_communication_hides_only_where_a_core_is_free():
    parts = {"compute_s": 1.0, "communication_s": 0.5, "hideable_s": 0.3}
    assert step_s(**parts, threads=1, cores=4) == pytest.approx(1.2)
    assert step_s(**parts, threads=2, cores=2) == pytest.approx(1.5)
    assert step_s(**parts, threads=4, cores=2) == pytest.approx(2.5)
    assert step_s(**parts | {"communication_s": 0.2}, threads=0, cores=1) == pytest.approx(1.0)


@pytest.mark.slow
@pytest.mark.multinode
def test_two_ranks_send_what_the_model_expects_and_keep_half(capsys, monkeypatch):
    monkeypatch.setattr(benchmark_scale, "WAYS", {way: benchmark_scale.WAYS[way] for way in ("ddp", "fsdp")})
    argv = ["--timm_args={depth: 3, embed_dim: 96}", "--batch_size=2", "--prototypes=512", "--global_size=32"]
    benchmark.main(
        ["scale", *argv, "--local_size=16", "--local_crops=2", "--rounds=1", "--ranks", "1", "2", "--json"]
    )
    printed = capsys.readouterr().out
    line = json.loads(printed.splitlines()[-1])
    found = line["groups"]["fsdp 2"]
    expected = expected_bytes("fsdp", found["sizes"])
    assert expected.keys() <= found["counted"].keys()
    for kind, count in expected.items():
        # Rows that two ranks cannot share are padded.
        assert found["counted"][kind]["bytes"] == pytest.approx(count, rel=0.02), kind
    assert line["predicted_s"]["fsdp 2"] > 0 < line["measured_s"]["fsdp 2"]
    whole = line["alone"]["1"]["kept_bytes"][0]
    assert found["kept_bytes"] == pytest.approx([whole / 2] * 2, rel=0.02)
    assert "state MiB a rank" in printed
