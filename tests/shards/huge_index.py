"""Opens a set of 10,000 shards of 10,000 samples and prints what that cost: ``python huge_index.py FOLDER`` prints a JSON line.

The shards and their indices are sparse files: they have their full size, but hardly take room. A program of its own,
because it measures a process that has done nothing else.
"""

import json
import os
import struct
import sys
import time
from pathlib import Path

import psutil

from glsd.data.order import EpochOrder
from glsd.shards.index import DTYPES, VERSION, _checksum
from glsd.shards.store import open_shards

NUM_SHARDS = SAMPLES_OF_SHARD = 10_000
IMAGE_BYTES, KEY_BYTES = 100_000, 8
MIB = 2**20


def make(folder: Path) -> None:
    """Write the shards and their indices, all alike, with nothing but zeros in them."""
    shard_bytes = SAMPLES_OF_SHARD * (IMAGE_BYTES + 2048)
    spans: dict[str, dict] = {}
    end = 0
    for name, (label, dtype) in DTYPES.items():
        items = SAMPLES_OF_SHARD * (KEY_BYTES if name == "key_bytes" else 1)
        start, end = end, end + items * dtype().itemsize
        spans[name] = {"dtype": label, "shape": [items], "data_offsets": [start, end], "bytes": end - start}
    metadata = {
        "version": str(VERSION),
        "shard": "huge",
        "shard_bytes": str(shard_bytes),
        "marks": "[0]",
        "digest": "0" * 64,
        "count": str(SAMPLES_OF_SHARD),
        "checksum": str(_checksum({name: [bytes(span["bytes"])] for name, span in spans.items()})),
    }
    for span in spans.values():
        del span["bytes"]
    header = json.dumps({"__metadata__": metadata, **spans}).encode()
    header += b" " * (-len(header) % 8)
    for number in range(NUM_SHARDS):
        path = folder / f"huge-{number:06d}.tar"
        with open(path, "wb") as shard, open(f"{path}.index", "wb") as index:
            shard.truncate(shard_bytes)
            index.write(struct.pack("<Q", len(header)) + header)
            index.truncate(8 + len(header) + end)


def main(folder: Path) -> None:
    make(folder)
    process = psutil.Process()
    before = process.memory_info().rss
    started, worked = time.monotonic(), time.process_time()
    shards = open_shards(str(folder / "huge-*.tar"))
    order = EpochOrder(shards.shard_sizes, seed=0, epoch=0, window_shards=16)
    first = order[0]
    shards.label(first)
    seconds, cpu = time.monotonic() - started, time.process_time() - worked
    opened = process.memory_info().rss - before
    for position in range(0, len(order), len(order) // 60):  # from one end of the epoch to the other
        shards.key(order[position])
        shards.label(order[position])
    print(
        json.dumps(
            {
                "samples": len(shards),
                "seconds": round(seconds, 3),
                "cpu_seconds": round(cpu, 3),
                "opened_mib": round(opened / MIB, 1),
                "used_mib": round((process.memory_info().rss - before) / MIB, 1),
                "disk_mib": sum(entry.stat().st_blocks for entry in os.scandir(folder)) * 512 // MIB,
            }
        )
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
