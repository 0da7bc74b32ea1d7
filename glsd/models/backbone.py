"""timm backbones that return image and patch features at any crop size: ViT, Eva (DINOv3), Swin, CNNs."""

from typing import Any

import timm
import torch
from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models.eva import Eva
from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from glsd.errors import UserError, nearest, one_line, pick
from glsd.models.tokens import POOLS, TOKENS
from glsd.models.weights import LoadReport, load_weights, read_weights

# Arguments of timm.create_model that users must not set, and what decides them instead.
_RESERVED_ARGS = {
    "img_size": "image_size",
    "drop_path_rate": "drop_path",
    "global_pool": "pool",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        "init",
    ),
    **dict.fromkeys(
        ("num_classes", "in_chans", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"), "glsd itself"
    ),
    **dict.fromkeys(("patch_drop_rate", "features_only"), "nothing: every patch is needed"),
}

# Supported families (timm's modules), and the arguments that let each take crops of several sizes.
_ANY_SIZE: dict[str, dict[str, Any]] = {
    "vision_transformer": {"dynamic_img_size": True},
    "vision_transformer_hybrid": {"dynamic_img_size": True},
    "deit": {"dynamic_img_size": True},
    "eva": {"dynamic_img_size": True},
    "swin_transformer": {"strict_img_size": False},
    "swin_transformer_v2": {"strict_img_size": False},
    "resnet": {},
    "efficientnet": {},
}
_WITHOUT_NATIVE_SIZE = ("resnet", "efficientnet")


