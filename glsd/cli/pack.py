"""glsd pack: make tar shards of a folder, of lists, of a benchmark's official files, or of other shards."""

import argparse
import functools
import os
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glsd.audit import counted
from glsd.cli.closing import of_packing
from glsd.cli.door import printable
from glsd.errors import INTERRUPTED
from glsd.files import expand
from glsd.packing import NO_LABEL, SHARD_MEGABYTES

if TYPE_CHECKING:
    from glsd.packing.write import PackSummary

SHOWN = 5
KINDS_SHOWN = 20
OTHER_COMMANDS = """\
other commands:
  glsd pack list train.csv shards/               lists with the columns path, label: .csv .tsv .parquet
  glsd pack torchvision CIFAR10 data/ shards/    a data set that torchvision reads
  glsd pack cub200 CUB_200_2011/ shards/         a retrieval benchmark; also cars196, sop, inshop
  glsd pack split 'all/*.tar' shards/            labeled shards again: train and test without a common class
  glsd pack roles 'all/*.tar' shards/ ...        labeled shards again: roles by a table of keys
  glsd pack index 'train-*.tar'                  the index beside shards that have none
  glsd pack doctor 'train-*.tar'                 what is wrong with shards (glsd audit)
After a kill, the same command resumes after the last finished shard. Write ./list for a source folder called list."""


def main(argv: list[str]) -> int | None:
    try:
        if argv and argv[0] in COMMANDS:
            return COMMANDS[argv[0]](argv[1:])
        folder(argv)
    except KeyboardInterrupt as stop:
        print(str(stop) or "stopped: nothing was packed", file=sys.stderr)
        return INTERRUPTED
    return 0


def folder(argv: list[str]) -> None:
    parser = make_parser("", "Make tar shards of a folder of images.", "photos/ shards/", OTHER_COMMANDS)
    parser.add_argument(
        "src", type=expand, help="folder of images; its subfolders are the classes, if all images lie in them"
    )
    args = parse(parser, argv, reads_images=True)
    from glsd.packing.folder import pack_folder

    report(pack_folder(args.pop("src"), args.pop("dst"), **args))


def lists(argv: list[str]) -> None:
    says = "Make tar shards of the images that .csv, .tsv or .parquet lists name."
    parser = make_parser("list", says, "list train.csv shards/")
    parser.add_argument("files", nargs="+", type=expand, help="the lists, all with the same columns")
    parser.add_argument(
        "--path_column", default="path", help="paths, or in Parquet the image files themselves (%(default)s)"
    )
    parser.add_argument(
        "--label_column", default="label", help="numbers or names of classes; '' = no labels (%(default)s)"
    )
    parser.add_argument(
        "--root", type=expand, help="folder that paths are relative to (default: that of the first list)"
    )
    args = parse(parser, argv, reads_images=True)
    from glsd.packing.lists import pack_list

    report(pack_list(args.pop("files"), args.pop("dst"), **args))


def torchvision(argv: list[str]) -> None:
    from glsd.packing.torchvision_sets import TORCHVISION_SETS, pack_torchvision

    says = "Make tar shards of a data set that torchvision reads. Its image files are packed as they are, pixels as PNG."
    parser = make_parser("torchvision", says, "torchvision CIFAR10 data/ shards/ --split test")
    parser.add_argument("name", metavar="NAME", help=", ".join(TORCHVISION_SETS))
    parser.add_argument("root", type=expand, help="the folder in which torchvision keeps it")
    parser.add_argument("--split", help="as torchvision calls it (default: mostly train)")
    parser.add_argument("--download", action="store_true", help="let torchvision download what is missing")
    args = parse(parser, argv, reads_images=True, prefix=None)
    report(pack_torchvision(args.pop("name"), args.pop("root"), args.pop("dst"), **args))


