"""Jobs that depend on each other, and their submission to SLURM."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from glsd.errors import UserError, one_line

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One call of sbatch."""

    script: str  # in launch/slurm
    options: list[str]
    words: list[str]  # arguments of the script
    requeues: bool = True  # itself; in a chain the next job resumes instead
    after_any: int | None = None  # the earlier job that must have ended, in whatever way
    after_ok: int | None = None  # the earlier job that must have succeeded; if it fails, this job is canceled

    def line(self, ids: list[str]) -> list[str]:
        """Return the command line; ids: of the earlier jobs."""
        export = f"--export=ALL,GLSD_ROOT={ROOT}" + ("" if self.requeues else ",GLSD_REQUEUE=0")
        line = ["sbatch", "--parsable", *self.options, export]
        if not self.requeues:
            line.append("--no-requeue")
        waits = {"afterany": self.after_any, "afterok": self.after_ok}
        wanted = [f"{kind}:{ids[other]}" for kind, other in waits.items() if other is not None]
        if wanted:
            line.append(f"--dependency={','.join(wanted)}")
        if self.after_ok is not None:
            line.append("--kill-on-invalid-dep=yes")
        return [*line, str(ROOT / "launch" / "slurm" / self.script), *self.words]


def submit(jobs: list[Job], *, dry_run: bool) -> None:
    """Submit jobs one after the other and print each sbatch line and job id; a dry run only prints.

    If sbatch refuses a job, the earlier jobs are canceled, and UserError says what sbatch said. Raises UserError also if the path
    of the checkout has a comma.
    """
    if "," in str(ROOT):
        raise UserError(
            f"the path of the checkout, {ROOT}, has a comma, where sbatch --export would cut it: move the checkout"
        )
    ids: list[str] = []
    for number, job in enumerate(jobs, start=1):
        line = job.line(ids)
        print(shlex.join(line), flush=True)
        ids.append(f"JOB{number}" if dry_run else _submitted(job, ids))
        print(f"  {ids[-1]}: not submitted (--dry_run)" if dry_run else f"  job {ids[-1]}", flush=True)


def environment() -> dict[str, str]:
    """Return the environment for sbatch, which passes it on, without the variables of a job that this shell runs in."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("SLURM_") or name == "SLURM_CONF"
    }


def _submitted(job: Job, before: list[str]) -> str:
    try:
        done = subprocess.run(job.line(before), capture_output=True, text=True, env=environment())
    except FileNotFoundError as problem:
        raise UserError(
            "sbatch is not found: submit from a machine of the cluster (--dry_run prints the lines anywhere)"
        ) from problem
    if done.returncode == 0:
        print(done.stderr, end="", file=sys.stderr)
        return done.stdout.strip().split(";")[0]
    fate = "nothing was submitted"
    if before:
        canceled = subprocess.run(["scancel", *before], capture_output=True, text=True)
        fate = (
            f"jobs {' '.join(before)} were {'canceled' if canceled.returncode == 0 else 'submitted before'}"
        )
    said = one_line(done.stderr.replace("sbatch: error: ", ""))
    raise UserError(f"sbatch refuses {job.script}: {said}; {fate}")
