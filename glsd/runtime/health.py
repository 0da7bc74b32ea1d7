"""Health rules: warnings about unhealthy metrics, each with the setting to change."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One warning; its ``kind`` is the same in every row, so that a run can print each once."""

    kind: str
    line: str


def check(
    metrics: Mapping[str, Any],
    *,
    num_prototypes: int,
    embed_dim: int,
    early: bool = False,
) -> list[Finding]:
    """Return the warnings about one row of metrics.

    metrics: any of loss, global_loss, local_loss (cross-entropies in nats, unweighted), global_teacher_entropy,
    local_teacher_entropy (nats), matched_share (0..1), grad_norm, rankme, and timing with data_wait (0..1). Missing ones
    are skipped. num_prototypes: k, the uniform distribution has entropy ln k. embed_dim: width of the features of rankme.
    early: True during the warm-up, when a network may still look uniform or change wildly.
    """
    findings = _non_finite(metrics)
    # Without matches the local loss is 0 and says nothing.
    parts = ("global", "local") if metrics.get("matched_share", 1.0) > 0.01 else ("global",)
    for part in parts:
        findings += _collapse(
            part, metrics.get(f"{part}_loss"), metrics.get(f"{part}_teacher_entropy"), num_prototypes, early
        )
    findings += _matched(metrics.get("matched_share"))
    findings += _gradient(metrics.get("grad_norm"), early)
    findings += _rank(metrics.get("rankme"), embed_dim, early)
    findings += _data_wait(metrics.get("timing", {}).get("data_wait"), early)
    return findings


def _non_finite(metrics: Mapping[str, Any]) -> list[Finding]:
    bad = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if not bad:
        return []
    line = (
        f"{', '.join(bad)} not finite: go back to the last checkpoint and lower lr or clip_grad; "
        "if it comes back, try precision no"
    )
    return [Finding("non_finite", line)]


def _collapse(
    part: str, loss: int | float | None, entropy: int | float | None, num_prototypes: int, early: bool
) -> list[Finding]:
    uniform = math.log(num_prototypes)
    if loss is None or early or num_prototypes < 2:
        return []
    if abs(loss - uniform) < 0.005 * uniform:
        if entropy is not None and entropy > 0.98 * uniform:
            line = (
                f"{part} loss {loss:.4f} = ln k = {uniform:.4f} and teacher entropy {entropy:.4f}: uniform collapse, "
                "every image gets the same flat answer; lower teacher_temp and warmup_teacher_temp"
            )
            return [Finding(f"{part}_uniform_collapse", line)]
        line = (
            f"{part} loss {loss:.4f} stays at ln k = {uniform:.4f}: the student has not learned to answer yet; "
            "raise lr, or for a small network set batch_norm true or lower num_prototypes"
        )
        return [Finding(f"{part}_stuck", line)]
    if entropy is not None and loss < 0.01 * uniform and entropy < 0.01 * uniform:
        line = (
            f"{part} loss {loss:.4f} and teacher entropy {entropy:.4f} are near 0: one-point collapse, every image gets "
            "the same prototype; use centering sinkhorn, lower center_momentum or raise teacher_temp"
        )
        return [Finding(f"{part}_one_point_collapse", line)]
    return []


def _matched(share: int | float | None) -> list[Finding]:
    if share is None or share >= 0.2:
        return []
    line = (
        f"only {share:.0%} of the patches found a match, crops hardly overlap: raise global_scale and "
        "local_scale, raise hinge_factor, or set hinge false"
    )
    return [Finding("few_matches", line)]


def _gradient(norm: int | float | None, early: bool) -> list[Finding]:
    if norm is None or not math.isfinite(norm):
        return []
    if norm < 1e-8:
        line = (
            f"gradient norm {norm:.1e}: nothing is learned; check that global_weight and local_weight are "
            "not 0 and that hinge leaves matches"
        )
        return [Finding("no_gradient", line)]
    if norm > 1e3 and not early:
        line = (
            f"gradient norm {norm:.1e}: training is about to diverge; lower lr or clip_grad, "
            "or raise warmup_epochs"
        )
        return [Finding("exploding_gradient", line)]
    return []


def _rank(value: int | float | None, embed_dim: int, early: bool) -> list[Finding]:
    if value is None or early or not math.isfinite(value) or value >= 0.05 * embed_dim:
        return []
    line = (
        f"RankMe {value:.1f} of {embed_dim}: the features use few directions (dimensional collapse); "
        "lower lr, raise batch_size or teacher_momentum, or use centering sinkhorn"
    )
    return [Finding("low_rank", line)]


def _data_wait(share: int | float | None, early: bool) -> list[Finding]:
    if share is None or early or share <= 0.1:
        return []
    line = (
        f"{share:.0%} of the time goes into waiting for data: raise num_workers, or pack smaller images "
        "(resize the photographs before launch/pack.py)"
    )
    return [Finding("data_wait", line)]
