"""Submit a stage, a sweep or a pipeline to SLURM. All flags are checked first, and every sbatch line is printed.

python launch/slurm/submit.py pretrain --nodes 2 --gpus_per_node 8 --time 1-0 -- --config configs/pretrain/... --out runs/x
python launch/slurm/submit.py pretrain --time 4:00:00 --chain 6 -- ...       six jobs in a row, for clusters that do not requeue
python launch/slurm/submit.py array --file sweep.txt --out runs/sweep --limit 4 --time 8:00:00 -- --config ...
python launch/slurm/submit.py pipeline --gpus_per_node 1 --time 4:00:00 \\
    --pretrain '--nodes 4 --gpus_per_node 8 --time 2-0 -- --config ... --out runs/x' \\
    --finetune '--config ... --out runs/x-dml' --evaluate '--protocol retrieval ...'

Flags after -- go to the stage (pretrain, finetune, evaluate). In a pipeline each text holds the arguments of `submit.py STAGE`:
options of its own and --, or the flags alone. --init and --model are the run folder of the stage before, unless given.
All options: submit.py STAGE --help.
"""

import argparse
import copy
import dataclasses
from pathlib import Path

from glsd.errors import UserError, one_line, pick
from glsd.files import expand, written
from glsd.slurm.flags import (
    CONFIGS,
    check_flags,
    refuse_out,
    sweep_tasks,
)
from glsd.slurm.resources import (
    Parser,
    add_resources,
    sbatch_options,
    words_of,
)
from glsd.slurm.sbatch import Job, submit

SWEEPABLE = ("pretrain", "finetune")
# The field and flag that name the run a stage starts from.
SOURCE = {"finetune": "init", "evaluate": "model"}


def main(argv: list[str]) -> None:
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    command = pick(COMMANDS, argv[0], "command")
    options, flags = split(argv[1:])
    jobs, dry_run = command(argv[0], options, flags)
    submit(jobs, dry_run=dry_run)


def split(words: list[str]) -> tuple[list[str], list[str]]:
    """Return the words before and after the first ``--``."""
    place = words.index("--") if "--" in words else len(words)
    return words[:place], words[place + 1 :]


def stage(name: str, options: list[str], flags: list[str]) -> tuple[list[Job], bool]:
    """Plan one stage: one job, or several for a chain."""
    args = stage_parser(name).parse_args(options)
    check_flags(name, flags)
    return stage_jobs(name, args, flags), args.dry_run


def stage_parser(name: str) -> Parser:
    parser = Parser(name, f"Submit launch/slurm/{name}.sbatch; flags after -- go to it.")
    add_resources(parser)
    parser.add_argument(
        "--chain",
        type=int,
        default=1,
        metavar="N",
        help="N jobs in a row, which are not requeued: each resumes where the one before stopped",
    )
    return parser


def stage_jobs(name: str, args: argparse.Namespace, flags: list[str]) -> list[Job]:
    """Return the jobs of one stage, whose flags have been checked; the first job waits for no other."""
    if args.chain < 1:
        raise UserError(f"--chain is {args.chain}: expected 1 or more jobs")
    if args.chain > 1 and name == "evaluate":
        raise UserError(
            f"--chain is {args.chain}: an evaluation saves nothing before its end, so one job must do it"
        )
    options = sbatch_options(args, training=name != "evaluate")
    return [
        Job(
            script=f"{name}.sbatch",
            options=options,
            words=flags,
            requeues=args.chain == 1,
            after_any=number - 1 if number else None,
        )
        for number in range(args.chain)
    ]


def array(name: str, options: list[str], flags: list[str]) -> tuple[list[Job], bool]:
    """Plan a sweep: an array of jobs with one task for each line of a file."""
    parser = Parser(name, "Submit launch/slurm/array.sbatch; flags after -- are common to all tasks.")
    add_resources(parser)
    parser.add_argument(
        "--file",
        required=True,
        metavar="FILE",
        type=expand,
        help="one line of flags for each task; empty lines and lines that begin with # do not count",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", type=expand, help="task N writes into FOLDER/N"
    )
    parser.add_argument(
        "--stage", choices=SWEEPABLE, default="pretrain", help="what each task runs (pretrain)"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="at most N tasks at the same time")
    args = parser.parse_args(options)
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit is {args.limit}: expected 1 or more tasks at the same time")
    refuse_out(flags, "the command line after --")
    tasks = sweep_tasks(args.file)
    for number, words in enumerate(tasks, start=1):
        try:
            check_flags(args.stage, [*flags, *words])
        except UserError as problem:
            raise UserError(f"--file {args.file}, task {number}: {problem}") from problem
    limit = f"%{args.limit}" if args.limit else ""
    job = Job(
        script="array.sbatch",
        options=[f"--array=1-{len(tasks)}{limit}", *sbatch_options(args, training=True)],
        words=[args.stage, str(Path(args.out) / "sweep.txt"), written(args.out), *flags],
    )
    if not args.dry_run:
        keep_sweep(args.file, Path(args.out) / "sweep.txt")
    return [job], args.dry_run


def keep_sweep(file: str, kept: Path) -> None:
    """Copy the file of a sweep to where its tasks read it at each start, so that a later edit changes nothing.

    Raises UserError if the folder has another sweep, whose tasks may still wait, or cannot be written.
    """
    text = Path(file).read_bytes()
    try:
        if kept.exists() and kept.read_bytes() != text:
            raise UserError(f"{kept} is another sweep than {file}: give another --out, or remove it")
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            kept.write_bytes(text)
    except OSError as problem:
        raise UserError(f"cannot write {kept}: {one_line(problem)}; give another --out") from problem


def pipeline(name: str, options: list[str], flags: list[str]) -> tuple[list[Job], bool]:
    """Plan a pipeline: each stage starts when the stage before it has finished."""
    parser = Parser(
        name, "Submit several stages; each waits for the stage before, and is canceled if that fails."
    )
    add_resources(parser)
    for each in CONFIGS:
        parser.add_argument(f"--{each}", metavar="TEXT", help=f"the arguments of submit.py {each}")
    args = parser.parse_args(options)
    texts = {each: vars(args).pop(each) for each in CONFIGS}
    if flags:
        raise UserError(
            "a pipeline takes no flags after --: give each stage its own, --pretrain '--config ...'"
        )
    if not any(texts.values()):
        raise UserError(f"a pipeline needs at least one of {', '.join(f'--{each}' for each in CONFIGS)}")
    jobs: list[Job] = []
    source, dry_run = "", args.dry_run
    for each, text in texts.items():
        if not text:
            continue
        words = words_of(text, f"--{each}")
        own, stage_flags = split(words) if "--" in words else ([], words)
        stage_args = stage_parser(each).parse_args(own, namespace=copy.deepcopy(args))
        if args.name and stage_args.name == args.name:
            stage_args.name = f"{args.name}-{each}"
        cfg = check_flags(each, stage_flags)
        if source and each in SOURCE and not getattr(cfg, SOURCE[each]):
            stage_flags = [*stage_flags, f"--{SOURCE[each]}", written(source)]
        source = cfg.out or source
        dry_run = dry_run or stage_args.dry_run
        before = len(jobs)
        for job in stage_jobs(each, stage_args, stage_flags):
            # Every job of a chain needs the stage before: if its first job is canceled, the next must not start either.
            after_any = None if job.after_any is None else before + job.after_any
            jobs.append(
                dataclasses.replace(job, after_any=after_any, after_ok=before - 1 if before else None)
            )
    return jobs, dry_run


COMMANDS = {**dict.fromkeys(CONFIGS, stage), "array": array, "pipeline": pipeline}
