"""What the bodies of the two-rank tests share."""

import contextlib

import torch

from glsd.cluster import dist


class Recorder:
    """Takes the place of the meters: keeps every value as the mean over ranks."""

    def __init__(self):
        self.values: dict[str, list[torch.Tensor]] = {}

    def add(self, name, value):
        self.values.setdefault(name, []).append(dist.all_reduce_mean(value.detach().double()))

    def waiting(self):
        return contextlib.nullcontext()