def index(argv: list[str]) -> None:
    parser = make_parser("index", "Write the index beside each shard.", "index 'shards/train-*.tar'")
    add_shards(parser)
    parser.add_argument(
        "--upload",
        action="store_true",
        help="write the index of a remote shard beside it (default: keep it on this machine)",
    )
    parser.add_argument(
        "--image",
        metavar="KIND",
        default="",
        help="the member that is the image where samples have several, such as tif or edited.jpg: its name behind the first dot "
        "(default: the first of a known kind)",
    )
    args = parser.parse_args(argv)
    from glsd.packing.write import index_shards
    from glsd.shards.store import open_shards

    print(f"indexed {index_shards(args.shards, upload=args.upload, image=args.image)} samples")
    for note in open_shards(args.shards).unused_members():
        print(f"note: {printable(note)}")


def retrieval_set(name: str, argv: list[str]) -> None:
    from glsd.packing.retrieval_sets import RETRIEVAL_SETS, pack_retrieval_set

    benchmark = RETRIEVAL_SETS[name]
    says = f"Make tar shards of {benchmark.title} in the split of the field;\n{benchmark.owner}."
    parser = make_parser(name, says, f"{name} unpacked/ shards/{name}")
    parser.add_argument("src", type=expand, help="folder of the unpacked archives")
    parser.add_argument(
        "--allow_incomplete",
        action="store_true",
        help="pack what is there, although images are missing or the numbers are not the published ones",
    )
    args = parse(parser, argv)
    report(*pack_retrieval_set(name, args.pop("src"), args.pop("dst"), **args).values())


def split(argv: list[str]) -> None:
    says = "Pack labeled shards again: the first classes as train-*.tar, the last ones as test-*.tar."
    parser = make_parser("split", says, "split 'all/*.tar' shards/ --test_share 0.5")
    add_shards(parser)
    parser.add_argument(
        "--test_share", type=float, default=0.5, help="share of the classes to test on (%(default)s)"
    )
    parser.add_argument(
        "--classes_file",
        metavar="FILE",
        type=expand,
        help="class names in label order, a line each or a .json list (default: classes.json beside the shards)",
    )
    args = parse(parser, argv)
    from glsd.packing.split import split_shards

    report(*split_shards(args.pop("shards"), args.pop("dst"), **args).values())


def roles(argv: list[str]) -> None:
    says = "Pack labeled shards again: ROLE-*.tar for each role, as a table of keys says."
    example = (
        "roles 'all/*.tar' shards/ --table t.tsv --field split --role query=test --role gallery=train,val"
    )
    parser = make_parser("roles", says, example)
    add_shards(parser)
    parser.add_argument(
        "--table", required=True, type=expand, help=".jsonl or .tsv, plain or .gz: a row for each key"
    )
    parser.add_argument("--field", required=True, help="the column of the table that decides")
    parser.add_argument(
        "--role",
        action="append",
        required=True,
        metavar="ROLE=VALUE,...",
        help="values of a role; once a role",
    )
    args = parse(parser, argv)
    from glsd.packing.split import assign_roles, parse_roles

    args["roles"] = parse_roles(args.pop("role"))
    report(*assign_roles(args.pop("shards"), args.pop("dst"), **args).values())


def audit(argv: list[str]) -> int:
    from glsd.cli.audit import main as audit_shards

    return audit_shards(argv)


def make_parser(command: str, says: str, example: str, more: str = "") -> argparse.ArgumentParser:
    return argparse.ArgumentParser(
        prog=f"glsd pack {command}".strip(),
        description=f"{says}\n\nexample: glsd pack {example}",
        epilog=more,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=120),
    )


