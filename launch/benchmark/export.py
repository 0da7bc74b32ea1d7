"""Parity of every export at the networks' true sizes: how far the features are from ours, loaded by the other library alone."""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from glsd.errors import UserError
from glsd.export.proof import Proof, prove
from glsd.export.write import FORMS
from glsd.inference.model import Model
from glsd.loading import Loaded
from glsd.models.backbone import build_backbone
from glsd.models.embedder import Embedder
from launch.benchmark.tools import add_json, finish

NETWORKS = (
    "vit_tiny_patch16_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_dinov3",
    "swin_tiny_patch4_window7_224",
    "resnet50",
)
SIZE = 224  # pixels
WIDTH = 128  # of the embedding layer
SHARPENED = 4.0  # factor of the attention's weights, which are drawn too small to prefer one patch to another
NO_CLASS_TOKEN = ("swin", "resnet")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), help="timm names (%(default)s)")
    parser.add_argument("--forms", nargs="+", default=list(FORMS), help="(%(default)s)")
    add_json(parser)


def benchmark(args: argparse.Namespace) -> None:
    unknown = set(args.forms) - set(FORMS)
    if unknown:
        raise UserError(f"--forms has {sorted(unknown)}: expected some of {', '.join(FORMS)}")
    results = []
    print(f"random weights, {SIZE} pixels, 32 pictures; differences are shares of the largest feature")
    print("| network | pooling | layer | form | same inputs | from pictures | another size |\n|" + "---|" * 7)
    for name in args.networks:
        for pool, layer in cases(name):
            model = noisy_model(name, SIZE, {}, pool=pool, embed_dim=layer)
            for form in args.forms:
                proof = proved(form, model)
                results.append(
                    {"network": name, "pool": pool, "layer": layer, "form": form, **proof._asdict()}
                )
                other = "refused" if proof.other_size is None else f"{proof.other_size:.1e}"
                print(
                    f"| {name} | {pool} | {layer or 'none'} | {form} | {proof.same_inputs:.1e} | {proof.from_pictures:.1e} "
                    f"| {other} |",
                    flush=True,
                )
    finish(args, "export", torch.device("cpu"), results=json.loads(json.dumps(results)))


def cases(name: str) -> tuple[tuple[str, int | None], ...]:
    """Return pooling and embedding layer of each model that is exported."""
    if name.startswith(NO_CLASS_TOKEN):
        return ("mean", None), ("mean", WIDTH)
    return ("cls", None), ("mean", WIDTH)


def proved(form: str, model: Model) -> Proof:
    """Export a model and return its proof. Raises UserError if a number is beyond its bound."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        out.mkdir()
        written = FORMS[form](out, model)
        return prove(form, out, model, any_size=written.any_size)


@torch.no_grad()
def noisy_model(
    name: str,
    size: int,
    timm_args: dict[str, Any],
    *,
    pool: Any,
    embed_dim: int | None,
    resize: int | None = None,
) -> Model:
    """Return a model with weights that matter: no bias, scale or statistic keeps its start, and attention is sharp.

    So a wrong position or pooling shows in the features. embed_dim: None = a backbone.
    """
    backbone = build_backbone(name, image_size=size, timm_args=timm_args, pool=pool, seed=3)
    network: Any = backbone
    if embed_dim is not None:
        network = Embedder(backbone, embed_dim=embed_dim, freeze_batch_norm=False, seed=4)
    generator = torch.Generator().manual_seed(5)
    for key, tensor in network.state_dict().items():
        if "qkv.weight" in key:
            tensor.mul_(SHARPENED)
        if tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator).clamp(-2, 2)
            tensor.mul_(1 + 0.2 * noise).add_(0.02 * noise.abs())
    return Model(Loaded(network=network, name=name, crop=size, resize=resize))
