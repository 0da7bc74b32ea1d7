"""What submit.py gives to sbatch, and what it refuses, on machines without SLURM too."""

import shlex
from pathlib import Path

import pytest
import resources
import submit

from glsd.contracts import UserError

ROOT = Path(__file__).parents[2]
ROOT_EXPORT = f"--export=ALL,GLSD_ROOT={ROOT}"


def lines_of(said: str) -> list[list[str]]:
    """The sbatch lines of what submit.py printed, as words behind ``sbatch --parsable``."""
    lines = [shlex.split(line) for line in said.splitlines() if line.startswith("sbatch ")]
    assert all(line[:2] == ["sbatch", "--parsable"] for line in lines)
    return [line[2:] for line in lines]


@pytest.fixture
def planned(capsys, monkeypatch, tmp_path):
    """A function: words of submit.py -> lines for sbatch, in a folder with an empty a.yaml, nothing being submitted."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")  # whatever is started is not found
    (tmp_path / "a.yaml").write_text("out: runs/of_yaml\n")

    def plan(*words: str) -> list[list[str]]:
        command, *rest = words
        submit.main([command, "--dry_run", *rest])
        return lines_of(capsys.readouterr().out)

    return plan


def script(name: str) -> str:
    return str(ROOT / "launch" / "slurm" / f"{name}.sbatch")


def test_every_resource_becomes_the_option_of_sbatch(planned):
    given = "--partition p --account a --qos q --name n --nodes 2-4 --gpus_per_node 8 --cpus_per_rank 6 --memory 200G"
    given += " --time 1-12:30 --warn_seconds 300 --extra --constraint=a100 --extra '--exclude=n1 --exclusive'"
    (line,) = planned("pretrain", *shlex.split(given), "--", "--config", "a.yaml", "--data.shards=x y*.tar")
    wanted = (
        "--partition=p --account=a --qos=q --job-name=n --nodes=2-4 --gpus-per-node=8 --ntasks-per-node=8"
    )
    wanted += " --cpus-per-task=6 --mem=200G --time=1-12:30 --signal=USR1@300 --constraint=a100 --exclude=n1 --exclusive"
    behind = [ROOT_EXPORT, script("pretrain"), "--config", "a.yaml", "--data.shards=x y*.tar"]
    assert line == [*wanted.split(), *behind]


def test_what_is_not_given_stays_as_the_script_has_it(planned):
    assert planned("finetune") == [[ROOT_EXPORT, script("finetune")]]
    assert planned("evaluate", "--ranks_per_node", "2") == [
        ["--ntasks-per-node=2", ROOT_EXPORT, script("evaluate")]
    ]


def test_a_chain_waits_for_the_job_before_however_it_ended(planned):
    lines = planned("pretrain", "--chain", "3", "--", "--config=a.yaml")
    waits = [[word for word in line if "depend" in word or "kill" in word] for line in lines]
    assert waits == [[], ["--dependency=afterany:JOB1"], ["--dependency=afterany:JOB2"]]
    assert all("--no-requeue" in line and f"{ROOT_EXPORT},GLSD_REQUEUE=0" in line for line in lines)
    assert {tuple(line[-2:]) for line in lines} == {(script("pretrain"), "--config=a.yaml")}


def test_a_pipeline_hands_the_run_folder_on_and_needs_success(planned):
    lines = planned(
        *["pipeline", "--partition", "p", "--name", "x"],
        *["--pretrain", "--nodes 4 --partition q --chain 2 -- --config a.yaml"],
        *["--finetune", "--out runs/fine"],
        *["--evaluate", "--protocol retrieval"],
    )
    after = [word for line in lines for word in line if word.startswith("--dependency")]
    assert after == [f"--dependency={kind}" for kind in ("afterany:JOB1", "afterok:JOB2", "afterok:JOB3")]
    assert ["--kill-on-invalid-dep=yes" in line for line in lines] == [False, False, True, True]
    assert ["--partition=q" in line for line in lines] == [True, True, False, False]
    assert [line[1] for line in lines[2:]] == ["--job-name=x-finetune", "--job-name=x-evaluate"]
    assert lines[2][-5:] == [script("finetune"), "--out", "runs/fine", "--init", "runs/of_yaml"]
    assert lines[3][-4:] == ["--protocol", "retrieval", "--model", "runs/fine"]


def test_a_pipeline_leaves_what_was_given(planned):
    lines = planned("pipeline", "--pretrain", "--out=a", "--evaluate", "--model timm:vit_tiny")
    assert lines[1][-3:] == [script("evaluate"), "--model", "timm:vit_tiny"]


def test_a_sweep_has_one_task_a_line(planned, tmp_path):
    (tmp_path / "sweep.txt").write_text("# rates\n--optim.lr 1e-3\n\n--optim.lr 2e-3 --out 'a b'\n")
    (line,) = planned("array", "--file", "sweep.txt", "--out", "runs/s", "--limit", "4", "--", "--seed=1")
    assert line == [
        "--array=1-2%4",
        ROOT_EXPORT,
        script("array"),
        "pretrain",
        "sweep.txt",
        "runs/s",
        "--seed=1",
    ]


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("1:30", 90), ("2:00:01", 7201), ("1-12", 129_600), ("1-0:1", 86_460), ("0-0:0:9", 9)],
)
def test_times_are_read_as_slurm_does(time, seconds):
    assert resources.seconds_of(time) == seconds


def test_no_limit_is_longer_than_any_warning():
    assert resources.seconds_of("UNLIMITED") > 1e9


MISTAKES = {
    "no such command": (["pretrian"], "did you mean 'pretrain'"),
    "flag": (["pretrain", "--node", "2"], "unrecognized arguments: --node"),
    "not a number": (["pretrain", "--gpus_per_node", "two"], "--gpus_per_node: invalid int value: 'two'"),
    "no node": (["pretrain", "--nodes", "0"], "--nodes is '0'"),
    "less than the least": (["pretrain", "--nodes", "4-2"], "--nodes is '4-2'"),
    "minus one GPU": (["pretrain", "--gpus_per_node=-1"], "--gpus_per_node is -1: expected 0 or more"),
    "two ways to say ranks": (["pretrain", "--gpus_per_node=2", "--ranks_per_node=2"], "give one of them"),
    "memory": (["pretrain", "--memory", "much"], "--memory is 'much'"),
    "time": (["pretrain", "--time", "1h"], "--time is '1h'"),
    "no time": (["pretrain", "--time", "2"], "asked to stop 120 s before its limit"),
    "a shorter warning": (
        ["pretrain", "--time", "0:30", "--warn_seconds", "60"],
        "stop 60 s before its limit",
    ),
    "no option": (["pretrain", "--extra", "exclusive"], "--extra has 'exclusive'"),
    "quotes": (["pretrain", "--extra", "'--x"], "No closing quotation"),
    "chain of none": (["pretrain", "--chain", "0"], "--chain is 0"),
    "chain of evaluations": (["evaluate", "--chain", "2"], "saves nothing on the way"),
    "a flag of the stage": (["pretrain", "--", "--optim.lrr", "1"], "did you mean '--optim.lr'"),
    "no such file": (["pretrain", "--", "--config", "b.yaml"], "cannot read config file b.yaml"),
    "not a job": (["pretrain", "--", "--dry_run"], "--dry_run is no job"),
    "no sweep": (["array", "--file", "b.txt", "--out", "x"], "cannot read --file b.txt: No such file"),
    "an empty sweep": (["array", "--file", "empty.txt", "--out", "x"], "no line of flags"),
    "a line of a sweep": (["array", "--file", "bad.txt", "--out", "x"], "bad.txt, task 2: unknown flag --lr"),
    "a sweep without folder": (["array", "--file", "bad.txt"], "required: --out"),
    "limit": (["array", "--file", "good.txt", "--out", "x", "--limit", "0"], "--limit is 0"),
    "an empty pipeline": (["pipeline"], "at least one of --pretrain"),
    "flags of nobody": (
        ["pipeline", "--evaluate", "--model x", "--", "--seed", "1"],
        "takes no flags behind --",
    ),
    "a stage's option": (["pipeline", "--pretrain", "--nodes 0 -- --seed 1"], "--nodes is '0'"),
    "a stage's flag": (["pipeline", "--evaluate", "--modell x"], "did you mean '--model'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_submitted(mistake, planned, tmp_path):
    words, expected = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "good.txt").write_text("--seed 1\n")
    (tmp_path / "bad.txt").write_text("--seed 1\n--lr 3\n")
    with pytest.raises(UserError) as raised:
        planned(*words)
    assert expected in str(raised.value)
    assert "\n" not in str(raised.value)


def test_without_sbatch_it_says_so(planned):
    with pytest.raises(UserError, match="sbatch is not found"):
        submit.main(["pretrain"])


def test_what_was_submitted_is_cancelled_when_a_later_job_is_refused(monkeypatch, tmp_path):
    (tmp_path / "sbatch").write_text(
        "#!/bin/sh\ncase $* in *afterok*) echo 'sbatch: error: no such partition' >&2; exit 1;; esac\necho 41\n"
    )
    (tmp_path / "scancel").write_text(f"#!/bin/sh\necho $* >{tmp_path}/cancelled\n")
    for program in ("sbatch", "scancel"):
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    with pytest.raises(
        UserError, match=r"refuses evaluate\.sbatch: no such partition; jobs 41 were cancelled"
    ):
        submit.main(["pipeline", "--pretrain", "--out a", "--evaluate", "--protocol knn"])
    assert (tmp_path / "cancelled").read_text() == "41\n"
