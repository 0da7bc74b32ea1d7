"""The blocks of a ViT or Eva one after the other: compiled, checkpointed, skipping dropped rows, as the network was built."""

import importlib.util
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from jaxtyping import Float
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from glsd.models.drop_path import Kepts, draw


def run_blocks(
    net: Any, tokens: Float[Tensor, "b n d"], arguments: Sequence[dict[str, Any]] | None = None
) -> Float[Tensor, "b n d"]:
    """Return the tokens after all of ``net.blocks``; arguments: of each block besides the tokens."""
    saving = net.grad_checkpointing and torch.is_grad_enabled()
    extras = arguments or [{}] * len(net.blocks)
    kepts = draw(list(net.blocks), tokens)
    for block, kept, extra in zip(net.blocks, kepts, extras, strict=True):
        if kept is not None:
            extra = {**extra, "kept": _varying(kept, len(tokens)) if is_compiled(block) else kept}
        # Not the reentrant kind: under DDP that one cannot run a block twice, for two resolutions.
        tokens = checkpoint(block, tokens, use_reentrant=False, **extra) if saving else block(tokens, **extra)
    return tokens


def compile_blocks(net: nn.Module, backend: str | Callable = "inductor") -> None:
    """Let torch compile the blocks of a ViT or Eva, in place; names of parameters stay. Nothing happens to other networks.

    Blocks share their graphs: there is one for each number of tokens and of rows (with dropped rows: for any number of
    kept ones), with and without gradient. Compiled at the first call.
    """
    # Under DDP dynamo would cut the graph of every block at the borders of gradient buckets, to overlap communication with the
    # backward pass: that overlap is there already, between blocks.
    torch._dynamo.config.optimize_ddp = False
    if isinstance(net, VisionTransformer | Eva):
        for block in net.blocks.children():
            block.compile(backend=backend, dynamic=False)


def compile_obstacle(device: torch.device) -> str | None:
    """Return what torch.compile would miss on the device, None if nothing."""
    if device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    variable, names = ("CC", ("gcc", "clang")) if device.type == "cuda" else ("CXX", ("g++", "clang++"))
    if os.environ.get(variable) or any(map(shutil.which, names)):
        return None
    return f"there is no compiler ({' or '.join(names)}, or one named by ${variable})"


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """Return the repeated blocks of a ViT, Eva or Swin, in order: most of its parameters."""
    parts = [part for name, part in net.named_modules() if name.rsplit(".", 1)[-1] == "blocks"]
    return [block for part in parts for block in part.children()]


def as_written() -> AbstractContextManager[None]:
    """Run compiled blocks as they are written: batches of other sizes than those of training would make further graphs."""
    return torch.compiler.set_stance("force_eager")


def is_compiled(block: nn.Module) -> bool:
    """Tell whether compile_blocks was here."""
    return getattr(block, "_compiled_call_impl", None) is not None


def _varying(kept: Kepts, num_rows: int) -> Kepts:
    """Mark the number of kept rows as one that changes, so that one graph serves all; a single row is always one."""
    if num_rows > 1:
        for tensor in (tensor for branch in kept for tensor in branch):
            torch._dynamo.mark_dynamic(tensor, 0)
    return kept
