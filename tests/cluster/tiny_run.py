"""A tiny pretraining run on a few uneven shards, and how far it has come."""

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from glsd.shards.index import build_index, index_path, write_index

SIZES = (31, 5, 47, 1, 22, 13, 38, 9, 27, 50)  # samples a shard: 243, 20 batches of 12 and 3 samples more
NAMES = "train-{000000..000009}.tar"


def pack_uneven(folder: Path) -> str:
    """Write SIZES[i] small images into ``folder/train-<i>.tar``, with an index each; return the pattern of all."""
    folder.mkdir(parents=True, exist_ok=True)
    number = 0
    for shard, size in enumerate(SIZES):
        path = folder / f"train-{shard:06d}.tar"
        with tarfile.open(path, "w") as tar:
            for _ in range(size):
                raw = noise(number)
                member = tarfile.TarInfo(f"{number:04d}.png")
                member.size = len(raw)
                tar.addfile(member, io.BytesIO(raw))
                number += 1
        write_index(build_index(path), index_path(path), shard_name=path.name)
    return f"{folder}/{NAMES}"


def noise(number: int) -> bytes:
    """A PNG file of 40 x 40 pixels, another one for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def argv_of(out: Path, shards: str, **changes: object) -> list[str]:
    """The command line of a run that goes on if there is something to go on with; ``changes`` have __ for the dot.

    A step takes some 20 ms and an epoch 20 steps of 12: to hit a run in the middle, give it more ``optim__epochs``.
    """
    values: dict[str, object] = {
        "out": out,
        "resume": "auto",
        "data.shards": shards,
        "data.num_workers": 0,
        "data.window_shards": 3,
        "data.global_size": 32,
        "data.local_size": 16,
        "data.num_local": 2,
        "model.backbone": "vit_tiny_patch16_224",
        "model.timm_args": "{patch_size: 8, depth: 2, embed_dim: 32, num_heads: 2}",
        "model.drop_path": 0.2,
        "head.num_prototypes": 64,
        "head.hidden_dim": 32,
        "head.bottleneck_dim": 16,
        "optim.epochs": 2,
        "optim.batch_size": 12,
        "optim.warmup_epochs": 1,
        "watch.log_every": 3,
        "watch.checkpoint_every": 4,
        "watch.sample_log": "true",
    }
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return [f"--{key}={value}" for key, value in values.items()]


def steps_written(run: Path) -> int:
    """How far a run has come by its log of samples, which may end in half a line."""
    file = run / "samples.jsonl"
    return max(_whole_steps(file.read_text().splitlines()), default=0) if file.exists() else 0


def _whole_steps(lines: list[str]) -> Iterator[int]:
    for line in lines:
        try:
            yield int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue  # it is being written
