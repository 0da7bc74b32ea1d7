"""The pretraining story in float64, for bodies of rank tests that import it first: networks, pixels, defaults."""

import torch

import glsd.pretrain.train as story
import glsd.pretrain.networks as builder
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.shards.store import ShardSet, open_shards
from glsd.pretrain.objective import Pixels
from glsd.models.multicrop import MultiCrop
from glsd.pretrain.plan import make_plan, rates_at
from glsd.cluster.launch import start

single, networks = story.augment, builder.build_networks


def augment_in_double(batch) -> Pixels:
    return Pixels(**{name: tensor.double() for name, tensor in vars(single(batch)).items()})


def networks_in_double(cfg: PretrainConfig) -> tuple[MultiCrop, MultiCrop]:
    student, teacher = networks(cfg)
    return student.double(), teacher.double()


torch.set_num_threads(1)
torch.set_default_dtype(torch.float64)
story.augment = augment_in_double
builder.build_networks = networks_in_double


class Training:
    """A run without a run folder: its state, and steps on demand from wherever the state stands."""

    def __init__(self, argv: list[str]):
        self.cfg = load(PretrainConfig, argv)
        self.accelerator = start("no", "launch/pretrain.py", grad_compression=self.cfg.optim.grad_compression)
        self.shards: ShardSet = open_shards(self.cfg.data.shards)
        self.plan = make_plan(self.cfg, len(self.shards))
        self.state = builder.build(self.cfg, self.accelerator)

    def steps(self, count: int, meters) -> None:
        consumed = self.state.step * self.cfg.optim.batch_size
        batches = story.make_batches(self.cfg, self.shards, consumed)
        for _ in range(count):
            rates = rates_at(self.cfg, self.plan, self.state.step)
            story.train_step(self.cfg, self.plan, rates, self.state, batches, meters, self.accelerator)
            self.state.step += 1
