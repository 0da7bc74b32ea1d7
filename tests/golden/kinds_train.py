"""Golden check of whole optimization steps: a toy network through our heads, losses and optimizer parts."""

import copy
from collections.abc import Iterator

import torch
from golden_file import Golden
from kinds_losses import HALF, corner_boxes, temperature_of
from kinds_parts import our_name
from torch import Tensor, nn

from glsd.batches import Match
from glsd.geometry import geometric_match
from glsd.losses.center import ema_center
from glsd.losses.distill import global_loss, local_loss, similarity_match
from glsd.models.heads import ProjectionHead
from glsd.optim import clip_per_parameter, cosine, ema_update, param_groups

NUM_GLOBAL = 2


class Toy(nn.Module):
    """Convolution and LayerNorm: patch features; a linear layer on their mean: class feature; two heads."""

    def __init__(self, golden: Golden):
        super().__init__()
        dim, stride = golden["feat_dim"], golden["stride"]
        self.embed = nn.Conv2d(3, dim, stride, stride)
        self.norm = nn.LayerNorm(dim, eps=golden["layer_norm_eps"])
        self.mix = nn.Linear(dim, dim)

        def head() -> ProjectionHead:
            return ProjectionHead(
                dim,
                num_prototypes=golden["K"],
                hidden_dim=golden["hidden_dim"],
                bottleneck_dim=golden["bottleneck_dim"],
                num_layers=3,
                batch_norm=False,
                trainable_gain=not golden["norm_last_layer"],
                seed=0,
            )

        self.head, self.head_dense = head(), head()

    def forward(self, views: list[Tensor]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
        """Return class vectors (v b e), and per view patch vectors (b n e) and patch features (b n d)."""
        features = [self.norm(self.embed(view).flatten(2).transpose(1, 2)) for view in views]
        cls = torch.stack([self.head(self.mix(view.mean(1))) for view in features])
        patches = [self.head_dense(view.flatten(0, 1)).unflatten(0, view.shape[:2]) for view in features]
        return cls, patches, features


def by_resolution(views: list[Tensor]) -> list[Tensor]:
    """Stack the global views, and the local ones if there are any."""
    return [torch.stack(part) for part in (views[:NUM_GLOBAL], views[NUM_GLOBAL:]) if part]


def find_match(golden: Golden, step: int, student: list[Tensor], teacher: list[Tensor]) -> Match:
    """Return the step's match, from its boxes or from both networks' patch features."""
    boxes = corner_boxes(golden.tensor(f"in_step{step}_boxes_ijhw"), golden.tensor(f"in_step{step}_flip"))
    if golden["matching"] == "similarity":
        return similarity_match(by_resolution(student), torch.stack(teacher))
    sizes = [golden["out_size"][0], *golden["out_size"][NUM_GLOBAL : NUM_GLOBAL + 1]]
    return geometric_match(
        by_resolution(list(boxes)), sizes, stride=golden["stride"], hinge=golden["hinge"], hinge_factor=1.0
    )


def schedules(golden: Golden) -> dict[str, list[float]]:
    """Return the values of every step."""
    per_epoch = golden["iters_per_epoch"]
    total = golden["epochs"] * per_epoch
    warmup = golden["lr_warmup_epochs"] * per_epoch
    ends = {
        "lr": (golden["lr"], golden["lr_min"], warmup),
        "wd": (golden["weight_decay"], golden["weight_decay_end"], 0),
        "momentum": (golden["ema_start"], 1.0, 0),
    }
    return {
        name: [
            cosine(step, base=float(base), final=float(final), total_steps=total, warmup_steps=rise)
            for step in range(total)
        ]
        for name, (base, final, rise) in ends.items()
    }


def check_train(golden: Golden) -> None:
    """Run the steps; compare losses, gradients, centers, students and teachers after each."""
    initial = golden.with_prefix("init_")
    student = Toy(golden).to(next(iter(initial.values())).dtype)
    student.load_state_dict({our_name(name): tensor for name, tensor in initial.items()})
    golden.equal(
        "parameters", {n for n, _ in student.named_parameters()}, {our_name(name) for name in initial}
    )
    teacher = copy.deepcopy(student)
    decay, no_decay = param_groups(student.named_parameters())
    optimizer = torch.optim.AdamW([decay, no_decay], betas=(0.9, 0.999), eps=1e-8)
    values = schedules(golden)
    for name, series in values.items():
        golden.close(f"{name}_schedule", torch.tensor(series, dtype=torch.float64))
    centers = {part: initial["embed.bias"].new_zeros(golden["K"]) for part in ("cls", "patch")}
    names = {our_name(name): name for name in initial}

    for step in steps_of(golden):
        epoch = step // golden["iters_per_epoch"]
        for group in optimizer.param_groups:
            group["lr"] = values["lr"][step]
        optimizer.param_groups[0]["weight_decay"] = values["wd"][step]
        losses, means = forward(golden, step, temperature_of(golden, epoch), student, teacher, centers)
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        centers = {
            part: ema_center(center, means[part], golden["center_momentum"])
            for part, center in centers.items()
        }
        check_gradients(golden, f"out_step{step}_gradraw_", student, names)
        clip_per_parameter(student.parameters(), golden["clip"])
        if epoch < golden["freeze_last_layer_epochs"]:
            for head in (student.head, student.head_dense):
                head.prototypes.zero_grad()
        check_gradients(golden, f"out_step{step}_gradused_", student, names)
        optimizer.step()
        ema_update(
            dict(teacher.named_parameters()), dict(student.named_parameters()), values["momentum"][step]
        )

        golden.close(f"out_step{step}_loss", torch.stack(losses))
        golden.close(f"out_step{step}_lr", torch.tensor(values["lr"][step], dtype=torch.float64))
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        golden.close(f"out_step{step}_wd", torch.tensor(decays, dtype=torch.float64))
        for part, center in centers.items():
            golden.close(f"out_step{step}_center_{part}", center)
        for role, network in (("student", student), ("teacher", teacher)):
            prefix = f"out_step{step}_{role}_"
            for name, parameter in network.named_parameters():
                if has(golden, prefix):
                    golden.close(prefix + names[name], parameter)


def steps_of(golden: Golden) -> Iterator[int]:
    """Yield the steps that the file holds."""
    step = 0
    while f"out_step{step}_loss" in golden:
        yield step
        step += 1


def forward(
    golden: Golden, step: int, temp: float, student: Toy, teacher: Toy, centers: dict[str, Tensor]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the two weighted losses, and the mean teacher logits of class rows and patch rows."""
    images = [golden.tensor(f"in_step{step}_image_v{v}") for v in range(golden["n_views"])]
    cls, patches, features = student(images)
    with torch.no_grad():
        teacher_cls, teacher_patches, teacher_features = teacher(images[:NUM_GLOBAL])
    temps = {"student_temp": golden["student_temp"], "teacher_temp": temp}
    view = global_loss(
        cls,
        teacher_cls,
        student.head.prototypes.weight(),
        teacher.head.prototypes.weight(),
        center=centers["cls"],
        **temps,
    )
    patch = local_loss(
        by_resolution(patches),
        torch.stack(teacher_patches),
        student.head_dense.prototypes.weight(),
        teacher.head_dense.prototypes.weight(),
        matches=[(find_match(golden, step, features, teacher_features), 1.0)],
        center=centers["patch"],
        **temps,
    )
    means = {"cls": view.teacher_mean, "patch": patch.teacher_mean}
    return [HALF * view.loss, HALF * patch.loss], means


def check_gradients(golden: Golden, prefix: str, student: Toy, names: dict[str, str]) -> None:
    """Compare all gradients of a step that has them in the file; one missing there must be None here."""
    if not has(golden, prefix):
        return
    for name, parameter in student.named_parameters():
        key = prefix + names[name]
        golden.equal(f"{key} exists", parameter.grad is not None, key in golden)
        if parameter.grad is not None and key in golden:
            golden.close(key, parameter.grad)


def has(golden: Golden, prefix: str) -> bool:
    """Return whether the file holds this set of arrays (raw gradients are given for some steps only)."""
    return any(name.startswith(prefix) for name in golden.arrays)
