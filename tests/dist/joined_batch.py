"""Body of test_ranks.py: three training steps in float64, then rank 0 writes losses, gradients, centers and weights.

python joined_batch.py OUT.pt FLAGS... : alone it takes the whole batch, under the launcher each rank its share.
"""

import sys

import torch
from tests.dist.joined_batch_recorder import Recorder

import glsd.pretrain.step as step_module
import glsd.pretrain.train as story
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.shards.store import open_shards
from glsd.pretrain.networks import build
from glsd.runtime.loop import Training as Loop
from glsd.pretrain.plan import make_plan, rates_at
from glsd.cluster import dist
from glsd.cluster.launch import start

torch.set_num_threads(1)


def augment_in_double(batch) -> tuple[torch.Tensor, torch.Tensor]:
    global_crops, local_crops = single(batch)
    return global_crops.double(), local_crops.double()


single = step_module.augment
step_module.augment = augment_in_double

out, *argv = sys.argv[1:]
cfg = load(PretrainConfig, argv)
accelerator = start("no", "launch/pretrain.py")
shards = open_shards(cfg.data.shards)
plan = make_plan(cfg, len(shards))
torch.set_default_dtype(torch.float64)
state = build(cfg, accelerator)
for network in (state.student, state.teacher):
    network.double()
gradients: list[dict[str, torch.Tensor]] = []
state.optimizer.register_step_pre_hook(
    lambda *_: gradients.append(
        {n: p.grad.clone() for n, p in state.student.named_parameters() if p.grad is not None}
    )
)
batches = story.make_batches(cfg, state, shards)
meters = Recorder()
training = Loop(cfg=cfg, plan=plan, state=state, run=None, accelerator=accelerator, meters=meters)  # type: ignore[arg-type]
keys = []
for _ in range(3):
    report = step_module.train_step(training, rates_at(cfg, plan, state.step), batches)
    keys.append(sorted(key for rank_keys in dist.gather_objects(report.keys) for key in rank_keys))
    state.step += 1
if dist.is_main():
    result = {
        "world": dist.world_size(),
        "keys": keys,
        "values": {name: torch.stack(values) for name, values in meters.values.items()},
        "gradients": gradients,
        "centers": state.centers,
        "student": state.student.state_dict(),
        "teacher": state.teacher.state_dict(),
    }
    torch.save(result, out)
dist.leave()
