"""Stochastic depth that saves the work: a residual branch runs only on the rows of the batch that keep it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block
from torch import Tensor, nn

_STRIDE = 4  # draws of a branch start at multiples of this, where compiled code reads them in place


class Kept(NamedTuple):
    """The rows of a batch that keep one branch, ascending, and what the branch's output is multiplied by.

    A row of weight 0 is dropped, and is there only so that there are at least two of them (see ``draw``).
    """

    rows: Int64[Tensor, " r"]
    weights: Float[Tensor, " r"]


Kepts = tuple[Kept, Kept]  # of attention, of the MLP


class _Skipping:
    """What makes one of timm's blocks accept draws; ``_attend`` and ``_mix`` are its branches without their DropPath."""

    def forward(self: Any, x: Tensor, *, kept: Kepts | None = None, **attention: Any) -> Tensor:
        """Return what timm's block returns; with draws, each branch runs on the rows that keep it."""
        if kept is None:
            return super().forward(x, **attention)  # type: ignore[misc]
        x = _add(x, self._attend(x.index_select(0, kept[0].rows), **attention), kept[0])
        return _add(x, self._mix(x.index_select(0, kept[1].rows)), kept[1])


class _SkippingBlock(_Skipping, Block):
    def _attend(self, x: Tensor, **attention: Any) -> Tensor:
        return self.ls1(self.attn(self.norm1(x), **attention))

    def _mix(self, x: Tensor) -> Tensor:
        return self.ls2(self.mlp(self.norm2(x)))


class _SkippingEvaBlock(_Skipping, EvaBlock):
    def _attend(self, x: Tensor, **attention: Any) -> Tensor:
        out = self.attn(self.norm1(x), **attention)
        return out if self.gamma_1 is None else self.gamma_1 * out

    def _mix(self, x: Tensor) -> Tensor:
        out = self.mlp(self.norm2(x))
        return out if self.gamma_2 is None else self.gamma_2 * out


class _SkippingPostNormBlock(_Skipping, EvaBlockPostNorm):
    def _attend(self, x: Tensor, **attention: Any) -> Tensor:
        return self.norm1(self.attn(x, **attention))

    def _mix(self, x: Tensor) -> Tensor:
        return self.norm2(self.mlp(x))


# timm's blocks of which we know the branches, and the same with skipping.
SKIPPING: dict[type, type] = {
    Block: _SkippingBlock,
    EvaBlock: _SkippingEvaBlock,
    EvaBlockPostNorm: _SkippingPostNormBlock,
}


def skip_dropped_rows(net: nn.Module) -> None:
    """Let every block of SKIPPING that drops rows take draws (``forward(x, kept=...)``), in place.

    Modules, parameters and their names stay; without draws a block does what timm's does. Other blocks (Swin's, parallel
    ones) and networks keep timm's DropPath, which drops after the work. Source: stochastic depth (arXiv 1603.09382); batch
    subsets as in DINOv2 (arXiv 2304.07193, section 5), which fixes their size, where here every row is drawn for itself.
    """
    for block in net.modules():
        if type(block) in SKIPPING and max(rates(block)) > 0:
            block.__class__ = SKIPPING[type(block)]


def rates(block: nn.Module) -> tuple[float, float]:
    """Return the shares of rows that a block drops: of attention, of the MLP."""
    paths = (getattr(block, name, None) for name in ("drop_path1", "drop_path2"))
    first, second = (float(getattr(path, "drop_prob", 0.0)) for path in paths)
    return first, second


def draw(blocks: Sequence[nn.Module], tokens: Float[Tensor, "b n d"]) -> list[Kepts | None]:
    """Return, block by block, which rows of ``tokens`` each branch keeps; None = the block runs as timm wrote it.

    A row is kept with probability 1 - p, independent of the others, and weighs 1 / (1 - p) then, so that the expectation
    is the branch's output. Drawn from torch's default generator of the CPU: how many rows are kept is known without
    waiting for the device, which gets all draws in two asynchronous copies. None for blocks in evaluation mode and those
    that skip_dropped_rows left as they are. At least two rows are returned (one of one), where need be with weight 0:
    with none at all the branch's parameters would have no gradient, which DDP waits for, and compiled code is made
    anew for 0 and for 1.
    """
    skipping = [isinstance(block, _Skipping) and block.training for block in blocks]
    shares = [rate for block, wanted in zip(blocks, skipping, strict=True) if wanted for rate in rates(block)]
    if not shares:
        return [None] * len(skipping)
    num_rows = len(tokens)
    dropped = torch.tensor(shares, dtype=torch.float64, device="cpu")[:, None]
    stride = -(-num_rows // _STRIDE) * _STRIDE
    keep = torch.rand(len(shares), stride, dtype=torch.float64, device="cpu") >= dropped
    keep[:, num_rows:] = False
    order = keep.logical_not().to(torch.uint8).argsort(dim=1, stable=True)  # the kept ones first
    weights = (keep.gather(1, order) / (1 - dropped)).to(torch.promote_types(tokens.dtype, torch.float32))
    counts = keep.sum(dim=1).clamp(min=min(2, num_rows)).tolist()
    rows, weights = _upload(order, tokens.device), _upload(weights, tokens.device)
    kept = iter([Kept(rows[i, :count], weights[i, :count]) for i, count in enumerate(counts)])
    return [(next(kept), next(kept)) if wanted else None for wanted in skipping]


def _add(x: Tensor, branch: Tensor, kept: Kept) -> Tensor:
    """Add a branch to the rows that keep it, in the type that timm's x + branch would have."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    weighted = branch.to(dtype) * kept.weights.to(dtype)[:, None, None]
    return x.to(dtype).index_add(0, kept.rows, weighted)


def _upload(host: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the device.
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)
