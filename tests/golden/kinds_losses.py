"""Golden checks of the losses, the matching and the positions."""

import torch
import torch.nn.functional as F
from golden_file import Golden
from pair_matches import Pairs, apart, joined
from torch import Tensor

from glsd.geometry import geometric_match, patch_centers, squared_half_diagonals
from glsd.losses.center import ema_center
from glsd.losses.cross_entropy import prototype_ce
from glsd.losses.distill import global_loss, local_loss, similarity_match
from glsd.losses.match import geometric, similarity
from glsd.optim import teacher_temp

# In the published code each of the two losses is halved when both are in use; here the caller weighs them.
HALF = 0.5
# Slack on a stated deviation: the maps are stored in float32, coordinates of hundreds of pixels.
ROUNDING_CELLS = 1e-4


def corner_boxes(boxes_ijhw: Tensor, flip: Tensor) -> Tensor:
    """Return x0 y0 x1 y1 (float64) of boxes given as top, left, height, width; x0 > x1 if mirrored."""
    top, left, height, width = boxes_ijhw.to(torch.float64).unbind(-1)
    mirrored = flip.bool()
    first, second = torch.where(mirrored, left + width, left), torch.where(mirrored, left, left + width)
    return torch.stack([first, top, second, top + height], dim=-1)


def temperature_of(golden: Golden, epoch: int) -> float:
    """Return the teacher's temperature of an epoch."""
    return teacher_temp(
        epoch,
        warmup_temp=float(golden["warmup_teacher_temp"]),
        temp=float(golden["teacher_temp"]),
        warmup_epochs=golden["warmup_teacher_temp_epochs"],
    )


def check_global(golden: Golden) -> None:
    """Consecutive calls of the global loss with its center; logits are vectors before identity prototypes."""
    student, teacher = golden.tensor("in_student_logits"), golden.tensor("in_teacher_logits")
    identity = torch.eye(student.shape[2], dtype=student.dtype)
    center = torch.zeros(student.shape[2], dtype=student.dtype)
    results: dict[str, list[Tensor]] = {"loss": [], "center": [], "grad_student": []}
    temps = [temperature_of(golden, int(epoch)) for epoch in golden.tensor("in_epochs")]
    for call, temp in enumerate(temps):
        leaf = student[call].clone().requires_grad_()
        result = global_loss(
            leaf.unflatten(0, (-1, golden["B"])),
            teacher[call].unflatten(0, (-1, golden["B"])),
            identity,
            identity,
            center=center,
            student_temp=golden["student_temp"],
            teacher_temp=temp,
        )
        center = ema_center(center, result.teacher_mean, golden["center_momentum"])
        results["loss"].append(result.loss)
        results["center"].append(center)
        results["grad_student"].append(torch.autograd.grad(result.loss, leaf)[0])
    for name, values in results.items():
        golden.close(f"out_{name}", torch.stack(values))
    golden.close("out_teacher_temp", temps)


class Views:
    """The student's and teacher's rows of a local_* file, per resolution, and the loss of given matches."""

    def __init__(self, golden: Golden):
        self.golden = golden
        self.num_images = golden["B"]
        self.views = [golden["n_global"], golden["n_local"]]
        self.patches = [golden["n_patch_global"], golden["n_patch_local"]]
        self.temps = {
            "student_temp": golden["student_temp"],
            "teacher_temp": temperature_of(golden, golden["epoch"]),
        }
        golden.close("teacher_temp_used", self.temps["teacher_temp"], golden["teacher_temp_used"])
        self.student_cls = golden.tensor("in_student_cls").requires_grad_()
        self.student_patch = golden.tensor("in_student_patch").requires_grad_()
        self.teacher_patch = self.of_teacher("in_teacher_patch")
        self.identity = torch.eye(golden["K"], dtype=self.student_cls.dtype)
        self.pairs = [(int(q), int(v)) for q, v in golden.tensor("pairs_qv")]
        golden.equal(
            "pairs_qv",
            [(q, v) for q in range(self.views[0]) for v in range(sum(self.views)) if v != q],
            sorted(self.pairs),
        )

    def groups(self, rows: Tensor) -> list[Tensor]:
        """Split patch rows of all views into (views, images, patches, width) per resolution."""
        counts = [v * self.num_images * n for v, n in zip(self.views, self.patches, strict=True)]
        shapes = [(v, self.num_images, n) for v, n in zip(self.views, self.patches, strict=True)]
        return [
            part.unflatten(0, shape)
            for part, shape in zip(rows.split(counts), shapes, strict=True)
            if len(part)
        ]

    def by_view(self, rows: Tensor) -> list[Tensor]:
        return [view for group in self.groups(rows) for view in group]

    def of_teacher(self, name: str) -> Tensor:
        return self.golden.tensor(name).unflatten(0, (self.views[0], self.num_images, self.patches[0]))

    def check_losses(self, prefix: str, pairs: Pairs, grad_cls: str) -> Tensor:
        """Compare both losses and their gradients; return the mean raw teacher logits of the patches."""
        view = global_loss(
            self.student_cls.unflatten(0, (-1, self.num_images)),
            self.golden.tensor("in_teacher_cls").unflatten(0, (-1, self.num_images)),
            self.identity,
            self.identity,
            center=self.golden.tensor("in_center_cls"),
            **self.temps,
        )
        patch = local_loss(
            self.groups(self.student_patch),
            self.teacher_patch,
            self.identity,
            self.identity,
            matches=[(joined(pairs, self.patches[0]), 1.0)],
            center=self.golden.tensor("in_center_patch"),
            **self.temps,
        )
        total = HALF * view.loss + HALF * patch.loss
        of_patch, of_cls = torch.autograd.grad(total, [self.student_patch, self.student_cls])
        self.golden.close(f"{prefix}_loss_view", HALF * view.loss)
        self.golden.close(f"{prefix}_loss_patch", HALF * patch.loss)
        self.golden.close(f"{prefix}_grad_student_patch", of_patch)
        self.golden.close(grad_cls, of_cls)
        if "out_center_cls_new" in self.golden:
            self.check_center("out_center_cls_new", "in_center_cls", view.teacher_mean)
        return patch.teacher_mean

    def check_center(self, name: str, old: str, mean: Tensor) -> None:
        self.golden.close(name, ema_center(self.golden.tensor(old), mean, self.golden["center_momentum"]))

    def patch_losses(self, q: int, v: int, pair: tuple[Tensor, Tensor]) -> Tensor:
        """Return the weighted cross-entropy of every student patch of a pair, from the library row by row."""
        student = self.by_view(self.student_patch.detach())[v]
        index, weight = pair
        losses = torch.zeros(index.shape, dtype=student.dtype)
        for b in range(self.num_images):
            for i in range(student.shape[1]):
                losses[b, i] = prototype_ce(
                    student[b, i : i + 1],
                    self.teacher_patch[q, b],
                    self.identity,
                    self.identity,
                    index=index[b, i].view(1, 1),
                    weight=weight[b, i].view(1, 1).to(student.dtype),
                    center=self.golden.tensor("in_center_patch"),
                    **self.temps,
                ).loss
        return losses


