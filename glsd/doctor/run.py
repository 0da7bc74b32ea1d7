"""The doctor's checks in order: everything that would make the first run on a new machine or cluster fail."""

import contextlib
import secrets
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glsd.cluster.launch import choose_interface
from glsd.doctor import clock, devices, files, launch, network, packages
from glsd.doctor.arrival import arrive, part, twice
from glsd.doctor.line import Line
from glsd.doctor.panel import SLACK, Lost, Panel, bounded
from glsd.errors import one_line

QUICK = 20.0  # seconds for a check that should take no time
DEVICE_SECONDS = 90.0  # the first use of a GPU on a busy host


def examine(
    installed: dict[str, Any],
    *,
    shards: Sequence[str],
    out: str,
    wait: float,
    now: Callable[[], float] = time.time,
) -> tuple[int, Panel, dict[str, Any]]:
    """Make all checks together with the other ranks; return the exit code, the panel with rank 0's table, details for machines.

    installed: ``packages.facts()`` of this rank. shards: patterns, may be empty. out: the folder of runs, "" to leave it out.
    wait: seconds in which all ranks must arrive. now: this rank's clock. Every check is bounded: a rank that hangs or dies is
    named and left out of the later checks. Raises Lost on a rank that has lost rank 0.
    """
    mistakes = launch.silent_mistakes()
    rank, world = (0, 1) if mistakes else launch.announced()
    panel = Panel(rank=rank, world=world, lines=mistakes)
    if world > 1:
        panel.store = arrive(rank, wait)
    try:
        details = check_ranks(panel, installed, wait)
        if world > 1:
            check_clocks(panel, now)
        check_files(panel, out)
        if shards:
            check_shards(panel, shards)
    except Lost:
        if panel.store is not None and rank not in panel.alive:
            with contextlib.suppress(RuntimeError):  # rank 0 may be gone as well
                part(panel)  # a launcher that loses one rank would end its neighbors
        raise
    code = panel.tell("code", lambda: int(any(line.verdict == "FIX" for line in panel.lines)))
    part(panel)
    return code, panel, details


def check_ranks(panel: Panel, installed: dict[str, Any], wait: float) -> dict[str, Any]:
    """Check packages, launch line, devices and network of all ranks; return details for machines, on rank 0."""
    arrived = panel.ask("arrive", lambda: {"packages": installed, "place": launch.facts()}, wait)
    values = {rank: answer.value for rank, answer in sorted(arrived.items()) if answer.value}
    places = {rank: value["place"] for rank, value in values.items()}
    if panel.world > 1:
        panel.hosts = launch.host_names(places)
    answers = panel.ask("device", devices.facts, DEVICE_SECONDS)  # where a driver hangs
    fix = "see whether nvidia-smi answers there; else restart that host"
    found = panel.sort_out("device", answers, fix)
    details: dict[str, Any] = {}
    if panel.rank == 0:
        names = {rank: devices.short_name(here) for rank, here in found.items()}
        details["ranks"] = launch.rank_map(places, names)
        lines = packages.judge({rank: value["packages"] for rank, value in values.items()}, panel.hosts)
        if not panel.lines:  # otherwise the launch line is known to be wrong
            lines += launch.judge(places, panel.world, panel.hosts)
        panel.lines += lines + twice(panel)
        if found:
            panel.lines += devices.judge(found, panel.hosts)
    if panel.world > 1:
        details["links"] = check_network(panel, places, found)
    return details


def check_network(panel: Panel, places: dict[int, Any], on_devices: dict[int, Any]) -> list[dict[str, Any]]:
    """Measure sums over all ranks and messages between hosts; only if all ranks are there, as a missing one blocks the rest."""

    def plan() -> dict[str, Any]:
        leaders = [ranks[0] for ranks in launch.by_host(places).values()]
        local = {rank: place["local_rank"] for rank, place in places.items()}
        gpu = all(here["cuda"]["count"] > local[rank] for rank, here in on_devices.items())
        complete = len(panel.alive) == panel.world == len(on_devices) and not twice(panel)
        return {"go": complete, "leaders": leaders, "gpu": gpu}

    agreed = panel.tell("plan", plan)
    if not agreed["go"]:
        panel.lines.append(
            Line("note", "all-reduce", "not measured: not all ranks are there", "fix the lines above first")
        )
        return []
    store, rank, world = panel.store.clone(), panel.rank, panel.world

    def measure() -> dict[str, Any]:
        if len(agreed["leaders"]) > 1:
            choose_interface()  # as a run does
        return network.measure(store, rank=rank, world=world, leaders=agreed["leaders"], gpu=agreed["gpu"])

    answers = panel.ask("network", measure, network.SECONDS)
    fix = "let hosts reach each other on all ports (firewall), name the interface with GLOO_SOCKET_IFNAME/NCCL_SOCKET_IFNAME"
    found = panel.sort_out("all-reduce", answers, fix)
    if len(found) == world:
        panel.lines += network.judge(found, panel.hosts)
    return network.link_rows(found, panel.hosts)


