"""Golden checks of PSD, OBD-SD and MDR: targets, values, gradients, statistics, and short trainings of a linear model."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from golden_file import Golden
from torch import Tensor

from glsd.losses import obd_sd
from glsd.losses.mdr import (
    MdrStatistics,
    initial_statistics,
    level_penalty,
    mdr_loss,
    mean_normalize,
    observe,
    pairwise_distances,
)
from glsd.losses.obd_sd import diffuse, ramp, symmetric_affinity, transition_matrix
from glsd.losses.ranking import build_ranking

# The files' settings where they do not say otherwise.
similarity_target = partial(obd_sd.similarity_target, mask_self=False)
diffusion_target = partial(obd_sd.diffusion_target, tau_d=1.0, form="softmax", mask_self=False)
distillation_kl = partial(obd_sd.distillation_kl, mask_self=False)
check_settings = partial(obd_sd.check_settings, tau_d=1.0, mask_self=False)

# float32 against float64: the divergence is a small difference of large terms.
TOLERANCE_FLOAT32 = 5e-4
MARGIN = 0.2  # of the triplet loss beside MDR
TOTAL_WEIGHT, TOTAL_PENALTY = 0.6, 0.01  # of "total_lambda0p6_nu0p01"
MOMENTUM = 0.9


def unit(rows: Tensor) -> Tensor:
    return F.normalize(rows, dim=1, eps=1e-12)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf, retain_graph=True)[0]


def rank_loss(z: Tensor, labels: Tensor) -> Tensor:
    """Return the multi-similarity loss with the library's defaults."""
    classes = int(labels.max()) + 1
    loss = build_ranking("multi_similarity", num_classes=classes, embed_dim=z.shape[1], seed=0, args={})
    return loss(z, labels, seed=0)


def close_in_float32(golden: Golden, name: str, ours: Tensor, want: Tensor) -> None:
    """Compare a number computed in float32 with the float64 one."""
    golden.equal(f"{name} dtype", ours.dtype, torch.float32)
    golden.within(name, (ours.double() - want).abs() / want.abs(), TOLERANCE_FLOAT32)


def target_of(case: dict[str, Any], z_teacher: Tensor) -> Tensor:
    """Return the target of a case of any of the distillation files, by its keys."""
    tau = case["kd_tau"]
    if "w" not in case:
        return similarity_target(z_teacher, tau=tau)
    if "clamp" in case:
        if case["clamp"]:
            return diffusion_target(z_teacher, tau=tau, w=case["w"], form="symmetric")
        similarity = z_teacher @ z_teacher.T
        affinity = symmetric_affinity(similarity)
        isolated = (affinity == 0).all(dim=1, keepdim=True)
        return (torch.where(isolated, similarity, diffuse(affinity, similarity, w=case["w"])) / tau).softmax(
            1
        )
    return diffusion_target(z_teacher, tau=tau, w=case["w"], tau_d=case["diffusion_tau"])


def coefficient_of(golden: Golden, case: dict[str, Any]) -> float:
    """Return the ramp's value, compared with the file's."""
    coef = ramp(case["epoch"], case["n_epochs"], weight=case["kd_lambda"], tau=case["kd_tau"])
    golden.close(f"{case['prefix']}coef", coef)
    return coef


def check_distillation(golden: Golden) -> None:
    """Files psd and obdsd_softmax*: ranking loss + distillation, in float64 and in float32."""
    raw = golden.tensor("raw").requires_grad_()
    teacher, labels = golden.tensor("teacher_raw"), golden.tensor("labels")
    for case in golden["cases"]:
        prefix, tau = case["prefix"], case["kd_tau"]
        check_settings(tau=tau, batch_size=len(raw), w=case.get("w"), tau_d=case.get("diffusion_tau", 1.0))
        z = unit(raw)
        target = target_of(case, unit(teacher))
        coef = coefficient_of(golden, case)
        rank, kl = rank_loss(z, labels), distillation_kl(z, target, tau=tau)
        total = rank + coef * kl
        ours = {"loss": total, "rank": rank, "kl": kl}
        ours |= {"grad_emb": gradient(total, z), "grad_raw": gradient(total, raw)}
        ours["kd_grad_emb"] = gradient(coef * kl, z)
        for name, value in ours.items():
            golden.close(prefix + name, value)
        check_matrices(golden, case, unit(teacher), target)

        single = unit(raw.detach().float())
        narrow = rank_loss(single, labels) + coef * distillation_kl(
            single, target_of(case, unit(teacher.float())), tau=tau
        )
        close_in_float32(golden, f"{prefix}loss", narrow, total.detach())
        if f"{prefix}loss_ref_float32" in golden:
            want = golden.tensor(f"{prefix}loss_ref_float32")
            close_in_float32(golden, f"{prefix}loss_ref_float32", narrow, want)


