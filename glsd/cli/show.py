"""glsd show: pictures of what a network sees."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from glsd.inference.images import Images
    from glsd.inference.model import Model

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
    from glsd.inference.images import as_images
    from glsd.inference.model import load

    count = COUNTS[args.what] if args.count is None else args.count
    if count < 1 or (args.what != "map" and count > MOST_DRAWN):
        raise UserError(f"--count is {count}: expected 1 to {MOST_DRAWN} for {args.what}, 5 or more for map")
    images = as_images(args.images[0] if len(args.images) == 1 else args.images)
    numbers = (
        [i * len(images.names) // count for i in range(count)]
        if count < len(images.names)
        else range(len(images.names))
    )
    out = args.out or Path(f"{args.what}.png")
    model = load(args.model, backbone=args.backbone)
    DRAW[args.what](model, images, list(numbers), out, args.seed)
    print(f"wrote {out}: {args.what} of {len(numbers)} of {len(images.names)} images, by {model.name}")


def squares(model: "Model", images: "Images", numbers: list[int]) -> tuple[Any, list[str]]:
    """Return the squares that the network sees (n 3 s s), uint8, and the images' names. Unreadable ones are a UserError."""
    import torch

    from glsd.errors import BrokenImage, UserError

    found = []
    for number in numbers:
        try:
            found.append(model.transform.square(images.pixels(number)))
        except BrokenImage as problem:
            raise UserError(f"image {images.names[number]} cannot be read: {problem}") from problem
    return torch.stack(found), [Path(images.names[number]).name for number in numbers]


def attention(model: "Model", images: "Images", numbers: list[int], out: Path, seed: int) -> None:
    from glsd.data.photometric import normalize
    from glsd.show.attention import draw_attention

    pixels, names = squares(model, images, numbers)
    draw_attention(out, pixels, model.attention(normalize(pixels)), names)


def pca(model: "Model", images: "Images", numbers: list[int], out: Path, seed: int) -> None:
    from glsd.data.photometric import normalize
    from glsd.show.pca import draw_pca, patch_colors

    pixels, names = squares(model, images, numbers)
    draw_pca(out, pixels, patch_colors(model.patches(normalize(pixels))), names)


def map_of(model: "Model", images: "Images", numbers: list[int], out: Path, seed: int) -> None:
    import numpy as np
    import torch.nn.functional as F

    from glsd.data.photometric import normalize
    from glsd.show.map import draw_map, places

    pixels, _ = squares(model, images, numbers)
    vectors = np.concatenate([model.features(normalize(part)).float().numpy() for part in pixels.split(64)])
    at, method = places(vectors, seed=seed)
    thumbnails = F.interpolate(pixels.float(), size=(48, 48), mode="area").round().byte()
    draw_map(out, at, thumbnails, title=f"{len(numbers)} images by {model.name} ({method})")


DRAW = {"attention": attention, "pca": pca, "map": map_of}