def check_clocks(panel: Panel, now: Callable[[], float]) -> None:
    """Compare the clock of one rank of each host with rank 0's."""

    def choose() -> list[int]:
        firsts: dict[str, int] = {}
        for rank in panel.alive:
            firsts.setdefault(panel.hosts[rank], rank)
        return [rank for rank in firsts.values() if rank]

    asked, store = panel.tell("clocks", choose), panel.store.clone()
    answers = panel.ask(
        "clock", lambda: clock.compare(store, now, rank=panel.rank, asked=asked), clock.SECONDS
    )
    found = panel.sort_out("clock", answers, "see the lines about the network")
    ahead = {rank: seconds for rank, seconds in found.items() if seconds is not None}
    if panel.rank == 0 and ahead:
        panel.lines.append(clock.judge(ahead, panel.hosts))


def check_files(panel: Panel, out: str) -> None:
    """Check the run folder, which all ranks share, and the cache of each host."""
    disks = panel.ask("disk", lambda: files.disks(out), QUICK)
    found = panel.sort_out("disk", disks, "that disk does not answer: mount it again")
    if panel.rank == 0 and found:
        panel.lines += files.judge_disks(found, panel.hosts)
    if not out:
        what = "not checked" if panel.world == 1 else "not checked: all hosts must see one run folder"
        panel.lines.append(Line("note", "out", what, "give --out FOLDER, the folder of your runs"))
        return
    token = secrets.token_hex(8)
    prepared = panel.ask("prepare", lambda: None if panel.rank else files.prepare(Path(out), token), QUICK)
    start = panel.sort_out("shared out", prepared, "make --out writable, or give another")
    ours = start.get(0) or {"folder": "", "made": []}
    folder, token = panel.tell("folder", lambda: [ours["folder"], token])
    if not folder:
        return
    try:
        check_sharing(panel, Path(folder), token, out)
    finally:
        if panel.rank == 0:
            # The other ranks wait longer than this for rank 0's next word.
            cleaned = bounded(lambda: files.clean(ours["made"]), SLACK)
            if cleaned.error:
                fix = f"remove {folder} by hand once that disk answers"
                panel.lines.append(Line("FIX", "out disk", f"{out}: cannot clean up: {cleaned.error}", fix))


def check_sharing(panel: Panel, folder: Path, token: str, out: str) -> None:
    """Check that all ranks share the folder that rank 0 made, and how fast it is written."""
    bound = files.SEE_SECONDS + SLACK
    fix = "that disk does not answer on these hosts: mount it again"
    seen = panel.sort_out(
        "shared out", panel.ask("see", lambda: files.see(folder, token, panel.rank), bound), fix
    )
    sharing = panel.tell("alike", lambda: [rank for rank, here in seen.items() if here["seen"]])
    if panel.world > 1:
        back = panel.ask("back", lambda: [] if panel.rank else files.seen_back(folder, token, sharing), bound)
        missing = panel.sort_out("shared out", back, fix).get(0, [])
        if panel.rank == 0 and seen:
            panel.lines += files.judge_sharing(seen, missing, out, panel.hosts)

        def take_turns() -> dict[str, Any] | None:
            mine = panel.rank in sharing and len(sharing) > 1
            return files.turns(folder, panel.rank) if mine else None

        turned = panel.sort_out("rename", panel.ask("turns", take_turns, bound), fix)
        panel.lines += files.judge_turns({r: here for r, here in turned.items() if here}, panel.hosts)
    wrote = panel.ask("write", lambda: None if panel.rank else files.write_speed(folder), 60.0)
    found = panel.sort_out("out write", wrote, "a disk that writes 64 MB in a minute, or another --out")
    if found.get(0):
        panel.lines.append(files.judge_speed(found[0]))


def check_shards(panel: Panel, shards: Sequence[str]) -> None:
    """Check the shards as every rank sees them; packages that are missing have been reported already."""
    try:
        # Imported here: it may be broken, and the other checks can do without.
        from glsd.doctor.shards import read_shards
    except ImportError as problem:
        panel.ask("shards", lambda: None, QUICK)
        skipped = f"not checked: {one_line(problem)}"
        panel.lines.append(Line("note", "shards", skipped, "fix the lines about packages first"))
        return
    read_shards(panel, shards)
