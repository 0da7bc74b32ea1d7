"""Measure this machine: time and memory of one part of the library beside another implementation of it.

python launch/benchmark loss --json
python launch/benchmark loss --sweep prototypes batch local_crops --plot growth.png
python launch/benchmark step --backbone vit_small_patch16_224
python launch/benchmark data --workers 0 1 2
python launch/benchmark eval --images 60502 --dim 512
python launch/benchmark dml --backbone vit_small_patch16_224
python launch/benchmark scale --ranks 1 2 4
"""

import argparse

from launch.benchmark import data as benchmark_data
from launch.benchmark import dml as benchmark_dml
from launch.benchmark import eval as benchmark_eval
from launch.benchmark import loss as benchmark_loss
from launch.benchmark import scale as benchmark_scale
from launch.benchmark import step as benchmark_step

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
        prog="launch/benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="WHAT")
    for name, module in BENCHMARKS.items():
        says = (module.__doc__ or "").splitlines()[0]
        module.add_arguments(commands.add_parser(name, help=says, description=says))
    args = parser.parse_args(argv)
    BENCHMARKS[args.command].benchmark(args)
