"""Body of test_fsdp_checkpoint.py: runs that read and write checkpoints, one after the other; rank 0 writes their next losses.

python sharded_checkpoint.py OUT.pt RUNS.json FLAGS... : runs are [name, ddp | fsdp, folder to read or "", folder to write or ""].
A run takes three steps, or reads what another one wrote after three; writes if it should; takes three more.
"""

import json
import sys
from pathlib import Path

import torch
from tests.dist.double_story import Training, story
from tests.dist.joined_batch_recorder import Recorder

from glsd.cluster import dist
from glsd.runtime.run import Run


class Meters(Recorder):
    def sync(self):
        pass

    def state(self):
        return {}


def train(parallel: str, source: str, target: str) -> dict[str, torch.Tensor]:
    training = Training([*argv, f"--cluster.parallel={parallel}"])
    if source:
        story.restore(training.cfg, training.state, Run(Path(source)), training.shards)
    else:
        training.steps(3, Recorder())
    assert training.state.step == 3
    meters = Meters()
    if target:
        story.save(training.loop(meters, Run(Path(target))), training.shards)
    training.steps(3, meters)
    return {name: torch.stack(values) for name, values in meters.values.items()}


out, runs, *argv = sys.argv[1:]
results = {name: train(*rest) for name, *rest in json.loads(runs)}
if dist.is_main():
    torch.save({"world": dist.world_size(), "runs": results}, out)
dist.leave()
