"""glsd search: the most similar images among those that were embedded."""

import argparse
import functools
import json
import sys
from typing import TYPE_CHECKING

from glsd.audit import counted
from glsd.cli.door import printable

if TYPE_CHECKING:
    from glsd.inference.search import Answer

MORE = """\
IMAGE is an image file, a folder, a list file or shards, as for glsd embed. The queries are embedded with the model that
made FILE. Without an index beside FILE, and with --exact, every vector is compared."""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="glsd search",
        description="Find the most similar images among those that glsd embed has embedded.\n\n"
        "example: glsd search photos.parquet query.jpg --picture found.png",
        epilog=MORE,
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=120),
    )
    parser.add_argument(
        "file", metavar="FILE", help="what glsd embed wrote: .parquet, .npy, .csv or .safetensors"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="the queries, see below")
    parser.add_argument("--k", type=int, default=10, help="images to find for each query (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of tables")
    parser.add_argument(
        "--picture",
        metavar="PNG",
        help="draw the first 20 queries and what was found, from where it was embedded",
    )
    parser.add_argument(
        "--exact", action="store_true", help="compare every vector, also if there is an index"
    )
    parser.add_argument(
        "--rerank", metavar="KIND", help="diffusion: order the 200 nearest anew, by a walk over them"
    )
    parser.add_argument("--model", help="where the model is now, if it has moved since")
    args = vars(parser.parse_args(argv))
    as_json = args.pop("json")
    from glsd.inference.search import search

    answer = search(**args)
    if as_json:
        print(to_json(answer))
        return
    report(answer)
    if args["picture"]:
        lost = f"; {counted(answer.lost, 'image')} not there any more" if answer.lost else ""
        print(f"\npicture   {printable(args['picture'])}{lost}")


def report(answer: "Answer") -> None:
    print(f"searched  {answer.vectors:,} vectors of {printable(answer.model)} ({answer.how})")
    for found in answer.found:
        print(f"\n{printable(found.query)}\n  rank   cosine  name")
        for entry in found.neighbors:
            label = "" if entry.label is None else f"  ({printable(entry.label)})"
            print(f"  {entry.rank:>4}  {entry.cosine:7.4f}  {printable(entry.name)}{label}")
    sys.stdout.flush()


def to_json(answer: "Answer") -> str:
    """Return the answer as one line; characters beyond ASCII, and bytes of a file name that are no text, are escaped."""
    found = [
        {"query": each.query, "neighbors": [entry._asdict() for entry in each.neighbors]}
        for each in answer.found
    ]
    return json.dumps({"model": answer.model, "how": answer.how, "vectors": answer.vectors, "found": found})
