"""The doctor before a server in trouble."""

from pathlib import Path

import pytest

from glsd.audit.report import examine
from glsd.packing.write import pack_samples
from tests.helpers.small_shards import encoded, scene
from tests.remote.faulty import FaultyServer


def pack(folder: Path, name: str, files: list[bytes]) -> int:
    """Write one shard and return the bytes of its files."""
    pack_samples([(raw, "jpg", 0) for raw in files], folder, prefix=name)
    return sum(map(len, files))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_shard_that_its_server_does_not_give_is_asked_for_once(tmp_path, monkeypatch, workers):
    """It is one line about a shard, not a line and a long wait for each of its images."""
    monkeypatch.setenv("GLSD_CACHE", str(tmp_path / "own_cache"))
    monkeypatch.setenv("GLSD_REMOTE_TIMEOUT", "0.5")
    made = tmp_path / "served"
    readable = pack(made, "a", [*(encoded(scene(seed)) for seed in range(4)), b""])
    pack(made, "b", [b"", *(encoded(scene(seed)) for seed in range(10, 50))])
    with FaultyServer(made) as server:
        url = server.url.replace("//", "//user:secret@")
        server.plan("b-000000.tar", "cut", after=100)
        found = examine({"all": [f"{url}/{name}-000000.tar" for name in "ab"]}, workers=workers)
        assert len(server.gets("b-000000.tar")) < 20 * max(1, workers)  # attempts of half a second
    items = {finding.topic: [" ".join(item) for item in finding.items] for finding in found.findings}
    (shard,) = items["shards"]
    assert shard.startswith(f"{server.url}/b-000000.tar cannot read {server.url}/b-000000.tar: ")
    assert items["unreadable"] == ["a-000000.tar 00000004 empty image member (0 bytes)"]
    (text,) = (finding.text for finding in found.findings if finding.topic == "unreadable")
    assert text == "1 of 5 images cannot be read"
    assert (found.splits[0].images, found.splits[0].total_bytes) == (46, readable)
    assert "secret" not in str(found)
