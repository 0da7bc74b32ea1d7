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
    }
    global_head = ProjectionHead(48, **options, seed=1)
    heads = {"own": ProjectionHead(48, **options, seed=2), "shared": global_head, "none": None}
    return MultiCrop(backbone, global_head, heads[local]).double()


def crops(rows: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rows * size)
    return torch.randn(rows, 3, size, size, dtype=torch.float64, generator=generator)


CLOSE: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-10}


@pytest.mark.parametrize("local", ["own", "shared"])
@pytest.mark.parametrize("local_size", [32, 64])
def test_equals_one_crop_at_a_time(local, local_size):
    """Rows are view-major and the patches of a crop stay with it, whatever ran together."""
    net = network(local)
    global_crops, local_crops = crops(2 * 3, 64), crops(4 * 3, local_size)
    views = net(global_crops, local_crops, num_images=3)
    assert net.local_head is not None
    for row in range(18):
        crop = global_crops[row] if row < 6 else local_crops[row - 6]
        cls, patches = net.backbone(crop[None])
        own_patches = views.global_patches if row < 6 else views.local_patches
        own_features = views.global_features if row < 6 else views.local_features
        at = row if row < 6 else row - 6
        torch.testing.assert_close(views.cls[row], net.global_head(cls)[0], **CLOSE)
        torch.testing.assert_close(own_features[at], patches[0], **CLOSE)
        torch.testing.assert_close(own_patches[at], net.local_head(patches[0]), **CLOSE)


def test_batch_norm_sees_the_rows_of_all_views_at_once():
    net = network(batch_norm=True)
    global_crops, local_crops = crops(6, 64), crops(12, 32)
    views = net(global_crops, local_crops, num_images=3)
    assert net.local_head is not None
    rows = torch.cat([net.backbone(c)[1].flatten(0, 1) for c in (global_crops, local_crops)])
    expected = net.local_head(rows)
    torch.testing.assert_close(views.global_patches.flatten(0, 1), expected[: 6 * 16], **CLOSE)
    torch.testing.assert_close(views.local_patches.flatten(0, 1), expected[6 * 16 :], **CLOSE)
    apart = net.local_head(rows[: 6 * 16])
    assert not torch.allclose(apart, expected[: 6 * 16])  # the statistics do differ
    counted = net.local_head.mlp[1].num_batches_tracked
    assert counted == 3  # one call for the views, two for this test


@pytest.mark.parametrize("local_crops", [None, torch.zeros(0, 3, 32, 32, dtype=torch.float64)])
def test_no_local_crops(local_crops):
    views = network()(crops(6, 64), local_crops, num_images=3)
    assert views.cls.shape == (6, 6)
    assert views.global_patches.shape == (6, 16, 6)
    assert views.local_patches is None
    assert views.local_features is None


def test_no_local_head():
    views = network("none")(crops(6, 64), crops(3, 32), num_images=3)
    assert views.cls.shape == (9, 6)
    assert views.global_patches is None
    assert views.local_patches is None
    assert views.global_features.shape == (6, 16, 48)
    assert views.local_features.shape == (3, 4, 48)


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
    views = net(crops(6, 64), crops(6, 32), num_images=3)
    for part in (views.cls, views.global_patches, views.local_patches):
        weights = torch.randn(part.shape, dtype=part.dtype, generator=torch.Generator().manual_seed(0))
        (part * weights).sum().backward(retain_graph=True)
    lacking = [name for name, p in net.named_parameters() if p.grad is None]
    assert sorted({name.split(".")[1] for name in lacking}) == ["prototypes"]


def test_rows_must_be_whole_views():
    with pytest.raises(ValueError, match="5 crop rows are not a multiple of 3"):
        network()(crops(6, 64), crops(5, 32), num_images=3)
