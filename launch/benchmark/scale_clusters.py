"""What the cost model says of clusters that nobody here has measured; its assumptions are written beside the numbers."""

import math
from dataclasses import dataclass

import timm
import torch

from glsd.models.blocks import blocks_of
from glsd.models.heads import ProjectionHead
from launch.benchmark.scale_model import (
    Link,
    communication_s,
    expected_bytes,
    step_s,
)

NODES = (1, 2, 4, 8, 16, 32, 64)
GPUS = 8  # of a node
BATCH_SIZE = 2048  # images in all: it does not grow with the ranks
FLOPS = 0.35 * 989e12  # of a GPU: a third of an H100's dense bfloat16 peak
HOP_S = 10e-6  # of a message between two GPUs; a collective takes 2 log2(ranks) of them, as in a tree
BUCKET = 25 * 2**20  # bytes: what DDP reduces at once
NVLINK = 300e9  # bytes a second that collectives reach inside of a node
# Bytes a second that collectives reach between nodes, all cards of a node together.
NETWORKS = {"8 x 400 Gb/s a node": 320e9, "100 Gb/s a node": 10e9}
# Share of the compute behind which communication hides: DDP's behind the backward pass of the student, that of parts behind
# all of it but the first and the last block.
HIDEABLE = {"ddp": 0.5, "fsdp": 0.8}
# Name, timm name, crops' sides.
BACKBONES = (
    ("ViT-S/16", "vit_small_patch16_224", 224, 96),
    ("ViT-L/16", "vit_large_patch16_224", 224, 96),
    ("ViT-g/14", "vit_giant_patch14_dinov2", 224, 98),
)
NUM_LOCAL, PROTOTYPES, HIDDEN, BOTTLENECK = 8, 65536, 2048, 256


@dataclass(frozen=True)
class Network:
    """What the model needs to know of a network with two heads."""

    sizes: dict[str, int]
    flops: float  # of an image's step: student forward and backward, teacher forward

    @property
    def state_bytes(self) -> int:
        """Parameters, gradients, two moments and teacher in float32."""
        return 4 * (4 * self.sizes["trained"] + 1 * self.sizes["parameters"])


def network_of(name: str, global_size: int, local_size: int) -> Network:
    """Count parameters and FLOPs of a backbone with a global and a local head, without making its weights."""
    with torch.device("meta"):
        net = timm.create_model(name, num_classes=0, img_size=global_size)
        head = ProjectionHead(
            net.num_features, num_prototypes=PROTOTYPES, hidden_dim=HIDDEN, bottleneck_dim=BOTTLENECK
        )
    blocks = sum(p.numel() for block in blocks_of(net) for p in block.parameters())
    heads = [p for p in head.parameters() for _ in range(2)]
    parameters = [*net.parameters(), *heads]
    patch = net.patch_embed.patch_size[0]
    tokens = {size: (size // patch) ** 2 + 1 for size in (global_size, local_size)}

    def forward(num_global: int, num_local: int) -> float:
        crops = ((num_global, tokens[global_size]), (num_local, tokens[local_size]))
        rows = sum(number * count for number, count in crops)
        attention = sum(4 * number * count**2 * net.num_features * len(net.blocks) for number, count in crops)
        heads_flops = 2 * rows * sum(p.numel() for p in head.parameters() if p.requires_grad)
        return 2 * blocks * rows + attention + heads_flops

    sizes = {
        "block_parameters": blocks,
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "tensors": sum(p.requires_grad for p in parameters),
        "passes": 2,
        "logits": 2 * PROTOTYPES,
    }
    return Network(sizes, 3 * forward(2, NUM_LOCAL) + forward(2, 0))


def predicted_s(
    network: Network, way: str, nodes: int, network_bandwidth: float
) -> tuple[float, float, float]:
    """Return the seconds of compute, of communication and of a step on ``nodes`` nodes."""
    ranks = nodes * GPUS
    bandwidth = NVLINK if nodes == 1 else min(NVLINK, network_bandwidth)
    link = Link(2 * math.ceil(math.log2(ranks)) * HOP_S, bandwidth)
    moved = expected_bytes(way, network.sizes)
    calls = {kind: {"bytes": count, "calls": math.ceil(count / BUCKET)} for kind, count in moved.items()}
    compute = BATCH_SIZE / ranks * network.flops / FLOPS
    moving = communication_s(calls, dict.fromkeys(moved, link), ranks)
    # Cores are no limit: GPUs move bytes beside their work.
    total = step_s(
        compute_s=compute,
        threads=0,
        cores=1,
        communication_s=moving,
        hideable_s=HIDEABLE[way] * compute,
    )
    return compute, moving, total


def rows() -> list[tuple[str, ...]]:
    """Return the table: images a second and efficiency (against one GPU without communication) of each cluster."""
    found = []
    for title, name, global_size, local_size in BACKBONES:
        network = network_of(name, global_size, local_size)
        alone = BATCH_SIZE * network.flops / FLOPS
        for way in ("ddp", "fsdp"):
            for wires, bandwidth in NETWORKS.items():
                cells = []
                for nodes in NODES:
                    total = predicted_s(network, way, nodes, bandwidth)[2]
                    cells.append(f"{BATCH_SIZE / total:,.0f} ({alone / (nodes * GPUS) / total:.0%})")
                found.append((title, way, wires, *cells))
    return found


if __name__ == "__main__":
    print(
        f"predictions, not measurements: images/s (efficiency), {BATCH_SIZE} images a step, {GPUS} GPUs a node"
    )
    print("| backbone | parallel | between nodes | " + " | ".join(f"{nodes} nodes" for nodes in NODES) + " |")
    print("|---" * (3 + len(NODES)) + "|")
    for row in rows():
        print("| " + " | ".join(row) + " |")
    for title, name, global_size, local_size in BACKBONES:
        network = network_of(name, global_size, local_size)
        sizes = network.sizes
        print(
            f"{title}: {sizes['block_parameters'] / 1e6:.0f} M in blocks, {sizes['parameters'] / 1e6:.0f} M with two heads, "
            f"{network.flops / 1e12:.2f} TFLOP an image and step, state {network.state_bytes / 2**30:.1f} GiB (ddp, every GPU), "
            f"{network.state_bytes / 2**30 / GPUS:.2f} GiB (fsdp on 8 GPUs)"
        )
