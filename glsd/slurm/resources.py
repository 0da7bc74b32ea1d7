"""Flags for the resources of a SLURM job, and the sbatch options they stand for."""

import argparse
import re
import shlex
import typing

from glsd.errors import UserError

WARN_SECONDS = 120  # the same as in the batch scripts
# minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, days-hours:minutes:seconds
TIME = re.compile(r"(?:(\d+)-(\d+)(?::(\d+))?(?::(\d+))?|(\d+)(?::(\d+))?(?::(\d+))?)")
TEXTS = ("--extra", "--pretrain", "--finetune", "--evaluate")  # their values look like flags
# Options that submit.py sets itself: long name and letter.
OURS = {"--export": "", "--array": "-a", "--wrap": "", "--dependency": "-d"}
PLAIN = {"partition": "partition", "account": "account", "qos": "qos", "name": "job-name"}


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UserError and knows no abbreviated flags."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(prog=f"submit.py {command}", description=description, allow_abbrev=False)

    def parse_args(self, args, namespace=None):  # type: ignore[override]
        words = list(args)
        for place in reversed(range(len(words) - 1)):
            if words[place] in TEXTS:  # argparse would read the text as another flag
                words[place : place + 2] = [f"{words[place]}={words[place + 1]}"]
        return super().parse_args(words, namespace)

    def error(self, message: str) -> typing.NoReturn:
        if message.startswith("unrecognized arguments"):
            message += "; put the flags of the stage after --"
        raise UserError(f"{message} (all options: {self.prog} --help)")


def add_resources(parser: argparse.ArgumentParser) -> None:
    """Add the flags for resources; by default the batch script and the cluster decide."""
    add = parser.add_argument
    add("--partition", metavar="NAME")
    add("--account", metavar="NAME")
    add("--qos", metavar="NAME")
    add("--name", metavar="NAME", help="name of the job and of its log")
    add(
        "--nodes",
        metavar="N|MIN-MAX",
        help="a range takes the nodes that are free; batch size and learning rate stay the same",
    )
    add("--gpus_per_node", type=int, metavar="N", help="one rank per GPU")
    add("--ranks_per_node", type=int, metavar="N", help="without GPUs: ranks per node")
    add("--cpus_per_rank", type=int, metavar="N", help="one computes, the others may load data")
    add("--memory", metavar="SIZE", help="memory per node, such as 200G; 0 is all of it")
    add("--time", metavar="LIMIT", help="minutes, hours:minutes:seconds or days-hours[:minutes[:seconds]]")
    add(
        "--warn_seconds",
        type=int,
        metavar="N",
        help=f"seconds before the time limit at which a training run saves and stops ({WARN_SECONDS})",
    )
    add(
        "--extra",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="more sbatch options, in quotes",
    )
    add("--dry_run", action="store_true", help="print the sbatch lines and submit nothing")


def sbatch_options(args: argparse.Namespace, *, training: bool) -> list[str]:
    """Return the sbatch options for the flags of ``add_resources``. Raises UserError for an invalid value.

    training: whether the job saves before its time limit; an evaluation has nothing to save.
    """
    if "/" in (args.name or ""):
        raise UserError(f"--name is {args.name!r}: expected no slash, because it begins the name of the log")
    options = [f"--{theirs}={vars(args)[ours]}" for ours, theirs in PLAIN.items() if vars(args)[ours]]
    if args.nodes is not None:
        options.append(f"--nodes={_checked_nodes(args.nodes)}")
    for flag, least in (
        ("gpus_per_node", 0),
        ("ranks_per_node", 1),
        ("cpus_per_rank", 1),
        ("warn_seconds", 1),
    ):
        value = vars(args)[flag]
        if value is not None and value < least:
            raise UserError(f"--{flag} is {value}: expected {least} or more")
    if args.gpus_per_node and args.ranks_per_node:
        raise UserError("--gpus_per_node and --ranks_per_node: give only one of them, each GPU has one rank")
    if args.gpus_per_node:
        options.append(f"--gpus-per-node={args.gpus_per_node}")
    # One task per node is the default. If asked for it, SLURM 22.05 takes the fewest nodes of a range even if all are free.
    if (ranks := args.gpus_per_node or args.ranks_per_node or 1) > 1:
        options.append(f"--ntasks-per-node={ranks}")
    if args.cpus_per_rank is not None:
        options.append(f"--cpus-per-task={args.cpus_per_rank}")
    if args.memory is not None:
        if not re.fullmatch(r"\d+[KMGT]?", args.memory):
            raise UserError(
                f"--memory is {args.memory!r}: expected a number with K, M, G or T, such as 200G, or 0"
            )
        options.append(f"--mem={args.memory}")
    if args.time is not None:
        warn = args.warn_seconds or WARN_SECONDS
        if seconds_of(args.time) <= warn and training:
            raise UserError(
                f"--time is {args.time}, but the run is asked to stop {warn} s before its limit: "
                "give more --time or fewer --warn_seconds"
            )
        options.append(f"--time={args.time}")
    if training and args.warn_seconds:
        options.append(f"--signal=USR1@{args.warn_seconds}")
    return options + extra_options(args.extra)


def _checked_nodes(nodes: str) -> str:
    match = re.fullmatch(r"(\d+)(?:-(\d+))?", nodes)
    least, most = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 1 <= least <= most:
        raise UserError(f"--nodes is {nodes!r}: expected a number of 1 or more, or a range such as 2-4")
    return nodes


def seconds_of(time: str) -> float:
    """Return the seconds of a SLURM time limit, infinity for UNLIMITED. Raises UserError for anything else."""
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return float("inf")
    match = TIME.fullmatch(time)
    if match is None:
        raise UserError(
            f"--time is {time!r}: expected minutes (90), hours:minutes:seconds (1:30:00) or days-hours (1-12)"
        )
    days, hours, minutes, seconds, first, second, third = (int(part or 0) for part in match.groups())
    if match[1] is not None:
        return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
    if match[7] is not None:  # hours:minutes:seconds
        return float((first * 60 + second) * 60 + third)
    return float(first * 60 + second)


def extra_options(texts: list[str]) -> list[str]:
    """Return the sbatch options given with --extra. Raises UserError for a word that is none, or that submit.py sets itself."""
    words = [word for text in texts for word in words_of(text, "--extra")]
    for word in words:
        if not word.startswith("-"):
            raise UserError(f"--extra has {word!r}: expected sbatch options such as --constraint=a100")
        for option, letter in OURS.items():
            # sbatch accepts abbreviated options.
            name = word.partition("=")[0]
            long = len(name) > 3 and (option.startswith(name) or name.startswith(option))
            if long or (letter and word.startswith(letter)):
                raise UserError(f"--extra has {word!r}: remove it, submit.py sets {option} itself")
    return words


def words_of(text: str, what: str) -> list[str]:
    """Split a text as a shell does. Raises UserError that names ``what`` for an unclosed quote."""
    try:
        return shlex.split(text)
    except ValueError as problem:
        raise UserError(f"{what} is {text!r}: {problem}") from problem
