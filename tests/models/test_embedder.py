"""The embedder: one linear layer on the pooled feature, frozen batch statistics, its start."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from glsd.errors import UserError
from glsd.models.backbone import build_backbone
from glsd.models.embedder import Embedder

TINY: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224": {"depth": 2, "embed_dim": 48, "num_heads": 3},
    "resnet10t": {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)},
}
NAMES = list(TINY)


def embedder(name="resnet10t", *, embed_dim=16, pool="mean+max", seed=0, **options) -> Embedder:
    backbone = build_backbone(name, image_size=64, timm_args=TINY[name], pool=pool, seed=1)
    return Embedder(backbone, **{"embed_dim": embed_dim, "seed": seed, "freeze_batch_norm": False, **options})


def layer(net: Embedder) -> torch.nn.Linear:
    assert net.head is not None
    return net.head


def images(count=4, size=64) -> torch.Tensor:
    return 2 * torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size)) + 1


@pytest.mark.parametrize("name", NAMES)
def test_embedding_is_a_linear_function_of_the_pooled_feature(name):
    net = embedder(name).eval()
    assert (net.embed_dim, net.stride) == (16, net.backbone.stride)
    features, _ = net.backbone(images())
    embeddings = net(images())
    torch.testing.assert_close(embeddings, features @ layer(net).weight.T + layer(net).bias)
    assert not torch.allclose(embeddings.norm(dim=1), torch.ones(4), atol=0.01)  # raw


@pytest.mark.parametrize("name", NAMES)
def test_width_0_is_the_pooled_feature(name):
    net = embedder(name, embed_dim=0).eval()
    assert torch.equal(net(images()), net.backbone(images())[0])
    assert net.embed_dim == net.backbone.embed_dim
    assert [key for key, _ in net.named_parameters() if not key.startswith("backbone.")] == []


def test_layer_starts_from_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = layer(embedder(seed=5))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again, other = layer(embedder(seed=5)), layer(embedder(seed=6))
    assert torch.equal(first.weight, again.weight)
    assert torch.equal(first.bias, again.bias)
    assert not torch.equal(first.weight, other.weight)


def test_layer_starts_uniform_within_one_over_root_width():
    head = layer(embedder(embed_dim=512))
    bound = 64**-0.5
    for tensor in (head.weight, head.bias):
        assert tensor.abs().max() <= bound
        assert tensor.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert abs(tensor.mean().item()) < 0.1 * bound


@pytest.mark.parametrize("freeze", [False, True])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("pool", ["cls", "mean", "mean+max"])
def test_every_parameter_learns_and_says_where_it_belongs(name, pool, freeze):
    """Frozen statistics leave the weights of batch normalization free; a silent parameter would stall DDP."""
    net = embedder(name, pool=pool, freeze_batch_norm=freeze).train()
    net(images()).square().sum().backward()
    assert [key for key, p in net.named_parameters() if p.grad is None or not p.requires_grad] == []
    assert {key.split(".")[0] for key, _ in net.named_parameters()} == {"backbone", "head"}
    if name == "resnet10t":
        assert net.backbone.net.bn1.weight.grad.abs().sum() > 0


def statistics(net: Embedder) -> dict[str, torch.Tensor]:
    found = {
        key: buffer.clone() for key, buffer in net.named_buffers() if "running" in key or "tracked" in key
    }
    assert len(found) >= 30
    return found


def test_frozen_batch_norm_keeps_its_statistics_in_training():
    net = embedder(freeze_batch_norm=True)
    assert net.training  # frozen from the start, without a call of train()
    before, expected = statistics(net), copy.deepcopy(net).eval()(images())
    for mode in (True, False, True):
        net.train(mode)
        assert net.training == net.backbone.training == layer(net).training == mode
        embeddings = net(images())
        assert torch.equal(embeddings, expected)
        embeddings.sum().backward()
    after = statistics(net)
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_free_batch_norm_is_that_of_the_batch():
    net = embedder().train()
    before, in_training = statistics(net), net(images())
    after = statistics(net)
    assert all(not torch.equal(before[key], after[key]) for key in before)
    assert not torch.allclose(in_training, net.eval()(images()), atol=1e-3)


def test_freezing_holds_in_a_copy_and_still_drops_paths():
    net = embedder(freeze_batch_norm=True)
    twin = copy.deepcopy(net).eval().train()
    assert torch.equal(twin(images()), net(images()))
    backbone = build_backbone("resnet10t", image_size=64, timm_args=TINY["resnet10t"], drop_path=0.9, seed=1)
    torch.nn.init.ones_(backbone.net.layer4[0].bn2.weight)
    dropping = Embedder(backbone, embed_dim=4, freeze_batch_norm=True, seed=0)
    many = images().repeat(4, 1, 1, 1)
    assert not torch.equal(dropping(many)[:4], dropping(many)[4:8])
    dropping.eval()
    torch.testing.assert_close(dropping(many)[:4], dropping(many)[4:8])


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_network_and_autocast(name):
    net = embedder(name).eval()
    wide = net(images())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = net(images())
    half = copy.deepcopy(net).bfloat16()(images().bfloat16())
    for embeddings in (mixed, half):
        assert F.cosine_similarity(embeddings.float(), wide).min() > 0.99
    assert net.double()(images().double()).dtype == torch.float64


def test_wrong_image_size_is_refused():
    with pytest.raises(UserError, match="image_size 80 is not a multiple of the patch size 32"):
        embedder()(images(1, 80))
