"""Steps of 1, 2, 4, ... processes on this machine: bytes sent, time taken, and the prediction of a cost model."""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from glsd.errors import UserError
from launch.benchmark import step as benchmark_step
from launch.benchmark.scale_model import (
    communication_s,
    expected_bytes,
    link_of,
    step_s,
)
from launch.benchmark.tools import (
    MIB,
    check_positive,
    device_name,
    finish,
    start,
)

WAYS = {
    "ddp": {"cluster.parallel": "ddp"},
    "ddp bf16": {"cluster.parallel": "ddp", "optim.grad_compression": "bf16"},
    "fsdp": {"cluster.parallel": "fsdp"},
}
SECONDS = 1800  # within which a group of ranks has to be done


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied: what benchmark step has, and the numbers of ranks."""
    benchmark_step.add_arguments(parser)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="(1 2 4)")
    parser.set_defaults(backbone="vit_tiny_patch16_224", threads=1)


def benchmark(args: argparse.Namespace) -> None:
    """Run one process alone at each rank's share of the batch, then every group; print what they sent and took."""
    device = start(args)
    check_positive(args, "batch_size", "prototypes")
    check_ranks(args, device)
    groups = [number for number in sorted(set(args.ranks)) if number > 1]
    cores = os.cpu_count() or 1
    print(
        f"pretraining steps of {args.backbone} by groups of ranks: {args.batch_size} images in all, {args.prototypes} prototypes, "
        f"matching {args.matching}, {device_name(device)}, {cores} cores, {args.threads} threads each, "
        f"the fastest of {args.rounds} steps each (other work on the machine only adds)"
    )
    # One rank's share of the batch, by one process that has the machine for itself.
    alone = {ranks: group(1, args, {}, -(-args.batch_size // ranks)) for ranks in (1, *groups)}
    found = {(way, ranks): group(ranks, args, WAYS[way], args.batch_size) for ranks in groups for way in WAYS}
    sent_rows = [row for (way, ranks), each in found.items() for row in sent_table(way, ranks, each)]
    print_rows(("way", "ranks", "collective", "calls", "MiB", "MiB expected"), sent_rows)
    first = min(alone[1]["seconds"])
    rows = [("one rank", 1, first, 0.0, first, first, kept(alone[1]))]
    for (way, ranks), each in found.items():
        rows.append((way, ranks, *timing(args, cores, device, ranks, each, alone[ranks]), kept(each)))
    print_rows(
        (
            "way",
            "ranks",
            "compute ms",
            "communication ms",
            "predicted ms",
            "measured ms",
            "error",
            "state MiB a rank",
        ),
        [shown(row) for row in rows],
    )
    finish(
        args,
        "scale",
        device,
        cores=cores,
        alone={str(ranks): each for ranks, each in alone.items()},
        groups={f"{way} {ranks}": each for (way, ranks), each in found.items()},
        predicted_s={f"{row[0]} {row[1]}": row[4] for row in rows},
        measured_s={f"{row[0]} {row[1]}": row[5] for row in rows},
    )


def check_ranks(args: argparse.Namespace, device: torch.device) -> None:
    most = min(args.batch_size, torch.cuda.device_count() if device.type == "cuda" else args.batch_size)
    for number in args.ranks:
        if not 1 <= number <= most:
            reason = "one image and, where there are GPUs, one GPU for each rank"
            raise UserError(f"--ranks {number}: expected 1 to {most} ({reason})")


def wait_for_all(running: list[subprocess.Popen]) -> list[int | None]:
    """Return the exit codes when all have ended, or one has with another code than 0, or it takes too long (None)."""
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        codes = [process.poll() for process in running]
        if all(code is not None for code in codes) or any(codes):
            break
        time.sleep(0.05)
    return codes


def group(ranks: int, args: argparse.Namespace, way: dict[str, str], batch_size: int) -> dict[str, Any]:
    """Run a group of processes and return what rank 0 found."""
    payload = {name: getattr(args, name) for name in benchmark_step.FLAGS}
    payload |= {"batch_size": batch_size, "threads": args.threads, "rounds": args.rounds, "way": way}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(ranks),
        "LOCAL_WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    if not torch.cuda.is_available():
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, "-m", "launch.benchmark.scale_rank", json.dumps(payload)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / f"{rank}.{kind}" for rank in range(ranks) for kind in ("out", "err")]
        outputs = [file.open("w+") for file in files]
        running = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=outputs[2 * rank],
                stderr=outputs[2 * rank + 1],
            )
            for rank in range(ranks)
        ]
        try:
            codes = wait_for_all(running)
        finally:
            for process in running:
                process.kill()  # does nothing to one that has ended
            for output in outputs:
                output.close()
        if codes != [0] * ranks:
            errors = "\n".join(file.read_text()[-2000:] for file in files if file.suffix == ".err")
            raise RuntimeError(f"{ranks} ranks, {way}: exit codes {codes}\n{errors}")
        return json.loads(files[0].read_text().splitlines()[-1])


def sent_table(way: str, ranks: int, found: dict[str, Any]) -> list[tuple[str, ...]]:
    """Return rows of what rank 0 handed to each kind of collective, beside what the cost model says."""
    expected = expected_bytes(way, found["sizes"])
    kinds = [kind for kind in (*expected, *found["counted"]) if kind in found["counted"]]
    return [
        (
            way,
            str(ranks),
            kind,
            str(found["counted"][kind]["calls"]),
            f"{found['counted'][kind]['bytes'] / MIB:.2f}",
            f"{expected.get(kind, 0) / MIB:.2f}",
        )
        for kind in dict.fromkeys(kinds)
    ]


def timing(
    args: argparse.Namespace, cores: int, device: torch.device, ranks: int, found: dict, alone: dict
) -> tuple[float, float, float, float]:
    """Return the seconds of compute, communication, a predicted and a measured step."""
    on_cpu = device.type == "cpu"
    links = {kind: link_of(kind, each, ranks) for kind, each in found["links"].items()}
    compute = min(alone["seconds"])
    moving = communication_s(found["counted"], links, ranks)
    predicted = step_s(
        compute_s=compute,
        threads=ranks * args.threads if on_cpu else 0,
        cores=cores,
        communication_s=moving,
        hideable_s=alone["backward_s"],
    )
    return compute, moving, predicted, min(found["seconds"])


def kept(found: dict[str, Any]) -> str:
    """Show the smallest and the largest rank's parameters, gradients, moments and teacher."""
    least, most = min(found["kept_bytes"]) / MIB, max(found["kept_bytes"]) / MIB
    return f"{most:.1f}" if least == most else f"{least:.1f} .. {most:.1f}"


def shown(row: tuple) -> tuple[str, ...]:
    way, ranks, compute, moving, predicted, measured, state = row
    times = (f"{1000 * seconds:.1f}" for seconds in (compute, moving, predicted, measured))
    return (way, str(ranks), *times, f"{predicted / measured - 1:+.0%}" if ranks > 1 else "", state)


def print_rows(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in (head, *rows):
        cells = (
            f"{cell:>{width}}" if i else f"{cell:{width}}"
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join(cells))
    sys.stdout.flush()
