"""Backbones against timm's own forward at the native size, and at other sizes; the user's mistakes."""

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from glsd.errors import UserError
from glsd.geometry import patch_centers, patch_sides
from glsd.models import backbone as backbone_module
from glsd.models.backbone import build_backbone, check_crop, check_image_size
from glsd.models.tokens import POOLS

SMALL = {"depth": 2, "embed_dim": 48, "num_heads": 3}
SMALL_SWIN = {"depths": (1, 1, 1, 1), "embed_dim": 24, "num_heads": (1, 2, 2, 4)}
VITS = {  # name: (tokens before the patches, arguments)
    "vit_tiny_patch16_224": (1, SMALL),
    "vit_small_patch14_dinov2": (1, SMALL | {"patch_size": 16}),
    "vit_small_patch14_reg4_dinov2": (5, SMALL | {"patch_size": 16}),
    "deit3_small_patch16_224": (1, SMALL),
    "vit_small_patch16_dinov3": (5, SMALL),
    "eva02_tiny_patch14_224": (1, SMALL | {"patch_size": 16}),
    "vit_small_patch16_rope_mixed_224": (1, SMALL),
}
SWINS = ("swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256")
SMALL_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 16, 32, 64)}
RESNETS = {
    "resnet50": 256,
    "resnet18": 64,
    "resnet10t": 64,
    "seresnet50": 256,
    "resnetblur50": 256,
}  # name: d


@pytest.fixture(autouse=True)
def _hub_answers(monkeypatch):
    monkeypatch.setattr(backbone_module, "check_hub", lambda name: None)


def small(name: str, **options):
    args = VITS.get(name, (1, SMALL_RESNET if name in RESNETS else SMALL_SWIN if name in SWINS else SMALL))[1]
    return build_backbone(name, **{"image_size": 64, "timm_args": args, **options})


def images(size: int, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(size))


@pytest.mark.parametrize("name", VITS)
def test_vit_equals_timm_bitwise_at_the_native_size(name):
    num_prefix, _ = VITS[name]
    backbone = small(name)
    cls, patches = backbone(images(64))
    tokens = backbone.net.forward_features(images(64))
    assert torch.equal(cls, tokens[:, 0])
    assert torch.equal(patches, tokens[:, num_prefix:])
    assert patches.shape == (2, 16, 48)
    assert (backbone.embed_dim, backbone.stride) == (48, 16)


@pytest.mark.parametrize("name", SWINS)
def test_swin_gives_normalized_tokens_and_their_mean(name):
    backbone = small(name)
    assert backbone.stride == 32
    assert backbone.pool == "mean"
    for size, side in ((64, 2), (32, 1), (96, 3)):
        cls, patches = backbone(images(size))
        tokens = backbone.net.forward_features(images(size))
        assert torch.equal(patches, tokens.reshape(2, side * side, 192))
        torch.testing.assert_close(cls, patches.mean(dim=1))
    layer_norm = F.layer_norm(patches, (192,))  # the final norm starts as the plain one
    torch.testing.assert_close(patches, layer_norm, rtol=1e-3, atol=1e-3)


