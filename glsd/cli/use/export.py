"""glsd export: write a trained network for another library, and prove it there."""

import argparse
import functools
from pathlib import Path

from glsd.cli.door import printable

FORMS = ("timm", "hf", "onnx", "torchscript", "safetensors")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="glsd export",
        description="Write a trained network into a new folder, for other libraries and for the Hub, with a model card.\n"
        "What was written is loaded back by the other library alone and run on 32 images. If a number differs from ours\n"
        "by more than rounding, the folder is removed and the exit code is 2.\n\n"
        "  timm         timm.create_model('local-dir:OUT', pretrained=True)\n"
        "  hf           transformers' AutoModel and AutoImageProcessor\n"
        "  onnx         onnxruntime: batches of any length, images of any size (Swin: the native one)\n"
        "  torchscript  a traced file for torch alone, images of the native size\n"
        "  safetensors  one file of weights by timm's names, and how to use them in its header\n\n"
        "example: glsd export runs/mine --to timm out",
        formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter, width=120),
    )
    parser.add_argument(
        "model", metavar="MODEL", help="run folder, checkpoint folder, timm:NAME or weights file"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="new folder")
    parser.add_argument("--to", required=True, choices=FORMS, help="form of the export")
    parser.add_argument(
        "--role",
        choices=("teacher", "student", "initial"),
        help="network of a run; unset = the teacher, after glsd finetune the student",
    )
    parser.add_argument("--which", default="last", help="last or best checkpoint of a run (%(default)s)")
    parser.add_argument(
        "--backbone", default="", help="timm name of the network that a weights file belongs to"
    )
    parser.add_argument(
        "--pool", choices=("cls", "mean", "mean+max"), help="unset = as the run was trained, else cls"
    )
    parser.add_argument(
        "--image_size", type=int, help="side of the images in pixels, for a network that is not a run's (224)"
    )
    args = parser.parse_args(argv)
    from glsd.export.write import export

    proof = export(
        args.model,
        args.to,
        args.out,
        role=args.role,
        backbone=args.backbone,
        pool=args.pool,
        image_size=args.image_size,
        which=args.which,
    )
    for line in proof.lines():
        print(printable(line))
    print(
        f"wrote {printable(args.out)}: README.md there says how to load it; fill in its license before you publish it"
    )
