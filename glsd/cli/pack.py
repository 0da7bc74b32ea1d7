"""Make tar shards: of a folder of images, of lists, of a benchmark's official files, or of other shards; examine them.

python launch/pack.py photos/ shards/ --prefix train           a folder; subfolders are classes
python launch/pack.py list train.csv shards/                   a list with the columns path, label: .csv .tsv .parquet
python launch/pack.py torchvision CIFAR10 data/ shards/ --split train   a set that torchvision reads
python launch/pack.py index 'shards/train-{000000..000146}.tar'  the index beside shards that have none
python launch/pack.py cub200 CUB_200_2011/ shards/cub200       also: cars196, sop, inshop
python launch/pack.py split 'all/*.tar' shards/ --test_share 0.5   training and test without a class in common
python launch/pack.py roles 'test-*.tar' shards/ --table index.jsonl.gz --field orig_split \\
    --role query=test --role gallery=train,val                  roles by a table of the keys

A folder, a list and a torchvision set take --workers, and --short_side 512 to make photographs of many megapixels smaller;
killed, the same command goes on where it was. A folder that is called as one of these commands: write ./index.
"""

import argparse
import functools
import sys
from collections.abc import Callable

from glsd.cli import audit
from glsd.cli.door import printable
from glsd.cli.pack_sources import (
    add_output,
    folder,
    listed,
    report_unreadable,
    torchvision,
)
from glsd.packing.folder import index_shards
from glsd.packing.retrieval_sets import RETRIEVAL_SETS, prepare
from glsd.packing.roles import RoleSummary
from glsd.packing.split import assign_roles, parse_roles, split_shards

STOPPED = 130  # as shells report a program ended by Ctrl-C


def main(argv: list[str]) -> int | None:
    command = COMMANDS.get(argv[0]) if argv else None
    try:
        if command:
            return command(argv[1:])
        return folder(argv, __doc__ or "")
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped: nothing was packed", file=sys.stderr)
        return STOPPED


def index(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="pack.py index", description="Write the index beside each shard.")
    parser.add_argument("shards", nargs="+", help="brace patterns or globs of .tar files")
    parser.add_argument(
        "--upload",
        action="store_true",
        help="write the index of a remote shard beside it; otherwise only this machine has it",
    )
    args = parser.parse_args(argv)
    print(f"indexed {index_shards(args.shards, upload=args.upload)} samples")


def benchmark(name: str, argv: list[str]) -> None:
    title, owner = RETRIEVAL_SETS[name].title, RETRIEVAL_SETS[name].owner
    parser = argparse.ArgumentParser(
        prog=f"pack.py {name}", description=f"Pack {title} in the split of the field; {owner}."
    )
    parser.add_argument("src", help="folder of the unpacked archives")
    add_output(parser)
    parser.add_argument(
        "--allow_incomplete",
        action="store_true",
        help="pack what is there although images are missing or the counts are not the published ones",
    )
    args = vars(parser.parse_args(argv))
    report_roles(prepare(name, args.pop("src"), args.pop("dst"), **args))


def split(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="pack.py split",
        description="Pack labeled shards again: the first classes as train-*.tar, the last ones as test-*.tar.",
    )
    parser.add_argument("shards", nargs="+", help="brace patterns or globs of .tar files")
    add_output(parser)
    parser.add_argument(
        "--test_share", type=float, default=0.5, help="share of the classes to test on (%(default)s)"
    )
    parser.add_argument(
        "--classes_file",
        metavar="FILE",
        help="names of the classes, a line each or a .json list, in label order",
    )
    args = vars(parser.parse_args(argv))
    report_roles(split_shards(args.pop("shards"), args.pop("dst"), **args))


def roles(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="pack.py roles", description="Pack labeled shards again: ROLE-*.tar for each role of a table."
    )
    parser.add_argument("shards", nargs="+", help="brace patterns or globs of .tar files")
    add_output(parser)
    parser.add_argument("--table", required=True, help=".jsonl or .tsv, plain or .gz: a row for each key")
    parser.add_argument("--field", required=True, help="the column of the table that decides")
    parser.add_argument(
        "--role",
        action="append",
        required=True,
        metavar="ROLE=VALUE,...",
        help="the values of a role; repeat",
    )
    args = vars(parser.parse_args(argv))
    args["roles"] = parse_roles(args.pop("role"))
    report_roles(assign_roles(args.pop("shards"), args.pop("dst"), **args))


def report_roles(summaries: dict[str, RoleSummary]) -> None:
    for role, summary in summaries.items():
        first, last = summary.shards[0], summary.shards[-1]
        print(
            f"{role}: packed {summary.num_images} images of {summary.num_classes} classes into "
            f"{len(summary.shards)} shards: {printable(first)} .. {printable(last.name)}"
        )
        report_unreadable(summary.unreadable)


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "doctor": audit.main,
    "list": listed,
    "torchvision": torchvision,
    "index": index,
    "split": split,
    "roles": roles,
    **{name: functools.partial(benchmark, name) for name in RETRIEVAL_SETS},
}
