"""The run directory, rewinding it, and signals."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from typing import Any

import pytest
import torch

from glsd.errors import UserError
from glsd.runtime import checkpoint
from glsd.runtime.loop import StopVote, catch_signals
from glsd.runtime.run import (
    Run,
    append_rows,
    open_run,
    redact,
    rewind,
)
from tests.helpers.ranks import run_ranks


def test_a_new_run_has_its_papers(tmp_path):
    run = open_run(tmp_path / "a" / "run", resolved_config="seed: 1\n", resume=False)
    assert run.checkpoints.is_dir()
    assert (run.folder / "config.yaml").read_text() == "seed: 1\n"
    text = (run.folder / "env.txt").read_text()
    for word in ("command: ", "commit: ", "host: ", "devices: cpu", "python: 3.", "torch: ", "processes: 1"):
        assert word in text
    assert sorted(path.name for path in run.folder.iterdir()) == ["checkpoints", "config.yaml", "env.txt"]


def test_a_run_with_checkpoints_needs_resume(tmp_path):
    run = open_run(tmp_path, resolved_config="seed: 1\n", resume=False)
    (run.checkpoints / "step_00000002.tmp-5").mkdir()  # an interrupted save is no checkpoint
    open_run(tmp_path, resolved_config="seed: 1\n", resume=False)
    (run.checkpoints / "step_00000002").mkdir()
    with pytest.raises(UserError, match=r"already has checkpoints: go on with --resume auto, or .* --out"):
        open_run(tmp_path, resolved_config="seed: 1\n", resume=False)
    assert open_run(tmp_path, resolved_config="seed: 1\n", resume=True) == run
    assert (tmp_path / "env.txt").read_text().count("started: ") == 3  # one block per start that went ahead


def test_a_changed_configuration_is_shown_and_the_old_one_kept(tmp_path, capsys):
    open_run(tmp_path, resolved_config="resume: never\nlr: 1\nseed: 1\n", resume=True)
    open_run(tmp_path, resolved_config="resume: auto\nlr: 1\nseed: 1\n", resume=True)
    assert capsys.readouterr().out == ""
    assert not (tmp_path / "config.1.yaml").exists()
    open_run(tmp_path, resolved_config="resume: auto\nlr: 2\nseed: 1\n", resume=True)
    out = capsys.readouterr().out
    assert "- lr: 1" in out
    assert "+ lr: 2" in out
    assert "seed" not in out
    assert (tmp_path / "config.1.yaml").read_text() == "resume: auto\nlr: 1\nseed: 1\n"
    assert (tmp_path / "config.yaml").read_text() == "resume: auto\nlr: 2\nseed: 1\n"
    open_run(tmp_path, resolved_config="lr: 3\n", resume=True)
    assert (tmp_path / "config.2.yaml").exists()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shards: [https://user:pw@host/a.tar?Sig=x%2F]", "shards: [https://host/a.tar]"),
        ("'s3://b/a-{0..9}.tar?X=1&Y=2' k=v?", "'s3://b/a-{0..9}.tar' k=v?"),
        (
            '["http://h/a,b.tar?s=1","hf://d/x@main/c.tar", 7]',
            '["http://h/a,b.tar","hf://d/x@main/c.tar", 7]',
        ),
        ("https://h/a.tar?s=1,https://me:p@ss@h/b.tar?s=2", "https://h/a.tar,https://h/b.tar"),
        ("/data/what?/a@b-*.tar", "/data/what?/a@b-*.tar"),
    ],
)
def test_addresses_are_logged_without_their_secrets(text, expected):
    assert redact(text) == expected


def test_no_secret_reaches_the_log_or_the_papers(tmp_path, capsys, monkeypatch):
    secret = "data.shards=https://me:{0}@host/a.tar?Signature={0}"
    for word in ("hidden1", "hidden2"):
        monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", secret.format(word)])
        open_run(tmp_path, resolved_config=f"a: 1\n{secret.format(word)}\n", resume=True)
    assert "\n  + data.shards=https://host/a.tar\n" in capsys.readouterr().out
    text = (tmp_path / "env.txt").read_text()
    assert "hidden" not in text
    assert text.count("command: python train.py") == 2


def test_a_run_without_checkpoints_starts_over(tmp_path):
    run = open_run(tmp_path, resolved_config="", resume=False)
    run.metrics.write_text('{"step": 1}\n')
    append_rows(run.quarantine, [{"step": 1, "key": "x"}])
    open_run(tmp_path, resolved_config="", resume=True)
    assert run.metrics.read_text() == run.quarantine.read_text() == ""


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_an_unwritable_folder_is_the_users_error(tmp_path, place):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=rf"cannot write to the run folder .*{place}: .*--out"):
        open_run(tmp_path / place, resolved_config="", resume=False)


@pytest.mark.slow
def test_both_ranks_hear_of_it(tmp_path):
    outputs = run_ranks(
        """
        from glsd.runtime.run import open_run
        run = open_run(folder / "good", resolved_config=f"rank: {rank}", resume=False)
        assert (run.folder / "config.yaml").read_text() == "rank: 0"
        try:
            open_run(folder / "rendezvous", resolved_config="", resume=False)
        except UserError as error:
            print(str(error).partition(" folder ")[0])
        """,
        tmp_path,
    )
    assert outputs == ["cannot write to the run\n"] * 2


def test_rewind_drops_later_rows_and_half_rows(tmp_path, capsys):
    run = Run(tmp_path)
    rows = [json.dumps({"step": step, "loss": step / 3}) for step in (1, 2, 3, 4)]
    run.metrics.write_text("\n".join(rows) + '\n{"step": 5, "lo')
    append_rows(run.quarantine, [{"step": 2, "key": "a"}, {"step": 3, "key": "b"}])
    append_rows(run.quarantine, [])
    rewind(tmp_path, 2)
    assert run.metrics.read_text() == "\n".join(rows[:2]) + "\n"
    assert [json.loads(line)["key"] for line in run.quarantine.read_text().splitlines()] == ["a"]
    assert capsys.readouterr().err == f"warning: {run.metrics} line 5 is incomplete: removed\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "quarantine.jsonl"]


def test_rewind_holds_no_whole_file_in_memory(tmp_path):
    run = Run(tmp_path)
    with run.samples.open("w") as file:
        file.writelines(json.dumps({"step": step, "key": "k" * 1000}) + "\n" for step in range(8000))
    tracemalloc.start()
    rewind(tmp_path, 6000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
    steps = [json.loads(line)["step"] for line in run.samples.read_text().splitlines()]
    assert steps == list(range(6001))


def test_rewind_without_files_does_nothing(tmp_path):
    rewind(tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_leaves_a_note_however_often_it_comes(number, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "1")  # as a launcher sets it, which passes a Ctrl-C on
    before = signal.getsignal(number)
    with catch_signals() as stop_requested:
        assert stop_requested() == ""
        for _ in range(3):
            os.kill(os.getpid(), number)
        assert stop_requested() == number.name
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop_requested() == number.name  # the first one counts
    # An interrupt is over with the block; after a request to end the process repeats stay harmless.
    assert signal.getsignal(number) is (before if number == signal.SIGINT else signal.SIG_IGN)
    answer = "\nstopping after this step; press again to stop now\n" if number == signal.SIGINT else ""
    assert capfd.readouterr() == ("", answer)


def press(capfd, answers: str = "") -> None:
    """Press Ctrl-C, and wait for an answer if there must be one."""
    os.kill(os.getpid(), signal.SIGINT)
    end = time.perf_counter() + 10
    while answers and answers not in capfd.readouterr().err:
        assert time.perf_counter() < end
        time.sleep(0.01)


@pytest.mark.parametrize(("variable", "patience"), [("", 0.1), ("WORLD_SIZE", 2.0), ("SLURM_JOB_ID", 2.0)])
def test_a_second_interrupt_stops_at_once(variable, patience, monkeypatch, capfd):
    for name in ("WORLD_SIZE", "SLURM_JOB_ID"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "1")
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with catch_signals() as stop_requested:
        press(capfd, answers="stopping after this step; press again to stop now")
        now[0] += (
            patience / 2
        )  # the same Ctrl-C, passed on by a launcher or come through a process that was just forked
        press(capfd)
        time.sleep(0.2)
        assert stop_requested() == "SIGINT"
        now[0] += patience
        with pytest.raises(
            KeyboardInterrupt, match="stopped at once; --resume auto goes on from the last checkpoint"
        ):
            press(capfd, answers="never")
    assert "press again" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_main_thread_in_a_long_operation_is_answered_and_not_waited_for(tmp_path):
    """Python runs no signal handler while C code works."""
    program = (
        "from glsd.runtime.loop import catch_signals\n"
        "import torch\nfrom glsd.runtime import loop\nloop.GRACE = 0.5\n"
        "torch.set_num_threads(1)\n"
        "x = torch.ones(10000, 10000, dtype=torch.float64)\n"
        "with catch_signals():\n  print('ready', flush=True)\n  x @ x\n"
    )
    environment = {
        key: value for key, value in os.environ.items() if key not in ("WORLD_SIZE", "SLURM_JOB_ID")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    start = time.perf_counter()
    assert [process.stderr.readline() for _ in range(2)] == [
        "\n",
        "stopping after this step; press again to stop now\n",
    ]
    assert time.perf_counter() - start < 2
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=20)[1]
    assert (process.returncode, rest.split()[:3]) == (130, ["stopped", "at", "once;"])


def test_an_interrupted_save_leaves_nothing_behind(tmp_path, monkeypatch):
    parts: dict[str, Any] = {
        "tensors": {"student": {"w": torch.zeros(2)}},
        "state": {},
        "optimizer": {},
        "keep": 2,
    }
    checkpoint.save(tmp_path, step=1, **parts)

    def interrupted(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, step=2, **parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step_00000001"]
    found = checkpoint.load_latest(tmp_path)
    assert found is not None
    assert found.step == 1


@pytest.mark.slow
@pytest.mark.parametrize(("first", "code"), [("SIGTERM", 0), ("SIGUSR1", 0), (None, -signal.SIGTERM)])
def test_a_repeated_signal_does_not_kill_a_process_on_its_way_out(first, code):
    """Launchers send SIGTERM two to four times; without any signal in the block the old handlers are back."""
    program = (
        "import os, signal\nfrom glsd.runtime.loop import catch_signals\n"
        f"with catch_signals() as stop:\n  first = {first!r}\n"
        "  if first: os.kill(os.getpid(), signal.Signals[first])\n"
        "  print('saved', stop(), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.stdout.split(), done.returncode) == (["saved", *([first] if first else [])], code)


def test_one_process_stops_at_once():
    vote = StopVote()
    assert [vote(name, last=False) for name in ("", "SIGUSR1")] == ["", "SIGUSR1"]


@pytest.mark.slow
def test_ranks_stop_after_the_same_step_whoever_got_the_signal(tmp_path):
    """Ranks run through their steps at their own pace; the third of three gets its signals at step 4 (and others later)."""
    outputs = run_ranks(
        """
        import random, time
        from glsd.runtime.loop import StopVote
        for signals, steps in (({(2, 4): "SIGTERM"}, 9), ({(0, 5): "SIGUSR1", (2, 4): "SIGUSR1"}, 9), ({(1, 9): "SIGINT"}, 9)):
            vote = StopVote()
            for step in range(1, steps + 1):
                time.sleep(random.random() / 100)
                name = vote(signals.get((rank, step), ""), last=step == steps)
                if name:
                    break
            print(step, name)
        """,
        tmp_path,
        world=3,
    )
    # Known one step after it was asked for; what comes at the last step changes nothing.
    assert outputs == ["5 SIGTERM\n5 SIGUSR1\n9 \n"] * 3
