"""Self-distillation of the similarities within a batch: from the previous epoch's network (PSD), or diffused (OBD-SD).

z and z_teacher are unit vectors, which the caller normalizes in float32 or better. Everything here is computed in float32 or
better, also under autocast: bfloat16 can hardly tell the rows of a target from uniform ones.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from glsd.errors import UserError, pick
from glsd.precision import widened

# At w = 1 the system is singular; its condition number is (1 + w) / (1 - w), 1999 at the largest w allowed.
LARGEST_W = 0.999
# Added to the degrees of the symmetric form, as in the released code; too small to matter in float32.
DEGREE_EPS = 1e-12


@torch.no_grad()
def similarity_target(
    z_teacher: Float[Tensor, "b e"], *, tau: float, mask_self: bool
) -> Float[Tensor, "b b"]:
    """Return the PSD target: each row is the softmax of the teacher's cosines to the batch, divided by tau.

    mask_self: leave the diagonal out. Rows sum to 1. No gradient.
    Source: OBD-SD (arXiv 2211.07566); its released code keeps the diagonal.
    """
    with torch.autocast(z_teacher.device.type, enabled=False):
        return _row_softmax(_similarity(z_teacher), tau, mask_self)


@torch.no_grad()
def diffusion_target(
    z_teacher: Float[Tensor, "b e"],
    *,
    tau: float,
    w: float,
    tau_d: float,
    form: str,
    mask_self: bool,
) -> Float[Tensor, "b b"]:
    """Return the OBD-SD target: the teacher's similarities after a random walk over the batch that stops with rate 1 - w.

    form 'softmax' (as released): P = (1-w) (I - w T)^-1 P0 with T = transition_matrix and P0 = similarity_target.
    form 'symmetric' (as in the paper): P = the row softmax of (1-w) (I - w A)^-1 S / tau; S are the cosines, A is the
    symmetric_affinity of S without its negative entries. A row without positive affinities keeps its S.
    tau_d: temperature of the walk in 'softmax'. mask_self: leave the diagonal out of P0 and P. w = 0 gives
    similarity_target exactly. Rows sum to 1. No gradient. Does not wait for the device, so it does not check its numbers:
    check_settings does. Raises UserError for another form. Source: OBD-SD (arXiv 2211.07566).
    """
    target = pick(FORMS, form, "form")
    with torch.autocast(z_teacher.device.type, enabled=False):
        similarity = _similarity(z_teacher)
        if w == 0 or len(similarity) == 1:
            return _row_softmax(similarity, tau, mask_self)
        return target(similarity, tau=tau, w=w, tau_d=tau_d, mask_self=mask_self)


def _softmax_form(similarity: Tensor, *, tau: float, w: float, tau_d: float, mask_self: bool) -> Tensor:
    start = _row_softmax(similarity, tau, mask_self)
    # Rounding can leave a tiny negative entry, which has no logarithm.
    target = diffuse(transition_matrix(similarity, tau_d=tau_d), start, w=w).clamp_(min=0)
    if mask_self:
        target.fill_diagonal_(0)
    # The solve's rounding grows with 1 / (1 - w): without this, rows would not sum to 1 and the divergence would be off.
    return target.div_(target.sum(dim=1, keepdim=True))


def _symmetric_form(similarity: Tensor, *, tau: float, w: float, tau_d: float, mask_self: bool) -> Tensor:
    affinity = symmetric_affinity(similarity.clamp(min=0))
    isolated = (affinity == 0).all(dim=1, keepdim=True)
    return _row_softmax(torch.where(isolated, similarity, diffuse(affinity, similarity, w=w)), tau, mask_self)


FORMS: dict[str, Callable[..., Tensor]] = {"softmax": _softmax_form, "symmetric": _symmetric_form}


def transition_matrix(similarity: Float[Tensor, "b b"], *, tau_d: float) -> Float[Tensor, "b b"]:
    """Return the step probabilities of the walk: the row softmax of similarity / tau_d without the diagonal; b > 1."""
    return _row_softmax(similarity, tau_d, mask_self=True)


def symmetric_affinity(similarity: Float[Tensor, "b b"]) -> Float[Tensor, "b b"]:
    """Return D^-1/2 A D^-1/2: A is similarity with a zero diagonal, D = diag(row sums of A).

    A row whose degree is not positive becomes 0, and its column too. The eigenvalues lie in [-1, 1] if no entry is
    negative. Otherwise they are not bounded, and the diffusion's system may be singular; hence the clipping in
    diffusion_target. Source: OBD-SD (arXiv 2211.07566); the paper does not say whether it clips.
    """
    affinity = similarity.clone().fill_diagonal_(0)
    degree = affinity.sum(dim=1)
    scale = torch.where(degree > 0, (degree + DEGREE_EPS).rsqrt(), 0.0)
    return affinity * scale[:, None] * scale


def diffuse(matrix: Float[Tensor, "b b"], values: Float[Tensor, "b c"], *, w: float) -> Float[Tensor, "b c"]:
    """Return (1-w) (I - w matrix)^-1 values, the limit of values' <- w matrix values' + (1-w) values, by one solve."""
    system = matrix * -w
    system.diagonal().add_(1)
    # solve_ex without checking the result: a check would wait for the device.
    return torch.linalg.solve_ex(system, values * (1 - w), check_errors=False).result


def distillation_kl(
    z: Float[Tensor, "b e"], target: Float[Tensor, "b b"], *, tau: float, mask_self: bool
) -> Float[Tensor, ""]:
    """Return the mean over rows of KL(target || the row softmax of the student's cosines / tau), in nats.

    Gradients reach z alone. mask_self: leave the diagonal out, as in the target.
    Source: OBD-SD (arXiv 2211.07566). The gradient is (G + G^T) z with G = (softmax - target) / (tau b).
    """
    with torch.autocast(z.device.type, enabled=False):
        logits = _without_self(_similarity(z) / tau, mask_self)
        log_q = F.log_softmax(logits, dim=1)
        if mask_self and len(z) > 1:
            log_q = log_q.masked_fill(_diagonal(log_q), 0.0)  # not -inf: 0 * inf is not a number
        return F.kl_div(log_q, target.detach().to(log_q.dtype), reduction="batchmean")


def ramp(epoch: int, epochs: int, *, weight: float, tau: float) -> float:
    """Return the weight of distillation_kl in a zero-based epoch: epoch / epochs * weight * tau^2, so 0 in the first."""
    return epoch / epochs * weight * tau**2


@torch.no_grad()
def target_statistics(
    target: Float[Tensor, "b b"], undiffused: Float[Tensor, "b b"]
) -> dict[str, Float[Tensor, ""]]:
    """Return how flat a target is and how far the diffusion moved it, for the log.

    'target_entropy': mean entropy of a row / ln b; 1 = uniform, the loss then only asks for equal similarities.
    'target_self': mean probability of the image itself; near 1 where a tau below 0.5 calls for mask_self.
    'target_shift': ||target - undiffused|| / ||undiffused|| (Frobenius); undiffused: similarity_target.
    """
    entropy = -torch.xlogy(target, target).sum(dim=1).mean() / math.log(max(len(target), 2))
    shift = torch.linalg.matrix_norm(target - undiffused) / torch.linalg.matrix_norm(undiffused)
    return {"target_entropy": entropy, "target_self": target.diagonal().mean(), "target_shift": shift}


def check_settings(*, tau: float, batch_size: int, w: float | None, tau_d: float, mask_self: bool) -> None:
    """Raise UserError for meaningless settings. w None: no diffusion (PSD); batch_size: the global batch."""
    for name, value in (("tau", tau), ("tau_d", tau_d)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value}: expected a temperature above 0, such as 1.0")
    if w is not None and not 0 <= w <= LARGEST_W:
        raise UserError(
            f"w is {w}: expected 0 to {LARGEST_W} (at 1 the diffusion's system is singular); use 0.3 to 0.99"
        )
    need = 2 if w is None and not mask_self else 3
    if batch_size < need:
        raise UserError(
            f"batch_size is {batch_size}: expected {need} or more, to compare similarities within the batch"
        )


def _similarity(z: Tensor) -> Tensor:
    """Return the cosines of all pairs of rows, in float32 or better."""
    wide = widened(z)
    return wide @ wide.T


def _row_softmax(similarity: Tensor, tau: float, mask_self: bool) -> Tensor:
    return torch.softmax(_without_self(similarity / tau, mask_self), dim=1)


def _without_self(logits: Tensor, mask_self: bool) -> Tensor:
    """Return the logits with -inf on the diagonal, if mask_self; a single row stays, as it has no other candidate."""
    if not mask_self or len(logits) == 1:
        return logits
    return logits.masked_fill(_diagonal(logits), -math.inf)


def _diagonal(matrix: Tensor) -> Tensor:
    return torch.eye(len(matrix), dtype=torch.bool, device=matrix.device)