class Backbone(nn.Module):
    """A timm network that maps images to image and patch features, both after the final norm.

    Attributes: ``net`` is the timm network, ``embed_dim`` the width d, ``stride`` the side of a patch in pixels. ``pool``
    makes the image feature: "cls" is the class token, "mean" the mean of the patch features, "mean+max" adds their
    maximum. ``load_report`` says which of the given weights fitted; ``built_with`` holds timm's name of the network and the
    arguments of timm.create_model.
    """

    def __init__(self, net: nn.Module, *, pool: str):
        super().__init__()
        timm_net: Any = net
        self.net = timm_net
        self.pool = pool
        self.embed_dim: int = timm_net.num_features
        self.stride: int = timm_net.feature_info[-1]["reduction"]
        self.load_report: LoadReport | None = None
        self.built_with: tuple[str, dict[str, Any]] | None = None
        self._tokens = TOKENS[type(net)]

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Return image features and patch features, row-major; UserError if a side is not a multiple of the stride."""
        for side in images.shape[2:]:
            if side % self.stride:  # timm would drop or pad the rest silently
                check_image_size(side, self.stride)
        prefix, patches = self._tokens(self.net, images)
        return POOLS[self.pool](prefix, patches), patches


def build_backbone(
    backbone: str,
    *,
    image_size: int,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    pool: str = "cls",
    init: str = "random",
    timm_args: dict[str, Any] | None = None,
    seed: int = 0,
    allow_partial: bool | None = None,
) -> Backbone:
    """Return a backbone whose native resolution is ``image_size`` pixels; it takes other sizes as well.

    backbone: timm name of a VisionTransformer, Eva, Swin, ResNet or EfficientNet. drop_path: rate of stochastic depth in
    the last block, rising linearly from 0 at the first. checkpointing: keep only the input of each block, and recompute
    the block in the backward pass. pool: "cls", "mean" or "mean+max"; "cls" is the mean for Swin and CNNs, which have no
    class token. init: "random" (drawn from ``seed`` alone; the global random state stays untouched), "timm" (its
    pretrained weights, if they expect ImageNet's mean and deviation) or a weights file. timm_args: further arguments of
    timm.create_model, plain values or lists of them. allow_partial: accept a file that fits only partly; None = no, and
    the error does not offer it. Raises UserError for an unknown or unsupported network, a bad argument, a size that is
    not a multiple of the stride, or weights that do not fit.
    Source: DINO (arXiv 2104.14294), EsViT (arXiv 2106.09785) for Swin's mean token.
    """
    args = _checked_args(backbone, drop_path, pool, timm_args or {})
    if init == "timm":
        _check_normalization(backbone)
    native = {} if _family(backbone) in _WITHOUT_NATIVE_SIZE else {"img_size": image_size}
    with torch.random.fork_rng(devices=[]):  # built on the CPU: other devices draw nothing
        torch.default_generator.manual_seed(seed)
        net = _create(backbone, args | native | {"drop_path_rate": drop_path})
        pretrained = _create(backbone, args | {"pretrained": True}).state_dict() if init == "timm" else None
    has_token = getattr(net, "cls_token", None) is not None
    if isinstance(net, VisionTransformer | Eva) and pool == "cls" and not has_token:
        raise UserError(f"backbone {backbone!r} has no class token: set pool to 'mean'")
    if checkpointing:
        timm_net: Any = net
        timm_net.set_grad_checkpointing(True)
    built = Backbone(net, pool="mean" if pool == "cls" and not has_token else pool)
    built.built_with = backbone, args | native
    check_image_size(image_size, built.stride)
    if init != "random":
        state = read_weights(init) if pretrained is None else pretrained
        built.load_report = load_weights(built.net, state, source=init, allow_partial=allow_partial)
    return built


def check_image_size(image_size: int, stride: int) -> None:
    """Raise UserError, with the nearest good sizes, unless ``image_size`` is a positive multiple of ``stride``."""
    if image_size > 0 and image_size % stride == 0:
        return
    below = image_size // stride * stride
    fits = f"{below} or {below + stride}" if below > 0 else f"{stride}"
    raise UserError(f"image_size {image_size} is not a multiple of the patch size {stride}: use {fits}")


def _checked_args(backbone: str, drop_path: float, pool: str, timm_args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm.create_model; UserError for what a user may have got wrong."""
    if not timm.is_model(backbone):
        hint = nearest(backbone, timm.list_models())
        raise UserError(f"unknown backbone {backbone!r}: expected the name of a timm ViT, Swin or CNN{hint}")
    family = _family(backbone)
    if family not in _ANY_SIZE:
        raise UserError(
            f"backbone {backbone!r} is of timm's family {family}, which is not supported:"
            f" choose one of {', '.join(_ANY_SIZE)}"
        )
    pick(POOLS, pool, "pool")
    if not 0 <= drop_path < 1:
        raise UserError(f"drop_path is {drop_path}: expected at least 0 and below 1")
    for key, value in timm_args.items():
        if key in _RESERVED_ARGS:
            raise UserError(f"timm_args: {key} cannot be set there: it follows from {_RESERVED_ARGS[key]}")
        if not _is_plain(value):
            raise UserError(f"timm_args: {key} is {value!r}: expected a number, a word or a list of them")
    return {**timm_args, "num_classes": 0, "global_pool": "", **_ANY_SIZE[family]}


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a scalar or a list of scalars, from which timm cannot build an object."""
    items = value if isinstance(value, list | tuple) else [value]
    return all(item is None or isinstance(item, bool | int | float | str) for item in items)


def _check_normalization(backbone: str) -> None:
    """Raise UserError for timm weights that expect another normalization than ImageNet's, which all images here have."""
    expected = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    try:
        known = timm.get_pretrained_cfg(backbone)
    except RuntimeError as error:
        raise UserError(f"backbone {backbone!r}: {one_line(error)}: check the part after the dot") from error
    if known is None or (tuple(known.mean), tuple(known.std)) == expected:
        return
    others = {
        tag: timm.get_pretrained_cfg(tag)
        for tag in timm.list_models(f"{backbone.split('.')[0]}.*", pretrained=True)
    }
    good = [
        tag for tag, other in others.items() if other and (tuple(other.mean), tuple(other.std)) == expected
    ]
    raise UserError(
        f"backbone {backbone!r}: its timm weights expect images of mean {tuple(known.mean)} and deviation "
        f"{tuple(known.std)}, but images here have ImageNet's {expected[0]} and {expected[1]}: "
        f"use {' or '.join(good[:3]) or 'another network, such as vit_small_patch16_224.dino'}"
    )


def _family(backbone: str) -> str:
    return timm.models.model_entrypoint(backbone).__module__.removeprefix("timm.models.")


def _create(backbone: str, args: dict[str, Any]) -> nn.Module:
    """Call timm.create_model; a user's mistake becomes one line."""
    pretrained = args.get("pretrained", False)
    try:
        net = timm.create_model(backbone, **args)
    except (TypeError, AssertionError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"backbone {backbone!r} cannot be built: {one_line(error)} (check timm_args)"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise UserError(f"backbone {backbone!r} cannot be built: {one_line(error)}") from error
        raise UserError(
            f"init 'timm': no pretrained weights for {backbone!r} ({one_line(error)}): check the name and the"
            " connection, or give a weights file"
        ) from error
    if type(net) not in TOKENS:  # the exact class: a subclass may handle tokens differently
        raise UserError(
            f"backbone {backbone!r} is a {type(net).__name__}, which is not supported:"
            " choose a plain ViT, Eva (DINOv3), Swin, ResNet or EfficientNet"
        )
    if not net.feature_info:
        raise UserError(f"backbone {backbone!r} has no blocks: set depth in timm_args to 1 or more")
    stages = [len(getattr(net, f"layer{i}", ())) for i in range(1, 5)] if isinstance(net, ResNet) else [1]
    if 0 in stages or (isinstance(net, ResNet) and net.feature_info[-1]["num_chs"] != net.num_features):
        raise UserError(
            f"backbone {backbone!r} has a stage without blocks: give 4 numbers of 1 or more in"
            " layers of timm_args (and 4 in channels)"
        )
    return net
