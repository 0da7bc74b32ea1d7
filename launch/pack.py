"""Make tar shards: of a folder of images, of a benchmark's official files, or of other shards.

python launch/pack.py photos/ shards/ --prefix train           a folder; subfolders are classes
python launch/pack.py index 'shards/train-{000000..000146}.tar'  the index beside shards that have none
python launch/pack.py cub200 CUB_200_2011/ shards/cub200       also: cars196, sop, inshop
python launch/pack.py split 'all/*.tar' shards/ --test_share 0.5   training and test without a class in common
python launch/pack.py roles 'test-*.tar' shards/ --table index.jsonl.gz --field orig_split \\
    --role query=test --role gallery=train,val                  roles by a table of the keys

A folder that is called as one of these commands: write ./index.
"""

import argparse
import functools
from collections.abc import Callable

from _door import run

from glsd.data.pack import PackSummary, index_shards, pack_folder
from glsd.data.retrieval_sets import RETRIEVAL_SETS, prepare
from glsd.data.retrieval_split import assign_roles, parse_roles, split_shards
from glsd.data.roles import RoleSummary

SHOWN = 5


def main(argv: list[str]) -> None:
    command = COMMANDS.get(argv[0]) if argv else None
    if command:
        command(argv[1:])
    else:
        folder(argv)


def folder(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="pack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="folder of images; if all lie in subfolders, these are the classes")
    add_output(parser)
    parser.add_argument("--prefix", default="train", help="beginning of the shards' names (%(default)s)")
    parser.add_argument(
        "--full_check", action="store_true", help="decode every image, leave out the damaged ones"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="classes.json of another packing: number the classes as it does"
    )
    args = vars(parser.parse_args(argv))
    report(pack_folder(args.pop("src"), args.pop("dst"), **args))


def index(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="pack.py index", description="Write the index beside each shard.")
    parser.add_argument("shards", nargs="+", help="brace patterns or globs of .tar files")
    print(f"indexed {index_shards(parser.parse_args(argv).shards)} samples")


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
        description="Pack labelled shards again: the first classes as train-*.tar, the last ones as test-*.tar.",
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
        prog="pack.py roles", description="Pack labelled shards again: ROLE-*.tar for each role of a table."
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


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dst", help="folder for the shards")
    parser.add_argument("--shard_megabytes", type=int, default=256, help="size of a shard (%(default)s)")
    parser.add_argument("--shuffle_seed", type=int, default=0, help="order of the images (%(default)s)")


def report(summary: PackSummary) -> None:
    first, last = summary.shards[0], summary.shards[-1]
    classes = f"{len(summary.classes)} classes" if summary.classes else "no labels"
    print(
        f"packed {summary.num_images} images, {classes}, into {len(summary.shards)} shards: "
        f"{first} .. {last.name}"
    )
    if summary.stray:
        print(
            f"no labels because {summary.stray} lies outside the subfolders: move such images and pack again"
        )
    if summary.skipped:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in list(summary.skipped.items())[:SHOWN])
        print(f"skipped {sum(summary.skipped.values())} files that are no images: {kinds}")
    report_unreadable(summary.unreadable)


def report_roles(summaries: dict[str, RoleSummary]) -> None:
    for role, summary in summaries.items():
        first, last = summary.shards[0], summary.shards[-1]
        print(
            f"{role}: packed {summary.num_images} images of {summary.num_classes} classes into "
            f"{len(summary.shards)} shards: {first} .. {last.name}"
        )
        report_unreadable(summary.unreadable)


def report_unreadable(unreadable: tuple[tuple[str, str], ...]) -> None:
    if unreadable:
        print(f"left out {len(unreadable)} unreadable images:")
        for path, reason in unreadable[:SHOWN]:
            print(f"  {path}: {reason}")


COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "index": index,
    "split": split,
    "roles": roles,
    **{name: functools.partial(benchmark, name) for name in RETRIEVAL_SETS},
}

if __name__ == "__main__":
    run(main)
