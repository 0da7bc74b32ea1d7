"""What submit.py gives to sbatch, and what it refuses, on machines without SLURM too."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from glsd.cli import submit
from glsd.errors import UserError
from glsd.slurm import resources, sbatch

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
    assert [line for line in lines if "--kill-on-invalid-dep=yes" in line] == lines[2:]
    assert ["--partition=q" in line for line in lines] == [True, True, False, False]
    assert [line[1] for line in lines[2:]] == ["--job-name=x-finetune", "--job-name=x-evaluate"]
    assert lines[2][-5:] == [script("finetune"), "--out", "runs/fine", "--init", "runs/of_yaml"]
    assert lines[3][-4:] == ["--protocol", "retrieval", "--model", "runs/fine"]


def test_every_job_of_a_chain_needs_the_stage_before(planned):
    """Else, were the first one cancelled, the second would start on a model that is half made."""
    lines = planned("pipeline", "--pretrain", "--chain 2 -- --out a", "--finetune", "--chain 3 -- --out b")
    after = [word.partition("=")[2] for line in lines for word in line if word.startswith("--dependency")]
    ok = "afterok:JOB2"
    assert after == ["afterany:JOB1", ok, f"afterany:JOB3,{ok}", f"afterany:JOB4,{ok}"]
    assert [line for line in lines if "--kill-on-invalid-dep=yes" in line] == lines[2:]


def test_a_dry_run_in_one_stage_makes_all_dry(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    submit.main(["pipeline", "--pretrain", "--dry_run -- --out a", "--evaluate", "--protocol knn"])
    assert capsys.readouterr().out.count("not submitted (--dry_run)") == 2


def test_a_pipeline_leaves_what_was_given(planned):
    lines = planned("pipeline", "--pretrain", "--out=a", "--evaluate", "--model timm:vit_tiny")
    assert lines[1][-3:] == [script("evaluate"), "--model", "timm:vit_tiny"]


def test_a_sweep_has_one_task_a_line(planned, tmp_path):
    (tmp_path / "sweep.txt").write_text("# rates\n--optim.lr 1e-3\n\n--optim.lr 2e-3 --data.shards 'a b'\n")
    (line,) = planned("array", "--file", "sweep.txt", "--out", "runs/s", "--limit", "4", "--", "--seed=1")
    behind = ["pretrain", "runs/s/sweep.txt", "runs/s", "--seed=1"]
    assert line == ["--array=1-2%4", ROOT_EXPORT, script("array"), *behind]
    assert not (tmp_path / "runs").exists()


def test_tasks_of_a_sweep_read_a_copy_that_another_sweep_does_not_change(clusterless, tmp_path):
    words = ["array", "--file", "sweep.txt", "--out", "runs/s"]
    kept = tmp_path / "runs" / "s" / "sweep.txt"
    (tmp_path / "sweep.txt").write_text("--seed 1\n")
    for _ in range(2):
        submit.main(words)
        assert kept.read_bytes() == b"--seed 1\n"
    (tmp_path / "sweep.txt").write_text("--seed 2\n")
    with pytest.raises(UserError, match=r"runs/s/sweep\.txt is another sweep than sweep\.txt"):
        submit.main(words)
    assert kept.read_bytes() == b"--seed 1\n"


@pytest.mark.slow
def test_a_task_of_a_sweep_gets_the_words_that_were_checked(tmp_path):
    """Of lines on which xargs and shlex do not agree, and such as Windows ends them."""
    text = b"# none\r\n--a 'x y' --b=\"\\q\"\r\n\r\n--c \\# d\r\n"
    (tmp_path / "sweep.txt").write_bytes(text)
    flags = [sys.executable, str(ROOT / "launch" / "slurm" / "flags.py"), "line", str(tmp_path / "sweep.txt")]
    first, second, third = (subprocess.run([*flags, task], capture_output=True) for task in ("1", "2", "3"))
    assert first.stdout == b"--a\0x y\0--b=\\q\0"
    assert second.stdout == b"--c\0#\0d\0"
    assert (third.returncode, third.stdout) == (2, b"")
    assert third.stderr.decode().endswith("has no task 3: expected 1 to 2\n")


@pytest.fixture
def clusterless(monkeypatch, tmp_path):
    """In a folder whose sbatch and scancel keep their words and variables in a file, and no SLURM is."""
    for program, says in (("sbatch", "echo 41"), ("scancel", "")):
        (tmp_path / program).write_text(
            f"#!/bin/sh\necho $* >{tmp_path}/{program}.said\nenv >>$0.said\n{says}\n"
        )
        (tmp_path / program).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.chdir(tmp_path)


def test_sbatch_does_not_see_the_job_that_this_shell_is_in(clusterless, monkeypatch, tmp_path):
    for name in (
        "SLURM_NTASKS",
        "SLURM_CPU_BIND",
        "SLURM_MEM_PER_CPU",
        "SLURM_CONF",
        "SBATCH_QOS",
        "SLURMISH",
    ):
        monkeypatch.setenv(name, "7")
    submit.main(["pretrain", "--", "--out", "a"])
    said = (tmp_path / "sbatch.said").read_text().splitlines()
    seen = [line for line in said if line.startswith(("SLURM", "SBATCH"))]
    assert sorted(seen) == ["SBATCH_QOS=7", "SLURMISH=7", "SLURM_CONF=7"]


def test_a_checkout_that_sbatch_would_cut_is_refused(planned, monkeypatch):
    monkeypatch.setattr(sbatch, "ROOT", Path("/a,b"))
    with pytest.raises(UserError, match="the path of the checkout, /a,b, has a comma"):
        planned("pretrain")


@pytest.mark.parametrize(
    ("variables", "words", "expected"),
    [
        ({}, ["pretrain"], "this is a batch script: give it to sbatch"),
        (
            {"GLSD_ROOT": "/nowhere"},
            ["pretrain"],
            "no /nowhere/launch/slurm/job.sh: submit from the checkout",
        ),
        (
            {"SLURM_JOB_ID": "1"},
            ["array", "pretrain", "f", "out"],
            "this is no task of an array: give sbatch --array=1-N",
        ),
        (
            {"SLURM_JOB_ID": "1", "GLSD_PYTHON": "/no/python"},
            ["pretrain"],
            "GLSD_PYTHON is /no/python: no such",
        ),
    ],
)
def test_a_batch_script_that_nobody_can_run_says_so(variables, words, expected):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "GLSD"))}
    env |= {"GLSD_PYTHON": sys.executable, "SLURM_SUBMIT_DIR": str(ROOT)} | variables
    if not variables:
        del env["SLURM_SUBMIT_DIR"]
    done = subprocess.run(
        ["bash", script(words[0]), *words[1:]], capture_output=True, text=True, cwd=ROOT, env=env
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {expected}")
    assert done.stderr.count("\n") == 1


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
    "no --": (["pretrain", "--nodes", "2", "--config", "a.yaml"], "put the flags of the stage after --"),
    "slash": (["pretrain", "--name", "a/b"], "--name is 'a/b'"),
    "export": (["pretrain", "--extra", "--export=NONE"], "submit.py sets --export itself"),
    "export file": (["pretrain", "--extra", "--export-file=f"], "submit.py sets --export itself"),
    "short": (["pretrain", "--extra", "-a1-3"], "submit.py sets --array itself"),
    "cut": (["pretrain", "--extra", "--depend=afterok:1"], "submit.py sets --dependency itself"),
    "out for all": (["array", "--file", "good.txt", "--out", "x", "--", "--out=y"], "after -- has --out"),
    "out of one": (["array", "--file", "out.txt", "--out", "x"], "out.txt, task 2 has --out"),
    "not a number": (["pretrain", "--gpus_per_node", "two"], "--gpus_per_node: invalid int value: 'two'"),
    "no node": (["pretrain", "--nodes", "0"], "--nodes is '0'"),
    "less than the least": (["pretrain", "--nodes", "4-2"], "--nodes is '4-2'"),
    "minus one GPU": (["pretrain", "--gpus_per_node=-1"], "--gpus_per_node is -1: expected 0 or more"),
    "two ways to say ranks": (
        ["pretrain", "--gpus_per_node=2", "--ranks_per_node=2"],
        "give only one of them",
    ),
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
    "chain of evaluations": (["evaluate", "--chain", "2"], "saves nothing before its end"),
    "a flag of the stage": (["pretrain", "--", "--optim.lrr", "1"], "did you mean '--optim.lr'"),
    "no such file": (["pretrain", "--", "--config", "b.yaml"], "cannot read config file b.yaml"),
    "not a job": (["pretrain", "--", "--dry_run"], "--dry_run is not for a job"),
    "no sweep": (["array", "--file", "b.txt", "--out", "x"], "cannot read b.txt: No such file"),
    "an empty sweep": (["array", "--file", "empty.txt", "--out", "x"], "no line of flags"),
    "a line of a sweep": (["array", "--file", "bad.txt", "--out", "x"], "bad.txt, task 2: unknown flag --lr"),
    "a sweep without folder": (["array", "--file", "bad.txt"], "required: --out"),
    "limit": (["array", "--file", "good.txt", "--out", "x", "--limit", "0"], "--limit is 0"),
    "an empty pipeline": (["pipeline"], "at least one of --pretrain"),
    "flags of nobody": (
        ["pipeline", "--evaluate", "--model x", "--", "--seed", "1"],
        "takes no flags after --",
    ),
    "a stage's option": (["pipeline", "--pretrain", "--nodes 0 -- --seed 1"], "--nodes is '0'"),
    "a stage's flag": (["pipeline", "--evaluate", "--modell x"], "did you mean '--model'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_before_anything_is_submitted(mistake, planned, tmp_path):
    words, expected = MISTAKES[mistake]
    (tmp_path / "empty.txt").write_text("# nothing\n")
    (tmp_path / "good.txt").write_text("--seed 1\n")
    (tmp_path / "out.txt").write_text("--seed 1\n--out y\n")
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
        UserError, match=r"refuses evaluate\.sbatch: no such partition; jobs 41 were canceled"
    ):
        submit.main(["pipeline", "--pretrain", "--out a", "--evaluate", "--protocol knn"])
    assert (tmp_path / "cancelled").read_text() == "41\n"
