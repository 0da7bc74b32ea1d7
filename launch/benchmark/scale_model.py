"""The cost model of a step on several ranks: step = compute + communication that nothing hides."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# What one rank sends of a whole tensor, in units of (ranks - 1) / ranks, when the ranks form a ring.
ROUNDS = {"all-reduce": 2, "all-gather": 1, "reduce-scatter": 1}


@dataclass(frozen=True)
class Link:
    """What a kind of collective takes: latency_s for a call of next to nothing, and bytes a rank sends in a second."""

    latency_s: float
    bandwidth: float


def ring_bytes(kind: str, whole: float, ranks: int) -> float:
    """Return the bytes that each rank sends in collectives of this kind over ``whole`` bytes."""
    return ROUNDS.get(kind, 0) * (ranks - 1) / ranks * whole


def link_of(kind: str, measured: Mapping[str, float], ranks: int) -> Link:
    """Return the link that an empty and a full collective show."""
    rest = max(measured["full_s"] - measured["empty_s"], 1e-9)
    return Link(measured["empty_s"], ring_bytes(kind, measured["bytes"], ranks) / rest)


def communication_s(calls: Mapping[str, Mapping[str, float]], links: Mapping[str, Link], ranks: int) -> float:
    """Return the seconds of these collectives one after the other; calls: kind -> calls and bytes."""
    return sum(
        each["calls"] * links[kind].latency_s + ring_bytes(kind, each["bytes"], ranks) / links[kind].bandwidth
        for kind, each in calls.items()
        if kind in links
    )


def step_s(
    *,
    compute_s: float,
    threads: int,
    cores: float,
    communication_s: float,
    hideable_s: float,
) -> float:
    """Return the seconds of a step.

    compute_s: of one rank that has the machine for itself; threads: that all ranks of one machine keep busy; cores: of that
    machine; hideable_s: of the compute, what can go on while others' bytes arrive. Where every core is taken nothing is
    hidden, because moving bytes takes a core as well.
    """
    crowd = max(1.0, threads / cores)
    hidden = min(communication_s, hideable_s) if threads < cores else 0.0
    return compute_s * crowd + communication_s - hidden


def expected_bytes(way: str, sizes: Mapping[str, Any]) -> dict[str, float]:
    """Return the bytes by kind that a step of float32 parameters should move; way: 'ddp', 'ddp bf16' or 'fsdp'.

    DDP reduces every gradient once. Parts gather the blocks for each pass of the student (one a resolution), forward and
    backward, and once for the teacher, what is outside of blocks once for each network; every gradient is reduced once.
    Beside these travel the means of the teacher's logits and, in parts, the gradients' norms.
    """
    small = 4 * sizes["logits"]
    if way.startswith("ddp"):
        return {"all-reduce": sizes["trained"] * (2 if way.endswith("bf16") else 4) + small}
    blocks, passes = sizes["block_parameters"], sizes["passes"]
    rest = sizes["parameters"] - blocks
    return {
        "all-reduce": small + 8 * sizes["tensors"],  # squares of norms are in float64
        "all-gather": 4 * (blocks * (2 * passes + 1) + 2 * rest),
        "reduce-scatter": 4 * sizes["trained"],
    }
