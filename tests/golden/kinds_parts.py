"""Golden checks of schedules, heads, clipping, parameter groups and position embeddings."""

import itertools
import re

import torch
from golden_file import FLOOR, Golden
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from glsd.models.heads import ProjectionHead
from glsd.models.tokens import resample_pos_embed
from glsd.optim import clip_per_parameter, cosine, param_groups, teacher_temp


def check_schedules(golden: Golden) -> None:
    """Every step of every cosine, every epoch of every temperature."""
    for name, c in golden["cosine"].items():
        total = c["epochs"] * c["iters_per_epoch"]
        values = [
            cosine(
                step,
                base=float(c["base_value"]),
                final=float(c["final_value"]),
                total_steps=total,
                warmup_steps=c["warmup_epochs"] * c["iters_per_epoch"],
            )
            for step in range(total)
        ]
        # Our rise starts at 0; one that starts elsewhere is a mean of the two ends with the same weights.
        for step in range(c["warmup_epochs"] * c["iters_per_epoch"]):
            values[step] += c["start_warmup_value"] * (1 - values[step] / c["base_value"])
        golden.close(f"cosine_{name}", torch.tensor(values, dtype=torch.float64))
    for name, c in golden["teacher_temp"].items():
        temps = [
            teacher_temp(
                epoch,
                warmup_temp=float(c["warmup_teacher_temp"]),
                temp=float(c["teacher_temp"]),
                warmup_epochs=c["warmup_epochs"],
            )
            for epoch in range(c["n_epochs"])
        ]
        golden.close(f"teacher_temp_{name}", torch.tensor(temps, dtype=torch.float64))


def check_head(golden: Golden) -> None:
    """Forward, backward and running statistics of a projection head in training mode."""
    weights = golden.with_prefix("w_")
    head = ProjectionHead(
        golden["in_dim"],
        num_prototypes=golden["out_dim"],
        hidden_dim=golden["hidden_dim"],
        bottleneck_dim=golden["bottleneck_dim"],
        num_layers=golden["n_layers"],
        batch_norm=golden["use_bn"],
        trainable_gain=not golden["norm_last_layer"],
        seed=0,
    ).to(golden.tensor("in_x").dtype)
    head.load_state_dict({reference_head_name(name): tensor for name, tensor in weights.items()})
    head.train()
    x = golden.tensor("in_x").requires_grad_()
    y = head.prototypes(head(x))
    y.backward(golden.tensor("in_grad_output"))
    golden.close("out_y", y)
    golden.close("out_grad_x", x.grad)
    parameters = dict(head.named_parameters())
    cancelled = biases_before_batch_norm(head)
    for name, trainable in golden["trainable"].items():
        parameter = parameters[reference_head_name(name)]
        golden.equal(f"{name} is trainable", parameter.requires_grad, trainable)
        if trainable:
            # What is left of a sum of numbers as large as those of the layer's weights.
            of_weights = (
                golden.tensor(f"grad_{name.removesuffix('bias')}weight") if name in cancelled else None
            )
            floor = FLOOR if of_weights is None else float(of_weights.abs().max())
            golden.close(f"grad_{name}", parameter.grad, floor=floor)
    after = dict(head.named_buffers())
    for name in golden.with_prefix("after_"):
        golden.close(f"after_{name}", after[reference_head_name(name)])


def reference_head_name(name: str) -> str:
    """Return our name of a projection head's tensor from the one in DINO, EsViT and GLSD checkpoints."""
    # A head of one layer is a bare linear layer there.
    name = re.sub(r"^mlp\.(weight|bias)$", r"mlp.0.\1", name)
    return name.replace("last_layer.weight_g", "prototypes.gain").replace(
        "last_layer.weight_v", "prototypes.direction"
    )


def biases_before_batch_norm(head: ProjectionHead) -> set[str]:
    """Return the names of the biases that batch normalization takes back.

    Their gradient is zero but for rounding: it has no scale of its own.
    """
    return {
        f"mlp.{place}.bias"
        for place, (layer, after) in enumerate(itertools.pairwise(head.mlp))
        if isinstance(layer, nn.Linear) and isinstance(after, nn.BatchNorm1d)
    }


def check_clip(golden: Golden) -> None:
    """Each gradient on its own."""
    gradients = golden.with_prefix("in_grad_")
    parameters = {name: nn.Parameter(torch.zeros_like(gradient)) for name, gradient in gradients.items()}
    for name, gradient in gradients.items():
        parameters[name].grad = gradient.clone()
    golden.close("out_norms", clip_per_parameter(parameters.values(), golden["clip"]))
    for name, parameter in parameters.items():
        golden.close(f"out_grad_{name}", parameter.grad)


def check_param_groups(golden: Golden) -> None:
    """Which group each tensor of a plain ViT with our two heads falls into."""
    for case, want in golden["groups"].items():
        places = [int(place) for place in re.findall(r"head\.mlp\.(\d+)", " ".join(want))]
        modules = nn.ModuleDict(
            {
                name: ProjectionHead(
                    golden["embed_dim"],
                    num_prototypes=4,
                    hidden_dim=4,
                    bottleneck_dim=4,
                    num_layers=1 + max(places, default=0) // 2,  # linear layers and GELUs in turn
                    batch_norm=False,
                    trainable_gain=case.endswith("False"),
                    seed=0,
                )
                for name in ("head", "head_dense")
            }
        )
        backbone = VisionTransformer(
            img_size=2 * golden["patch_size"],
            patch_size=golden["patch_size"],
            embed_dim=golden["embed_dim"],
            depth=golden["depth"],
            num_heads=1,
            num_classes=0,
        )
        named = [*backbone.named_parameters(), *modules.named_parameters()]
        decay, no_decay = param_groups(named)
        got = dict.fromkeys((name for name, _ in named), "not_optimised")
        got |= dict.fromkeys(decay["names"], "decay") | dict.fromkeys(no_decay["names"], "no_decay")
        golden.equal(f"groups {case}", got, {our_name(name): group for name, group in want.items()})
    golden.used.add("n_params")  # how many numbers the source's network had; the file does not say its widths


def our_name(name: str) -> str:
    """Return our name of a tensor of backbone, head or head_dense."""
    part, dot, rest = name.partition(".")
    return part + dot + reference_head_name(rest) if part in ("head", "head_dense") else name


def check_pos_embed(golden: Golden) -> None:
    """Position embeddings of other grids, class token in front."""
    for case, c in golden["cases"].items():
        sides = [(c["grid_in"],) * 2, (c["grid_out"],) * 2]
        resampled = resample_pos_embed(golden.tensor(f"in_pos_embed_{case}")[None], 1, sides[0], sides[1])
        golden.close(f"out_pos_embed_{case}", resampled[0])
