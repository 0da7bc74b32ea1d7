"""The code of glsd that one pretraining step runs through: files, functions and lines, counted with sys.setprofile."""

import argparse
import contextlib
import sys
import tempfile
from collections import Counter
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

import glsd
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.packing.embedded import digit_canvases
from glsd.packing.write import pack_samples
from glsd.pretrain.train import pretrain
from launch.benchmark.tools import add_json, finish

ROOT = Path(glsd.__file__).parent
FIRST = 3  # the step that is counted; caches are filled before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what can be varied."""
    parser.add_argument("--config", default="digits", help="recipe or YAML file (%(default)s, the demo's)")
    add_json(parser)


def benchmark(args: argparse.Namespace) -> None:
    """Pretrain for a few steps with the loader in this process; count everything between two optimizer steps."""
    found: set[CodeType] = set()
    with tempfile.TemporaryDirectory() as folder, counting(found):
        pack_samples(digit_canvases("val"), Path(folder), prefix="train")
        flags = {"config": args.config, "data.shards": f"{folder}/*.tar", "out": f"{folder}/run"}
        flags |= {"data.num_workers": 0, "optim.max_steps": FIRST + 1}
        pretrain(load(PretrainConfig, [f"--{key}={value}" for key, value in flags.items()]))
    lines: Counter[str] = Counter()
    for code in found:
        lines[str(Path(code.co_filename).relative_to(ROOT))] += length(code)
    for file, count in lines.most_common():
        print(f"{count:5}  {file}")
    print(
        f"One step runs through {len(lines)} files, {len(found)} functions and {lines.total()} lines of glsd."
    )
    finish(args, "road", torch.device("cpu"), files=len(lines), functions=len(found), lines=lines.total())


@contextlib.contextmanager
def counting(found: set[CodeType]):
    """Collect the code objects of glsd that run between two optimizer steps of the block."""
    steps = 0

    def note(frame: FrameType, event: str, _: object) -> None:
        if event in ("call", "return") and frame.f_code.co_filename.startswith(str(ROOT)):
            found.add(frame.f_code)

    def stepped(*_: object) -> None:
        nonlocal steps
        steps += 1
        sys.setprofile(note if steps == FIRST else None)

    hook = register_optimizer_step_post_hook(stepped)
    try:
        yield
    finally:
        sys.setprofile(None)
        hook.remove()


def length(code: CodeType) -> int:
    """Return the lines of a function from its first line to the start of its last statement."""
    return max(line for _, _, line in code.co_lines() if line) - code.co_firstlineno + 1
