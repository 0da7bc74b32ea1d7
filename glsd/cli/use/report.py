"""glsd report: one HTML page about a run, with its curves, evaluations and pictures."""

import argparse
from pathlib import Path

EXAMPLES = """\
  glsd report runs/mine                             report.html in the run's folder
  glsd report runs/mine photos/ --out mine.html     pictures of other images than the run's own"""


def main(argv: list[str]) -> None:
    """Parse, then write. The imports of networks take seconds, so they wait for a valid command line."""
    parser = argparse.ArgumentParser(
        prog="glsd report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", type=Path, help="the folder of a run, or one of its checkpoints")
    parser.add_argument(
        "images", nargs="*", help="a folder, image files, or shards (the run's training shards)"
    )
    parser.add_argument("--out", type=Path, help="the page (RUN/report.html)")
    args = parser.parse_args(argv)
    from glsd.inference.report import write_report

    images = (args.images[0] if len(args.images) == 1 else args.images) or None
    print(f"wrote {write_report(args.run, images=images, out=args.out)}: open it in a browser")
