"""~ and $NAME mean the same in the folders and files of every command."""

import shlex
from pathlib import Path

import pytest

from glsd.cli import audit, pack, submit
from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import dump, load, load_file
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.shards.store import open_shards
from tests.helpers.small_shards import digit_sample


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """Home folder and $WORK with six photographs of two classes; commands run in an empty folder."""
    for name in ("home", "elsewhere", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WORK", str(tmp_path / "elsewhere"))
    monkeypatch.chdir(tmp_path / "here")
    for number in range(6):
        image = tmp_path / "home" / "photos" / "ab"[number % 2] / f"{number}.png"
        image.parent.mkdir(parents=True, exist_ok=True)
        image.write_bytes(digit_sample(number)[0])
    rows = "".join(f"photos/ab/{n}.png,{n % 2}\n".replace("ab", "ab"[n % 2]) for n in range(6))
    (tmp_path / "home" / "l.csv").write_text(f"path,label\n{rows}")
    return tmp_path / "home"


def test_pack_and_audit(home, capsys):
    work = home.parent / "elsewhere"
    pack.main(["~/photos", "$WORK/a", "--workers", "0"])
    pack.main(
        ["list", "~/l.csv", "${WORK}/b", "--root", "~", "--classes", "$WORK/a/classes.json", "--workers", "0"]
    )
    pack.main(["split", "$WORK/a/*.tar", "~/c"])
    assert [len(open_shards(f"{folder}/*.tar")) for folder in (work / "a", work / "b", home / "c")] == [
        6,
        6,
        6,
    ]
    assert audit.main(["all=$WORK/a/*.tar", "--list", "~/found.tsv", "--workers", "0"]) == 0
    assert (home / "found.tsv").read_text().startswith("level\ttopic")
    assert list((home.parent / "here").iterdir()) == []
    with pytest.raises(UserError, match="the environment variable NO_SUCH is not set"):
        pack.main(["~/photos", "$NO_SUCH/a"])


def test_submit(home, capsys, monkeypatch):
    (home / "sweep.txt").write_text("--seed 1\n")
    (home / "c.yaml").write_text("out: $WORK/x\n")
    submit.main(
        ["array", "--dry_run", "--file", "~/sweep.txt", "--out", "$WORK/a$$b", "--", "--config", "~/c.yaml"]
    )
    words = shlex.split(capsys.readouterr().out.splitlines()[0])
    # The task reads the file as it is, and gives the folder to --out, which reads $$ as a dollar sign.
    assert words[-5:] == [
        "pretrain", f"{home.parent}/elsewhere/a$b/sweep.txt", f"{home.parent}/elsewhere/a$$b", "--config", "~/c.yaml",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        (PretrainConfig, ("out", "model.init")),
        (FinetuneConfig, ("out", "init")),
        (EvalConfig, ("out", "model")),
    ],
)
@pytest.mark.parametrize("path", ["~/r/x", "$HOME/r/x", "${HOME}/r/x"])
def test_every_path_of_a_configuration(home, kind, keys, path):
    (home / "c.yaml").write_text("".join(f"{key}: {path}\n" for key in keys))
    argvs = [
        ["--config", "~/c.yaml"],
        ["--config=$HOME/c.yaml"],
        [f"--{key}={path}" for key in keys],
        [word for key in keys for word in (f"--{key}", path)],
    ]
    for argv in argvs:
        cfg = load(kind, argv)
        for key in keys:
            value = cfg
            for part in key.split("."):
                value = getattr(value, part)
            assert value == f"{home}/r/x"
        # The configuration that a run keeps names the same place, wherever it is read.
        (home / "again.yaml").write_text(dump(cfg))
        assert load_file(kind, home / "again.yaml") == cfg


def test_a_mistake_names_key_and_file(home):
    (home / "c.yaml").write_text("seed: 1\nout: $NO_SUCH/x\n")
    with pytest.raises(
        UserError, match=r"c.yaml, line 2: out: path '\$NO_SUCH/x': the environment variable NO_SUCH"
    ):
        load(PretrainConfig, ["--config", "~/c.yaml"])
    with pytest.raises(
        UserError, match=r"^--out: path '\$NO_SUCH/x': the environment variable NO_SUCH is not set"
    ):
        load(PretrainConfig, ["--out", "$NO_SUCH/x"])
