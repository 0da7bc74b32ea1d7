"""Pack a folder of images into tar shards, or write the index beside shards that have none.

python launch/pack.py photos/ shards/ --prefix train
python launch/pack.py index 'shards/train-{000000..000146}.tar'
"""

import argparse

from _door import run

from glsd.data.pack import PackSummary, index_shards, pack_folder

SHOWN = 5


def main(argv: list[str]) -> None:
    if argv[:1] == ["index"]:
        parser = argparse.ArgumentParser(
            prog="pack.py index", description="Write the index beside each shard."
        )
        parser.add_argument("shards", nargs="+", help="brace patterns or globs of .tar files")
        print(f"indexed {index_shards(parser.parse_args(argv[1:]).shards)} samples")
        return
    parser = argparse.ArgumentParser(
        prog="pack.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("src", help="folder of images; if all lie in subfolders, these are the classes")
    parser.add_argument("dst", help="folder for the shards")
    parser.add_argument("--prefix", default="train", help="beginning of the shards' names (%(default)s)")
    parser.add_argument("--shard_megabytes", type=int, default=256, help="size of a shard (%(default)s)")
    parser.add_argument("--shuffle_seed", type=int, default=0, help="order of the images (%(default)s)")
    parser.add_argument(
        "--full_check", action="store_true", help="decode every image, leave out the damaged ones"
    )
    parser.add_argument(
        "--classes", metavar="FILE", help="classes.json of another packing: number the classes as it does"
    )
    args = vars(parser.parse_args(argv))
    report(pack_folder(args.pop("src"), args.pop("dst"), **args))


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
    if summary.unreadable:
        print(f"left out {len(summary.unreadable)} unreadable images:")
        for path, reason in summary.unreadable[:SHOWN]:
            print(f"  {path}: {reason}")


if __name__ == "__main__":
    run(main)
