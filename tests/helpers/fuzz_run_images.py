"""python fuzz_run_images.py SEED COUNT: decode and crop mutated images, one row of JSON for each."""

import sys
import warnings
from typing import Any

import torch

from glsd.data.crops import crop_sample
from glsd.errors import BrokenImage
from tests.helpers import fuzz_images, fuzz_watch
from tests.helpers.usual_spec import usual_spec

# Crops for which the whole image is decoded, and such small ones that JPEGs are decoded at half their size.
SPECS = (
    usual_spec(global_size=16, local_size=8, num_local=1),
    usual_spec(global_size=4, local_size=3, num_local=1, local_scale=(0.3, 0.4)),
)
MEMORY = 4 << 30  # more address space than before; an image of decode.MAX_PIXELS may take most of it


def main(seed: int, count: int) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    files = fuzz_images.originals()
    for name, raw in files.items():  # whatever is imported on first use
        for spec in SPECS if name != "tiff float" else ():
            crop_sample(raw, spec, seed=0, epoch=0, position=0)
    fuzz_watch.bound_memory(MEMORY)
    before = fuzz_watch.peak_bytes()
    seen = fuzz_watch.watch()

    def work(number: int) -> dict[str, Any]:
        name, raw = fuzz_images.mutated(number, files, seed)
        seen.clear()
        outcome: dict[str, Any]
        try:
            crops = crop_sample(raw, SPECS[number // 2 % 2], seed=0, epoch=0, position=number)
            outcome = {"pixels": list(crops.global_crops.shape)}
        except BrokenImage as error:
            outcome = {"reason": str(error)}
        except Exception as error:  # noqa: BLE001 - the question is which ones escape
            outcome = {"escaped": repr(error)}
        return {"name": name, **outcome, "seen": list(seen), "grown": fuzz_watch.peak_bytes() - before}

    fuzz_watch.go_through(range(count), work)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
