"""glsd show: pictures of what a network sees."""

import argparse
from pathlib import Path

EXAMPLES = """\
  glsd show matches runs/mine                       two crops of an image, and which patches are matched
  glsd show attention runs/mine photos/             where the class token looks, head by head
  glsd show pca runs/mine photos/ --count 8         patches that are alike have the same color, in all images
  glsd show neighbors runs/mine photos/             images, and those that are most like them
  glsd show map runs/mine photos/ --count 2000      images that are alike lie close to each other
The most similar images of one image, among millions: glsd embed, then glsd search. All of these on one page: glsd report."""
COUNTS = {"matches": 4, "attention": 6, "pca": 8, "neighbors": 6, "map": 2000}
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
    parser.add_argument(
        "images", nargs="*", help="a folder, image files, or shards (the run's training shards)"
    )
    parser.add_argument("--out", type=Path, help="the PNG to write (WHAT.png)")
    parser.add_argument(
        "--count",
        type=int,
        help="images, evenly spread (4 for matches, 8 for pca, 2,000 for map, else 6)",
    )
    parser.add_argument(
        "--matching", choices=["geometric", "similarity"], help="of matches (as the run was trained)"
    )
    parser.add_argument("--backbone", default="", help="timm name of the network, for a weights file")
    parser.add_argument("--seed", type=int, default=0, help="of the crops, and of the map (%(default)s)")
    args = parser.parse_args(argv)
    from glsd.errors import UserError
    from glsd.inference import look
    from glsd.inference.images import as_images
    from glsd.inference.model import load

    count = COUNTS[args.what] if args.count is None else args.count
    if count < 1 or (args.what != "map" and count > MOST_DRAWN):
        raise UserError(f"--count is {count}: expected 1 to {MOST_DRAWN} for {args.what}, 5 or more for map")
    if args.matching and args.what != "matches":
        raise UserError(f"--matching is of matches, not of {args.what}: leave it out")
    model = load(args.model, backbone=args.backbone)
    images = as_images(args.images) if args.images else look.training_images(model)
    numbers = look.evenly(len(images.names), count)
    out = args.out or Path(f"{args.what}.png")
    if args.what == "matches":
        look.draw_matches_of(model, images, numbers, out, matching=args.matching, seed=args.seed)
    elif args.what == "neighbors":
        look.draw_neighbors_of(model, images, numbers, out)
    elif args.what == "map":
        look.draw_map_of(model, model.squares(images, numbers), out, seed=args.seed)
    else:
        draw = {"attention": look.draw_attention_of, "pca": look.draw_pca_of}[args.what]
        draw(model, model.squares(images, numbers), out)
    print(f"wrote {out}: {args.what} of {len(numbers)} of {len(images.names)} images, by {model.name}")
