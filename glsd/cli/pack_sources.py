"""The commands of pack.py that pack images for the first time: of a folder, of lists, of a torchvision data set."""

import argparse
import os

from glsd.cli.door import printable
from glsd.packing.folder import PackSummary, pack_folder
from glsd.packing.lists import pack_list
from glsd.packing.torchvision_sets import TORCHVISION_SETS, pack_torchvision

SHOWN = 5


def folder(argv: list[str], description: str) -> int:
    parser = argparse.ArgumentParser(
        prog="pack.py", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="folder of images; if all lie in subfolders, these are the classes")
    add_output(parser)
    add_reading(parser, prefix="train")
    args = vars(parser.parse_args(argv))
    report(pack_folder(args.pop("src"), args.pop("dst"), **args))
    return 0


def listed(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="pack.py list",
        description="Pack the images of .csv, .tsv or .parquet lists; a Parquet column may hold the files themselves.",
    )
    parser.add_argument("files", nargs="+", help="the lists, all with the same columns")
    add_output(parser)
    add_reading(parser, prefix="train")
    parser.add_argument(
        "--path_column", default="path", help="paths, or the files' bytes in Parquet (%(default)s)"
    )
    parser.add_argument(
        "--label_column", default="label", help="numbers or names of classes; '' = none (%(default)s)"
    )
    parser.add_argument("--root", help="folder the paths start from (default: that of the first list)")
    args = vars(parser.parse_args(argv))
    report(pack_list(args.pop("files"), args.pop("dst"), **args))


def torchvision(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="pack.py torchvision",
        description=f"Pack a data set that torchvision reads: {', '.join(TORCHVISION_SETS)}. Its image files are packed as "
        "they are; where it has only pixels (CIFAR, MNIST, ...) they become PNG files.",
    )
    parser.add_argument("name", help="as torchvision calls it")
    parser.add_argument("root", help="the folder torchvision keeps it in")
    add_output(parser)
    add_reading(parser, prefix=None)
    parser.add_argument("--split", help="as torchvision calls it (default: mostly train)")
    parser.add_argument("--download", action="store_true", help="let torchvision download what is not there")
    args = vars(parser.parse_args(argv))
    report(pack_torchvision(args.pop("name"), args.pop("root"), args.pop("dst"), **args))


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dst", help="folder for the shards")
    parser.add_argument("--shard_megabytes", type=int, default=256, help="size of a shard (%(default)s)")
    parser.add_argument("--shuffle_seed", type=int, default=0, help="order of the images (%(default)s)")


def add_reading(parser: argparse.ArgumentParser, *, prefix: str | None) -> None:
    parser.add_argument(
        "--prefix", default=prefix, help=f"beginning of the shards' names ({prefix or 'the split'})"
    )
    parser.add_argument(
        "--full_check", action="store_true", help="decode every image, leave out the damaged ones"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="classes.json of another packing: number the classes as it does"
    )
    parser.add_argument(
        "--short_side",
        type=int,
        metavar="PIXELS",
        help="make images with a longer short side that small: JPEG of quality 95 with full color (PNG stays PNG), upright, "
        "without EXIF; all others stay as they are to the bit",
    )
    add_workers(parser)


def add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        help="processes that read images; the result does not depend on it (%(default)s)",
    )


def report(summary: PackSummary) -> None:
    first, last = summary.shards[0], summary.shards[-1]
    labels = "labels without names" if summary.labeled else "no labels"
    classes = f"{len(summary.classes)} classes" if summary.classes else labels
    if summary.resumed:
        print(f"went on after {summary.resumed} shards that were finished")
    print(
        f"packed {summary.num_images} images, {classes}, into {len(summary.shards)} shards: "
        f"{printable(first)} .. {printable(last.name)}"
    )
    if summary.resized:
        print(f"resized {summary.resized} of them; the table of sources says which")
    if summary.stray:
        print(
            f"no labels because {printable(summary.stray)} lies outside the subfolders: move such images and pack again"
        )
    if summary.skipped:
        kinds = ", ".join(
            f"{count} {printable(suffix)}" for suffix, count in list(summary.skipped.items())[:SHOWN]
        )
        print(f"skipped {sum(summary.skipped.values())} files that are no images: {kinds}")
    report_unreadable(summary.unreadable)


def report_unreadable(unreadable: tuple[tuple[str, str], ...]) -> None:
    if unreadable:
        print(f"left out {len(unreadable)} unreadable images:")
        for path, reason in unreadable[:SHOWN]:
            print(f"  {printable(path)}: {printable(reason)}")
