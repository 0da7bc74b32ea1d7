"""The story of the doctor: before the first run on a new machine or cluster, look at all that would make it fail."""

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glsd.cluster.interface import choose_interface
from glsd.doctor import (
    clock as doctor_clock,
)
from glsd.doctor import (
    devices as doctor_devices,
)
from glsd.doctor import (
    files as doctor_files,
)
from glsd.doctor import (
    launch as doctor_launch,
)
from glsd.doctor import (
    network as doctor_network,
)
from glsd.doctor import (
    packages as doctor_packages,
)
from glsd.doctor.arrival import arrive, part, twice
from glsd.doctor.line import Line
from glsd.doctor.panel import (
    SLACK,
    Lost,
    Panel,
    bounded,
)
from glsd.errors import one_line

QUICK = 20.0  # seconds for a check that takes none
DEVICE_SECONDS = 90.0  # the first use of a GPU on a busy host


def examine(
    packages: dict[str, Any],
    *,
    shards: Sequence[str] = (),
    out: str = "",
    wait: float = doctor_packages.ARRIVE_SECONDS,
    clock: Callable[[], float] = time.time,
) -> tuple[int, Panel, dict[str, Any]]:
    """Make all checks together with the other ranks; returns the exit code, rank 0's table and details for machines.

    packages: doctor_packages.facts of this rank; wait: seconds in which all ranks must have come; clock: this rank's.
    Every check is bounded: a rank that hangs or dies is named and left out of the next ones. Raises Lost on a rank that
    has no rank 0 to answer to.
    """
    mistakes = doctor_launch.silent_mistakes()
    rank, world = (0, 1) if mistakes else doctor_launch.announced()
    panel = Panel(rank=rank, world=world, lines=mistakes)
    if world > 1:
        panel.store = arrive(rank, wait)
    try:
        details = all_checks(panel, packages, shards, out, wait, clock)
    except Lost:
        if panel.store is not None and rank not in panel.alive:
            with contextlib.suppress(RuntimeError):  # rank 0 may be gone as well
                part(panel)  # a launcher that loses one rank would end its neighbors
        raise
    code = panel.tell("code", lambda: int(any(line.verdict == "FIX" for line in panel.lines)))
    part(panel)
    return code, panel, details


def all_checks(
    panel: Panel,
    packages: dict[str, Any],
    shards: Sequence[str],
    out: str,
    wait: float,
    clock: Callable[[], float],
) -> dict[str, Any]:
    """Go through all checks; returns details for machines, on rank 0."""
    arrived = panel.ask("arrive", lambda: {"packages": packages, "place": doctor_launch.facts()}, wait)
    values = {rank: answer.value for rank, answer in sorted(arrived.items()) if answer.value}
    places = {rank: value["place"] for rank, value in values.items()}
    if panel.world > 1:
        panel.hosts = doctor_launch.host_names(places)
    devices = devices_of(panel)
    details: dict[str, Any] = {}
    if panel.rank == 0:
        names = {rank: doctor_devices.short_name(here) for rank, here in devices.items()}
        details["ranks"] = doctor_launch.rank_map(places, names)
        lines = doctor_packages.judge({rank: v["packages"] for rank, v in values.items()}, panel.hosts)
        if not panel.lines:  # of the launch line, which is wrong already
            lines += doctor_launch.judge(places, panel.world, panel.hosts)
        panel.lines += lines + twice(panel)
        if devices:
            panel.lines += doctor_devices.judge(devices, panel.hosts)
    if panel.world > 1:
        details["links"] = network(panel, places, devices)
        clocks(panel, clock)
    files(panel, out)
    if shards:
        data(panel, shards)
    return details


def devices_of(panel: Panel) -> dict[int, Any]:
    """Return what each rank computes on, on rank 0; a driver that hangs does so here."""
    answers = panel.ask("device", doctor_devices.facts, DEVICE_SECONDS)
    return panel.sort_out("device", answers, "see whether nvidia-smi answers there; else restart that host")


def network(panel: Panel, places: dict[int, Any], devices: dict[int, Any]) -> list[dict[str, Any]]:
    """Sums over all ranks and messages between hosts; only where all are there, as one that is missing would block them."""

    def plan() -> dict[str, Any]:
        leaders = [ranks[0] for ranks in doctor_launch.by_host(places).values()]
        local = {rank: place["local_rank"] for rank, place in places.items()}
        gpu = all(here["cuda"]["count"] > local[rank] for rank, here in devices.items())
        whole = len(panel.alive) == panel.world == len(devices) and not twice(panel)
        return {"go": whole, "leaders": leaders, "gpu": gpu}

    agreed = panel.tell("plan", plan)
    if not agreed["go"]:
        skipped = Line(
            "note", "all-reduce", "not tried: not all ranks are there", "mend the lines above first"
        )
        panel.lines.append(skipped)
        return []
    store, rank, world = panel.store.clone(), panel.rank, panel.world

    def work() -> dict[str, Any]:
        if len(agreed["leaders"]) > 1:
            choose_interface()  # as a run does
        return doctor_network.measure(
            store, rank=rank, world=world, leaders=agreed["leaders"], gpu=agreed["gpu"]
        )

    answers = panel.ask("network", work, doctor_network.SECONDS)
    fix = "let hosts reach each other on all ports (firewall), name the interface with GLOO_SOCKET_IFNAME/NCCL_SOCKET_IFNAME"
    found = panel.sort_out("all-reduce", answers, fix)
    if len(found) == world:
        panel.lines += doctor_network.judge(found, panel.hosts)
    return doctor_network.link_rows(found, panel.hosts)


