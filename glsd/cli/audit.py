"""glsd audit: read every image of some shards and say what is wrong."""

import argparse
import functools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from glsd.audit import NEAR_BITS, Finding, counted
from glsd.cli.door import printable
from glsd.cli.pack import add_workers
from glsd.errors import UserError, one_line
from glsd.files import expand

if TYPE_CHECKING:
    from glsd.audit.report import Examination, SplitSummary

SHOWN = 3


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="glsd audit",
        description="Read every image of some shards and say what is wrong. The exit code is 1 if something must be fixed:\n"
        "a damaged shard, an unreadable image, labels for only a part of a split, a picture in two splits.\n\n"
        "example: glsd audit train='shards/train-*.tar' val='shards/val-*.tar'",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=120),
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="[NAME=]SHARDS",
        help="brace patterns or globs of .tar files; a name makes them a split",
    )
    parser.add_argument(
        "--near_bits",
        type=int,
        default=NEAR_BITS,
        help="how many of 64 bits differ at most in the hashes of near-duplicates (%(default)s)",
    )
    parser.add_argument(
        "--list", metavar="FILE", type=expand, help="write every image that was found to a .tsv"
    )
    parser.add_argument("--json", action="store_true", help="print the result as a last line of JSON, too")
    add_workers(parser)
    args = parser.parse_args(argv)
    from glsd.audit.census import parse_splits
    from glsd.audit.report import examine

    found = examine(parse_splits(args.shards), near_bits=args.near_bits, workers=args.workers)
    report(found)
    if args.list:
        write_list(found, Path(args.list))
    if args.json:
        print(as_json(found))
    return int(found.has_problems)


def report(found: "Examination") -> None:
    for split in found.splits:
        print_split(split)
    width = max(len(finding.topic) for finding in found.findings)
    for finding in found.findings:
        print(f"{finding.level:4}  {finding.topic:{width}}  {printable(finding.text)}")
        for where, what in finding.items[:SHOWN]:
            between = "" if what[0] in "=~" else ":"
            print(f"      {'':{width}}  - {printable(where)}{between} {printable(what)}")
        if len(finding.items) > SHOWN:
            print(f"      {'':{width}}  - and {len(finding.items) - SHOWN:,} more (--list FILE)")
    fixes, notes = (sum(f.level == level for f in found.findings) for level in ("FIX", "note"))
    print(f"{counted(fixes, 'problem')} to fix, {counted(notes, 'note')}")


def print_split(split: "SplitSummary") -> None:
    labels = f"of {counted(split.labels, 'class', 'classes')}" if split.labels else "without labels"
    print(
        f"{split.name}: {counted(split.images, 'image')} {labels} in {counted(split.shards, 'shard')}, "
        f"{split.total_bytes / 1e6:,.1f} MB"
    )
    if not all(split.percentiles.values()):
        return
    print(f"  {'':8}{'min':>9}{'5%':>9}{'median':>9}{'95%':>9}{'max':>9}")
    for column, values in split.percentiles.items():
        digits = 1 if column == "KB" else 0
        print(f"  {column:8}" + "".join(f"{value:9,.{digits}f}" for value in values))
    print()


def write_list(found: "Examination", file: Path) -> None:
    rows = [
        "\t".join(map(printable, (finding.level, finding.topic, where, what)))
        for finding in found.findings
        for where, what in finding.items
    ]
    try:
        file.write_text("\n".join(["level\ttopic\twhere\twhat", *rows]) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write {file}: {one_line(error)}") from error


def as_json(found: "Examination") -> str:
    def line(finding: Finding) -> dict:
        return {
            "level": finding.level,
            "topic": finding.topic,
            "text": finding.text,
            "count": len(finding.items),
        }

    splits = {
        split.name: {
            "shards": split.shards,
            "images": split.images,
            "labels": split.labels,
            "bytes": split.total_bytes,
            "percentiles": split.percentiles,
        }
        for split in found.splits
    }
    return json.dumps(
        {"sick": found.has_problems, "splits": splits, "findings": [line(f) for f in found.findings]}
    )
