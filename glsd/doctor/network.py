"""Whether sums over ranks are right, how long they take, and which link between two hosts is slow."""

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from glsd.cluster import dist
from glsd.doctor.launch import local_rank
from glsd.doctor.line import Line, ranges

JOIN_SECONDS = 30.0  # to connect all ranks, and for each single message
LINKS_SECONDS = 8.0  # for all rounds together
SECONDS = 2 * JOIN_SECONDS + LINKS_SECONDS + 20.0  # for the whole check
TRANSFER_SECONDS = 0.3  # at most, for one message
SMALLEST, LARGEST = 1 << 18, 1 << 26  # bytes of one message
FIRST = 1 << 20  # bytes of the first sum, whose time sets the size of the next
REPEATS = 20
SLOW = 1 / 3  # of the usual speed of a link
ALIKE = 5.0  # links within this factor of the slowest have its cause
FEW_HOSTS = 4
POOR = 100e6  # bytes per second: the gradients of a ViT-S take about a second


def measure(store: Any, *, rank: int, world: int, leaders: Sequence[int], gpu: bool) -> dict[str, Any]:
    """Measure sums and links together with all other ranks, which call it too; return JSON for ``judge``.

    leaders: one rank of each host. They measure the links between all pairs of hosts, in rounds in which each host is in one pair.
    """
    device = torch.device("cuda", local_rank()) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    began = time.monotonic()
    dist.join(store, device=device, rank=rank, world_size=world, seconds=JOIN_SECONDS)
    # Integers below 2^24: their float32 sum is exact in any order.
    ramp = torch.arange(1000, device=device, dtype=torch.float32) % 7
    total = dist.all_reduce_sum(ramp * (rank + 1))
    found: dict[str, Any] = {
        "connected": time.monotonic() - began,
        "right": bool(torch.equal(total, ramp * (world * (world + 1) // 2))),
        "latency": statistics.median(_sum_seconds(device, 4) for _ in range(REPEATS)),
    }
    slowest = dist.all_reduce_max(torch.tensor([_sum_seconds(device, FIRST)], device=device)).item()
    found["bytes"] = int(min(max(FIRST / slowest, FIRST), LARGEST))
    found["seconds"] = min(_sum_seconds(device, found["bytes"]) for _ in range(2))
    rate = float(
        dist.all_reduce_max(torch.tensor([-found["bytes"] / found["seconds"]], device=device)).item()
    )
    return found | _links(rank, leaders, -rate, device)


def _sum_seconds(device: torch.device, size: int) -> float:
    numbers = torch.ones(size // 4, device=device)
    began = time.perf_counter()
    dist.all_reduce_sum(numbers)[0].item()
    return time.perf_counter() - began


def rounds(players: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return all pairs of players in rounds; each player is in at most one pair of a round (round robin)."""
    circle: list[int | None] = [*players, *([None] if len(players) % 2 else [])]
    half, plan = len(circle) // 2, []
    for _ in range(len(circle) - 1):
        pairs = zip(circle[:half], reversed(circle[half:]), strict=True)
        plan.append([(min(a, b), max(a, b)) for a, b in pairs if a is not None and b is not None])
        circle = [circle[0], circle[-1], *circle[1:-1]]
    return plan if len(players) > 1 else []


def _links(rank: int, leaders: Sequence[int], rate: float, device: torch.device) -> dict[str, Any]:
    """Measure the links of this rank; rate: bytes per second of a sum over all ranks, a first guess."""
    plan = rounds(leaders)
    seconds = min(TRANSFER_SECONDS, LINKS_SECONDS / max(1, len(plan)) / 4)
    size = int(min(max(rate * seconds, SMALLEST), LARGEST))
    speeds, began, done = [], time.monotonic(), 0
    for pairs in plan:
        mine = [pair for pair in pairs if rank in pair]
        for one, other in mine:
            _message(rank, one, other, FIRST // 16, device)  # connects
            for source, target in ((one, other), (other, one)):
                took = _message(rank, source, target, size, device)
                if rank == source:
                    speeds.append([source, target, size / took])
        done += 1
        spent = torch.tensor([time.monotonic() - began], device=device)
        if dist.all_reduce_max(spent).item() > LINKS_SECONDS:
            break
    return {"links": speeds, "rounds": [done, len(plan)]}


def _message(rank: int, source: int, target: int, size: int, device: torch.device) -> float:
    """The seconds from sending to the receipt, a message back: what is sent may still wait in a buffer."""
    numbers, receipt = torch.zeros(size // 4, device=device), torch.zeros(1, device=device)
    began = time.perf_counter()
    if rank == source:
        dist.send(numbers, target)
        dist.receive(receipt, target)
    else:
        dist.receive(numbers, source)
        dist.send(receipt, source)
    receipt.item()
    return time.perf_counter() - began


def judge(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Line]:
    """Return the lines about sums over ranks and about links, from the measurements of each rank."""
    wrong = [rank for rank, here in found.items() if not here["right"]]
    if wrong:
        fix = "numbers arrive changed: for GPUs try NCCL_P2P_DISABLE=1 and NCCL_IB_DISABLE=1 in turn, else the network card"
        return [Line("FIX", "all-reduce", f"a wrong sum on rank {ranges(wrong)}", fix)]
    slowest = max(found.values(), key=lambda here: here["seconds"])
    rate = slowest["bytes"] / slowest["seconds"]
    latency = max(here["latency"] for here in found.values())
    said = (
        f"right; a sum of {slowest['bytes'] / 1e6:.1f} MB over {len(found)} ranks takes {slowest['seconds'] * 1e3:.1f} ms "
        f"({rate / 1e6:,.0f} MB/s), a small one {latency * 1e3:.2f} ms"
    )
    lines = [Line("ok", "all-reduce", said)]
    if rate < POOR:
        seconds = 88e6 / rate
        fix = f"a ViT-S waits {seconds:.1f} s per step for it: set grad_compression bf16, or a larger batch_size"
        lines = [Line("note", "all-reduce", said, fix)]
    speeds = {(a, b): speed for here in found.values() for a, b, speed in here["links"]}
    if speeds:
        lines.append(judge_links(speeds, hosts, *min(tuple(here["rounds"]) for here in found.values())))
    return lines


def judge_links(
    speeds: Mapping[tuple[int, int], float], hosts: Mapping[int, str], done: int, planned: int
) -> Line:
    """Return the line about links; speeds: bytes per second by (from, to); done: rounds, of those planned."""
    ordered = sorted(speeds.values())
    members = {rank for pair in speeds for rank in pair}
    # With four hosts half of the links are a bad host's, and the median would be one of them.
    usual = ordered[(len(ordered) * 3 - 1) // 4] if len(members) <= FEW_HOSTS else statistics.median(ordered)
    said = f"{len(speeds)} links" + (
        "" if done == planned else f" ({done} of {planned} rounds, then time was up)"
    )

    def name(pair: tuple[int, int]) -> str:
        return f"{hosts[pair[0]]} to {hosts[pair[1]]}"

    worst = min(speeds, key=lambda pair: speeds[pair])
    slow = sorted((pair for pair in speeds if speeds[pair] < SLOW * usual), key=lambda pair: speeds[pair])
    if not slow:
        both = f"slowest {name(worst)} {speeds[worst] / 1e6:,.0f} MB/s, usual {usual / 1e6:,.0f} MB/s"
        return Line("ok", "links", f"{said}: {both}")
    shown = ", ".join(f"{name(pair)} {speeds[pair] / 1e6:,.1f} MB/s" for pair in slow[:4])
    more = f" and {len(slow) - 4} more" if len(slow) > 4 else ""
    # What slows a link tenfold is not what slows another to a third: only links as slow as the slowest are of one cause.
    common = set(slow[0]).intersection(*(pair for pair in slow if speeds[pair] < ALIKE * speeds[slow[0]]))
    where = " and ".join(hosts[rank] for rank in sorted(common)) or "the switch between them"
    fix = f"look at the card, cable or other traffic of {where} (ethtool INTERFACE), or leave it out (SLURM: --exclude)"
    return Line(
        "FIX", "links", f"{said}; much slower than the usual {usual / 1e6:,.0f} MB/s: {shown}{more}", fix
    )


def link_rows(found: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return one row for each measured direction, for machines."""
    links = [link for here in found.values() for link in here["links"]]
    return [{"from": hosts[a], "to": hosts[b], "megabytes_per_second": speed / 1e6} for a, b, speed in links]