def timm_resnet(name: str, pool: str) -> torch.nn.Module:
    """The same network with timm's own pooling; the start of both is timm's, after the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return timm.create_model(name, num_classes=0, global_pool=pool, **SMALL_RESNET)


@pytest.mark.parametrize(("pool", "of_timm"), [("mean", "avg"), ("cls", "avg"), ("mean+max", "avgmax")])
@pytest.mark.parametrize("name", RESNETS)
def test_resnet_equals_timm(name, pool, of_timm):
    backbone = small(name, pool=pool, seed=3)
    net: Any = timm_resnet(name, of_timm)
    assert (backbone.embed_dim, backbone.stride) == (RESNETS[name], 32)
    assert backbone.pool == ("mean" if pool == "cls" else pool)
    for mode in (True, False):  # the running statistics of both move alike in between
        features, patches = backbone.train(mode)(images(96))
        grid = net.train(mode).forward_features(images(96))
        assert torch.equal(patches, grid.permute(0, 2, 3, 1).reshape(2, 9, RESNETS[name]))
        pooled = net.forward_head(grid)  # timm's avgmax is half of our sum
        torch.testing.assert_close(features, pooled * 2 if of_timm == "avgmax" else pooled)
        assert features.std() > 0.01


def test_resnet_takes_any_multiple_of_its_stride_and_other_strides():
    backbone = small("resnet50", image_size=64)
    for height, width in ((32, 32), (96, 64), (64, 160)):
        _, patches = backbone(torch.randn(2, 3, height, width))
        assert patches.shape == (2, height * width // 32**2, 256)
    dense = small("resnet50", image_size=72, timm_args=SMALL_RESNET | {"output_stride": 8})
    assert dense.stride == 8
    assert dense(images(72))[1].shape == (2, 81, 256)


def test_resnet_has_stochastic_depth():
    backbone = small("resnet18", drop_path=0.3)
    rates = [
        getattr(block.drop_path, "drop_prob", 0.0)
        for block in [backbone.net.layer4[0], backbone.net.layer1[0]]
    ]
    assert rates == pytest.approx([0.3, 0.0])


@pytest.mark.parametrize("pool", ["mean", "mean+max"])
@pytest.mark.parametrize("name", ["vit_small_patch14_reg4_dinov2", SWINS[0], "resnet18"])
def test_pools_are_of_the_patches_alone(name, pool):
    image_features, patches = small(name, pool=pool)(images(64))
    expected = torch.stack([row.sum(0) / len(row) for row in patches])
    if pool == "mean+max":
        expected = expected + torch.stack([row.max(0).values for row in patches])
    torch.testing.assert_close(image_features, expected)


def test_gradient_of_mean_plus_max():
    patches = torch.tensor([[[1.0], [5.0], [2.0], [0.0]]], dtype=torch.float64, requires_grad=True)
    POOLS["mean+max"](patches[:, :0], patches).sum().backward()
    assert patches.grad is not None
    assert patches.grad.flatten().tolist() == [0.25, 1.25, 0.25, 0.25]


@pytest.mark.slow
def test_swin_tiny_has_the_grids_of_the_paper():
    backbone = build_backbone("swin_tiny_patch4_window7_224", image_size=224)
    assert backbone(images(224, 1))[1].shape == (1, 49, 768)
    assert backbone(images(96, 1))[1].shape == (1, 9, 768)


def test_vit_at_another_size_uses_positions_without_antialiasing():
    backbone = small("vit_tiny_patch16_224", image_size=224)
    net = backbone.net
    with torch.no_grad():
        net.pos_embed.normal_(generator=torch.Generator().manual_seed(0))
    cls, patches = backbone(images(96))
    grid = net.pos_embed[:, 1:].reshape(1, 14, 14, 48).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=(6, 6), mode="bicubic", align_corners=False, antialias=False)
    places = torch.cat([net.pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    tokens = net.patch_embed.proj(images(96)).flatten(2).transpose(1, 2)
    tokens = torch.cat([net.cls_token.expand(2, -1, -1), tokens], dim=1) + places
    expected = net.norm(net.blocks(tokens))
    torch.testing.assert_close(patches, expected[:, 1:], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cls, expected[:, 0], rtol=1e-4, atol=1e-5)
    antialiased = net.forward_features(images(96))
    assert (patches - antialiased[:, 1:]).abs().max() > 0.01  # timm's way is really another one


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_oblong_images_are_taken(name):
    _, patches = small(name)(torch.randn(1, 3, 32, 96))
    assert patches.shape == (1, 12, 48)


def test_patches_are_row_major():
    backbone = small("vit_tiny_patch16_224")
    backbone.net.blocks = torch.nn.Sequential()  # no token hears of another
    with torch.no_grad():
        backbone.net.pos_embed.zero_()
    plain = torch.zeros(1, 3, 64, 64)
    marked = plain.clone()
    marked[:, :, 16:32, 48:64] = 1  # row 1, column 3
    moved = (backbone(marked)[1] - backbone(plain)[1]).abs().sum(-1)[0] > 1e-6
    assert moved.nonzero().flatten().tolist() == [1 * 4 + 3]


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_small_patch16_dinov3"]
)
def test_mean_pool_is_over_patches_only(name):
    backbone = small(name, pool="mean")
    cls, patches = backbone(images(64))
    torch.testing.assert_close(cls, patches.mean(dim=1))
    assert not torch.allclose(cls, backbone.net.forward_features(images(64)).mean(dim=1))


@pytest.mark.parametrize("pool", ["cls", "mean", "mean+max"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", SWINS[0], "resnet50"])
def test_every_parameter_gets_a_gradient(name, pool):
    """DDP waits for gradients that never come otherwise."""
    backbone = small(name, pool=pool)
    cls, patches = backbone(images(32))
    (cls.square().sum() + patches.square().sum()).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


def test_start_is_a_function_of_the_seed_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = small("vit_tiny_patch16_224", seed=1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(99)
    again = small("vit_tiny_patch16_224", seed=1, drop_path=0.3).state_dict()
    other = small("vit_tiny_patch16_224", seed=2).state_dict()
    assert first.keys() == again.keys()  # stochastic depth has no weights: the teacher can copy the student's
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["net.cls_token"], other["net.cls_token"])


def test_drop_path_rises_linearly_and_only_acts_in_training():
    backbone = small("vit_tiny_patch16_224", timm_args=SMALL | {"depth": 5}, drop_path=0.2)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in backbone.net.blocks]
    assert rates == pytest.approx([0, 0.05, 0.1, 0.15, 0.2])
    teacher = small("vit_tiny_patch16_224", timm_args=SMALL | {"depth": 5})
    teacher.load_state_dict(backbone.state_dict())
    many = images(64).repeat(16, 1, 1, 1)
    assert not torch.equal(backbone(many)[0], teacher(many)[0])
    assert torch.equal(backbone.eval()(many)[0], teacher(many)[0])  # the teacher has none, even in train mode


@pytest.mark.parametrize("pool", ["mean", "mean+max"])
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "resnet18"])
def test_pooling_is_in_float32(name, pool):
    backbone = small(name, pool=pool).bfloat16()
    cls, patches = backbone(images(64).bfloat16())
    assert patches.dtype == torch.bfloat16
    assert cls.dtype == torch.float32
    expected = patches.float().mean(dim=1)
    torch.testing.assert_close(
        cls, expected + patches.float().amax(dim=1) if pool == "mean+max" else expected
    )


def test_pooling_keeps_float64():
    assert POOLS["mean+max"](torch.zeros(1, 0, 2), torch.rand(1, 3, 2).double()).dtype == torch.float64


# Name: arguments, and the sides of a patch after the last stage.
OBLONG: dict[str, tuple[dict[str, Any], tuple[int, int]]] = {
    "vit_tiny_patch16_224": (SMALL | {"patch_size": [8, 16]}, (8, 16)),
    "vit_small_patch14_reg4_dinov2": (SMALL | {"patch_size": [32, 16]}, (32, 16)),
    "vit_small_patch16_dinov3": (SMALL | {"patch_size": [16, 8]}, (16, 8)),
    "eva02_tiny_patch14_224": (SMALL | {"patch_size": [16, 32]}, (16, 32)),
    SWINS[0]: (SMALL_SWIN | {"patch_size": [2, 4]}, (16, 32)),
    SWINS[1]: (SMALL_SWIN | {"patch_size": [4, 2]}, (32, 16)),
}


@pytest.mark.parametrize("name", OBLONG)
@pytest.mark.parametrize("size", [64, 96, 32])
def test_oblong_patches_have_centers_where_the_network_looks(name, size):
    """The gradient of a patch feature without its neighbors' help comes from the pixels around its center."""
    args, sides = OBLONG[name]
    backbone = small(name, timm_args=args)
    assert backbone.stride == sides
    picture = images(size, 1).requires_grad_()
    patches = backbone(picture)[1]
    centers = patch_centers(torch.tensor([[0.0, 0.0, size, size]]), size, backbone.stride)[0]
    assert patches.shape[1] == len(centers) == (size // sides[0]) * (size // sides[1])
    if name in SWINS:
        return  # its windows mix patches in every block
    backbone.net.blocks = torch.nn.Sequential()  # no token hears of another
    picture = images(size, 1).requires_grad_()
    features = torch.nn.Identity()(backbone.net.patch_embed(picture)).flatten(1, 2)
    for number in (0, 1, len(centers) // 2, len(centers) - 1):
        (gradient,) = torch.autograd.grad(features[0, number].sum(), picture, retain_graph=True)
        rows, columns = gradient[0].abs().sum(0).nonzero().float().unbind(1)
        assert [columns.mean().item(), rows.mean().item()] == pytest.approx(centers[number].tolist())


def test_a_grid_that_is_not_the_strides_is_refused_before_a_step(monkeypatch):
    """Whatever timm may change: the network's own grid decides, at every size."""
    monkeypatch.setattr("glsd.models.backbone._stride", lambda net: 16)
    args = SMALL | {"patch_size": 8}
    with pytest.raises(
        UserError, match="makes 64 patches of an image of 64 x 64, where patches of 16 pixels would be 16"
    ):
        small("vit_tiny_patch16_224", timm_args=args)
    monkeypatch.setattr("glsd.models.backbone._stride", lambda net: (8, 16))
    with pytest.raises(
        UserError, match="where patches of 8 x 16 pixels would be 32: use another backbone or other timm"
    ):
        small("vit_tiny_patch16_224", timm_args=args)


def test_a_look_at_the_grid_changes_nothing():
    backbone = small("resnet18")
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    check_crop(backbone, 96)
    assert backbone.training
    assert all(module.training for module in backbone.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in backbone.state_dict().items())


def test_a_crop_must_be_a_multiple_of_both_sides():
    for size, fits in ((90, "use 48 or 96"), (10, "use 48")):
        with pytest.raises(
            UserError, match=f"image_size {size} is not a multiple of the patch size 16 x 12: {fits}"
        ):
            check_image_size(size, (16, 12))
    check_image_size(96, (16, 12))


@pytest.mark.parametrize("size", [32, 64])
def test_positions_of_an_oblong_grid_are_kept_and_resampled_as_such(size, tmp_path):
    """4 x 2 patches and a class token are 9 entries, which are no grid of 3 x 3."""
    args = SMALL | {"patch_size": [8, 16]}
    first = small("vit_tiny_patch16_224", timm_args=args, image_size=32, seed=5)
    torch.save(first.net.state_dict(), tmp_path / "w.pth")
    again = small("vit_tiny_patch16_224", timm_args=args, image_size=size, init=str(tmp_path / "w.pth"))
    assert again.load_report is not None
    assert again.load_report.complete
    found, own = again.net.pos_embed, first.net.pos_embed
    assert torch.equal(found[:, :1], own[:, :1])
    grid = own[:, 1:].unflatten(1, (4, 2)).permute(0, 3, 1, 2)
    wanted = F.interpolate(grid, size=(size // 8, size // 16), mode="bicubic", align_corners=False)
    torch.testing.assert_close(found[:, 1:], wanted.flatten(2).transpose(1, 2))


WRONG_ARGS = [
    ("vit_tiny_patch16_224", {"patch_size": [8]}),
    ("vit_tiny_patch16_224", {"patch_size": [8, 8, 8]}),
    ("vit_tiny_patch16_224", {"patch_size": "8 x 8"}),
    ("vit_tiny_patch16_224", {"patch_size": 0}),
    ("vit_tiny_patch16_224", {"patch_size": -8}),
    ("vit_tiny_patch16_224", {"patch_size": 4.5}),
    ("vit_tiny_patch16_224", {"depth": "three"}),
    ("vit_tiny_patch16_224", {"depth": 2.5}),
    ("vit_tiny_patch16_224", {"num_heads": 0}),
    ("vit_tiny_patch16_224", {"num_heads": [3]}),
    ("vit_tiny_patch16_224", {"num_heads": 5}),
    ("vit_tiny_patch16_224", {"embed_dim": -3}),
    ("vit_tiny_patch16_224", {"embed_dim": [48]}),
    ("vit_tiny_patch16_224", {"mlp_ratio": "wide"}),
    ("vit_tiny_patch16_224", {"act_layer": "no_such"}),
    ("vit_tiny_patch16_224", {"norm_layer": "no_such"}),
    ("vit_tiny_patch16_224", {"weight_init": "no_such"}),
    ("vit_tiny_patch16_224", {"reg_tokens": "four"}),
    ("vit_small_patch16_dinov3", {"num_heads": 5}),
    ("vit_small_patch16_dinov3", {"rope_type": "no_such"}),
    (SWINS[0], {"num_heads": [3]}),
    (SWINS[0], {"depths": [1, 1, 1, 1, 1]}),
    (SWINS[0], {"window_size": [7]}),
    (SWINS[0], {"window_size": 0}),
    (SWINS[1], {"num_heads": [3, 3]}),
    ("resnet18", {"layers": [1]}),
    ("resnet18", {"channels": [8, 16]}),
    ("resnet18", {"output_stride": 7}),
    ("resnet18", {"stem_type": 3}),
    ("resnet50", {"patch_size": 4}),
    ("resnet50", SMALL),
    ("tf_efficientnet_lite0", {"patch_size": 4}),
]


def test_the_settings_of_a_vit_are_all_named_that_a_resnet_does_not_take():
    with pytest.raises(
        UserError, match=r"'resnet50' \(ResNet\) takes no depth, embed_dim, num_heads: remove them$"
    ):
        small("resnet50", timm_args=SMALL)


@pytest.mark.parametrize(("name", "args"), WRONG_ARGS, ids=lambda value: str(value))
def test_whatever_timm_raises_is_one_line_with_the_argument_and_its_value(name, args):
    base = SMALL if name.startswith("vit") else SMALL_SWIN if name in SWINS else {}
    try:
        backbone = small(name, timm_args=base | args)
    except UserError as problem:
        said = str(problem)
        assert "\n" not in said
        assert "timm_args" in said
        assert all(f"{name!r}: {value!r}" in said for name, value in args.items())
    else:  # timm takes it: then the network works as it says
        size = 2 * max(patch_sides(backbone.stride))
        assert backbone(images(size))[1].isfinite().all()


@pytest.mark.parametrize(
    ("size", "message"),
    [(90, "use 80 or 96"), (10, "use 16"), (0, "use 16"), (-16, "use 16")],
)
def test_crop_size_must_be_a_multiple_of_the_patch(size, message):
    with pytest.raises(
        UserError, match=f"image_size {size} is not a multiple of the patch size 16: {message}"
    ):
        check_image_size(size, 16)
    check_image_size(96, 16)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch16_224", {}, "did you mean 'vit_small_patch16_224'"),
        ("resnest14d", {}, "family resnest"),
        (
            "resnet18",
            {"timm_args": SMALL_RESNET | {"layers": (1, 0, 1, 1)}},
            "a stage without blocks: give 4",
        ),
        ("resnet18", {"timm_args": {"layers": (1,), "channels": (8,)}, "drop_path": 0.1}, "cannot be built"),
        (
            "resnet18",
            {"timm_args": SMALL_RESNET | {"channels": (8, 16, 32, 64, 99)}},
            "a stage without blocks",
        ),
        ("resnet18", {"image_size": 80}, "image_size 80 .* use 64 or 96"),
        ("resnet18", {"timm_args": {"global_pool": "avg"}}, "follows from pool"),
        ("beit_base_patch16_224", {}, "family beit"),
        ("deit_tiny_distilled_patch16_224", {}, "cannot be built|not supported"),
        ("vit_base_patch16_siglip_224", {}, "no class token: set pool to 'mean'"),
        ("vit_tiny_patch16_224", {"pool": "mean_max"}, "one of cls, mean, mean.max; did you mean 'mean.max'"),
        ("vit_tiny_patch16_224", {"pool": "max"}, "unknown pool 'max'"),
        ("vit_tiny_patch16_224", {"drop_path": 1.0}, "^drop_path is 1.0"),
        (
            "vit_tiny_patch16_224",
            {"timm_args": {"depht": 3}},
            "'depht': 3.* takes no depht: remove it; did you mean 'depth'",
        ),
        (
            "vit_tiny_patch16_224",
            {"timm_args": {"depth": 0}},
            "timm_args .*'depth': 0.* set depth to 1 or more",
        ),
        ("vit_tiny_patch16_224", {"timm_args": {"img_size": 32}}, "follows from image_size"),
        *(
            ("vit_tiny_patch16_224", {"timm_args": {key: None}}, f"{key} cannot be set there: .* init")
            for key in (
                "pretrained",
                "pretrained_cfg",
                "pretrained_cfg_overlay",
                "checkpoint_path",
                "cache_dir",
            )
        ),
        (
            "vit_tiny_patch16_224",
            {"timm_args": {"norm_layer": {"class_path": "os.system"}}},
            "norm_layer is .*os.system",
        ),
        ("vit_tiny_patch16_224", {"timm_args": {"depth": [[1]]}}, r"depth is \[\[1\]\]: expected a number"),
        ("vit_tiny_patch16_224", {"image_size": 90}, "image_size 90 .* use 80 or 96"),
        (SWINS[0], {"image_size": 80}, "image_size 80 .* use 64 or 96"),
        ("vit_tiny_patch16_224.no_such_tag", {}, "no_such_tag"),
        ("vit_tiny_patch16_224", {"init": "nowhere/weights.pth"}, "'nowhere/weights.pth': no such file"),
    ],
)
def test_users_mistakes_are_one_line(name, options, message):
    with pytest.raises(UserError, match=message) as caught:
        small(name, **options)
    assert "\n" not in str(caught.value)


def test_image_of_a_wrong_size_is_refused_in_forward():
    for name in ("vit_tiny_patch16_224", SWINS[0], "resnet18"):
        with pytest.raises(UserError, match="image_size 72"):
            small(name)(images(72))


def test_no_pretrained_weights_is_one_line(monkeypatch):
    build = timm.create_model

    def offline(name, pretrained=False, **options):
        if pretrained:
            raise OSError("no\nconnection")
        return build(name, **options)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"init 'timm': .*\(no connection\).*weights file"):
        small("vit_small_patch16_224.dino", init="timm")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "vit_small_patch16_224",
            ["mean (0.5, 0.5, 0.5) and deviation (0.5, 0.5, 0.5)", "use vit_small_patch16_224.dino"],
        ),
        ("vit_small_patch16_224.augreg_in1k", ["(0.5, 0.5, 0.5)", "use vit_small_patch16_224.dino"]),
        ("vit_base_patch16_clip_224", ["0.48145466", "0.26862954", "use "]),
        ("vit_tiny_patch16_224", ["(0.5, 0.5, 0.5)", "another network, such as"]),
        ("vit_tiny_patch16_224.no_such_tag", ["no_such_tag", "after the dot"]),
    ],
)
def test_pretrained_weights_of_another_normalization_are_refused(name, words, monkeypatch):
    monkeypatch.setattr(timm, "create_model", lambda *args, **options: pytest.fail("too late"))
    with pytest.raises(UserError) as caught:
        small(name, init="timm")
    assert [word for word in words if word not in str(caught.value)] == []
    assert "\n" not in str(caught.value)