def check_local_distance(golden: Golden) -> None:
    """Both losses with geometric matching: on exact positions, which ours must equal, and resampled ones."""
    views = Views(golden)
    sizes = golden.tensor("in_out_size").tolist()
    boxes = corner_boxes(golden.tensor("in_boxes_ijhw"), golden.tensor("in_flip"))
    for v, size in enumerate(sizes):
        golden.close(f"pos_exact_v{v}", patch_centers(boxes[v], size, golden["stride"]))
        if f"fullmap_exact_v{v}" in golden:
            golden.close(f"fullmap_exact_v{v}", full_map(boxes[v], size))
    halves = [squared_half_diagonals(boxes[v], size, golden["stride"]) for v, size in enumerate(sizes)]
    check_matched(views, "exact", halves)
    check_closed_form(views, boxes, sizes)
    if "pos_resampled_v0" in golden:
        # Where the source had resampled coordinates, it measured the cells on them: all that is the matcher's
        # input.
        check_matched(views, "resampled", [measured_half(golden, v) for v in range(len(sizes))])
    for name in ("in_image_hw", "in_student_feat", "in_teacher_feat"):
        golden.used.add(name)  # describe the case; not needed by closed form and matching
    golden.used.update(n for n in golden.arrays if n.startswith(("pos_resampled_aa", "fullmap_resampled")))


def check_matched(views: Views, positions: str, halves: list[Tensor]) -> None:
    """Compare everything that follows from one set of patch positions."""
    golden = views.golden
    centers = [golden.tensor(f"pos_{positions}_v{v}") for v in range(sum(views.views))]
    halves = [half.to(centers[0].dtype) for half in halves]
    for hinge in (False, True):
        pairs: Pairs = {}
        for q, v in views.pairs:
            pair = f"q{q}_v{v}"
            index, weight = geometric(
                centers[v], centers[q], student_half=halves[v], teacher_half=halves[q], hinge=hinge
            )
            if hinge:
                golden.equal(f"out_{positions}_accept_{pair}", weight)
            golden.close(f"out_{positions}_threshold_{pair}", torch.maximum(halves[q], halves[v]))
            chosen = centers[q].gather(1, index[..., None].expand(-1, -1, 2))
            golden.close(f"out_{positions}_sqdist_{pair}", (centers[v] - chosen).square().sum(-1))
            scale = float(golden.tensor(f"out_{positions}_sqdist_{pair}").max())
            pairs[q, v] = settle_ties(golden, f"out_{positions}", pair, index, scale), weight
            patch_losses = views.patch_losses(q, v, pairs[q, v])
            golden.close(f"out_{positions}_hinge{int(hinge)}_patchloss_{pair}", patch_losses)
        mean = views.check_losses(f"out_{positions}_hinge{int(hinge)}", pairs, "out_grad_student_cls")
        views.check_center("out_center_patch_new", "in_center_patch", mean)


