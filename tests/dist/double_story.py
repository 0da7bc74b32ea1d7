"""The pretraining story in float64, for bodies of rank tests that import it first: networks, pixels, defaults."""

import torch

import glsd.pretrain.step as step_module
import glsd.pretrain.train as story
import glsd.pretrain.networks as builder
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.shards.store import ShardSet, open_shards
from glsd.models.multicrop import MultiCrop
from glsd.runtime.loop import Training as Loop
from glsd.pretrain.plan import make_plan, rates_at
from glsd.cluster.launch import start

single, networks = step_module.augment, builder.build_networks


def augment_in_double(batch) -> tuple[torch.Tensor, torch.Tensor]:
    global_crops, local_crops = single(batch)
    return global_crops.double(), local_crops.double()


def networks_in_double(cfg: PretrainConfig) -> tuple[MultiCrop, MultiCrop]:
    student, teacher = networks(cfg)
    return student.double(), teacher.double()


torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
step_module.augment = augment_in_double
builder.build_networks = networks_in_double


class Training:
    """A run without a run folder: its state, and steps on demand from wherever the state stands."""

    def __init__(self, argv: list[str]):
        self.cfg = load(PretrainConfig, argv)
        self.accelerator = start("no", "launch/pretrain.py", grad_compression=self.cfg.optim.grad_compression)
        self.shards: ShardSet = open_shards(self.cfg.data.shards)
        self.plan = make_plan(self.cfg, len(self.shards))
        self.state = builder.build(self.cfg, self.accelerator)

    def loop(self, meters, run=None) -> Loop:
        parts = {"cfg": self.cfg, "plan": self.plan, "state": self.state, "accelerator": self.accelerator}
        return Loop(**parts, run=run, meters=meters)

    def steps(self, count: int, meters) -> None:
        batches = story.make_batches(self.cfg, self.state, self.shards)
        for _ in range(count):
            rates = rates_at(self.cfg, self.plan, self.state.step)
            step_module.train_step(self.loop(meters), rates, batches)
            self.state.step += 1
