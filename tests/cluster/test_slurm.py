"""Training on a real SLURM of two nodes: stopped, pushed away, a node without power, and yet nothing lost or doubled."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.slurm_jobs import ROOT, Jobs, check
from tests.helpers.uneven_run import argv_of

pytestmark = pytest.mark.slurm

LONG = {"optim__epochs": 4}  # 80 steps
SHORT = {"optim__epochs": 1, "optim__warmup_epochs": 0, "loss__warmup_teacher_temp_epochs": 0}  # 20 steps


@pytest.fixture(scope="module")
def aside(
    jobs: Jobs, stand_ins, uneven_shards: str, class_shards: Path, digit_shards: Path
) -> dict[str, list[str]]:
    """Ids of jobs that nothing happens to, by name; they fill the time in which other tests wait for SLURM."""
    started = {}
    for nodes in ("1", "2"):
        words = ["--nodes", nodes, "--ranks_per_node", "2", "--"]
        argv = argv_of(jobs.folder / f"ranks_{nodes}", uneven_shards, **SHORT)
        started[f"ranks_{nodes}"] = jobs.submit("pretrain", *words, *argv)
    fine = [
        f"--data.train_shards={class_shards}/train-*.tar",
        f"--data.test_shards={class_shards}/test-*.tar",
    ]
    fine += ["--data.num_workers=0", "--data.crop=32", "--data.images_per_class=4", "--model.embed_dim=16"]
    fine += ["--optim.epochs=1", "--optim.batch_size=16", "--watch.recall_at=[1,2]", "--out=fine"]
    known = [f"--data.train_shards={digit_shards}/train-*.tar", f"--data.val_shards={digit_shards}/val-*.tar"]
    known += ["--data.num_workers=0", "--k=[5]", "--out=measured"]
    started["way"] = jobs.submit(
        *["pipeline", "--name", "way"],
        *[
            "--pretrain",
            shlex.join(["--chain=2", "--", *argv_of(jobs.folder / "chain", uneven_shards, **SHORT)]),
        ],
        *["--finetune", shlex.join(fine), "--evaluate", shlex.join(known)],
    )
    (jobs.folder / "sweep.txt").write_text("--seed 1\n# not this one\n--seed 2 --optim.lr=1e-3\n--seed=3\n")
    common = [word for word in argv_of(jobs.folder, uneven_shards, **SHORT) if not word.startswith("--out=")]
    started["sweep"] = jobs.submit("array", "--file=sweep.txt", "--out=sweep", "--limit=2", "--", *common)
    wrong = argv_of(jobs.folder / "wrong", f"{jobs.folder}/nothing-*.tar")
    started["wrong"] = jobs.submit(
        "pipeline", "--pretrain", shlex.join(wrong), "--evaluate", "--protocol knn"
    )
    return started


@pytest.fixture(scope="module")
def uninterrupted(jobs: Jobs, stand_ins, uneven_shards: str) -> Path:
    """The folder of a run on two nodes that nothing happened to."""
    run = jobs.folder / "uninterrupted"
    words = ["pretrain", "--nodes", "2", "--name", "whole", "--", *argv_of(run, uneven_shards, **LONG)]
    line = [sys.executable, str(ROOT / "launch" / "slurm" / "submit.py"), *words]
    done = subprocess.run(
        line, capture_output=True, text=True, cwd=jobs.folder, env={**os.environ, **jobs.environment}
    )
    assert done.returncode == 0, done.stderr
    jobs.wait_for_end(done.stdout.split()[-1])
    check(run, uneven_shards)
    return run


def start_long(jobs: Jobs, run: Path, shards: str, *options: str, **variables: str) -> str:
    words = ["--nodes", "2", "--name", run.name, *options, "--", *argv_of(run, shards, **LONG)]
    return jobs.submit("pretrain", *words, **variables)[0]


def test_asked_to_stop_it_requeues_itself_and_ends_as_if_never_stopped(
    cluster, jobs, aside, uninterrupted, uneven_shards
):
    run = jobs.folder / "usr1"
    job = start_long(jobs, run, uneven_shards, GLSD_PYTHON=sys.executable)
    jobs.wait_for_step(job, run, 20)
    cluster.call("scancel", "--signal=USR1", job)
    assert jobs.wait_for_end(job)["Restarts"] == "1"
    said = jobs.log(job)  # both starts in one file
    assert said.index(f"start 1 of job {job}") < said.index("stopped by SIGUSR1") < said.index("resumed from")
    check(run, uneven_shards, like=uninterrupted)


def test_pushed_away_by_a_job_of_more_priority_it_ends_as_if_never_stopped(
    cluster, jobs, uninterrupted, uneven_shards
):
    run = jobs.folder / "preempted"
    job = start_long(jobs, run, uneven_shards, "--cpus_per_rank", "10")
    jobs.wait_for_step(job, run, 20)
    wide = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=10"]
    jobs.wait_for_end(jobs.sbatch(*wide, "--wrap=true"))
    assert jobs.wait_for_end(job)["Restarts"] == "1"
    said = jobs.log(job)
    assert said.index("stopped by SIGTERM") < said.index(f"start 2 of job {job}") < said.index("resumed from")
    check(run, uneven_shards, like=uninterrupted)


def test_ranks_of_one_node_and_of_two_see_the_same_samples(jobs, aside, uneven_shards):
    records = []
    for name, ranks in (("ranks_1", 2), ("ranks_2", 4)):
        (job,) = aside[name]
        jobs.wait_for_end(job)
        assert f", {ranks} ranks" in jobs.log(job)
        assert f"WORLD_SIZE={ranks}" in (jobs.folder / name / "env.txt").read_text()
        check(jobs.folder / name, uneven_shards)
        records.append((jobs.folder / name / "samples.jsonl").read_text())
    assert records[0] == records[1]


def test_a_chain_and_a_pipeline_run_through(jobs, aside, uneven_shards):
    assert len(aside["way"]) == 4
    for job in aside["way"]:
        jobs.wait_for_end(job)
    check(jobs.folder / "chain", uneven_shards)
    assert "last checkpoint: step_00000020" in jobs.log(aside["way"][1])  # it was finished
    assert (jobs.folder / "fine" / "evals.json").exists()
    assert (jobs.folder / "measured" / "evals.json").exists()


def test_a_sweep_has_a_folder_for_each_line(jobs, aside, uneven_shards):
    for number in (1, 2, 3):
        jobs.wait_for_end(f"{aside['sweep'][0]}_{number}")
        run = jobs.folder / "sweep" / str(number)
        assert f"seed: {number}" in (run / "config.yaml").read_text()
        check(run, uneven_shards)


def test_a_mistake_is_not_started_again_and_takes_along_what_waits_for_it(cluster, jobs, aside):
    first, then = (cluster.wait_for_end(job, 60) for job in aside["wrong"])
    said = jobs.log(aside["wrong"][0])
    assert (first["JobState"], first["ExitCode"], first["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == 1, said
    assert (then["JobState"], then["Restarts"]) == ("CANCELLED", "0")


def test_a_node_loses_power(cluster, jobs, uninterrupted, uneven_shards):
    waiting, smaller = jobs.folder / "waiting", jobs.folder / "smaller"
    first = start_long(jobs, waiting, uneven_shards)
    second = start_long(jobs, smaller, uneven_shards, "--nodes", "1-2")
    for job, run in ((first, waiting), (second, smaller)):
        jobs.wait_for_step(job, run, 5)
        assert cluster.job(job)["NodeList"] == "node[1-2]"
    cluster.power_off("node2")
    # One job goes on with the node that is left, the other one waits for its second.
    assert jobs.wait_for_end(second)["NodeList"] == "node1"
    check(smaller, uneven_shards)
    assert cluster.job(first)["JobState"] == "PENDING"
    cluster.power_on("node2")
    assert jobs.wait_for_end(first)["NodeList"] == "node[1-2]"
    check(waiting, uneven_shards, like=uninterrupted)
    assert "rank 1 on node2 is missing since" in jobs.log(first)
