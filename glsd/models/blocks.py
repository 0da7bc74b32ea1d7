"""The blocks of a ViT or Eva: compiled, or run without their compiled graphs."""

import importlib.util
import os
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from timm.layers import DropPath
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class _SharedDropPath(nn.Module):
    """timm's DropPath with its rate in a buffer, so that blocks of different rates share one compiled graph.

    The compiler treats a float as a constant: timm's module would need one graph a block.
    """

    keep_prob: Tensor

    def __init__(self, drop_prob: float, device: torch.device):
        super().__init__()
        self.register_buffer("keep_prob", torch.tensor(1 - drop_prob, device=device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand(len(x), *[1] * (x.ndim - 1), device=x.device) < self.keep_prob
        return x * (kept / self.keep_prob).to(x.dtype)


def compile_blocks(net: nn.Module, backend: str | Callable = "inductor") -> None:
    """Let torch compile the blocks of a ViT or Eva, in place; parameters keep their names. Other networks stay as they are.

    The blocks share their graphs: one for each shape of the tokens, with and without gradient, with and without
    stochastic depth. Each is compiled at its first call.
    """
    # Under DDP dynamo would cut each block's graph at gradient buckets, to overlap communication with the backward pass.
    # Blocks already overlap with each other.
    torch._dynamo.config.optimize_ddp = False
    if isinstance(net, VisionTransformer | Eva):
        for block in net.blocks.children():
            device = next(block.parameters()).device
            for name, child in list(block.named_children()):
                if isinstance(child, DropPath):
                    setattr(block, name, _SharedDropPath(child.drop_prob, device))
            block.compile(backend=backend, dynamic=False)


def compile_obstacle(device: torch.device) -> str | None:
    """Return what torch.compile lacks on the device, None if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"there is no compiler ({' or '.join(names)}, or one named by ${variable})"


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a ViT, Eva or Swin in order: they hold most of its parameters."""
    parts = [part for name, part in net.named_modules() if name.rsplit(".", 1)[-1] == "blocks"]
    return [block for part in parts for block in part.children()]


def run_uncompiled() -> AbstractContextManager[None]:
    """Run compiled blocks eagerly: batches of other sizes than those of training would compile further graphs."""
    return torch.compiler.set_stance("force_eager")
