"""Golden checks of the ranking losses: multi-similarity, margin, the distance-weighted sampling."""

from typing import Any

import torch
import torch.nn.functional as F
from golden_file import Golden
from kinds_dml import diffusion_target, distillation_kl, similarity_target
from torch import Tensor

from glsd.losses.mining import FAR_CUTOFF, NEAR_CUTOFF, Triplets, distance_weights, mined_pairs
from glsd.losses.obd_sd import ramp
from glsd.losses.ranking import build_ranking
from glsd.losses.tuple_losses import margin_loss

# The files' float32 numbers are of the same order as ours, one rounding each: relative to 1, the size of the losses.
FLOAT32 = 1e-5
# The margin files' source holds beta in float32.
FLOAT32_BETA = 1e-6
# Not stated in the margin files; psd files of the same source say so.
DEFAULT_EPOCHS = 150
DEFAULT_BETA = 1.2
EVERY_PAIR = 10.0  # an epsilon that mines nothing away: cosines differ by 2 at most


def check_ms(golden: Golden) -> None:
    """Multi-similarity with mining: values, gradients at the unit vectors and through them, and without mining."""
    params = golden["params"]
    args = {
        "alpha": params["alpha"],
        "beta": params["beta"],
        "base": params["thresh"],
        "epsilon": params["margin"],
    }

    def value(z: Tensor, labels: Tensor, **changes: float) -> Tensor:
        loss = build_ranking(
            "multi_similarity", num_classes=1, embed_dim=z.shape[1], seed=0, args=args | changes
        )
        return loss(z, labels, seed=0)

    for case in golden["cases"]:
        c = case["prefix"]
        raw, labels = golden.tensor(f"{c}raw").requires_grad_(), golden.tensor(f"{c}labels")
        z = F.normalize(raw, dim=1)
        loss = value(z, labels)
        of_z, of_raw = torch.autograd.grad(loss, [z, raw])
        golden.close(f"{c}loss", loss)
        golden.close(f"{c}grad_emb", of_z)
        golden.close(f"{c}grad_raw", of_raw)
        kept_positive, kept_negative = mined_pairs((z @ z.T).detach(), labels, epsilon=args["epsilon"])
        active = (kept_positive.any(dim=1) & kept_negative.any(dim=1)).sum()
        golden.equal(f"{c}n_active", active)
        golden.close(f"{c}pml_mined_avgnonzero", loss)
        golden.close(f"{c}pml_mined_mean", loss * active / len(z))
        golden.close(f"{c}pml_unmined_mean_beta40", value(z, labels, epsilon=EVERY_PAIR, beta=40.0))
        defaults = {"alpha": 2.0, "base": 0.5, "beta": 50.0}
        golden.close(f"{c}pml_default_unmined_beta50", value(z, labels, epsilon=EVERY_PAIR, **defaults))
        narrow = value(F.normalize(raw.detach().float(), dim=1), labels)
        golden.within(
            f"{c}loss_ref_float32", (narrow.detach() - golden.tensor(f"{c}loss_ref_float32")).abs(), FLOAT32
        )


def check_margin(golden: Golden) -> None:
    """The margin loss on given triplets, with and without self-distillation, and the sampling probabilities."""
    labels = golden.tensor("labels")
    triplets = Triplets(*golden.tensor("triplets").T)
    teacher = F.normalize(golden.tensor("teacher_raw"), dim=1)
    for case in golden["cases"]:
        c = case["prefix"]
        raw = golden.tensor("raw").requires_grad_()
        z = F.normalize(raw, dim=1)
        beta = golden.tensor(f"{c}beta_used_float32exact").requires_grad_()
        golden.within(
            f"{c}beta_used_float32exact", (beta.detach() - golden.tensor("beta")).abs(), FLOAT32_BETA
        )
        # One constant boundary: not a parameter in the source, so its gradient counts as 0 there.
        boundary = torch.full_like(beta, DEFAULT_BETA) if case["const"] else beta

        def ranking(count: Any, nu: float, z=z, boundary=boundary, case=case) -> Tensor:
            return margin_loss(z, labels, triplets, boundary, margin=case["margin"], nu=nu, count=count)

        by_triplets, by_pairs = ranking("triplets", 0.0), ranking("pairs", 0.0)
        loss = ranking("triplets", case["nu"]) + self_distillation(z, teacher, case)
        of_z, of_raw = torch.autograd.grad(loss, [z, raw], retain_graph=True)
        of_beta = torch.zeros_like(beta) if case["const"] else torch.autograd.grad(loss, beta)[0]
        limit_like(golden, f"{c}loss", loss)
        limit_like(golden, f"{c}grad_emb", of_z)
        limit_like(golden, f"{c}grad_raw", of_raw)
        limit_like(golden, f"{c}grad_beta", of_beta)
        limit_like(golden, f"{c}loss_sum_count", by_pairs)  # the ranking part alone
        # The two losses share their numerator, so each times what it is divided by is the same.
        golden.close(
            f"{c}pair_count_or x loss",
            by_triplets * golden.tensor(f"{c}pair_count_or"),
            want=by_pairs.detach() * golden.tensor(f"{c}pair_count_sum"),
        )
    z = F.normalize(golden.tensor("raw"), dim=1)
    bounds = golden["dw"]
    golden.equal("near cutoff", NEAR_CUTOFF, bounds["lower_cutoff"])
    golden.equal("far cutoff", FAR_CUTOFF, bounds["upper_cutoff_rkd"])
    golden.close("dw_prob_obdsd", distance_weights(z, labels, upper=None))
    want = golden.tensor("dw_prob_rkd_float32")
    cut = distance_weights(z.float(), labels, upper=bounds["upper_cutoff_rkd"])
    golden.within("dw_prob_rkd_float32", (cut - want).abs(), FLOAT32)


def self_distillation(z: Tensor, teacher: Tensor, case: dict[str, Any]) -> Tensor | float:
    """Return the weighted divergence from the teacher's similarities, diffused if the case says so."""
    if not case.get("PSD"):
        return 0.0
    tau = case["kd_tau"]
    if case["OBDP"]:
        target = diffusion_target(teacher, tau=tau, w=case["w"], tau_d=case["diffusion_tau"])
    else:
        target = similarity_target(teacher, tau=tau)
    epochs = case.get("n_epochs", DEFAULT_EPOCHS)
    return ramp(case["epoch"], epochs, weight=case["kd_lambda"], tau=tau) * distillation_kl(
        z, target, tau=tau
    )


def limit_like(golden: Golden, name: str, ours: Tensor) -> None:
    """Compare relative to the largest number, to what beta in float32 allows."""
    want = golden.tensor(name)
    scale = max(float(want.abs().max()), FLOAT32_BETA)
    golden.within(name, (ours.detach() - want).abs() / scale, FLOAT32_BETA)
