"""What to run first on a new machine or cluster: is all there that a run needs, and what is to be done where not?

python launch/doctor.py                                      # this machine
accelerate launch ... launch/doctor.py --out runs/x --shards 'shards/train-*.tar'    # the ranks of a run, started like it
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import NoReturn

# Before torch is imported: where a rank goes, its store would add forty lines of its own stack to ours.
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")

# Nothing beyond Python itself and two modules that need nothing either: broken packages are what this is to tell of.
from glsd.doctor import packages as doctor_packages
from glsd.doctor.line import Line, plain, summary, table

ROOT = Path(__file__).resolve().parents[2]

WAIT_HELP = (
    "seconds in which all ranks must have come (%(default).0f: the first import from a network disk is slow)"
)


def main(argv: list[str], *, installed: bool = True) -> int:
    """Print the table on rank 0; returns 1 where something is to be fixed.

    installed: False where glsd itself was found beside the door only.
    """
    parser = argparse.ArgumentParser(
        prog="doctor.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", default="", help="the folder where runs are to be, which all hosts must share"
    )
    parser.add_argument(
        "--shards", nargs="+", default=[], help="patterns of shards that every rank must reach"
    )
    parser.add_argument("--wait", type=float, default=doctor_packages.ARRIVE_SECONDS, help=WAIT_HELP)
    parser.add_argument("--json", action="store_true", help="print one last line for machines")
    args = parser.parse_args(argv)
    if not 0 < args.wait < 1e5:
        parser.error(f"--wait is {args.wait:g}: expected seconds above 0")
    packages = doctor_packages.facts(ROOT / "pyproject.toml")
    if not installed:
        packages["needed"] = {"glsd": "", **packages["needed"]}
    if not doctor_packages.usable(packages):
        return report_packages(packages, args.json)
    from glsd.doctor.panel import Lost
    from glsd.doctor.run import examine

    try:
        code, panel, details = examine(packages, shards=args.shards, out=args.out, wait=args.wait)
    except Lost as problem:
        print(f"error: {plain(problem)}", file=sys.stderr, flush=True)
        return 1
    # Tasks of srun that do not know of each other are rank 0 each.
    if panel.rank == 0 and (panel.world > 1 or os.environ.get("SLURM_PROCID", "0") == "0"):
        print("\n".join(details["ranks"]))
        report(panel.lines, args.json, **details)
    elif panel.rank == 0 and "RANK" in os.environ:  # what is wrong may be so with this task only
        complain([line for line in panel.lines if line.name == "launch"])
    return code


def report_packages(packages: dict, as_json: bool) -> int:
    """Without torch this rank cannot speak to the others: it says alone what is wrong."""
    lines = doctor_packages.judge({0: packages}, {})
    if os.environ.get("RANK", "0") != "0":
        complain(lines)
        return 1
    lines.append(
        Line("note", "others", "all other checks need torch: not made", "mend the lines above first")
    )
    report(lines, as_json)
    return 1


def complain(lines: list[Line]) -> None:
    """Say on stderr, where there is a table of rank 0 or none, what this rank has to be fixed."""
    for line in lines:
        if line.verdict == "FIX":
            said = f"error: rank {os.environ['RANK']} on {os.uname().nodename}: {line.found}: {line.fix}"
            print(plain(said), file=sys.stderr, flush=True)


def report(lines: list[Line], as_json: bool, **details: object) -> None:
    """Print the table, and with ``as_json`` one more line for machines."""
    print("\n".join([*table(lines), summary(lines)]))
    if as_json:
        print(json.dumps({"lines": [vars(line) for line in lines], **details}))


def exit_with(code: int) -> NoReturn:
    """End at once: a check that hangs has a thread that would be waited for, and gloo's threads may abort at the end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
