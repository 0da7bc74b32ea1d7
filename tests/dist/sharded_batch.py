"""Body of test_fsdp.py: steps in float64 with whole and with cut parameters, in one process group; rank 0 writes what came out.

python sharded_batch.py OUT.pt CASES.json FLAGS... : cases are name -> further flags.
"""

import json
import sys
from typing import Any

import torch
from joined_batch_recorder import Recorder

import glsd.pretrain as story
import glsd.pretrain_build as builder
from glsd.command_line import load
from glsd.config import PretrainConfig
from glsd.data.shards import open_shards
from glsd.distillation import Pixels
from glsd.pretrain_plan import make_plan, rates_at
from glsd.runtime import dist, sharding
from glsd.runtime.launch import start

STEPS = 3
single, networks = story.augment, builder.build_networks
torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
story.augment = lambda batch: Pixels(
    **{name: tensor.double() for name, tensor in vars(single(batch)).items()}
)
builder.build_networks = lambda cfg: tuple(network.double() for network in networks(cfg))


def whole_gradients(state: builder.State) -> dict[str, torch.Tensor]:
    named = dict(state.student.named_parameters())
    found = {}
    for name, parameter in state.own.items():
        if parameter.grad is not None:
            parts = sharding.in_parts(state.student)
            found[name] = (
                sharding._full(sharding._whole(parameter.grad, named[name])) if parts else parameter.grad
            )
    return {name: gradient.clone() for name, gradient in found.items()}


def train(argv: list[str]) -> dict[str, Any]:
    cfg = load(PretrainConfig, argv)
    o = cfg.optim
    accelerator = start("no", "launch/pretrain.py", grad_compression=o.grad_compression)
    shards = open_shards(cfg.data.shards)
    plan = make_plan(cfg, len(shards))
    state = builder.build(cfg, accelerator)
    gradients: list[dict[str, torch.Tensor]] = []
    state.optimizer.register_step_pre_hook(lambda *_: gradients.append(whole_gradients(state)))
    batches = story.make_batches(cfg, plan, shards, 0)
    meters = Recorder()
    for _ in range(STEPS):
        rates = rates_at(cfg, plan, state.step)
        story.train_step(cfg, rates, state, batches, meters, accelerator)  # type: ignore[arg-type]
        state.step += 1
    return {
        "in_parts": sharding.in_parts(state.student) and sharding.in_parts(state.teacher),
        "values": {name: torch.stack(values) for name, values in meters.values.items()},
        "gradients": gradients,
        "centers": state.centers,
        "student": sharding.gather_state(state.student),
        "teacher": sharding.gather_state(state.teacher),
        "optimizer": sharding.gather_optimizer(state.optimizer, state.student)["state"],
    }


out, cases, *argv = sys.argv[1:]
results = {
    name: {parallel: train([*argv, *flags, f"--cluster.parallel={parallel}"]) for parallel in ("ddp", "fsdp")}
    for name, flags in json.loads(cases).items()
}
if dist.is_main():
    torch.save({"world": dist.world_size(), "cases": results}, out)
dist.leave()
