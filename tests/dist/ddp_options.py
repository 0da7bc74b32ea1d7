"""Body of test_ddp_options.py: a few backward passes under each way of launch.start; rank 0 writes the gradients.

python ddp_options.py OUT.pt : alone it takes the whole batch, under the launcher each rank its half.
"""

import contextlib
import sys

import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from glsd.models.backbone import build_backbone
from glsd.models.blocks import compile_blocks
from glsd.cluster import dist
from glsd.cluster.launch import start

torch.set_num_threads(1)

# Options of start, micro-batches, compiled and checkpointed blocks.
WAYS: dict[str, tuple[dict, int, bool]] = {
    "static": ({"static_graph": True}, 1, False),
    "static_compiled": ({"static_graph": True}, 1, True),
    "accumulated": ({}, 2, False),
    "accumulated_compiled": ({}, 2, True),
    "bf16": ({"static_graph": True, "grad_compression": "bf16"}, 1, False),
}


class TwoSizes(nn.Module):
    """One DDP forward in which the blocks run twice, for two resolutions, as with multi-crop."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone

    def forward(self, large, small):
        return self.backbone(large)[0].pow(3).mean() + self.backbone(small)[1].pow(3).mean()


def share(images: torch.Tensor) -> torch.Tensor:
    return images.chunk(dist.world_size())[dist.rank()]


def gradients(options: dict, num_micro: int, compiled: bool) -> list[torch.Tensor]:
    accelerator = start("no", "launch/pretrain.py", **options)
    args = {"patch_size": 8, "depth": 2, "embed_dim": 192, "num_heads": 2}
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=32, checkpointing=compiled, timm_args=args
    ).double()
    counter = CompileCounterWithBackend("aot_eager")
    if compiled:
        compile_blocks(backbone.net, counter)
    # Wide enough for the blocks to reach over a bucket of DDP, where dynamo would cut their graphs.
    model = accelerator.prepare_model(TwoSizes(backbone))
    found = []
    for step in range(3):
        for micro in range(num_micro):
            torch.manual_seed(10 * step + micro)
            large, small = torch.randn(4, 3, 32, 32).double(), torch.randn(8, 3, 16, 16).double()
            with contextlib.nullcontext() if micro == num_micro - 1 else accelerator.no_sync(model):
                accelerator.backward(model(share(large), share(small)) / num_micro)
        found.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
        backbone.zero_grad(set_to_none=True)
    assert counter.frame_count <= 2, f"{counter.frame_count} graphs for two sizes"
    return found


results = {name: gradients(*way) for name, way in WAYS.items()}
if dist.is_main():
    torch.save({"world": dist.world_size(), **results}, sys.argv[1])
dist.leave()
