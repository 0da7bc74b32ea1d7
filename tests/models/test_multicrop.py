"""One network over all crops, against one crop at a time: order of rows, batch statistics, heads."""

from typing import Any

import pytest
import torch

from glsd.models.backbone import build_backbone
from glsd.models.heads import ProjectionHead
from glsd.models.multicrop import MultiCrop


def network(local: str = "own", batch_norm: bool = False, num_layers: int = 2) -> MultiCrop:
    backbone = build_backbone(
        "vit_tiny_patch16_224", image_size=64, timm_args={"depth": 2, "embed_dim": 48, "num_heads": 3}
    )
    options: dict[str, Any] = {
        "num_prototypes": 7,
        "hidden_dim": 16,
        "bottleneck_dim": 6,
        "num_layers": num_layers,
        "batch_norm": batch_norm,
        "trainable_gain": False,
    }
    global_head = ProjectionHead(48, **options, seed=1)
    heads = {"own": ProjectionHead(48, **options, seed=2), "shared": global_head, "none": None}
    return MultiCrop(backbone, global_head, heads[local]).double()


def crops(views: int, size: int) -> torch.Tensor:
    """Views of three images."""
    generator = torch.Generator().manual_seed(views * size)
    return torch.randn(views, 3, 3, size, size, dtype=torch.float64, generator=generator)


CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("local", ["own", "shared"])
@pytest.mark.parametrize("local_size", [32, 64])
def test_equals_one_crop_at_a_time(local, local_size):
    """The patches of a crop stay with it, whatever ran together."""
    net = network(local)
    global_crops, local_crops = crops(2, 64), crops(4, local_size)
    views = net(global_crops, local_crops)
    assert net.local_head is not None
    for view in range(6):
        resolution, number = (0, view) if view < 2 else (1, view - 2)
        for image in range(3):
            crop = (global_crops, local_crops)[resolution][number, image]
            cls, patches = net.backbone(crop[None])
            torch.testing.assert_close(views.cls[view, image], net.global_head(cls)[0], **CLOSE)
            torch.testing.assert_close(views.features[resolution][number, image], patches[0], **CLOSE)
            want = net.local_head(patches[0])
            torch.testing.assert_close(views.patches[resolution][number, image], want, **CLOSE)
    assert torch.equal(views.cls_prototypes, net.global_head.prototypes.weight())
    assert torch.equal(views.patch_prototypes, net.local_head.prototypes.weight())


def test_batch_norm_sees_the_rows_of_all_views_at_once():
    net = network(batch_norm=True)
    global_crops, local_crops = crops(2, 64), crops(4, 32)
    views = net(global_crops, local_crops)
    assert net.local_head is not None
    rows = torch.cat([net.backbone(c.flatten(0, 1))[1].flatten(0, 1) for c in (global_crops, local_crops)])
    expected = net.local_head(rows)
    torch.testing.assert_close(views.patches[0].flatten(0, 2), expected[: 6 * 16], **CLOSE)
    torch.testing.assert_close(views.patches[1].flatten(0, 2), expected[6 * 16 :], **CLOSE)
    apart = net.local_head(rows[: 6 * 16])
    assert not torch.allclose(apart, expected[: 6 * 16])  # the statistics do differ
    counted = net.local_head.mlp[1].num_batches_tracked
    assert counted == 3  # one call for the views, two for this test


@pytest.mark.parametrize("local_crops", [None, torch.zeros(0, 3, 3, 32, 32, dtype=torch.float64)])
def test_no_local_crops(local_crops):
    views = network()(crops(2, 64), local_crops)
    assert views.cls.shape == (2, 3, 6)
    assert [patches.shape for patches in views.patches] == [(2, 3, 16, 6)]
    assert [features.shape for features in views.features] == [(2, 3, 16, 48)]


def test_no_local_head():
    views = network("none")(crops(2, 64), crops(1, 32))
    assert views.cls.shape == (3, 3, 6)
    assert views.patches == []
    assert views.patch_prototypes is None
    assert [features.shape for features in views.features] == [(2, 3, 16, 48), (1, 3, 4, 48)]


def test_shared_head_has_its_weights_once():
    shared, own = network("shared"), network("own")
    assert shared.local_head is shared.global_head
    assert own.local_head is not None
    counts = [sum(p.numel() for p in net.parameters()) for net in (shared, own, own.local_head)]
    assert counts[0] == counts[1] - counts[2]  # so the optimizer sees them once
    assert not any(name.startswith("local_head") for name, _ in shared.named_parameters())
    assert any(name.startswith("local_head.") for name, _ in own.named_parameters())


def test_gradients_reach_every_parameter_but_the_prototypes():
    net = network()
    views = net(crops(2, 64), crops(2, 32))
    for part in (views.cls, *views.patches):
        weights = torch.randn(part.shape, dtype=part.dtype, generator=torch.Generator().manual_seed(0))
        (part * weights).sum().backward(retain_graph=True)
    lacking = [name for name, p in net.named_parameters() if p.grad is None]
    assert sorted({name.split(".")[1] for name in lacking}) == ["prototypes"]