def check_matrices(golden: Golden, case: dict[str, Any], z_teacher: Tensor, target: Tensor) -> None:
    """Compare the matrices that some cases hold: transition, diffusion, target."""
    prefix = case["prefix"]
    if f"{prefix}target" in golden:
        golden.close(f"{prefix}target", target)
    if f"{prefix}transition" in golden:
        transition = transition_matrix(z_teacher @ z_teacher.T, tau_d=case["diffusion_tau"])
        golden.close(f"{prefix}transition", transition)
        identity = torch.eye(len(transition), dtype=transition.dtype)
        golden.close(f"{prefix}diffusion", diffuse(transition, identity, w=case["w"]))


def check_symmetric(golden: Golden) -> None:
    """File obdp_sym: the paper's form, of several data sets; the distillation alone."""
    for case in golden["cases"]:
        prefix, data, tau = case["prefix"], f"d{case['data']}_", case["kd_tau"]
        golden.used.add(f"{data}labels")  # there is no ranking loss
        check_settings(tau=tau, batch_size=len(golden.tensor(f"{data}raw")), w=case["w"])
        z = unit(golden.tensor(f"{data}raw")).requires_grad_()
        z_teacher = unit(golden.tensor(f"{data}teacher_raw"))
        similarity = z_teacher @ z_teacher.T
        affinity = symmetric_affinity(similarity.clamp(min=0) if case["clamp"] else similarity)
        target = target_of(case, z_teacher)
        coef = coefficient_of(golden, case)
        kl = distillation_kl(z, target, tau=tau)
        golden.close(f"{prefix}kl", kl)
        golden.close(f"{prefix}kd_loss", coef * kl)
        golden.close(f"{prefix}kd_grad_emb", gradient(coef * kl, z))
        eigenvalues = torch.linalg.eigvalsh(affinity)
        golden.close(f"{prefix}eig_min_max", eigenvalues[[0, -1]])
        # affinity_ij = cos_ij / sqrt(degree_i degree_j): with the file's degrees, ours must give back the cosines.
        degree = golden.tensor(f"{prefix}degree")
        cosines = similarity.clone().fill_diagonal_(0).clamp(min=0 if case["clamp"] else -1)
        golden.close(f"{prefix}degree", affinity * (degree[:, None] * degree).sqrt(), cosines)
        matrices = {"S": affinity, "A_T": diffuse(affinity, similarity, w=case["w"]), "target": target}
        for name, matrix in matrices.items():
            if f"{prefix}{name}" in golden:
                golden.close(f"{prefix}{name}", matrix)
        narrow = distillation_kl(z.detach().float(), target_of(case, z_teacher.float()), tau=tau)
        close_in_float32(golden, f"{prefix}kl", narrow, kl.detach())


def triplet(e: Tensor, triplets: Tensor) -> Tensor:
    """Return the triplet loss of given (anchor, positive, negative) rows: unsquared distances, mean over triplets."""
    anchor, positive, negative = (e[column] for column in triplets.T)
    return F.triplet_margin_loss(anchor, positive, negative, margin=MARGIN)


def check_mdr(golden: Golden) -> None:
    """File mdr: consecutive batches with running statistics, for several variants of the method."""
    golden.used.add("labels")  # the triplets are given
    for variant in golden["variants"]:
        levels = golden.tensor(f"levels_{variant['levels']}").requires_grad_()
        stats = initial_statistics()
        for t, batch in enumerate(golden.tensor("raw")):
            stats = check_mdr_batch(golden, variant, t, levels, stats)
            narrow = batch.float()
            e = mean_normalize(narrow) if variant["mean_normalise"] else narrow
            value = mdr_loss(pairwise_distances(e), levels.detach().float(), stats)
            name = f"{variant['prefix']}t{t}_mdr"
            close_in_float32(golden, name, value, golden.tensor(name))