def add_shards(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shards", nargs="+", help="brace patterns or globs of .tar files")


def parse(
    parser: argparse.ArgumentParser,
    argv: list[str],
    *,
    reads_images: bool = False,
    prefix: str | None = "train",
) -> dict[str, Any]:
    """Add the options of every command that packs, and those of commands that read image files; parse ``argv``."""
    parser.add_argument("dst", type=expand, help="folder for the shards")
    if reads_images:
        add_reading(parser, prefix)
    parser.add_argument(
        "--shard_megabytes", type=int, default=SHARD_MEGABYTES, help="size of a shard (%(default)s)"
    )
    parser.add_argument("--shuffle_seed", type=int, default=0, help="order of the images (%(default)s)")
    return vars(parser.parse_args(argv))


def add_reading(parser: argparse.ArgumentParser, prefix: str | None) -> None:
    parser.add_argument(
        "--prefix", default=prefix, help=f"beginning of the shards' names ({prefix or 'the split'})"
    )
    parser.add_argument(
        "--classes",
        metavar="FILE",
        type=expand,
        help="classes.json of another packing: number the classes as it does",
    )
    parser.add_argument(
        "--short_side",
        type=int,
        metavar="PIXELS",
        help="resize images with a longer short side: JPEG of quality 95 (PNG if lossless), upright, without EXIF; all others "
        "are packed bit for bit",
    )
    parser.add_argument(
        "--full_check", action="store_true", help="decode every image and leave out the damaged ones"
    )
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="processes that read images; they do not change the result (%(default)s)",
    )


def report(*summaries: "PackSummary") -> None:
    for summary in summaries:
        if summary.num_resumed:
            print(f"resumed after {counted(summary.num_resumed, 'finished shard')}")
        classes = "without labels"
        if summary.num_classes:
            unnamed = "" if summary.classes else " (without names)"
            classes = f"of {counted(summary.num_classes, 'class', 'classes')}{unnamed}"
        print(
            f"packed {counted(summary.num_images, 'image')} {classes} into {counted(len(summary.shards), 'shard')}: "
            f"{shown_range(summary.shards)}"
        )
        if summary.num_resized:
            print(f"resized {counted(summary.num_resized, 'image')}; the table of source files says which")
        if summary.stray:
            print(
                f"the images have no labels because {printable(summary.stray)} lies outside the subfolders: move such images "
                "and pack again"
            )
        for note in summary.notes:
            print(f"note: {printable(note)}")
        report_left_out(summary)
    prefixes = [summary.shards[0].name.rpartition("-")[0] for summary in summaries]
    print(printable(of_packing(prefixes, summaries[0].shards[0].parent)))


def report_left_out(summary: "PackSummary") -> None:
    if skipped := summary.skipped:
        kinds = ", ".join(
            f"{count} {printable(suffix)}" for suffix, count in list(skipped.items())[:KINDS_SHOWN]
        )
        more = len(skipped) - KINDS_SHOWN
        others = f" and {sum(list(skipped.values())[KINDS_SHOWN:])} of {more} other kinds" if more > 0 else ""
        print(f"skipped {counted(sum(skipped.values()), 'file')} that are not images: {kinds}{others}")
    unlabeled = [row for row in summary.unreadable if row[1].startswith(NO_LABEL)]
    broken = [row for row in summary.unreadable if not row[1].startswith(NO_LABEL)]
    for images, noun, plural in (
        (unlabeled, "image without label", "images without label"),
        (broken, "unreadable image", "unreadable images"),
    ):
        if images:
            print(f"left out {counted(len(images), noun, plural)}:")
        for path, reason in images[:SHOWN]:
            print(f"  {printable(path)}: {printable(reason)}")
    marks = Counter(reason for _, reason in unlabeled if reason != NO_LABEL)
    if marks and summary.classes:
        kinds = ", ".join(f"{count} {printable(mark)}" for mark, count in marks.most_common(SHOWN))
        print(f"{kinds}: if that is a class, list the names of all classes in a JSON file for --classes")


def shown_range(shards: tuple[Path, ...]) -> str:
    return printable(shards[0]) + (f" .. {printable(shards[-1].name)}" if len(shards) > 1 else "")


COMMANDS: dict[str, Callable[[list[str]], int | None]] = {
    "doctor": audit,
    "list": lists,
    "torchvision": torchvision,
    "index": index,
    "split": split,
    "roles": roles,
    **{name: functools.partial(retrieval_set, name) for name in ("cub200", "cars196", "sop", "inshop")},
}
