"""Check this machine, or all ranks of a cluster, before a run: what a run would miss, and how to fix it.

python launch/doctor.py                                      # this machine
accelerate launch ... launch/doctor.py --out runs/x --shards 'shards/train-*.tar'    # all ranks of a run, started like the run
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

# Before torch is imported: when a rank goes, torch's store would add forty lines of its own stack to ours.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Only the standard library and modules that need nothing else: this program must be able to say that packages are broken.
from glsd.doctor import packages
from glsd.doctor.line import Line, plain, summary, table
from glsd.errors import UserError, with_config_keys

ROOT = Path(__file__).resolve().parents[2]
# What the doctor advises to change, and the flag for it.
FLAGS = {
    "num_workers": "--data.num_workers",
    "precision": "--optim.precision",
    "grad_compression": "--optim.grad_compression",
    "batch_size": "--optim.batch_size",
    "checkpoint_every": "--watch.checkpoint_every",
}


def main(argv: list[str], *, installed: bool = True) -> int:
    """Print the table on rank 0; return 1 if something is to be fixed.

    installed: whether glsd is installed, and not only found beside the launch script.
    """
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="", type=expanded, help="the folder of your runs, which all hosts must share"
    )
    parser.add_argument(
        "--shards", nargs="+", default=[], help="patterns of shards that every rank must reach"
    )
    parser.add_argument(
        "--wait",
        type=float,
        default=packages.ARRIVE_SECONDS,
        help="seconds in which all ranks must arrive (%(default).0f: the first import from a network disk is slow)",
    )
    parser.add_argument("--json", action="store_true", help="print the table once more, as one line of JSON")
    try:
        args = parser.parse_args(argv)
    except UserError as problem:
        parser.error(str(problem))
    if not 0 < args.wait < 1e5:
        parser.error(f"--wait is {args.wait:g}: expected seconds above 0")
    found = packages.facts(ROOT / "pyproject.toml")
    if not installed:
        found["needed"] = {"glsd": "", **found["needed"]}
    if not packages.usable(found):
        return report_packages(found, args.json)
    from glsd.doctor.panel import Lost
    from glsd.doctor.run import examine

    try:
        code, panel, details = examine(found, shards=args.shards, out=args.out, wait=args.wait)
    except Lost as problem:
        print(f"error: {plain(problem)}", file=sys.stderr, flush=True)
        return 1
    # Tasks of srun that do not know of each other are all rank 0.
    if panel.rank == 0 and (panel.world > 1 or os.environ.get("SLURM_PROCID", "0") == "0"):
        print("\n".join(details["ranks"]))
        report(panel.lines, args.json, **details)
    elif panel.rank == 0 and "RANK" in os.environ:  # a mistake of this task may be its own
        complain([line for line in panel.lines if line.name == "launch"])
    return code


def expanded(path: str) -> str:
    """Return a path with ``~`` and ``$NAME`` replaced; the import waits, as an old Python cannot read that file."""
    from glsd.files import expand

    return expand(path)


def report_packages(found: dict, as_json: bool) -> int:
    """Report packages only: without torch this rank cannot reach the other ranks."""
    lines = packages.judge({0: found}, {})
    if os.environ.get("RANK", "0") != "0":
        complain(lines)
        return 1
    lines.append(Line("note", "others", "all other checks need torch: skipped", "fix the lines above first"))
    report(lines, as_json)
    return 1


def complain(lines: list[Line]) -> None:
    """Print on stderr what is to be fixed on this rank, which prints no table."""
    for line in lines:
        if line.verdict == "FIX":
            said = f"error: rank {os.environ['RANK']} on {os.uname().nodename}: {line.found}: {line.fix}"
            print(plain(said), file=sys.stderr, flush=True)


def report(lines: list[Line], as_json: bool, **details: object) -> None:
    """Print the table, and with ``as_json`` one more line for machines."""
    lines = [dataclasses.replace(line, fix=with_config_keys(line.fix, FLAGS)) for line in lines]
    print("\n".join([*table(lines), summary(lines)]))
    if as_json:
        print(json.dumps({"lines": [vars(line) for line in lines], **details}))


def exit_with(code: int) -> NoReturn:
    """End at once: a check that hangs has a thread that would be waited for, and gloo's threads may abort at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
