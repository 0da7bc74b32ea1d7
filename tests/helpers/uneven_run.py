"""A tiny pretraining run on a few uneven shards, and how far it has come."""

import json
from collections.abc import Iterator
from pathlib import Path

from tests.helpers import small_shards

SIZES = (31, 5, 47, 1, 22, 13, 38, 9, 27, 50)  # samples a shard: 243, 20 batches of 12 and 3 samples more
NAMES = "train-{000000..000009}.tar"


def pack_uneven(folder: Path) -> str:
    """Write SIZES[i] small images into ``folder/train-<i>.tar``, with an index each; return the pattern of all."""
    return small_shards.pack_uneven(folder, SIZES, side=40)


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
        "watch.probe_every": 0,
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
