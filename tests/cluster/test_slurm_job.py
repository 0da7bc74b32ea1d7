"""What becomes of a job, by how its ranks end: real SLURM, but a shell script in place of training."""

import re

import pytest

from tests.cluster.slurm_jobs import ROOT, STAND_IN

pytestmark = pytest.mark.slurm

# (state, exit code, starts) and what the job says at last, for each of the stand_ins.
ENDS = {
    "mistake": (("FAILED", "2:0", 1), "the ranks ended with 2: not started again"),
    "bug": (("FAILED", "1:0", 1), "the ranks ended with 1: not started again"),
    "killed": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "stuck": (("FAILED", "75:0", 4), "the ranks ended with 75, the third time without a new checkpoint"),
    "limited": (("FAILED", "75:0", 2), "after 1 requeues (GLSD_MAX_REQUEUES): not started again"),
    "chained": (
        ("FAILED", "75:0", 1),
        "this job is not requeued (GLSD_REQUEUE=0), the next one of this folder",
    ),
    "cancelled": (("CANCELLED", "75:0", 1), "SLURM has ended this job itself"),
    "batch_usr1": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "batch_term": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "warned": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "time_limit": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "measured": (
        ("TIMEOUT", "2:0", 1),
        "error: evaluate has reached its time limit and saves nothing on the way: give more --time",
    ),
    "early": (("FAILED", "75:0", 3), "the third time without a new checkpoint after none"),
    "busy": (("COMPLETED", "0:0", 2), "no answer of SLURM (requeue), asked again in 1 s"),
    "inherited": (("COMPLETED", "0:0", 1), "rank none of none"),
}
SIGNALS = {
    "cancelled": [],
    "batch_usr1": ["--batch", "--signal=USR1"],
    "batch_term": ["--batch", "--signal=TERM"],
}


@pytest.mark.parametrize("name", ENDS)
def test_what_becomes_of_a_job_follows_from_how_its_ranks_end(name, cluster, jobs, stand_ins):
    job = stand_ins[name]
    if name in SIGNALS:
        cluster.wait_for("its rank", lambda: "rank none of none" in jobs.log(job))
        cluster.call("scancel", *SIGNALS[name], job)
    end = cluster.wait_for_end(job, 120)
    (state, code, starts), last_words = ENDS[name]
    said = jobs.log(job)
    assert (end["JobState"], end["ExitCode"], int(end["Restarts"]) + 1) == (state, code, starts), said
    assert len(re.findall(r"glsd: start \d", said)) == starts
    assert last_words in said
    assert said.count("rank none got USR1") == (name in ("batch_usr1", "batch_term", "warned"))
    assert said.count("rank none got TERM") == (name in ("cancelled", "time_limit", "measured"))


def test_each_task_of_an_array_is_started_again_by_itself(cluster, jobs, stand_ins):
    """Also the last one, whose number is that of the array."""
    for task in ("1", "2", "3"):
        name = f"{stand_ins['array']}_{task}"
        end = cluster.wait_for_end(name, 120)
        said = (jobs.folder / f"glsd-sweep-{name}.out").read_text()
        assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), said
        assert re.findall(r"glsd: start (\d) of job (\S+)", said) == [("1", name), ("2", name)]
        assert (jobs.folder / "tasks" / task / "slurm.txt").read_text().count("\n") == 1


def test_where_a_rank_is_and_which_gpus_it_sees(cluster, jobs):
    wanted = ["--nodes=2", "--gpus-per-node=2", "--cpus-per-task=3"]
    wanted.append(f"--export=ALL,GLSD_ROOT={ROOT},{STAND_IN},STAND_IN=0")
    script = f"{ROOT}/launch/slurm/evaluate.sbatch"
    job = jobs.sbatch(*wanted, "--ntasks-per-node=2", script, without="OMP_NUM_THREADS")
    wrong = jobs.sbatch(*wanted, script)
    jobs.wait_for_end(job)
    assert sorted(row for row in jobs.log(job).splitlines() if row.startswith("rank")) == [
        f"rank {rank} of 4, local {rank % 2} of 2 on node{1 + rank // 2}: at node1, cpu no, gpus 0,1, threads 3"
        for rank in range(4)
    ]
    assert cluster.wait_for_end(wrong)["ExitCode"] == "2:0"
    assert "error: 2 GPUs a node, but 1 ranks" in jobs.log(wrong)


def test_a_flag_that_is_wrong_ends_before_any_rank_starts(cluster, jobs):
    job = jobs.sbatch(
        f"--export=ALL,GLSD_ROOT={ROOT}", f"{ROOT}/launch/slurm/pretrain.sbatch", "--optim.lrr=1"
    )
    assert cluster.wait_for_end(job)["ExitCode"] == "2:0"
    assert jobs.log(job).splitlines() == [
        "error: unknown flag --optim.lrr; did you mean '--optim.lr'? (all flags: --help all)"
    ]
