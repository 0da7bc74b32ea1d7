"""The flags of a stage, checked before anything waits in a queue: ``flags.py pretrain --config ...`` prints the run folder."""

import contextlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import _door

from glsd.command_line import load
from glsd.config import PretrainConfig
from glsd.contracts import UserError, pick
from glsd.eval_config import EvalConfig
from glsd.finetune_config import FinetuneConfig

CONFIGS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "evaluate": EvalConfig}


def check_flags(stage: str, flags: list[str]) -> Any:
    """Return the configuration of a stage's command line; UserError as the stage itself would, but no data is looked at."""
    config = pick(CONFIGS, stage, "stage")
    for word in flags:
        if word.partition("=")[0] in ("--help", "--print_config", "--dry_run"):
            raise UserError(f"{word} is no job: give it to launch/{stage} itself")
    with contextlib.redirect_stdout(sys.stderr):
        return load(config, flags)


def main(argv: list[str]) -> None:
    if not argv:
        raise UserError(f"expected a stage ({', '.join(CONFIGS)}) and its flags")
    print(check_flags(argv[0], argv[1:]).out)


if __name__ == "__main__":
    _door.run(main)
