"""Measure this machine: time and memory of one part of the library beside another implementation of it.

python launch/benchmark.py loss --json
python launch/benchmark.py loss --sweep prototypes batch local_crops --plot growth.png
python launch/benchmark.py step --backbone vit_small_patch16_224
python launch/benchmark.py data --workers 0 1 2
python launch/benchmark.py eval --images 60502 --dim 512
python launch/benchmark.py dml --backbone vit_small_patch16_224
python launch/benchmark.py scale --ranks 1 2 4
"""

import argparse

import benchmark_data
import benchmark_dml
import benchmark_eval
import benchmark_loss
import benchmark_scale
import benchmark_step
from _door import run

# Subcommand -> module with add_arguments(parser) and benchmark(args).
BENCHMARKS = {
    "loss": benchmark_loss,
    "step": benchmark_step,
    "data": benchmark_data,
    "eval": benchmark_eval,
    "dml": benchmark_dml,
    "scale": benchmark_scale,
}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="benchmark.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    for name, module in BENCHMARKS.items():
        says = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=says, description=says))
    args = parser.parse_args(argv)
    BENCHMARKS[args.command].benchmark(args)


if __name__ == "__main__":
    run(main)
