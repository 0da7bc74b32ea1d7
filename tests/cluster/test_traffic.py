"""What the benchmark of scale counts is what goes over the wire: two hosts, and their network cards' own numbers."""

import json
import sys

import pytest

from launch.benchmark import scale as benchmark_scale
from launch.benchmark.scale_model import ring_bytes
from tests.cluster.hosts import DEVICE, made_hosts

pytestmark = [pytest.mark.slow, pytest.mark.multinode]

PAYLOAD = {
    "backbone": "vit_tiny_patch16_224",
    "timm_args": "{depth: 3}",
    "batch_size": 2,
    "prototypes": 512,
    "global_size": 32,
    "local_size": 16,
    "local_crops": 2,
    "matching": "geometric",
    "precision": "no",
    "threads": 1,
    "rounds": 3,
    "interface": DEVICE,
}
HEADERS = 1.08  # Ethernet, IP and TCP headers, acknowledgements, heartbeats


@pytest.mark.parametrize("way", benchmark_scale.WAYS)
def test_counted_bytes_are_what_the_network_card_sent(tmp_path, way):
    payload = json.dumps(PAYLOAD | {"way": benchmark_scale.WAYS[way]})
    with made_hosts(2, tmp_path / "hosts") as hosts:
        common = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "ACCELERATE_USE_CPU": "true"}
        common |= {"MASTER_ADDR": hosts["h1"].address, "MASTER_PORT": "28901", "OMP_NUM_THREADS": "1"}
        ranks = [
            host.run(
                [sys.executable, "-m", "launch.benchmark.scale_rank", payload],
                tmp_path / f"{host.name}.log",
                common | {"RANK": str(rank)},
            )
            for rank, host in enumerate(hosts)
        ]
        codes = [rank.wait(240) for rank in ranks]
        assert codes == [0, 0], [rank.said()[-2000:] for rank in ranks]
        found = [json.loads(rank.said().splitlines()[-1]) for rank in ranks]
    for each in found:
        counted = each["counted"]
        # gloo's reduce-scatter is an all-reduce of which each rank keeps its part.
        kinds = {kind: "all-reduce" if kind == "reduce-scatter" else kind for kind in counted}
        expected = sum(ring_bytes(kinds[kind], counted[kind]["bytes"], 2) for kind in counted)
        assert expected > 1e6
        assert expected < each["sent_bytes"] < HEADERS * expected, (
            way,
            expected,
            each["sent_bytes"],
            counted,
        )
