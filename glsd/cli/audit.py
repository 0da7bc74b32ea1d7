"""glsd audit: examine shards, print what was found."""

import argparse
import json
import os
from pathlib import Path

from glsd.audit.census import parse_splits
from glsd.audit.finding import Finding
from glsd.audit.near_duplicates import MAX_BITS
from glsd.audit.report import Examination, SplitSummary, examine
from glsd.cli.door import printable
from glsd.errors import UserError, one_line

SHOWN = 3


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="glsd audit",
        description="Read every image of some shards and say what is wrong. Ends with code 1 if something must be fixed: a "
        "damaged shard, an image that cannot be read, labels in part of a split only, a picture that is in two splits.",
    )
    parser.add_argument(
        "shards",
        nargs="+",
        metavar="[NAME=]SHARDS",
        help="brace patterns or globs of .tar files; a name makes them a split: train='a-*.tar' test='b-*.tar'",
    )
    parser.add_argument(
        "--near_bits",
        type=int,
        default=MAX_BITS,
        help="differing bits, of 64, of the hashes of near duplicates (%(default)s)",
    )
    parser.add_argument("--list", metavar="FILE", help="write every image that was found to a .tsv")
    parser.add_argument("--json", action="store_true", help="print one last line for machines")
    add_workers(parser)
    args = parser.parse_args(argv)
    found = examine(parse_splits(args.shards), max_bits=args.near_bits, workers=args.workers)
    report(found)
    if args.list:
        write_list(found, Path(args.list))
    if args.json:
        print(as_json(found))
    return int(found.sick)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="processes that read images; they do not change the result (%(default)s)",
    )


def report(found: Examination) -> None:
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
    print(f"{fixes} to fix, {notes} to know")


def print_split(split: SplitSummary) -> None:
    labels = f"{split.labels:,} classes" if split.labels else "no labels"
    print(
        f"{split.name}: {split.images:,} images in {split.shards:,} shards, {split.total_bytes / 1e6:,.1f} MB, {labels}"
    )
    if not all(split.percentiles.values()):
        return
    print(f"  {'':8}{'min':>9}{'5%':>9}{'median':>9}{'95%':>9}{'max':>9}")
    for column, values in split.percentiles.items():
        digits = 1 if column == "KB" else 0
        print(f"  {column:8}" + "".join(f"{value:9,.{digits}f}" for value in values))
    print()


def write_list(found: Examination, file: Path) -> None:
    rows = [
        "\t".join(map(printable, (finding.level, finding.topic, where, what)))
        for finding in found.findings
        for where, what in finding.items
    ]
    try:
        file.write_text("\n".join(["level\ttopic\twhere\twhat", *rows]) + "\n", "utf-8", "backslashreplace")
    except OSError as error:
        raise UserError(f"cannot write {file}: {one_line(error)}") from error


def as_json(found: Examination) -> str:
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
    return json.dumps({"sick": found.sick, "splits": splits, "findings": [line(f) for f in found.findings]})
