"""The proof of an export: a fresh process loads it with the foreign library alone, and both sides are compared."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from glsd.data.photometric import STD
from glsd.errors import UserError, one_line
from glsd.geometry import patch_sides
from glsd.inference.model import Model

NUM_IMAGES = 32
# Largest difference of features, as a share of the largest feature: rounding of float32.
BOUNDS = {"timm": 1e-5, "hf": 1e-5, "torchscript": 1e-5, "safetensors": 1e-5, "onnx": 1e-4}
# Pillow and torch round the resized image differently, by one level of 255, rarely by two. A wrong filter, size or
# normalization is tens of levels away.
LEVELS = 2
_BATCH = 8
_PROGRAM = Path(__file__).with_name("foreign.py")


class Proof(NamedTuple):
    """How far an exported model is from ours. Differences are shares of the largest feature."""

    library: str
    bound: float
    same_inputs: float
    levels: float  # of 255, between the images that both sides made from the same pictures
    from_pictures: float  # on the images that the foreign library made
    cosine: float  # the smallest, between both sides' vectors of the same pictures, each with its own images
    other_size: float | None  # None: the export takes its native size only

    def lines(self) -> list[str]:
        """Return the proof as full statements."""
        lines = [
            f"loaded by {self.library} alone, in a process without glsd, and run on {NUM_IMAGES} images",
            f"same inputs: features differ by {self.same_inputs:.1e} of the largest (bound {self.bound:.0e})",
            f"from pictures: pixels differ by {self.levels:.1f} of 255 levels (bound {LEVELS}), features on the same pixels by "
            f"{self.from_pictures:.1e} (bound {self.bound:.0e}); smallest cosine {self.cosine:.6f}",
        ]
        if self.other_size is not None:
            lines.append(
                f"another image size: features differ by {self.other_size:.1e} (bound {self.bound:.0e})"
            )
        return lines


def prove(form: str, folder: Path, model: Model, *, any_size: bool) -> Proof:
    """Load what was written with the foreign library alone, run it on 32 images, and compare it with the model.

    any_size: compare on images of another size, too. model: on the CPU. Raises UserError if the library cannot load or run
    it, a number differs more than its bound allows, or is not finite.
    """
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        (work / "images").mkdir()
        pictures = draw_pictures(model.transform.resize)
        for number, picture in enumerate(pictures):
            picture.save(work / "images" / f"{number:02}.png")
        inputs = torch.stack([model.transform(picture) for picture in pictures])
        given = {"inputs": inputs}
        if any_size:
            (down, across), side = patch_sides(model.backbone.stride), model.transform.crop
            generator = torch.Generator().manual_seed(1)
            # Not the size of the example that write_onnx traces: a size that was frozen there would pass.
            given["other"] = torch.randn(4, 3, side + 3 * down, side + across, generator=generator)
        for name, images in given.items():
            np.save(work / f"{name}.npy", images.numpy())
        library = run_alone(form, folder, work)
        with np.load(work / "results.npz") as file:
            theirs = {name: torch.from_numpy(file[name]) for name in file}
    return _compare(form, library, model, given, theirs)


def draw_pictures(short_side: int) -> list[Image.Image]:
    """Return 32 pictures of many sizes and shapes around ``short_side``: large patches of color, edges, fine grain."""
    generator = np.random.default_rng(0)
    pictures = []
    for _ in range(NUM_IMAGES):
        width, height = (short_side * generator.uniform(0.7, 1.8, 2)).astype(int).clip(2)
        rough = generator.integers(60, 150, (5, 7, 3), dtype=np.uint8)
        smooth = Image.fromarray(rough).resize((int(width), int(height)), Image.Resampling.BILINEAR)
        picture = np.asarray(smooth) + generator.normal(0, 6, (height, width, 3))
        top, left = (generator.uniform(0.1, 0.6, 2) * (height, width)).astype(int)
        picture[top : top + height // 3, left : left + width // 3] += 45
        # Far from black and white: some programs clip between the passes of a resize, others do not.
        pictures.append(Image.fromarray(picture.clip(50, 205).astype(np.uint8)))
    return pictures


def run_alone(form: str, folder: Path, work: Path) -> str:
    """Run the foreign side; return the library's name and version."""
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-P", str(_PROGRAM), form, str(folder.absolute()), str(work)]
    done = subprocess.run(command, env={**os.environ, **offline}, cwd=work, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"--to {form}: the proof failed, nothing was written: it cannot be loaded or run: {one_line(last)}"
        )
    said = json.loads((work / "library.json").read_text())
    assert not said["glsd_modules"], said
    return said["library"]


def _compare(
    form: str, library: str, model: Model, given: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]
) -> Proof:
    """Compare both sides; UserError for a difference beyond its bound."""
    ours = {name: _features(model, images) for name, images in given.items()}
    differences = {name: _difference(theirs[name], ours[name]) for name in given}
    if theirs["pixels"].shape != given["inputs"].shape:
        made, expected = tuple(theirs["pixels"].shape), tuple(given["inputs"].shape)
        raise UserError(
            f"--to {form}: the proof failed, nothing was written: {library} makes images {made}, not {expected}"
        )
    levels = (theirs["pixels"] - given["inputs"]).abs() * 255 * torch.tensor(STD)[:, None, None]
    proof = Proof(
        library=library,
        bound=BOUNDS[form],
        same_inputs=differences["inputs"],
        levels=round(float(levels.max()), 2),
        from_pictures=_difference(theirs["from_pictures"], _features(model, theirs["pixels"])),
        cosine=float(
            torch.cosine_similarity(theirs["from_pictures"].double(), ours["inputs"].double()).min()
        ),
        other_size=differences.get("other"),
    )
    for what, found, bound in (
        ("features of the same inputs differ", proof.same_inputs, proof.bound),
        ("pixels of the same pictures differ", proof.levels, LEVELS),
        ("features of the same pictures differ", proof.from_pictures, proof.bound),
        ("features at another image size differ", proof.other_size or 0.0, proof.bound),
    ):
        if not found <= bound:  # also if it is not a number
            raise UserError(
                f"--to {form}: the proof failed, nothing was written: {what} by {found:.1e} in {library} (bound {bound:.0e})"
            )
    return proof


def _features(model: Model, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.features(part) for part in images.split(_BATCH)]).float()


def _difference(theirs: torch.Tensor, ours: torch.Tensor) -> float:
    """Return the largest difference as a share of the largest feature; infinity for another shape."""
    if theirs.shape != ours.shape:
        return float("inf")
    return float((theirs - ours).abs().max() / ours.abs().max().clamp_min(1e-12))
