"""Measure a frozen backbone: evaluate.py --model RUN --data.train_shards TARS --data.val_shards TARS."""

import _door

from glsd.command_line import load
from glsd.eval_config import EvalConfig
from glsd.evaluate import evaluate
from glsd.runtime import ending


def main(argv: list[str]) -> None:
    """Parse, call the story, leave the process group."""
    evaluate(load(EvalConfig, argv))
    ending.finish()


if __name__ == "__main__":
    _door.run(main)
