"""Backbones from timm that give image and patch features at any crop size: ViTs, Eva (DINOv3), Swin, CNNs."""

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

# Arguments of timm.create_model that follow from other settings or would change what a token means.
_RESERVED_ARGS = {
    "img_size": "data.global_size",
    "drop_path_rate": "model.drop_path",
    "global_pool": "model.pool",
    **dict.fromkeys(
        ("pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"),
        "model.init",
    ),
    **dict.fromkeys(
        ("num_classes", "in_chans", "dynamic_img_size", "dynamic_img_pad", "strict_img_size"), "glsd itself"
    ),
    **dict.fromkeys(("patch_drop_rate", "features_only"), "nothing: every patch is needed"),
}

# The families whose tokens we know (timm's modules), and what lets each take crops of several sizes.
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
_WITHOUT_NATIVE_SIZE = ("resnet", "efficientnet")  # nothing in them depends on the size of an image


class Backbone(nn.Module):
    """A timm network seen as images -> (image features, patch features), both after the final norm.

    Attributes: ``net`` the timm network; ``embed_dim`` d; ``stride`` side of a patch in pixels; ``pool`` what
    the image feature is, of the patch features unless "cls" (the class token): "mean" or "mean+max" (both
    added); ``load_report`` what fitted of given weights.
    """

    def __init__(self, net: nn.Module, *, pool: str):
        super().__init__()
        timm_net: Any = net
        self.net = timm_net
        self.pool = pool
        self.embed_dim: int = timm_net.num_features
        self.stride: int = timm_net.feature_info[-1]["reduction"]
        self.load_report: LoadReport | None = None
        self._tokens = TOKENS[type(net)]

    def forward(
        self, images: Float[Tensor, "b 3 h w"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b n d"]]:
        """Return image and patch features, n = h/stride * w/stride, row-major.

        Raises UserError if a side is not a multiple of the stride (the rest would be dropped or padded in
        silence).
        """
        for side in images.shape[2:]:
            check_crop_size(side, self.stride, "an image side")
        prefix, patches = self._tokens(self.net, images)
        return POOLS[self.pool](prefix, patches), patches


def build_backbone(
    name: str,
    *,
    image_size: int,
    drop_path: float = 0.0,
    checkpointing: bool = False,
    pool: str = "cls",
    init: str = "random",
    timm_args: dict[str, Any] | None = None,
    seed: int = 0,
    allow_partial: bool | None = None,
    size_key: str = "data.global_size",
) -> Backbone:
    """Return a backbone whose native resolution is ``image_size`` pixels (it takes other sizes as well).

    name: a timm VisionTransformer, Eva, Swin, ResNet or EfficientNet; drop_path: stochastic depth of the last block, rising
    linearly from 0 (ViT and Eva skip the work of dropped rows and draw them from torch's default generator of the CPU; Swin
    and CNNs have timm's DropPath, which draws from the device's and drops after the work); checkpointing: keep only the
    input of each block and compute the block again in the backward pass; pool: "cls", "mean" or "mean+max"
    ("cls" is the mean for Swin and CNNs, which have no class token); init: "random" (a function of
    ``seed`` alone, the global random state stays as it was), "timm" (its pretrained weights, which have to
    expect ImageNet's mean and deviation) or a weights file, of which all has to fit unless ``allow_partial``
    (None: the error does not offer it);
    timm_args: further arguments of timm.create_model, plain values or lists of them; size_key: what an error
    about image_size names. Raises UserError for an
    unknown or unsuitable network, a bad argument, a size that is not a multiple of the stride, weights that
    do not fit. Source: DINO (arXiv 2104.14294), EsViT (arXiv 2106.09785) for Swin's mean token.
    """
    args = _checked_args(name, drop_path, pool, timm_args or {})
    if init == "timm":
        _check_normalization(name)
    native = {} if _family(name) in _WITHOUT_NATIVE_SIZE else {"img_size": image_size}
    with torch.random.fork_rng(devices=[]):  # built on the CPU: no other generator is touched
        torch.default_generator.manual_seed(seed)
        net = _create(name, args | native | {"drop_path_rate": drop_path})
        pretrained = _create(name, args | {"pretrained": True}).state_dict() if init == "timm" else None
    has_token = getattr(net, "cls_token", None) is not None
    if isinstance(net, VisionTransformer | Eva) and pool == "cls" and not has_token:
        raise UserError(f"model.backbone {name!r} has no class token: set model.pool to 'mean'")
    if checkpointing:
        timm_net: Any = net
        timm_net.set_grad_checkpointing(True)
    backbone = Backbone(net, pool="mean" if pool == "cls" and not has_token else pool)
    check_crop_size(image_size, backbone.stride, size_key)
    if init != "random":
        state = read_weights(init) if pretrained is None else pretrained
        backbone.load_report = load_weights(backbone.net, state, source=init, allow_partial=allow_partial)
    return backbone


def check_crop_size(size: int, stride: int, key: str) -> None:
    """Raise UserError, naming ``key`` and the nearest good sizes, unless ``size`` is a multiple of stride."""
    if size > 0 and size % stride == 0:
        return
    below = size // stride * stride
    fits = f"{below} or {below + stride}" if below > 0 else f"{stride}"
    raise UserError(f"{key} {size} is not a multiple of the patch size {stride}: use {fits}")


def _checked_args(name: str, drop_path: float, pool: str, timm_args: dict[str, Any]) -> dict[str, Any]:
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise UserError(
            f"unknown model.backbone {name!r}: expected the name of a timm ViT, Swin or CNN{hint}"
        )
    if _family(name) not in _ANY_SIZE:
        raise UserError(
            f"model.backbone {name!r} is of timm's family {_family(name)}, whose tokens are not known here:"
            f" choose one of {', '.join(_ANY_SIZE)}"
        )
    pick(POOLS, pool, "model.pool")
    if not 0 <= drop_path < 1:
        raise UserError(f"model.drop_path is {drop_path}: expected at least 0 and below 1")
    for key in timm_args:
        if key in _RESERVED_ARGS:
            raise UserError(
                f"model.timm_args.{key} cannot be set there: it follows from {_RESERVED_ARGS[key]}"
            )
        if not _is_plain(timm_args[key]):
            raise UserError(
                f"model.timm_args.{key} is {timm_args[key]!r}: expected a number, a word or a list of them"
            )
    return {**timm_args, "num_classes": 0, "global_pool": "", **_ANY_SIZE[_family(name)]}


def _is_plain(value: Any) -> bool:
    """Tell whether a value is a scalar or a list of scalars: nothing that timm could build an object from."""
    items = value if isinstance(value, list | tuple) else [value]
    return all(item is None or isinstance(item, bool | int | float | str) for item in items)


def _check_normalization(name: str) -> None:
    """Raise UserError for timm's weights of images normalized in another way than ours: they would be fed wrong ones."""
    expected = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    try:
        known = timm.get_pretrained_cfg(name)
    except RuntimeError as error:
        raise UserError(
            f"model.backbone {name!r}: {one_line(error)}: check the part after the dot"
        ) from error
    if known is None or (tuple(known.mean), tuple(known.std)) == expected:
        return
    others = {
        tag: timm.get_pretrained_cfg(tag)
        for tag in timm.list_models(f"{name.split('.')[0]}.*", pretrained=True)
    }
    good = [
        tag for tag, other in others.items() if other and (tuple(other.mean), tuple(other.std)) == expected
    ]
    raise UserError(
        f"model.backbone {name!r}: its timm weights expect images of mean {tuple(known.mean)} and deviation "
        f"{tuple(known.std)}, but images here have ImageNet's {expected[0]} and {expected[1]}: "
        f"use {' or '.join(good[:3]) or 'another network, such as vit_small_patch16_224.dino'}"
    )


def _family(name: str) -> str:
    return timm.models.model_entrypoint(name).__module__.removeprefix("timm.models.")


def _create(name: str, args: dict[str, Any]) -> nn.Module:
    """Call timm.create_model; whatever the user may have got wrong becomes one line."""
    pretrained = args.get("pretrained", False)
    try:
        net = timm.create_model(name, **args)
    except (TypeError, AssertionError, ValueError, KeyError, ZeroDivisionError) as error:
        raise UserError(
            f"model.backbone {name!r} cannot be built: {one_line(error)} (check model.timm_args)"
        ) from error
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise UserError(f"model.backbone {name!r} cannot be built: {one_line(error)}") from error
        raise UserError(
            f"model.init 'timm': no pretrained weights for {name!r} ({one_line(error)}): check the name and the"
            " connection, or give a weights file"
        ) from error
    if type(net) not in TOKENS:  # the exact class: a subclass may treat its tokens in another way
        raise UserError(
            f"model.backbone {name!r} is a {type(net).__name__}, whose tokens are not known here:"
            " choose a plain ViT, Eva (DINOv3), Swin, ResNet or EfficientNet"
        )
    if not net.feature_info:
        raise UserError(f"model.backbone {name!r} has no blocks: set model.timm_args.depth to 1 or more")
    stages = [len(getattr(net, f"layer{i}", ())) for i in range(1, 5)] if isinstance(net, ResNet) else [1]
    if 0 in stages or (isinstance(net, ResNet) and net.feature_info[-1]["num_chs"] != net.num_features):
        raise UserError(
            f"model.backbone {name!r} has a stage without blocks: give 4 numbers of 1 or more in"
            " model.timm_args.layers (and 4 in channels)"
        )
    return net