def check_mdr_batch(
    golden: Golden, variant: dict[str, Any], t: int, levels: Tensor, stats: MdrStatistics
) -> MdrStatistics:
    """Compare everything of batch t; return the statistics after it."""
    prefix = f"{variant['prefix']}t{t}_"
    raw = golden.tensor("raw")[t].requires_grad_()
    e = mean_normalize(raw) if variant["mean_normalise"] else raw * 1.0
    distances = pairwise_distances(e)
    include = variant["include_diag"]
    alone, stats = (
        observe(before, distances, momentum=MOMENTUM, include_diagonal=include)
        for before in (initial_statistics(), stats)
    )
    mdr, penalty = mdr_loss(distances, levels, stats), level_penalty(levels)
    ranking = triplet(e, golden.tensor("triplets")[t])
    pairs = ~torch.eye(len(raw), dtype=torch.bool)
    z = ((distances - stats.mean) / stats.std)[pairs].detach()
    nearest = (z[:, None] - levels.detach()).abs().argmin(dim=1)
    ours = {
        "mdr": mdr,
        "grad_raw": gradient(mdr, raw),
        "grad_emb": gradient(mdr, e),
        "grad_levels": gradient(mdr, levels),
        "mean_distance": raw.norm() / e.norm(),  # what the rows were divided by
        "batch_mean": alone.mean,
        "batch_std": alone.std,
        "ema_mean": stats.mean,
        "ema_std": stats.std,
        "z_range": torch.stack([z.min(), z.max()]),
        "level_reg": penalty,
        "triplet": ranking,
        "triplet_grad_raw": gradient(ranking, raw),
        "total_lambda0p6_nu0p01": ranking + TOTAL_WEIGHT * mdr + TOTAL_PENALTY * penalty,
    }
    for name, value in ours.items():
        golden.close(prefix + name, value)
    golden.equal(f"{prefix}counts_per_level", torch.bincount(nearest, minlength=len(levels)))
    return stats


def check_trace_obdsd(golden: Golden) -> None:
    """File trace_obdsd: plain SGD on a linear model; the teacher is the student of the end of the epoch before."""
    weight = golden.tensor("W_init").requires_grad_()
    teacher = golden.tensor("teacher_init")
    tau, losses, weights = golden["kd_tau"], [], []
    batches = zip(golden.tensor("X"), golden.tensor("labels"), strict=True)
    for step, (x, labels) in enumerate(batches):
        epoch, place = divmod(step, golden["iters_per_epoch"])
        if epoch and not place:
            teacher = weight.detach().clone()
        z = unit(x @ weight.T)
        target = diffusion_target(unit(x @ teacher.T), tau=tau, w=golden["w"], tau_d=golden["diffusion_tau"])
        coef = ramp(epoch, golden["E"], weight=golden["kd_lambda"], tau=tau)
        loss = rank_loss(z, labels) + coef * distillation_kl(z, target, tau=tau)
        weight = (weight - golden["lr"] * gradient(loss, weight)).detach().requires_grad_()
        losses.append(loss)
        weights.append(weight)
    golden.close("losses", torch.stack(losses))
    golden.close("W_after_step", torch.stack(weights))


def check_trace_mdr(golden: Golden) -> None:
    """File trace_mdr: plain SGD on a linear model and the levels, which start where the method's do."""
    weight = golden.tensor("W_init").requires_grad_()
    start = golden.constants.get("levels", [-3.0, 0.0, 3.0])
    levels = golden.tensor("levels_init") if "levels_init" in golden else torch.tensor(start)
    levels = levels.to(weight.dtype).requires_grad_()
    stats = initial_statistics()
    trace: dict[str, list[Tensor]] = {}
    for x, triplets in zip(golden.tensor("X"), golden.tensor("triplets"), strict=True):
        e = mean_normalize(x @ weight.T)
        distances = pairwise_distances(e)
        stats = observe(stats, distances, momentum=MOMENTUM, include_diagonal=True)
        ranking, mdr = triplet(e, triplets), mdr_loss(distances, levels, stats)
        loss = ranking + golden["lambda_mdr"] * mdr + golden["nu"] * level_penalty(levels)
        of_weight, of_levels = torch.autograd.grad(loss, [weight, levels])
        weight = (weight - golden["lr"] * of_weight).detach().requires_grad_()
        levels = (levels - golden["lr"] * of_levels).detach().requires_grad_()
        values = {"loss": loss, "triplet": ranking, "mdr": mdr}
        values["ema_mean_std"] = torch.stack([stats.mean, stats.std])
        values |= {"levels_after_step": levels, "W_after_step": weight}
        for name, value in values.items():
            trace.setdefault(name, []).append(value.detach())
    for name, series in trace.items():
        golden.close(name, torch.stack(series))
