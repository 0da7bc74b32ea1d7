"""Measure time and memory of one part of the library on this machine, beside another implementation.

python launch/benchmark loss --json
python launch/benchmark loss --sweep prototypes batch local_crops --plot growth.png
python launch/benchmark step --backbone vit_small_patch16_224
python launch/benchmark data --workers 0 1 2
python launch/benchmark eval --images 60502 --dim 512
python launch/benchmark dml --backbone vit_small_patch16_224
python launch/benchmark scale --ranks 1 2 4
python launch/benchmark road
python launch/benchmark embed --images 20000
python launch/benchmark search --vectors 60000 --dim 512
python launch/benchmark rerank runs/mine --query 'roles/query-*.tar' --gallery 'roles/gallery-*.tar'
python launch/benchmark export --networks vit_tiny_patch16_224
python launch/benchmark learn --shards 'train-*.tar' --val 'val-*.tar' --out learn --arms published hybrid
python launch/benchmark table runs/grid-*
"""

import argparse

from launch.benchmark import data, dml, embed, export, learn, loss, rerank, road, scale, search, step, table
from launch.benchmark import eval as evaluation

# Subcommand -> module with add_arguments(parser) and benchmark(args).
BENCHMARKS = {
    "loss": loss,
    "step": step,
    "data": data,
    "eval": evaluation,
    "dml": dml,
    "scale": scale,
    "road": road,
    "embed": embed,
    "search": search,
    "export": export,
    "learn": learn,
    "rerank": rerank,
    "table": table,
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
