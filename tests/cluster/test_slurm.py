"""Real jobs on a real SLURM of two nodes: what the batch scripts and submit.py promise."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import check_run
import pytest
import submit
from slurm_cluster import Cluster
from tiny_run import argv_of, steps_written

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).parents[2]
LONG = {"optim__epochs": 8}  # 160 steps, some seconds
SHORT = {"optim__epochs": 1, "optim__warmup_epochs": 0, "loss__warmup_teacher_temp_epochs": 0}
Submit = Callable[..., list[str]]


@pytest.fixture(scope="module")
def folder(cluster: Cluster, tmp_path_factory) -> Iterator[Path]:
    """The folder that jobs are submitted from, and what their programs need."""
    made = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(made)
        environment = {**cluster.environment, "OMP_NUM_THREADS": "1", "GLSD_PYTHON": sys.executable}
        for name, value in environment.items():
            patch.setenv(name, value)
        yield made


@pytest.fixture
def submitted(folder: Path, capsys) -> Submit:
    """A function: words of submit.py -> ids of the jobs."""

    def give(*words: str) -> list[str]:
        submit.main(list(words))
        return re.findall(r"^  job (\d+)$", capsys.readouterr().out, re.MULTILINE)

    return give


def log_of(folder: Path, job: str) -> str:
    """What a job has said so far, from its first start on."""
    (log,) = [*folder.glob(f"*-{job}.out"), *folder.glob(f"*-{job}_*.out")]
    return log.read_text()


def assert_like(run: Path, uninterrupted: Path, shards: str) -> None:
    """All records of a run are whole and those of another one, to the bit."""
    assert check_run.main([str(run), "--like", str(uninterrupted), "--shards", shards]) == 0


@pytest.fixture(scope="module")
def stand_ins(cluster: Cluster, folder: Path) -> dict[str, str]:
    """Jobs whose ranks only end as they are told, by name; they wait for SLURM while other tests compute."""
    plans = {
        "mistake": ("2", []),
        "bug": ("1", []),
        "killed": ("KILL 0", []),
        "stuck": ("75+ 75 75 75 0", []),
        "limited": ("75+ 75+ 0", ["GLSD_MAX_REQUEUES=1"]),
        "chained": ("75 0", ["GLSD_REQUEUE=0"]),
        "cancelled": ("wait 0", []),
        "batch_usr1": ("wait 0", []),
        "batch_term": ("wait 0", []),
        "time_limit": ("wait 0", []),
    }
    jobs = {}
    for name, (words, variables) in plans.items():
        (folder / name / "checkpoints").mkdir(parents=True)
        options = ["--time=1", "--signal=USR1@30"] if name == "time_limit" else []
        export = [
            "ALL",
            f"GLSD_ROOT={ROOT}",
            f"GLSD_PYTHON={ROOT}/tests/cluster/stand_in.sh",
            f"STAND_IN={words}",
        ]
        line = ["--parsable", f"--job-name={name}", *options, f"--export={','.join([*export, *variables])}"]
        script = f"{ROOT}/launch/slurm/pretrain.sbatch"
        jobs[name] = cluster.call("sbatch", *line, script, f"--out={name}").strip()
    return jobs


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, folder: Path, stand_ins, uneven_shards: str) -> Path:
    """The folder of a run on two nodes that nothing happened to."""
    run = folder / "uninterrupted"
    words = [
        "pretrain",
        "--nodes",
        "2",
        "--name",
        "uninterrupted",
        "--",
        *argv_of(run, uneven_shards, **LONG),
    ]
    program = [sys.executable, str(ROOT / "launch" / "slurm" / "submit.py"), *words]
    said = subprocess.run(program, capture_output=True, text=True, check=True).stdout
    job = said.split()[-1]
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED", log_of(folder, job)
    assert check_run.main([str(run), "--shards", uneven_shards]) == 0
    return run


def start_long(submitted: Submit, name: str, run: Path, shards: str, *options: str) -> str:
    (job,) = submitted(
        "pretrain", "--nodes", "2", "--name", name, *options, "--", *argv_of(run, shards, **LONG)
    )
    return job


def wait_for_step(cluster: Cluster, folder: Path, job: str, run: Path, step: int = 30) -> None:
    def come() -> bool:
        return steps_written(run) >= step or cluster.job(job)["JobState"] not in ("RUNNING", "PENDING")

    cluster.wait_for(f"step {step} of job {job}", come, 90)
    assert steps_written(run) >= step, log_of(folder, job)


def test_asked_to_stop_it_requeues_itself_and_ends_as_if_never_stopped(
    cluster, folder, submitted, uninterrupted, uneven_shards
):
    run = folder / "usr1"
    job = start_long(submitted, "usr1", run, uneven_shards)
    wait_for_step(cluster, folder, job, run)
    cluster.call("scancel", "--signal=USR1", job)
    end = cluster.wait_for_end(job, 90)
    said = log_of(folder, job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), said
    assert (
        said.index(f"start 1 of job {job}")
        < said.index("stopped by SIGUSR1")
        < said.index(f"start 2 of job {job}")
    )
    assert_like(run, uninterrupted, uneven_shards)


def test_pushed_away_by_a_job_of_more_priority_it_ends_as_if_never_stopped(
    cluster, folder, submitted, uninterrupted, uneven_shards
):
    run = folder / "preempted"
    job = start_long(submitted, "preempted", run, uneven_shards, "--cpus_per_rank", "10")
    wait_for_step(cluster, folder, job, run)
    wide = ["--partition=high", "--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=10"]
    other = cluster.call("sbatch", "--parsable", *wide, "--wrap=true").strip()
    assert cluster.wait_for_end(other)["JobState"] == "COMPLETED"
    end = cluster.wait_for_end(job, 90)
    said = log_of(folder, job)
    assert (end["JobState"], end["Restarts"]) == ("COMPLETED", "1"), said
    assert said.index("stopped by SIGTERM") < said.index(f"start 2 of job {job}")
    assert_like(run, uninterrupted, uneven_shards)


def test_ranks_of_one_node_and_of_two_see_the_same_samples(cluster, folder, submitted, uneven_shards):
    jobs = {}
    for nodes in ("1", "2"):
        run = folder / f"two_ranks_a_node_{nodes}"
        words = ["--nodes", nodes, "--ranks_per_node", "2", "--", *argv_of(run, uneven_shards, **SHORT)]
        jobs[run] = submitted("pretrain", *words)[0]
    for (run, job), ranks in zip(jobs.items(), (2, 4), strict=True):
        assert cluster.wait_for_end(job, 90)["JobState"] == "COMPLETED", log_of(folder, job)
        assert f", {ranks} ranks" in log_of(folder, job)
        assert f"WORLD_SIZE={ranks}" in (run / "env.txt").read_text()
        assert check_run.main([str(run), "--shards", uneven_shards]) == 0
    one, two = ((run / "samples.jsonl").read_text() for run in jobs)
    assert one == two


def test_a_chain_and_a_pipeline_run_through(cluster, folder, submitted, uneven_shards, class_shards):
    first, second = folder / "chain", folder / "fine"
    network = [f"--data.train_shards={class_shards}/train-*.tar", f"--out={second}", "--data.num_workers=0"]
    network += ["--data.crop=32", "--data.images_per_class=4", "--optim.epochs=1", "--optim.batch_size=16"]
    network += [
        f"--data.test_shards={class_shards}/test-*.tar",
        "--model.embed_dim=16",
        "--watch.recall_at=[1,2]",
    ]
    measure = [f"--data.{role}_shards={class_shards}/test-*.tar" for role in ("train", "val")]
    jobs = submitted(
        *["pipeline", "--name", "way"],
        *["--pretrain", shlex.join(["--chain=2", "--", *argv_of(first, uneven_shards, **SHORT)])],
        *["--finetune", shlex.join(network)],
        *[
            "--evaluate",
            shlex.join([*measure, "--data.num_workers=0", "--k=[5]", f"--out={folder}/measured"]),
        ],
    )
    assert len(jobs) == 4
    ends = [cluster.wait_for_end(job, 120)["JobState"] for job in jobs]
    assert ends == ["COMPLETED"] * 4, "".join(log_of(folder, job) for job in jobs)
    assert check_run.main([str(first), "--shards", uneven_shards]) == 0
    assert "last checkpoint: step_00000020" in log_of(folder, jobs[1])
    assert (second / "evals.json").exists()
    assert (folder / "measured" / "evals.json").exists()


def test_a_sweep_has_a_folder_for_each_line(cluster, folder, submitted, uneven_shards):
    (folder / "sweep.txt").write_text("--seed 1\n# not this one\n--seed 2 --optim.lr=1e-3\n--seed=3\n")
    common = argv_of(folder / "not_this", uneven_shards, **SHORT)
    (job,) = submitted("array", "--file", "sweep.txt", "--out", "sweep", "--limit", "2", "--", *common)
    tasks = [f"{job}_{number}" for number in (1, 2, 3)]
    ends = [cluster.wait_for_end(task, 90)["JobState"] for task in tasks]
    assert ends == ["COMPLETED"] * 3, "".join(log_of(folder, task) for task in tasks)
    for number in (1, 2, 3):
        run = folder / "sweep" / str(number)
        assert f"seed: {number}" in (run / "config.yaml").read_text()
        assert check_run.main([str(run), "--shards", uneven_shards]) == 0
    assert not (folder / "not_this").exists()


def test_a_mistake_is_not_started_again_and_takes_along_what_waits_for_it(
    cluster, folder, submitted, uneven_shards
):
    wrong = argv_of(folder / "wrong", f"{folder}/nothing-*.tar")
    jobs = submitted("pipeline", "--pretrain", shlex.join(wrong), "--evaluate", "--protocol knn")
    first, then = (cluster.wait_for_end(job, 60) for job in jobs)
    said = log_of(folder, jobs[0])
    assert (first["JobState"], first["ExitCode"], first["Restarts"]) == ("FAILED", "2:0", "0"), said
    assert said.count("error: ") == 2, said  # ours, and srun's with the exit code
    assert (then["JobState"], then["Restarts"]) == ("CANCELLED", "0")


def test_a_flag_that_is_wrong_ends_before_any_rank_starts(cluster, folder):
    line = ["--parsable", f"--export=ALL,GLSD_ROOT={ROOT}", f"{ROOT}/launch/slurm/pretrain.sbatch"]
    job = cluster.call("sbatch", *line, "--optim.lrr=1").strip()
    assert cluster.wait_for_end(job)["ExitCode"] == "2:0"
    assert log_of(folder, job).splitlines() == [
        "error: unknown flag --optim.lrr; did you mean '--optim.lr'? (all flags: --help)"
    ]


# (state, exit code, starts) and what the job says at last, for each of the stand-ins.
ENDS = {
    "mistake": (("FAILED", "2:0", 1), "the ranks ended with 2: not started again"),
    "bug": (("FAILED", "1:0", 1), "the ranks ended with 1: not started again"),
    "killed": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "stuck": (("FAILED", "75:0", 4), "the ranks ended with 75, the third time without a new checkpoint"),
    "limited": (("FAILED", "75:0", 2), "after 1 requeues (GLSD_MAX_REQUEUES): not started again"),
    "chained": (("FAILED", "75:0", 1), "this job is not requeued, the next one goes on"),
    "cancelled": (("CANCELLED", "75:0", 1), "SLURM has ended this job itself"),
    "batch_usr1": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "batch_term": (("COMPLETED", "0:0", 2), "start 2 of job"),
    "time_limit": (("COMPLETED", "0:0", 2), "start 2 of job"),
}
SIGNALS = {
    "cancelled": [],
    "batch_usr1": ["--batch", "--signal=USR1"],
    "batch_term": ["--batch", "--signal=TERM"],
}


@pytest.mark.parametrize("name", ENDS)
def test_what_becomes_of_a_job_follows_from_how_its_ranks_end(name, cluster, folder, stand_ins):
    job = stand_ins[name]
    if name in SIGNALS:
        cluster.wait_for("its rank", lambda: "rank none of none" in log_of(folder, job))
        cluster.call("scancel", *SIGNALS[name], job)
    end = cluster.wait_for_end(job, 120)
    (state, code, starts), last_words = ENDS[name]
    said = log_of(folder, job)
    assert (end["JobState"], end["ExitCode"], int(end["Restarts"]) + 1) == (state, code, starts), said
    assert len(re.findall(r"glsd: start \d", said)) == starts
    assert last_words in said
    if starts == 2:
        assert said.count("rank none got USR1") == (0 if name in ("killed", "limited") else 1)


def test_where_a_rank_is_and_which_gpus_it_sees(cluster, folder):
    line = ["--parsable", "--nodes=2", "--gpus-per-node=2", "--ntasks-per-node=2", "--cpus-per-task=3"]
    export = f"--export=ALL,GLSD_ROOT={ROOT},GLSD_PYTHON={ROOT}/tests/cluster/stand_in.sh,STAND_IN=0"
    script = f"{ROOT}/launch/slurm/evaluate.sbatch"
    job = cluster.call("env", "-u", "OMP_NUM_THREADS", "sbatch", *line, export, script).strip()
    wrong = cluster.call("sbatch", *line, "--ntasks-per-node=1", export, script).strip()
    assert cluster.wait_for_end(job)["JobState"] == "COMPLETED"
    said = sorted(row for row in log_of(folder, job).splitlines() if row.startswith("rank"))
    assert said == [
        f"rank {rank} of 4, local {rank % 2} of 2 on node{1 + rank // 2}: at node1, cpu no, gpus 0,1, threads 3"
        for rank in range(4)
    ]
    assert cluster.wait_for_end(wrong)["ExitCode"] == "2:0"
    assert "error: 2 GPUs a node, but 1 ranks" in log_of(folder, wrong)


def test_a_node_loses_power(cluster, folder, submitted, uninterrupted, uneven_shards):
    waiting, smaller = folder / "waiting", folder / "smaller"
    first = start_long(submitted, "waiting", waiting, uneven_shards)
    (second,) = submitted(
        "pretrain", "--nodes", "1-2", "--name", "smaller", "--", *argv_of(smaller, uneven_shards, **LONG)
    )
    wait_for_step(cluster, folder, first, waiting, 5)
    wait_for_step(cluster, folder, second, smaller, 5)
    assert cluster.job(second)["NodeList"] == "node[1-2]"
    cluster.power_off("node2")
    # One job goes on with the node that is left, the other one waits for its second.
    end = cluster.wait_for_end(second, 120)
    assert (end["JobState"], end["NodeList"]) == ("COMPLETED", "node1"), log_of(folder, second)
    assert check_run.main([str(smaller), "--shards", uneven_shards]) == 0
    assert cluster.job(first)["JobState"] == "PENDING"
    cluster.power_on("node2")
    assert cluster.wait_for_end(first, 120)["JobState"] == "COMPLETED", log_of(folder, first)
    assert_like(waiting, uninterrupted, uneven_shards)
