"""Body of test_finetune_ranks.py: four metric-learning steps, over two epochs, in float64 for every loss and regularizer, written by rank 0.

python joined_dml.py OUT.pt FLAGS... : alone it takes the whole batch, under the launcher each rank its share.
"""

import dataclasses
import sys
from typing import Any

import torch
from tests.dist.joined_batch_recorder import Recorder

import glsd.finetune.step as step_module
import glsd.finetune.train as story
from glsd.runtime.loop import Training
from glsd.config.parse import load
from glsd.finetune.networks import build, resolve
from glsd.config.finetune import FinetuneConfig, Reg
from glsd.finetune.plan import make_plan, rates_at
from glsd.finetune.report import open_sets
from glsd.losses.ranking import RANKING
from glsd.cluster import dist
from glsd.cluster.launch import start

torch.set_num_threads(1)
to_float32 = step_module.normalize
step_module.normalize = lambda images: to_float32(images).double()
CASES: list[tuple[str, Reg]] = [(loss, "none") for loss in RANKING]
CASES += [("multi_similarity", "psd"), ("multi_similarity", "obdsd"), ("multi_similarity", "mdr")]
CASES += [("triplet", "obdsd+mdr"), ("margin", "mdr"), ("proxy_anchor", "obdsd+mdr")]

out, *argv = sys.argv[1:]
base = load(FinetuneConfig, argv)
accelerator = start("no", "launch/finetune_dml.py")
torch.set_default_dtype(torch.float64)
results: dict[str, dict[str, Any]] = {}
for loss, reg in CASES:
    cfg, source = resolve(dataclasses.replace(base, loss=loss, reg=reg))
    sets = open_sets(cfg)
    plan = make_plan(cfg, len(sets.groups.members), len(sets.groups))
    state = build(cfg, source, plan.num_classes, accelerator)
    for network in (state.student, state.teacher, state.ranking):
        if network is not None:
            network.double()
    state.levels.data = state.levels.data.double()
    gradients: list[dict[str, torch.Tensor]] = []

    def keep(*_, state=state, gradients=gradients):
        named = [*state.student.named_parameters(), *state.ranking.named_parameters(prefix="ranking")]
        named += [("levels", state.levels)]
        gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    state.optimizer.register_step_pre_hook(keep)
    batches = story.make_batches(cfg, plan, sets, 0)
    meters, keys = Recorder(), []
    training = Training(cfg=cfg, plan=plan, state=state, run=None, accelerator=accelerator, meters=meters)  # type: ignore[arg-type]
    for _ in range(4):
        rates = rates_at(cfg, plan, state.step)
        report = step_module.train_step(training, rates, batches)
        keys.append([key for rank_keys in dist.gather_objects(report.keys) for key in rank_keys])
        state.step += 1
    results[f"{loss} {reg}"] = {
        "keys": keys,
        "values": {name: torch.stack(values) for name, values in meters.values.items()},
        "gradients": gradients,
        "statistics": dict(zip(("mean", "std"), state.mdr_statistics[:2], strict=True)),
        "student": state.student.state_dict(),
        "losses": dict(state.ranking.state_dict()) | {"levels": state.levels.data},
    }
if dist.is_main():
    torch.save({"world": dist.world_size(), "cases": results}, out)
dist.leave()
