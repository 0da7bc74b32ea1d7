"""Skipping dropped rows against timm's own DropPath with the same mask, and against the expectation."""

import copy
from typing import Any

import pytest
import torch
from timm.layers import DropPath
from timm.models.eva import EvaBlock, EvaBlockPostNorm
from timm.models.vision_transformer import Block, ParallelScalingBlock
from torch import nn

from glsd.models.backbone import build_backbone
from glsd.models.drop_path import (
    SKIPPING,
    Kept,
    draw,
    rates,
    skip_dropped_rows,
)

BLOCKS: dict[str, tuple[Any, dict[str, Any]]] = {
    "plain": (Block, {"init_values": None}),
    "layer_scale": (Block, {"init_values": 0.7}),
    "eva": (EvaBlock, {"init_values": None}),
    "eva_gamma": (EvaBlock, {"init_values": 0.7, "swiglu_mlp": True}),
    "eva_post_norm": (EvaBlockPostNorm, {}),
}
SMALL = {"patch_size": 8, "depth": 3, "embed_dim": 32, "num_heads": 2}


def rows(count: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.zeros(count, 5, 16, dtype=dtype)


def draw_one(block: nn.Module, tokens: torch.Tensor) -> tuple[Kept, Kept]:
    (kept,) = draw([block], tokens)
    assert kept is not None
    return kept


class FixedMask(nn.Module):
    """timm's DropPath with a mask that is given: literally x * mask / (1 - p)."""

    def __init__(self, kept: torch.Tensor, drop_prob: float):
        super().__init__()
        self.kept, self.drop_prob = kept, drop_prob

    def forward(self, x):
        return x * self.kept.to(x.dtype)[:, None, None] / (1 - self.drop_prob)


def make_block(name: str, drop_path: float, dtype=torch.float64) -> Any:
    kind, options = BLOCKS[name]
    torch.manual_seed(0)
    block = kind(dim=16, num_heads=2, drop_path=drop_path, **options).to(dtype)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


def skipping(block: nn.Module) -> Any:
    copied = copy.deepcopy(block)
    skip_dropped_rows(copied)
    assert type(copied) is SKIPPING[type(block)]
    return copied


def rope_of(block: nn.Module) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    eva = isinstance(block, EvaBlock | EvaBlockPostNorm)
    return {"rope": torch.randn(4, 16, dtype=torch.float64)} if eva else {}  # 4 patches after one class token


def mask_of(kept: Kept, num_rows: int) -> torch.Tensor:
    mask = torch.zeros(num_rows, dtype=torch.bool)
    mask[kept.rows[kept.weights > 0]] = True
    return mask


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(("drop_path", "num_rows"), [(0.4, 9), (0.999, 5), (0.999, 1), (0.001, 6), (0.5, 2)])
def test_values_and_gradients_are_drop_paths_with_the_same_mask(name, drop_path, num_rows):
    block = make_block(name, drop_path)
    ours, literal = skipping(block), copy.deepcopy(block)
    torch.manual_seed(3)
    kept = draw_one(ours, rows(num_rows))
    masks = [mask_of(branch, num_rows) for branch in kept or ()]
    literal.drop_path1, literal.drop_path2 = (FixedMask(mask, drop_path) for mask in masks)
    if drop_path == 0.999:
        assert not any(mask.any() for mask in masks), "nothing kept is the case to test"
    if drop_path == 0.001:
        assert all(mask.all() for mask in masks), "all kept is the case to test"
    outputs = []
    for module, options in ((ours, {"kept": kept}), (literal, {})):
        torch.manual_seed(4)
        x = torch.randn(num_rows, 5, 16, dtype=torch.float64, requires_grad=True)
        out = module(x, **options, **rope_of(block))
        (out * torch.randn_like(out)).sum().backward()
        outputs.append([out.detach(), x.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*outputs, strict=True):
        assert one is not None, "DDP waits for this gradient"
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_the_expectation_is_the_output_without_drop_path():
    """The mean over many draws, of one linear function of the branch: attention alone, the MLP's output weights are zero."""
    block = skipping(make_block("plain", 0.3))
    nn.init.zeros_(block.mlp.fc2.weight)
    nn.init.zeros_(block.mlp.fc2.bias)
    torch.manual_seed(5)
    x = torch.randn(3, 5, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = block.eval()(x) - x
        block.train()
        draws = [block(x, kept=draw_one(block, rows(3))) - x for _ in range(2000)]
        mean = torch.stack(draws).mean(0)
    error = (mean / expected - 1).abs()
    # The weight of a row is 0 or 1 / 0.7: deviation sqrt(0.3 / 0.7) = 0.65, of the mean of 2,000 0.015.
    assert error.max() < 4 * 0.015
    assert error.max() > 1e-4, "it never dropped anything"


@pytest.mark.parametrize("num_rows", [1, 2, 3, 40])
def test_each_row_is_kept_with_its_probability(num_rows):
    blocks = [skipping(make_block("plain", rate)) for rate in (0.2, 0.6)]
    torch.manual_seed(6)
    total = torch.zeros(4, num_rows, dtype=torch.float64)
    for _ in range(1500):
        kepts = [branch for kept in draw(blocks, rows(num_rows)) for branch in kept or ()]
        for i, (branch, rate) in enumerate(zip(kepts, (0.2, 0.2, 0.6, 0.6), strict=True)):
            chosen, weights = branch
            assert len(chosen) >= min(2, num_rows)
            assert chosen.unique().numel() == chosen.numel()
            torch.testing.assert_close(
                weights[weights > 0], torch.full_like(weights[weights > 0], 1 / (1 - rate))
            )
            assert (weights == 0).sum() <= 2, "work for dropped rows"
            total[i, chosen] += weights
    deviation = torch.tensor([0.2, 0.2, 0.6, 0.6])
    deviation = (deviation / (1 - deviation) / 1500).sqrt()[:, None]
    assert ((total / 1500 - 1).abs() < 5 * deviation).all()


def test_the_branches_see_fewer_rows():
    block = skipping(make_block("plain", 0.5))
    seen = {"attn": 0, "mlp": 0}
    for name in seen:
        getattr(block, name).register_forward_hook(
            lambda module, inputs, output, name=name: seen.update({name: len(output)})
        )
    torch.manual_seed(8)
    kept = draw_one(block, rows(64))
    block(torch.randn(64, 5, 16, dtype=torch.float64), kept=kept)
    assert seen == {"attn": int((kept[0].weights > 0).sum()), "mlp": int((kept[1].weights > 0).sum())}
    assert all(16 < count < 48 for count in seen.values())
    assert seen["attn"] != seen["mlp"] or not torch.equal(kept[0].rows, kept[1].rows)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3"])
def test_a_backbone_trains_with_seeds_and_is_exact_in_evaluation(name):
    options: dict[str, Any] = {"image_size": 32, "timm_args": SMALL, "seed": 1}
    plain, dropping = build_backbone(name, **options), build_backbone(name, **options, drop_path=0.6)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    assert type(dropping.net.blocks[0]) is type(plain.net.blocks[0])  # rate 0: as timm made it
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(2))

    def train_output(seed):
        torch.manual_seed(seed)
        return dropping.train()(images)[0].detach()

    assert torch.equal(train_output(0), train_output(0))
    assert not torch.equal(train_output(0), train_output(1))
    assert torch.equal(dropping.eval()(images)[0], plain.eval()(images)[0])
    copied = copy.deepcopy(dropping)
    torch.manual_seed(0)
    assert torch.equal(copied.train()(images)[0], train_output(0))


def test_both_branches_of_all_but_the_first_block_draw_their_own_rows():
    net = build_backbone("vit_tiny_patch16_224", image_size=32, timm_args=SMALL, drop_path=0.6).net
    kepts = draw(list(net.blocks), rows(64))
    assert kepts[0] is None
    drawn = [branch for kept in kepts[1:] for branch in kept or ()]
    assert [rate for block in net.blocks for rate in rates(block)] == pytest.approx(
        [0, 0, 0.3, 0.3, 0.6, 0.6]
    )
    assert len({tuple(branch.rows.tolist()) for branch in drawn}) == 4
    assert draw(list(net.eval().blocks), rows(64)) == [None] * 3


def test_blocks_that_are_not_known_keep_timms_drop_path():
    net = nn.Sequential(ParallelScalingBlock(16, 2, drop_path=0.5), Block(16, 2, drop_path=0.5))
    swin = build_backbone(
        "swin_tiny_patch4_window7_224",
        image_size=64,
        drop_path=0.5,
        timm_args={"depths": [1, 1, 1, 2], "embed_dim": 12, "num_heads": [1, 1, 2, 2], "window_size": 2},
    )
    skip_dropped_rows(net)
    assert type(net[0]) is ParallelScalingBlock
    assert [kept is None for kept in draw(list(net), rows(8))] == [True, False]
    assert any(isinstance(module, DropPath) and module.drop_prob == 0.5 for module in swin.modules())
    images = torch.randn(32, 3, 64, 64)
    outputs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        outputs.append(swin(images)[1])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_it_runs_in_half_precision_with_timms_types():
    """Under autocast a branch comes in bfloat16 and the tokens stay what x + branch makes of them."""
    block = make_block("plain", 0.5, torch.float32)
    ours = skipping(block)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(8, 5, 16, dtype=dtype)
        with torch.autocast("cpu", torch.bfloat16):
            assert ours(x, kept=draw_one(ours, rows(8))).dtype == block(x).dtype
