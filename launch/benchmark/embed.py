"""``glsd embed`` against a plain script (timm, PIL, torch's DataLoader): images/s, peak memory, and how far their vectors differ.

Each measurement is a process of its own, from after its imports to the written file; the two take turns.
"""

import argparse
import json
import os
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from glsd.data.photometric import MEAN, STD
from glsd.data.transform import choose_sizes
from glsd.inference.run import embed_files
from glsd.inference.vectors import read_vectors
from glsd.models.backbone import build_backbone
from launch.benchmark.data import jpeg
from launch.benchmark.tools import MIB, add_common, check_positive, finish, in_own_process, paired_ratio
from launch.benchmark.tools import start as start_device

DIFFERENT = 256  # photographs that are made; all files are links to them
PEAK_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes in a unit of ru_maxrss
KINDS = ("ours", "plain")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=int, default=20_000, help="files in the folder (%(default)s)")
    parser.add_argument("--backbone", default="vit_tiny_patch16_224", help="timm name (%(default)s)")
    parser.add_argument("--batch_size", type=int, default=64, help="(%(default)s)")
    parser.add_argument("--num_workers", type=int, default=2, help="loader processes of both (%(default)s)")
    add_common(parser, rounds=3)


def benchmark(args: argparse.Namespace) -> None:
    device = start_device(args)
    check_positive(args, "images", "batch_size", "num_workers")
    with tempfile.TemporaryDirectory() as folder:
        make_folder(Path(folder), args.images)
        save_file(
            build_backbone(args.backbone, image_size=224).net.state_dict(), f"{folder}/weights.safetensors"
        )
        measured: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for _ in range(args.rounds):
            for kind in KINDS:
                payload = {**vars(args), "kind": kind, "folder": folder}
                measured[kind].append(in_own_process("launch.benchmark.embed", payload))
        cosine = mean_cosine(Path(folder))
    seconds = {kind: [each["seconds"] for each in measured[kind]] for kind in KINDS}
    ratio = paired_ratio(seconds["plain"], seconds["ours"])
    processor = {kind: [each["processor_s"] for each in measured[kind]] for kind in KINDS}
    processor_ratio = paired_ratio(processor["plain"], processor["ours"])
    for kind in KINDS:
        median = statistics.median(seconds[kind])
        peak = max(each["mib"] for each in measured[kind])
        print(
            f"{kind:6} {median:8.1f} s  {args.images / median:8.1f} images/s  "
            f"{statistics.median(processor[kind]):8.1f} processor s  {peak:7.0f} MiB at most in all processes"
        )
    print(
        f"ours is {ratio:.2f} times as fast, {processor_ratio:.2f} by processor time; mean cosine of the vectors of both "
        f"{cosine:.5f}"
    )
    finish(
        args, "embed", device, ratio=ratio, processor_ratio=processor_ratio, measured=measured, cosine=cosine
    )


def make_folder(folder: Path, images: int) -> None:
    """Write photographs, and the folder "photos" with ``images`` links to them."""
    (folder / "made").mkdir()
    (folder / "photos").mkdir()
    for number in range(min(DIFFERENT, images)):
        (folder / "made" / f"{number}.jpg").write_bytes(jpeg(number))
    for number in range(images):
        os.link(folder / "made" / f"{number % DIFFERENT}.jpg", folder / "photos" / f"{number:07d}.jpg")


def mean_cosine(folder: Path) -> float:
    """Return the mean cosine between what both have written last."""
    table, plain = read_vectors(folder / "ours.npy"), np.load(folder / "plain.npy")
    assert table.names == sorted(table.names)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (table.vectors, plain)]
    return float((unit[0] * unit[1]).sum(axis=1).mean())


class Photos(Dataset):
    """The usual data set of files."""

    def __init__(self, paths: list[Path]):
        resize, crop = choose_sizes(224)
        self.paths = paths
        self.transform = transforms.Compose(
            [
                transforms.Resize(resize, interpolation=InterpolationMode.BICUBIC),
                transforms.CenterCrop(crop),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> Tensor:
        return self.transform(Image.open(self.paths[number]).convert("RGB"))


def plain(args: Mapping[str, Any]) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(args["folder"])
    weights = str(folder / "weights.safetensors")
    model = timm.create_model(args["backbone"], num_classes=0, checkpoint_path=weights).eval().to(device)
    paths = sorted((folder / "photos").iterdir())
    loader = DataLoader(
        Photos(paths),
        batch_size=args["batch_size"],
        num_workers=args["num_workers"],
        pin_memory=device == "cuda",
    )
    with torch.inference_mode():
        vectors = [model(batch.to(device)).cpu().numpy() for batch in loader]
    np.save(folder / "plain.npy", np.concatenate(vectors))


def ours(args: Mapping[str, Any]) -> None:
    folder = Path(args["folder"])
    (folder / "ours.npy").unlink(missing_ok=True)
    embed_files(
        str(folder / "weights.safetensors"),
        [str(folder / "photos")],
        folder / "ours.npy",
        backbone=args["backbone"],
        batch_size=args["batch_size"],
        num_workers=args["num_workers"],
        index="none",
    )


if __name__ == "__main__":
    payload = json.loads(sys.argv[1])
    torch.set_num_threads(payload["threads"])
    began = time.perf_counter()
    {"ours": ours, "plain": plain}[payload["kind"]](payload)
    took = time.perf_counter() - began
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    own, worker = (each.ru_maxrss * PEAK_UNIT / MIB for each in used)
    processor_s = sum(each.ru_utime + each.ru_stime for each in used)
    print(
        json.dumps(
            {"seconds": took, "processor_s": processor_s, "mib": own + payload["num_workers"] * worker}
        )
    )
