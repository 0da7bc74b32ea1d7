"""glsd show: pictures of what a network sees."""

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

EXAMPLES = """\
  glsd show attention runs/mine photos/             where the class token looks, head by head
  glsd show pca runs/mine photos/ --count 8         patches that are alike have the same color, in all images
  glsd show map runs/mine photos/ --count 2000      images that are alike lie close to each other
The most similar images of one image: glsd search. The crops of a run with matched patches: first_batch.png in its folder."""
COUNTS = {"attention": 6, "pca": 8, "map": 2000}
MOST_DRAWN = 24


def main(argv: list[str]) -> None:
    """Parse, then draw. The imports of networks take seconds, so they wait for a valid command line."""
    parser = argparse.ArgumentParser(
        prog="glsd show",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=list(COUNTS), help="the picture")
    parser.add_argument("model", help="run, checkpoint, timm:NAME or weights file")
    parser.add_argument("images", nargs="+", help="a folder, image files, or shards")
    parser.add_argument("--out", type=Path, help="the PNG to write (WHAT.png)")
    parser.add_argument(
        "--count",
        type=int,
        help="images, evenly spread (6 for attention, 8 for pca, 2,000 for map)",
    )
    parser.add_argument("--backbone", default="", help="timm name of the network, for a weights file")
    parser.add_argument("--seed", type=int, default=0, help="of the map's layout (%(default)s)")
    args = parser.parse_args(argv)
    from glsd.errors import UserError
    from glsd.inference import look
    from glsd.inference.images import as_images
    from glsd.inference.model import load

    count = COUNTS[args.what] if args.count is None else args.count
    if count < 1 or (args.what != "map" and count > MOST_DRAWN):
        raise UserError(f"--count is {count}: expected 1 to {MOST_DRAWN} for {args.what}, 5 or more for map")
    images = as_images(args.images[0] if len(args.images) == 1 else args.images)
    model = load(args.model, backbone=args.backbone)
    squares = model.squares(images, look.evenly(len(images.names), count))
    out = args.out or Path(f"{args.what}.png")
    draw: dict[str, Callable[..., None]] = {
        "attention": look.draw_attention_of,
        "pca": look.draw_pca_of,
        "map": partial(look.draw_map_of, seed=args.seed),
    }
    draw[args.what](model, squares, out)
    print(f"wrote {out}: {args.what} of {len(squares.names)} of {len(images.names)} images, by {model.name}")
