"""The flags of a stage, checked before anything waits in a queue: ``flags.py pretrain --config ...`` prints the run folder.

``flags.py line FILE N`` prints the words of task N of a sweep, a zero byte behind each.
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
    """Return the configuration of a stage's command line; UserError as the stage itself would, but no data is looked at."""
    config = pick(CONFIGS, stage, "stage")
    for word in flags:
        if word.partition("=")[0] in ("--help", "--print_config", "--dry_run"):
            raise UserError(f"{word} is no job: give it to launch/{stage} itself")
    with contextlib.redirect_stdout(sys.stderr):
        return load(config, flags)


def sweep_tasks(file: str) -> list[list[str]]:
    """Return the words of each task of a sweep; lines that are empty or begin with # do not count.

    Raises UserError where the file cannot be read, has no task, or one with quotes without an end or an --out of its own.
    """
    try:
        lines = Path(file).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as problem:
        raise UserError(f"cannot read {file}: {one_line(problem)}") from problem
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not lines:
        raise UserError(f"{file} has no line of flags: expected one for each task")
    tasks = [words_of(line, f"{file}, task {number}") for number, line in enumerate(lines, start=1)]
    for number, words in enumerate(tasks, start=1):
        refuse_out(words, f"{file}, task {number}")
    return tasks


def refuse_out(words: list[str], where: str) -> None:
    """Raise UserError for an --out among the flags of a sweep."""
    if any(word.partition("=")[0] == "--out" for word in words):
        raise UserError(
            f"{where} has --out: each task of a sweep writes into a folder of its own, leave it out"
        )


def print_line(file: str, number: str) -> None:
    """Print the words of one task of a sweep; UserError where there is no such task."""
    tasks = sweep_tasks(file)
    if not number.isdecimal() or not 1 <= int(number) <= len(tasks):
        raise UserError(f"{file} has no task {number}: there are {len(tasks)}, counted from 1 on")
    print(*tasks[int(number) - 1], sep="\0", end="\0")


def main(argv: list[str]) -> None:
    if argv[:1] == ["line"] and len(argv) == 3:
        print_line(*argv[1:])
        return
    if not argv:
        raise UserError(f"expected a stage ({', '.join(CONFIGS)}) and its flags")
    print(check_flags(argv[0], argv[1:]).out)