def test_pretrained_weights_of_another_size_are_resampled(monkeypatch):
    build = timm.create_model
    source = build("deit_tiny_patch16_224", img_size=224, num_classes=0, dynamic_img_size=True, **SMALL)
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **args: source if pretrained else build(name, **args),
    )
    backbone = small("deit_tiny_patch16_224", init="timm", image_size=96)
    assert backbone.load_report is not None
    assert backbone.load_report.matched == backbone.load_report.total == len(source.state_dict())
    ours, native = (
        backbone(images(96)),
        small("deit_tiny_patch16_224", init="timm", image_size=224)(images(96)),
    )
    torch.testing.assert_close(ours[1], native[1], rtol=1e-4, atol=1e-5)


def test_pretrained_resnet_weights_are_taken_without_their_classifier(monkeypatch):
    build = timm.create_model
    source = build("resnet18", num_classes=7, **SMALL_RESNET)
    monkeypatch.setattr(
        timm,
        "create_model",
        lambda name, pretrained=False, **args: source if pretrained else build(name, **args),
    )
    backbone = small("resnet18", init="timm")
    assert backbone.load_report is not None
    assert backbone.load_report.complete
    assert backbone.load_report.ignored == ("fc.weight", "fc.bias")
    grid = source.forward_features(images(64))
    assert torch.equal(backbone(images(64))[1], grid.flatten(2).transpose(1, 2))


def test_efficientnet_gives_the_map_before_its_pooling():
    backbone = build_backbone("tf_efficientnet_lite0", image_size=64, seed=3).eval()
    images = torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    pooled, patches = backbone(images)
    assert (backbone.embed_dim, backbone.stride, patches.shape) == (1280, 32, (2, 6, 1280))
    plain: Any = timm.create_model("tf_efficientnet_lite0", num_classes=0).eval()
    plain.load_state_dict(backbone.net.state_dict())
    torch.testing.assert_close(pooled, plain(images))
