"""Jobs on the test cluster: submitting them, waiting for them, reading what they said."""

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

from glsd.cli import submit
from tests.cluster import check_run
from tests.cluster.slurm_cluster import Cluster
from tests.helpers.uneven_run import steps_written

ROOT = Path(__file__).parents[2]
STAND_IN = f"GLSD_PYTHON={ROOT}/tests/cluster/stand_in.sh"


class Jobs:
    """Submits from one folder, where the logs come to lie."""

    def __init__(self, cluster: Cluster, folder: Path, python: str) -> None:
        self.cluster, self.folder = cluster, folder
        # One thread, so that sums are the same in each run.
        self.environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "GLSD_PYTHON": python}

    def submit(self, *words: str, **variables: str) -> list[str]:
        """Call submit.py, with more variables of the environment, and return the ids of the jobs."""
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.chdir(self.folder)
            for name, value in {**self.environment, **variables}.items():
                patch.setenv(name, value)
            submit.main(list(words))
        return re.findall(r"^  job (\d+)$", said.getvalue(), re.MULTILINE)

    def sbatch(self, *words: str, without: str = "") -> str:
        """Call sbatch itself, without one variable of the environment, and return the id of the job."""
        variables = {**os.environ, **self.environment}
        variables.pop(without, None)
        return self.cluster.call("sbatch", "--parsable", *words, cwd=self.folder, env=variables).strip()

    def log(self, job: str) -> str:
        """Return what a job has said so far, from its first start on."""
        logs = [*self.folder.glob(f"*-{job}.out"), *self.folder.glob(f"*-{job}_*.out")]
        return "".join(log.read_text(errors="replace") for log in logs)

    def wait_for_step(self, job: str, run: Path, step: int) -> None:
        """Wait until a running job has come to a step; AssertionError with its log if it ends before."""

        def come() -> bool:
            state = "RUNNING" if steps_written(run) >= step else self.cluster.job(job)["JobState"]
            assert state in ("RUNNING", "PENDING"), self.log(job)
            return steps_written(run) >= step

        self.cluster.wait_for(f"step {step} of job {job}", come, 300)

    def wait_for_end(self, job: str) -> dict[str, str]:
        """Wait until a job has ended well and return its fields; AssertionError with its log otherwise."""
        end = self.cluster.wait_for_end(job, 420)
        assert end["JobState"] == "COMPLETED", self.log(job)
        return end


def check(run: Path, shards: str, *, like: Path | None = None) -> None:
    """All records of a run are whole; with ``like`` they are those of another run, to the bit."""
    words = [str(run), "--shards", shards, *(["--like", str(like)] if like else [])]
    assert check_run.main(words) == 0
