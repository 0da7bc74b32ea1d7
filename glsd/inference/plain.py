"""The timm form of a network: a plain timm module, and the configuration that builds it again without any code of ours."""

import math
from typing import Any, NamedTuple

import timm
import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from glsd.data.photometric import MEAN, STD
from glsd.data.transform import EvalTransform
from glsd.errors import UserError
from glsd.models.backbone import Backbone
from glsd.models.embedder import Embedder

# Our pooling -> timm's; for "mean+max" timm takes half of the sum.
_POOLS = {"cls": "token", "mean": "avg", "mean+max": "avgmax"}
# Arguments that say how timm pools and normalizes: the form has its own.
_REPLACED = (
    "num_classes", "global_pool", "fc_norm", "use_fc_norm", "use_post_transformer_norm", "pool_include_prefix",
)  # fmt: skip
_CLOSE = (
    1e-4  # of the largest feature: float32 rounding of deep networks stays below, any other network far above
)


class Plain(NamedTuple):
    """A plain timm network and what timm.create_model needs to build it again."""

    net: Any  # the timm module, in evaluation mode, with its pretrained_cfg
    architecture: str
    args: dict[str, Any]  # of timm.create_model, besides num_classes
    has_layer: bool  # a linear layer follows the pooled feature, as timm's classifier
    any_size: bool  # images of other sizes give our features, too; otherwise timm refuses them

    def config(self) -> dict[str, Any]:
        """Return the config.json from which timm and transformers build the network."""
        return {
            "architecture": self.architecture,
            "num_classes": self.net.num_classes,
            "num_features": self.net.num_features,
            "global_pool": self.args["global_pool"],
            "model_args": self.args,
            "pretrained_cfg": self.net.pretrained_cfg,
        }


@torch.no_grad()
def plain_form(network: Backbone | Embedder, transform: EvalTransform) -> Plain:
    """Return the timm form of a network, with copies of its weights, on the same device.

    network: in evaluation mode; transform: what its images need. The final norm of ours is applied to all tokens before they
    are pooled, so the form has no norm behind the pooling. The layer of an Embedder becomes timm's classifier. "mean+max" is
    twice timm's "avgmax": the layer's weight is doubled, and without a layer the form gets one that doubles. Raises UserError
    for a network that timm cannot express.
    """
    backbone = network.backbone if isinstance(network, Embedder) else network
    layer = network.head if isinstance(network, Embedder) else None
    if backbone.built_with is None:
        raise UserError("this backbone was not made by build_backbone: nothing says how timm would build it")
    weight, bias = _layer(backbone, layer)
    args = _arguments(backbone)
    name = backbone.built_with[0].split(".")[0]
    with torch.random.fork_rng(devices=[]):
        net: Any = timm.create_model(name, num_classes=0 if weight is None else len(weight), **args).eval()
    classifier = net.pretrained_cfg["classifier"]
    layer_state = {} if weight is None else {f"{classifier}.weight": weight, f"{classifier}.bias": bias}
    net.load_state_dict(_timm_state(backbone) | layer_state)
    net.to(next(network.parameters()).device)
    any_size = getattr(net, "pos_embed", None) is None
    net.pretrained_cfg = net.default_cfg = _pretrained_cfg(net, name, transform, any_size=any_size)
    _check(net, network, transform.crop)
    return Plain(net, name, args, weight is not None, any_size)


def _layer(backbone: Backbone, layer: nn.Linear | None) -> tuple[Tensor | None, Tensor | None]:
    """Return weight and bias of the linear layer behind timm's pooling, None if there is none."""
    doubled = backbone.pool == "mean+max"
    if layer is None and not doubled:
        return None, None
    width = backbone.embed_dim
    weight = torch.eye(width) if layer is None else layer.weight
    bias = torch.zeros(width) if layer is None else layer.bias
    return (2 * weight if doubled else weight), bias


def _arguments(backbone: Backbone) -> dict[str, Any]:
    """Return the arguments of timm.create_model, besides num_classes."""
    assert backbone.built_with is not None
    net = backbone.net
    args = {key: value for key, value in backbone.built_with[1].items() if key not in _REPLACED}
    args["global_pool"] = _POOLS[backbone.pool]
    if not isinstance(net, VisionTransformer | Eva):
        return args
    norms = [norm for norm in (net.norm, net.fc_norm) if not isinstance(norm, nn.Identity)]
    if len(norms) == 2:
        raise UserError(
            "timm_args: a norm before and one after the pooling: timm cannot pool between them as we do"
        )
    if isinstance(net, VisionTransformer):
        args["fc_norm"] = False
    else:
        args |= {"use_fc_norm": False, "use_post_transformer_norm": bool(norms)}
    if net.pos_embed is not None:
        # At another size timm would resample the positions with antialiasing, which gives other features: it shall refuse.
        args.pop("dynamic_img_size", None)
    return args


def _timm_state(backbone: Backbone) -> dict[str, Tensor]:
    """Return the backbone's tensors by their names in the form, whose one norm stands before the pooling."""
    return {
        f"norm.{key.removeprefix('fc_norm.')}" if key.startswith("fc_norm.") else key: x
        for key, x in backbone.net.state_dict().items()
    }


def _pretrained_cfg(net: Any, name: str, transform: EvalTransform, *, any_size: bool) -> dict[str, Any]:
    """Return timm's description of weights: our preprocessing, and no address or tag of weights of others."""
    return {
        "architecture": name,
        "num_classes": net.num_classes,
        "input_size": (3, transform.crop, transform.crop),
        "crop_pct": crop_share(transform.crop, transform.resize),
        "crop_mode": "center",
        "interpolation": "bicubic",
        "mean": MEAN,
        "std": STD,
        "fixed_input_size": not any_size,
        "pool_size": None,
        "first_conv": net.pretrained_cfg["first_conv"],
        "classifier": net.pretrained_cfg["classifier"],
        "custom_load": False,
    }


def crop_share(crop: int, resize: int) -> float:
    """Return timm's crop_pct: timm resizes to floor(crop / crop_pct), which must be exactly ``resize``."""
    share = crop / resize
    return share if math.floor(crop / share) == resize else crop / (resize + 0.5)


def _check(net: Any, network: Backbone | Embedder, size: int) -> None:
    """Raise UserError unless the form returns the features of the network for one random image."""
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    image = image.to(next(network.parameters()).device)
    expected = network(image) if isinstance(network, Embedder) else network(image)[0]
    if not expected.isfinite().all():
        raise UserError("the network's features are not finite: it diverged, take an earlier checkpoint")
    difference = float((net(image) - expected).abs().max() / expected.abs().max().clamp_min(1e-12))
    if difference > _CLOSE:
        raise UserError(
            f"timm cannot express this network: as a plain timm module its features differ by {difference:.1e} of the "
            "largest; use glsd.load, or export it to onnx"
        )
