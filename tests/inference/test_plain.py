"""model.timm: a plain timm module that says of images what ours says, and knows what its images need."""

import math

import pytest
import timm
import torch

from glsd.data.photometric import MEAN, STD
from glsd.errors import UserError
from glsd.inference.plain import crop_share, plain_form
from tests.helpers.exports import KINDS, small_model
from tests.helpers.small_shards import scene

TIMM_POOLS = {"cls": "token", "mean": "avg", "mean+max": "avgmax"}


@pytest.mark.parametrize("embed_dim", [None, 0, 6])
@pytest.mark.parametrize("pool", ["cls", "mean", "mean+max"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_vectors_are_ours(kind, pool, embed_dim):
    model = small_model(kind, pool=pool, embed_dim=embed_dim)
    net = model.timm
    images = torch.randn(3, 3, *2 * [KINDS[kind].size])
    expected = model.features(images)
    torch.testing.assert_close(net(images), expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert type(net).__module__.startswith("timm.")
    assert not net.training
    has_class_token = kind not in ("swin", "resnet")
    assert net.global_pool == TIMM_POOLS[pool] if has_class_token else "avg"
    assert net.num_classes == (model.width if embed_dim or pool == "mean+max" else 0)


@torch.no_grad()
def test_the_form_is_a_copy():
    model = small_model("vit", pool="mean", embed_dim=6)
    images = torch.randn(2, 3, 32, 32)
    before = model.features(images)
    for parameter in model.timm.parameters():
        parameter.zero_()
    assert torch.equal(model.features(images), before)


@pytest.mark.parametrize("sizes", [(37, 32), (32, 32), (50, 32)])
def test_timm_prepares_images_as_we_do(sizes):
    """Within the rounding of Pillow's resize against torch's: two levels of 255."""
    model = small_model("vit", pool="cls", embed_dim=None, resize=sizes[0])
    net = model.timm
    transform = timm.data.create_transform(**timm.data.resolve_data_config({}, model=net))
    for seed, width, height in ((0, 90, 60), (1, 41, 77), (2, 20, 30)):
        picture = scene(seed, width, height)
        difference = (transform(picture) - model.transform(picture)) * torch.tensor(STD)[:, None, None]
        assert difference.abs().max() <= 2.001 / 255
    cfg = net.pretrained_cfg
    assert (cfg["mean"], cfg["std"], cfg["input_size"]) == (MEAN, STD, (3, 32, 32))
    assert not {"url", "hf_hub_id", "tag", "file", "source", "origin_url"} & {k for k, v in cfg.items() if v}


def test_the_share_of_the_crop_is_exact():
    """timm resizes to the floor of a quotient of floats: 1 pixel less would be another image."""
    for crop in range(1, 700):
        for resize in {crop, crop + 1, round(crop * 256 / 224), crop * 2 - 1, crop + 37}:
            assert math.floor(crop / crop_share(crop, resize)) == resize


@torch.no_grad()
def test_timm_saves_it_right_by_itself(tmp_path):
    """What was silently wrong: mean and deviation 0.5, another pooling, a second norm."""
    model = small_model("registers", pool="mean", embed_dim=6)
    timm.models.save_for_hf(model.timm, str(tmp_path / "x"), safe_serialization=True)
    net = timm.create_model(f"local-dir:{tmp_path / 'x'}", pretrained=True).eval()
    images = torch.randn(3, 3, 42, 42)
    assert torch.equal(net(images), model.timm(images))
    assert tuple(net.pretrained_cfg["mean"]) == MEAN


@torch.no_grad()
def test_other_sizes_are_refused_or_ours():
    images = torch.randn(2, 3, 64, 80)
    with pytest.raises(AssertionError, match="doesn't match model"):
        small_model("vit", pool="cls", embed_dim=None).timm(images)
    for kind in ("dinov3", "resnet"):
        model = small_model(kind, pool="mean", embed_dim=None)
        larger = torch.randn(2, 3, 64, 96)
        torch.testing.assert_close(model.timm(larger), model.features(larger), rtol=0, atol=1e-5)


@torch.no_grad()
def test_a_norm_behind_the_pooling_moves_before_it():
    model = small_model("vit", pool="mean", embed_dim=None, fc_norm=True)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.timm(images), model.features(images))
    two = small_model("dinov3", pool="mean", embed_dim=None, use_fc_norm=True, use_post_transformer_norm=True)
    with pytest.raises(UserError, match="a norm before and one after the pooling"):
        two.timm  # noqa: B018


@torch.no_grad()
def test_a_form_that_differs_is_refused():
    """A network changed behind timm's back, as a subclass or a hook would."""
    model = small_model("vit", pool="cls", embed_dim=None)
    model.backbone.net.blocks[0].register_forward_hook(lambda _, given, result: 2 * result)
    with pytest.raises(UserError, match="timm cannot express this network"):
        plain_form(model.network, model.transform)
    next(model.network.parameters()).fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        plain_form(model.network, model.transform)
