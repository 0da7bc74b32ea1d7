"""Check the flags of a stage before a job waits in a queue: ``flags.py pretrain --config ...`` prints the run folder.

``flags.py line FILE N`` prints the flags of task N of a sweep, each followed by a zero byte.
"""

import contextlib
import sys
from pathlib import Path
from typing import Any

from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import load
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError, one_line, pick
from glsd.slurm.resources import words_of

CONFIGS: dict[str, type] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig, "evaluate": EvalConfig}


def check_flags(stage: str, flags: list[str]) -> Any:
    """Return the configuration of a stage's command line, without a look at the data. Raises UserError as the stage would."""
    config = pick(CONFIGS, stage, "stage")
    for word in flags:
        if word.partition("=")[0].replace("-", "_") in ("__help", "__print_config", "__dry_run"):
            raise UserError(f"{word} is not for a job: give it to launch/{stage} itself")
    with contextlib.redirect_stdout(sys.stderr):
        return load(config, flags)


def sweep_tasks(file: str) -> list[list[str]]:
    """Return the flags of each task of a sweep, one line each; empty lines and lines that begin with # do not count.

    Raises UserError if the file cannot be read or has no task, or if a task has an unclosed quote or its own --out.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot read {file}: {one_line(problem)}") from problem
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError(f"{file} has no line of flags: expected one line for each task")
    tasks = [words_of(line, f"{file}, task {number}") for number, line in enumerate(lines, start=1)]
    for number, words in enumerate(tasks, start=1):
        refuse_out(words, f"{file}, task {number}")
    return tasks


def refuse_out(words: list[str], where: str) -> None:
    """Raise UserError if the flags of a sweep contain --out."""
    if any(word.partition("=")[0] == "--out" for word in words):
        raise UserError(f"{where} has --out: remove it, each task of a sweep writes into its own folder")


def print_line(file: str, number: str) -> None:
    """Print the flags of one task of a sweep. Raises UserError if there is no such task."""
    tasks = sweep_tasks(file)
    if not number.isdecimal() or not 1 <= int(number) <= len(tasks):
        raise UserError(f"{file} has no task {number}: expected 1 to {len(tasks)}")
    print(*tasks[int(number) - 1], sep="\0", end="\0")


def main(argv: list[str]) -> None:
    if argv[:1] == ["line"] and len(argv) == 3:
        print_line(*argv[1:])
        return
    if not argv:
        raise UserError(f"expected a stage ({', '.join(CONFIGS)}) and its flags")
    print(check_flags(argv[0], argv[1:]).out)
