"""Features of every image exactly once, whatever the number of processes."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from jaxtyping import Float32, Int64
from torch import Tensor

from glsd.batches import LabeledBatch
from glsd.cluster import dist
from glsd.errors import UserError


class Embedded(NamedTuple):
    """Features of a labeled set on the CPU, in the order of the data set."""

    features: Float32[Tensor, "n d"]
    labels: Int64[Tensor, " n"]  # -1 = no label
    indices: Int64[Tensor, " n"]  # ascending


@torch.no_grad()
def embed(
    forward: Callable[[Tensor], Tensor],
    loader: Iterable[LabeledBatch],
    *,
    device: torch.device,
    precision: str = "no",
) -> Embedded:
    """Return the feature of every image of all ranks' loaders; every rank gets the whole, by index.

    forward: images (b 3 h w) -> features (b d), a network in evaluation mode; loader: this rank's batches, rows
    with index -1 are padding or unreadable and left out; precision: "no" or "bf16" (autocast).
    Raises UserError if there is no batch at all, RuntimeError if an index comes twice, which would be a fault
    of the loader.
    """
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in loader:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
            features = forward(batch.images.to(device, non_blocking=True))
        parts.append((features.float().cpu(), batch.labels, batch.indices))
    if not parts:
        raise UserError("no images to embed: the shards are empty")
    # Gathered on the device, where the process group's backend can reach it, and brought back to the CPU.
    features, labels, indices = (
        dist.gather_rows(torch.cat(column).to(device)).cpu() for column in zip(*parts, strict=True)
    )
    real = (indices >= 0).nonzero()[:, 0]
    order = real[indices[real].argsort()]
    features, labels, indices = features[order], labels[order], indices[order]
    twice = indices[1:][indices[1:] == indices[:-1]]
    if len(twice):
        raise RuntimeError(f"the loader gave {len(twice)} images twice, the first is number {int(twice[0])}")
    return Embedded(features, labels, indices)
