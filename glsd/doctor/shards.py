"""Whether every rank can read the shards of a run, and whether they are the same on all ranks."""

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

from glsd.doctor.line import Line, who
from glsd.doctor.panel import Panel
from glsd.errors import BrokenImage
from glsd.shards.remote import TIMEOUT_VARIABLE, is_remote
from glsd.shards.store import open_shards

SECONDS = 150.0
SHARDS_READ, SAMPLES_READ = 4, 8  # by each rank; one remote shard, because it is downloaded
REMOTE_PATIENCE = "30"  # seconds to wait for a server that does not answer


def read_shards(panel: Panel, patterns: Sequence[str]) -> None:
    """Check that every rank opens the shards, sees the same ones and can read them."""
    os.environ.setdefault(TIMEOUT_VARIABLE, REMOTE_PATIENCE)
    answers = panel.ask("shards", lambda: read_some(patterns, panel.rank), SECONDS)
    values = panel.sort_out(
        "shards", answers, "do what the message says; glsd audit SHARDS checks every image"
    )
    found = {rank: value for rank, value in values.items() if value}  # None: packages of that rank are broken
    if found and len(found) == len(answers):
        panel.lines.append(judge_shards(found, panel.hosts))


def read_some(patterns: Sequence[str], rank: int) -> dict[str, Any]:
    """Open the shards and read a few samples, different ones on each rank; UserError if they cannot be opened."""
    began = time.monotonic()
    opened = open_shards(list(patterns))
    opening = time.monotonic() - began
    sizes = opened.shard_sizes.tolist()
    remote = any(is_remote(path) for path in opened.paths)
    chosen = {(rank + step) % len(sizes) for step in range(1 if remote else SHARDS_READ)}
    num_read, num_bytes, num_broken, began = 0, 0, 0, time.monotonic()
    for number in sorted(chosen):
        first = sum(sizes[:number])
        for place in range(0, sizes[number], max(1, sizes[number] // SAMPLES_READ)):
            try:
                num_bytes += len(opened.read(first + place))
            except BrokenImage:
                num_broken += 1
            num_read += 1
    return {
        "shards": len(sizes),
        "samples": len(opened),
        "fingerprint": opened.fingerprint(),
        "opening": opening,
        "read": num_read,
        "broken": num_broken,
        "bytes": num_bytes,
        "seconds": time.monotonic() - began,
    }


def judge_shards(found: Mapping[int, Any], hosts: Mapping[int, str]) -> Line:
    """Return the line about shards."""
    kinds: dict[str, list[int]] = {}
    for rank, here in found.items():
        kinds.setdefault(here["fingerprint"], []).append(rank)
    if len(kinds) > 1:
        parts = "; ".join(f"{found[r[0]]['shards']} on {who(r, hosts)}" for r in kinds.values())
        fix = "copy the same shards to all hosts, with their .index files, or put them on a shared disk"
        return Line("FIX", "shards", f"not the same on all ranks: {parts}", fix)
    first = next(iter(found.values()))
    opening = max(here["opening"] for here in found.values())
    rates = {rank: here["bytes"] / max(here["seconds"], 1e-6) for rank, here in found.items()}
    slowest = min(rates, key=lambda rank: rates[rank])
    said = f"{first['shards']:,} shards of {first['samples']:,} samples, opened in {opening:.1f} s; read at "
    said += f"{rates[slowest] / 1e6:,.0f} MB/s" + (
        f" ({who([slowest], hosts)}, the slowest)" if len(found) > 1 else ""
    )
    broken = sum(here["broken"] for here in found.values())
    if broken:
        said += f"; {broken} of {sum(here['read'] for here in found.values())} samples are broken"
        return Line("note", "shards", said, "glsd audit SHARDS names them")
    return Line("ok", "shards", said)