def check_closed_form(views: Views, boxes: Tensor, sizes: list[int]) -> None:
    """The match that training makes of whole crops attains the distances and verdicts of the file."""
    golden, stride = views.golden, views.golden["stride"]
    count, patches = (
        views.views[0],
        [n for n, v in zip(views.patches, views.views, strict=True) for _ in range(v)],
    )
    parts = [slice(0, count), slice(count, None)] if views.views[1] else [slice(0, count)]
    match = geometric_match(
        [boxes[part] for part in parts],
        [sizes[part][0] for part in parts],
        stride=stride,
        hinge=True,
        hinge_factor=1.0,
    )
    for (q, v), (index, weight) in apart(match, patches).items():
        pair = f"q{q}_v{v}"
        golden.equal(f"out_exact_accept_{pair}", weight.to(golden.tensor(f"out_exact_accept_{pair}").dtype))
        teacher, student = (golden.tensor(f"pos_exact_v{view}") for view in (q, v))
        chosen = teacher.gather(1, index[..., None].expand(-1, -1, 2))
        golden.close(f"out_exact_sqdist_{pair}", (student - chosen).square().sum(-1))


def settle_ties(golden: Golden, prefix: str, pair: str, index: Tensor, scale: float) -> Tensor:
    """Compare the chosen patches where no other is as good; return them with the file's choice elsewhere.

    That a tied choice is as good is compared by the caller, through the distance or cosine it attains.
    """
    margin = golden.tensor(f"{prefix}_tiemargin_{pair}")
    unique = margin > 8 * torch.finfo(margin.dtype).eps * scale
    want = golden.tensor(f"{prefix}_index_{pair}").to(torch.int64)
    golden.equal(f"{prefix}_index_{pair}", index * unique, want * unique)
    return torch.where(unique, index, want)


def measured_half(golden: Golden, v: int) -> Tensor:
    """Return the squared half diagonal of the first cell of each image, measured on resampled positions."""
    centers = golden.tensor(f"pos_resampled_v{v}")
    side = round(centers.shape[1] ** 0.5)
    dx = centers[:, 1, 0] - centers[:, 0, 0]
    dy = centers[:, side, 1] - centers[:, 0, 1]
    return (dx / 2) ** 2 + (dy / 2) ** 2


def check_local_similarity(golden: Golden) -> None:
    """Both losses with matching by features."""
    views = Views(golden)
    teacher = views.of_teacher("in_teacher_feat")
    student = golden.tensor("in_student_feat")
    pairs: Pairs = {}
    for q, v in views.pairs:
        pair = f"q{q}_v{v}"
        vectors = views.by_view(student)[v]
        index = similarity(vectors, teacher[q])
        chosen = teacher[q].gather(1, index[..., None].expand(-1, -1, vectors.shape[-1]))
        golden.close(f"out_similarity_max_{pair}", F.cosine_similarity(vectors, chosen, dim=-1, eps=1e-12))
        pairs[q, v] = (
            settle_ties(golden, "out_similarity", pair, index, 1.0),
            torch.ones_like(index).to(vectors),
        )
    groups, counts = (
        views.groups(student),
        [n for n, v in zip(views.patches, views.views, strict=True) for _ in range(v)],
    )
    for (q, v), (index, _) in apart(similarity_match(groups, teacher), counts).items():
        settle_ties(golden, "out_similarity", f"q{q}_v{v}", index, 1.0)
    mean = views.check_losses("out_similarity", pairs, "out_similarity_grad_student_cls")
    views.check_center("out_similarity_center_patch_new", "in_center_patch", mean)


def check_positions(golden: Golden) -> None:
    """Closed-form positions against the exact ones, and within the stated deviation of the resampled ones."""
    boxes = corner_boxes(golden.tensor("in_boxes_ijhw"), golden.tensor("in_flip"))
    golden.used.add("in_image_hw")
    size, stride = golden["out_size"], golden["stride"]
    ours = channels_first(patch_centers(boxes, size, stride))
    golden.close("pos_exact", ours)
    if "fullmap_exact" in golden:
        golden.close("fullmap_exact", full_map(boxes, size))
    cell = torch.stack([(boxes[:, 2] - boxes[:, 0]).abs(), boxes[:, 3] - boxes[:, 1]], 1) * stride / size
    for variant, limit in golden["max_abs_deviation_of_resampled_from_exact_in_cells"].items():
        deviation = (golden.tensor(f"pos_{variant}").double() - ours).abs() / cell[:, :, None, None]
        golden.within(f"pos_{variant}", deviation, limit + ROUNDING_CELLS)
        golden.used.add(f"fullmap_{variant}")  # its cells average to the array above, border effects included


def channels_first(centers: Tensor) -> Tensor:
    """(m, n, 2) -> (m, 2, side, side)."""
    side = round(centers.shape[1] ** 0.5)
    return centers.transpose(1, 2).unflatten(2, (side, side))


def full_map(boxes: Tensor, size: int) -> Tensor:
    """Return the source coordinates of every pixel of the resized crops: patches of one pixel."""
    return channels_first(patch_centers(boxes, size, 1))
