"""timm backbones that return image and patch features at any crop size: ViT, Eva (DINOv3), Swin, CNNs."""

import difflib
import inspect
import math
import re
import sys
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
from glsd.geometry import Stride, patch_sides
from glsd.models.hub import check_hub
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

    Attributes: ``net`` is the timm network, ``embed_dim`` the width d, ``stride`` the side of a patch in pixels, or its
    height and width where they differ. ``pool`` makes the image feature: "cls" is the class token, "mean" the mean of the
    patch features, "mean+max" adds their maximum. ``load_report`` says which of the given weights fitted; ``built_with``
    holds timm's name of the network and the arguments of timm.create_model.
    """

    def __init__(self, net: nn.Module, *, pool: str):
        super().__init__()
        timm_net: Any = net
        self.net = timm_net
        self.pool = pool
        self.embed_dim: int = timm_net.num_features
        self.stride = _stride(timm_net)
        self.load_report: LoadReport | None = None
        self.built_with: tuple[str, dict[str, Any]] | None = None
        self._tokens = TOKENS[type(net)]

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Return image features and patch features, row-major.

        Raises UserError if a side is not a multiple of the stride, and if the network has another grid than its stride says.
        """
        prefix, patches = self.tokens(images)
        return POOLS[self.pool](prefix, patches), patches

    def pooled(self, images: Float[Tensor, "b 3 h w"]) -> dict[str, Float[Tensor, "b d"]]:
        """Return the image feature by each pooling that fits this network: "cls" if it has a class token, and "mean"."""
        prefix, patches = self.tokens(images)
        has_token = getattr(self.net, "cls_token", None) is not None
        return {pool: POOLS[pool](prefix, patches) for pool in (("cls", "mean") if has_token else ("mean",))}

    def tokens(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b p d"], Float[Tensor, "b n d"]]:
        """Return prefix tokens (the class token first) and patch features. Raises UserError as ``forward``."""
        expected = 1
        for side, patch in zip(images.shape[2:], patch_sides(self.stride), strict=True):
            if side % patch:  # timm would drop or pad the rest silently
                check_image_size(side, patch)
            expected *= side // patch
        prefix, patches = self._tokens(self.net, images)
        if patches.shape[1] != expected:  # places of patches would be wrong
            height, width = images.shape[2:]
            raise UserError(
                f"backbone: this {type(self.net).__name__} makes {patches.shape[1]} patches of an image of {height} x {width}, "
                f"where patches of {_by(self.stride)} pixels would be {expected}: use another backbone or other timm_args"
            )
        return prefix, patches


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
    timm_args = timm_args or {}
    args = _checked_args(backbone, drop_path, pool, timm_args)
    if init == "timm":
        _check_normalization(backbone)
        check_hub(backbone)
    native = {} if _family(backbone) in _WITHOUT_NATIVE_SIZE else {"img_size": image_size}
    with torch.random.fork_rng(devices=[]):  # built on the CPU: other devices draw nothing
        torch.default_generator.manual_seed(seed)
        net = _create(backbone, args | native | {"drop_path_rate": drop_path}, timm_args)
        pretrained = (
            _create(backbone, args | {"pretrained": True}, timm_args).state_dict() if init == "timm" else None
        )
    has_token = getattr(net, "cls_token", None) is not None
    if isinstance(net, VisionTransformer | Eva) and pool == "cls" and not has_token:
        raise UserError(f"backbone {backbone!r} has no class token: set pool to 'mean'")
    if checkpointing:
        timm_net: Any = net
        timm_net.set_grad_checkpointing(True)
    try:
        built = Backbone(net, pool="mean" if pool == "cls" and not has_token else pool)
        built.built_with = backbone, args | native
        check_crop(built, image_size)
    except Exception as error:  # timm raises whatever its layers do
        if isinstance(error, UserError) or not timm_args:
            raise
        raise _unbuildable(backbone, timm_args, error) from error
    if init != "random":
        state = read_weights(init) if pretrained is None else pretrained
        built.load_report = load_weights(built.net, state, source=init, allow_partial=allow_partial)
    return built


def check_crop(backbone: Backbone, image_size: int) -> None:
    """Raise UserError unless crops of ``image_size`` pixels fit, and have the grid of patches that the stride says.

    The network itself is asked, by one image without gradients; nothing in it changes.
    """
    check_image_size(image_size, backbone.stride)
    was_training, device = backbone.training, next(backbone.parameters()).device
    with torch.no_grad():
        backbone.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
    backbone.train(was_training)


def check_image_size(image_size: int, stride: Stride) -> None:
    """Raise UserError, with the nearest good sizes, unless ``image_size`` is a positive multiple of both sides of a patch."""
    unit = math.lcm(*patch_sides(stride))
    if image_size > 0 and image_size % unit == 0:
        return
    below = image_size // unit * unit
    fits = f"{below} or {below + unit}" if below > 0 else f"{unit}"
    raise UserError(f"image_size {image_size} is not a multiple of the patch size {_by(stride)}: use {fits}")


def _by(stride: Stride) -> str:
    return " x ".join(map(str, stride)) if isinstance(stride, tuple) else str(stride)


def _stride(net: Any) -> Stride:
    """Return the side of a patch after the last stage; timm's own number is the larger one of two different sides."""
    last = net.feature_info[-1]["reduction"]
    first = net.patch_embed.feat_ratio(as_scalar=False) if hasattr(net, "patch_embed") else (last, last)
    height, width = (side * (last // max(first)) for side in first)  # Swin merges patches in between
    return height if height == width else (height, width)


def _checked_args(backbone: str, drop_path: float, pool: str, timm_args: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of timm.create_model; UserError for what a user may have got wrong."""
    if not timm.is_model(backbone):
        plain = backbone.partition(":")[2].rpartition("/")[2]
        hint = (
            f"; write {plain!r}, without a prefix"
            if timm.is_model(plain)
            else nearest(backbone, timm.list_models())
        )
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


def _create(backbone: str, args: dict[str, Any], timm_args: dict[str, Any]) -> nn.Module:
    """Call timm.create_model; a user's mistake becomes one line. timm_args: those of ``args`` that the user gave."""
    try:
        net = timm.create_model(backbone, **args)
    except Exception as error:  # timm raises whatever its layers do
        if not isinstance(error, OSError | RuntimeError) or not args.get("pretrained", False):
            raise _unbuildable(backbone, timm_args, error) from error
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
        raise UserError(f"timm_args {timm_args}: backbone {backbone!r} has no blocks: set depth to 1 or more")
    stages = [len(getattr(net, f"layer{i}", ())) for i in range(1, 5)] if isinstance(net, ResNet) else [1]
    if 0 in stages or (isinstance(net, ResNet) and net.feature_info[-1]["num_chs"] != net.num_features):
        raise UserError(
            f"timm_args {timm_args}: backbone {backbone!r} has a stage without blocks: give 4 numbers of 1 or more in"
            " layers (and 4 in channels)"
        )
    return net


def _unbuildable(backbone: str, timm_args: dict[str, Any], error: Exception) -> UserError:
    """Return what a user reads where timm cannot build a network, or where it does not take an image."""
    found = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if found and found[2] in timm_args:
        network = getattr(sys.modules[timm.models.model_entrypoint(backbone).__module__], found[1], None)
        known = inspect.signature(network).parameters if network else timm_args.keys() - {found[2]}
        unknown = [name for name in timm_args if name not in known]
        close = difflib.get_close_matches(found[2], list(known), n=1, cutoff=0.7)
        return UserError(
            f"timm_args {timm_args}: backbone {backbone!r} ({found[1]}) takes no {', '.join(unknown)}: "
            f"remove {'it' if len(unknown) == 1 else 'them'}{f'; did you mean {close[0]!r}?' if close else ''}"
        )
    # An IndexError says no more than that a list is too short.
    said = f"{type(error).__name__}: {one_line(error)}" if isinstance(error, LookupError) else one_line(error)
    if not timm_args:
        return UserError(f"backbone {backbone!r} cannot be built: {said}")
    return UserError(
        f"timm_args {timm_args}: backbone {backbone!r} cannot be built with them ({said}): check lengths, types and names"
    )
