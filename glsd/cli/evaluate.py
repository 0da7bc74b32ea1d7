"""Measure a frozen backbone: evaluate.py --model RUN --data.train_shards TARS --data.val_shards TARS."""

from glsd.cluster import shutdown
from glsd.config.evaluate import EvalConfig
from glsd.config.parse import load
from glsd.evaluate.run import evaluate


def main(argv: list[str]) -> None:
    """Parse, call the story, leave the process group."""
    evaluate(load(EvalConfig, argv))
    shutdown.finish()