def clocks(panel: Panel, clock: Callable[[], float]) -> None:
    """One rank of each host compares its clock with rank 0's."""

    def choose() -> list[int]:
        firsts: dict[str, int] = {}
        for rank in panel.alive:
            firsts.setdefault(panel.hosts[rank], rank)
        return [rank for rank in firsts.values() if rank]

    asked, store = panel.tell("clocks", choose), panel.store.clone()
    answers = panel.ask(
        "clock",
        lambda: doctor_clock.compare(store, clock, rank=panel.rank, asked=asked),
        doctor_clock.SECONDS,
    )
    found = panel.sort_out("clock", answers, "see the lines about the network")
    ahead = {rank: seconds for rank, seconds in found.items() if seconds is not None}
    if panel.rank == 0 and ahead:
        panel.lines.append(doctor_clock.judge(ahead, panel.hosts))


def files(panel: Panel, out: str) -> None:
    """The run folder, shared by all ranks, and the cache of each host."""
    disks = panel.ask("disk", lambda: doctor_files.disks(out), QUICK)
    found = panel.sort_out("disk", disks, "that disk does not answer: mount it again")
    if panel.rank == 0 and found:
        panel.lines += doctor_files.judge_disks(found, panel.hosts)
    if not out:
        what = "not looked at" if panel.world == 1 else "not looked at: all hosts must see one run folder"
        panel.lines.append(Line("note", "out", what, "give --out FOLDER, where runs are to be"))
        return
    token = secrets.token_hex(8)
    prepared = panel.ask(
        "prepare", lambda: None if panel.rank else doctor_files.prepare(Path(out), token), QUICK
    )
    start = panel.sort_out("shared out", prepared, "make --out writable, or give another")
    ours = start.get(0) or {"folder": "", "made": []}
    folder, token = panel.tell("folder", lambda: [ours["folder"], token])
    if not folder:
        return
    try:
        share(panel, Path(folder), token, out)
    finally:
        if panel.rank == 0:
            # Shorter than the others wait for what rank 0 has to say next.
            cleaned = bounded(lambda: doctor_files.clean(ours["made"]), SLACK)
            if cleaned.error:
                fix = f"remove {folder} by hand once that disk answers"
                panel.lines.append(Line("FIX", "out disk", f"{out}: cannot clean up: {cleaned.error}", fix))


def share(panel: Panel, folder: Path, token: str, out: str) -> None:
    """What all ranks see in the folder that rank 0 made."""
    bound = doctor_files.SEE_SECONDS + SLACK
    fix = "that disk does not answer on these hosts: mount it again"
    seen = panel.sort_out(
        "shared out", panel.ask("see", lambda: doctor_files.see(folder, token, panel.rank), bound), fix
    )
    alike = panel.tell("alike", lambda: [rank for rank, here in seen.items() if here["seen"]])
    if panel.world > 1:
        back = panel.ask(
            "back", lambda: [] if panel.rank else doctor_files.seen_back(folder, token, alike), bound
        )
        missing = panel.sort_out("shared out", back, fix).get(0, [])
        if panel.rank == 0 and seen:
            panel.lines += doctor_files.judge_sharing(seen, missing, out, panel.hosts)

        def take_turns() -> dict[str, Any] | None:
            mine = panel.rank in alike and len(alike) > 1
            return doctor_files.turns(folder, panel.rank) if mine else None

        turned = panel.sort_out("rename", panel.ask("turns", take_turns, bound), fix)
        panel.lines += doctor_files.judge_turns({r: here for r, here in turned.items() if here}, panel.hosts)
    wrote = panel.ask("write", lambda: None if panel.rank else doctor_files.write_speed(folder), 60.0)
    found = panel.sort_out("out write", wrote, "a disk that writes 64 MB in a minute, or another --out")
    if found.get(0):
        panel.lines.append(doctor_files.judge_speed(found[0]))


def data(panel: Panel, shards: Sequence[str]) -> None:
    """The shards, as every rank sees them; where packages are missing, that was said already."""
    try:
        # Only here: what it imports may be broken, and the other checks can do without.
        from glsd.doctor.shards import read_shards
    except ImportError as problem:
        panel.ask("shards", lambda: None, QUICK)
        skipped = f"not looked at: {one_line(problem)}"
        panel.lines.append(Line("note", "shards", skipped, "mend the lines about packages first"))
        return
    read_shards(panel, shards)
