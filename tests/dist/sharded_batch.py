"""Body of test_fsdp.py: steps in float64 with whole and with cut parameters, in one process group; rank 0 writes what came out.

python sharded_batch.py OUT.pt CASES.json FLAGS... : cases are name -> further flags.
"""

import json
import sys
from typing import Any

import torch
from tests.dist.double_story import Training
from tests.dist.joined_batch_recorder import Recorder

from glsd.pretrain.networks import State
from glsd.cluster import dist, fsdp


def whole_gradients(state: State) -> dict[str, torch.Tensor]:
    named: dict[str, Any] = dict(state.student.named_parameters())
    local = fsdp.local_parameters(state.student)
    found = {name: part.grad.clone() for name, part in local.items() if part.grad is not None}
    if not fsdp.is_sharded(state.student):
        return found
    return {name: fsdp._full(fsdp._whole(rows, named[name])) for name, rows in found.items()}


def train(argv: list[str]) -> dict[str, Any]:
    training, meters = Training(argv), Recorder()
    state = training.state
    gradients: list[dict[str, torch.Tensor]] = []
    state.optimizer.register_step_pre_hook(lambda *_: gradients.append(whole_gradients(state)))
    training.steps(3, meters)
    return {
        "sharded": fsdp.is_sharded(state.student) and fsdp.is_sharded(state.teacher),
        "values": {name: torch.stack(values) for name, values in meters.values.items()},
        "gradients": gradients,
        "centers": state.centers,
        "student": fsdp.gather_state(state.student),
        "teacher": fsdp.gather_state(state.teacher),
    }


out, cases, *argv = sys.argv[1:]
results = {
    name: {parallel: train([*argv, *flags, f"--cluster.parallel={parallel}"]) for parallel in ("ddp", "fsdp")}
    for name, flags in json.loads(cases).items()
}
if dist.is_main():
    torch.save({"world": dist.world_size(), "cases": results}, out)
dist.leave()
