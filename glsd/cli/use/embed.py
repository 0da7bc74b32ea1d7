"""glsd embed: one vector for each image, in a file."""

import argparse
import functools
import sys
from typing import TYPE_CHECKING

from glsd.audit import counted
from glsd.cli.door import printable
from glsd.errors import INTERRUPTED

if TYPE_CHECKING:
    from glsd.inference.run import Summary

SHOWN = 3
MORE = """\
IMAGES are a folder (with all below it), list files (.csv .tsv .parquet with a column path), shards (.tar, also on a
server), or image files. After a kill, the same command goes on where it stopped. On several GPUs:
  accelerate launch -m glsd embed runs/mine photos/ --out photos.parquet
FILE ends in .parquet, .npy, .csv or .safetensors; .npy and .safetensors have the names beside, in FILE.names.csv."""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="glsd embed",
        description="Write one vector for each image, with its name.\n\n"
        "example: glsd embed runs/mine photos/ --out photos.parquet",
        epilog=MORE,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=120),
    )
    parser.add_argument("model", help="a run, a checkpoint, timm:NAME, or a weights file")
    parser.add_argument("images", nargs="+", metavar="IMAGES", help="see below")
    parser.add_argument("--out", required=True, metavar="FILE", help="see below")
    parser.add_argument(
        "--index",
        default="auto",
        metavar="KIND",
        help="faiss index beside it: none, flat, ivf, hnsw; auto = none up to 100,000 images, ivf beyond",
    )
    add_model(parser)
    parser.add_argument(
        "--batch_size", type=int, default=64, help="images at once, on each GPU (%(default)s)"
    )
    parser.add_argument("--precision", default="no", help="no = float32, or bf16 (%(default)s)")
    parser.add_argument("--path_column", default="path", help="of list files (%(default)s)")
    parser.add_argument(
        "--label_column", help="of list files; '' = no labels (default: label, if there is one)"
    )
    parser.add_argument(
        "--root", help="folder that paths in lists are relative to (default: that of the first list)"
    )
    parser.add_argument(
        "--num_workers",
        type=int,
        help="processes that read images, for each GPU (default: the cores, at most 8)",
    )
    args = vars(parser.parse_args(argv))
    from glsd.inference.run import embed_files

    try:
        summary = embed_files(**args)
    except KeyboardInterrupt:
        print("stopped: the same command goes on where it stopped", file=sys.stderr)
        return INTERRUPTED
    if summary is not None:
        report(summary)
    return 0


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add what ``glsd.load`` takes besides the path."""
    parser.add_argument("--role", help="teacher, student or initial network of a run (default: as glsd.load)")
    parser.add_argument("--which", default="last", help="last or best checkpoint of a run (%(default)s)")
    parser.add_argument(
        "--backbone", default="", help="timm name of the network that a weights file belongs to"
    )
    parser.add_argument("--pool", help="cls, mean or mean+max (default: as the run was trained, else cls)")
    parser.add_argument(
        "--image_size", type=int, metavar="PIXELS", help="of a network that is not a run's (224)"
    )


def report(summary: "Summary") -> None:
    out = printable(summary.out)
    if summary.images_done:
        if summary.resumed:
            print(f"resumed   {counted(summary.resumed, 'image')} were there already")
        rate = summary.images_done / summary.seconds
        print(
            f"embedded  {counted(summary.images_done, 'image')} in {summary.seconds:,.1f} s ({rate:,.0f} images/s)"
        )
    if summary.unreadable:
        print(
            f"warning: {counted(len(summary.unreadable), 'image')} cannot be read, listed in {out}.unreadable.txt:"
        )
        for name, reason in summary.unreadable[:SHOWN]:
            print(f"  {printable(name)}: {printable(reason)}")
    there = "" if summary.images_done or summary.resumed else ", which was there already"
    print(f"wrote     {counted(summary.num_vectors, 'vector')} of {printable(summary.model)}: {out}{there}")
    if summary.built is None:
        print(f"index     none: {summary.no_index}")
    else:
        built = summary.built
        print(
            f"index     {built.kind} ({built.effort}) in {built.seconds:,.1f} s, recall@10 {built.recall:.3f} against exact "
            f"search: {printable(built.path)}"
        )
    print(f"next: glsd search {out} IMAGE --picture found.png")
