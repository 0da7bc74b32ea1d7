"""The help of each command: fast, one screen, and in full on request."""

import subprocess
import sys

import pytest
import yaml

from glsd.cli import evaluate, finetune, pretrain
from glsd.cli.main import COMMANDS
from glsd.config.evaluate import EvalConfig
from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import dump, load
from glsd.config.pretrain import PretrainConfig
from tests.helpers.dotted_keys import dotted_keys

# What takes seconds to import, or is not needed before the first image is read.
HEAVY = {
    *(
        "torch",
        "torchvision",
        "timm",
        "accelerate",
        "pytorch_metric_learning",
        "scipy",
        "sklearn",
        "matplotlib",
    ),
    *("tensorboard", "webdataset", "cv2", "PIL", "fsspec", "pyarrow", "faiss"),
}
STAGES = {
    "pretrain": (pretrain, PretrainConfig),
    "finetune": (finetune, FinetuneConfig),
    "evaluate": (evaluate, EvalConfig),
}
LIST_HEAVY = f"""
import sys
from glsd.cli.main import main
try:
    main()
except SystemExit as ended:
    code = ended.code
print("heavy:", *({HEAVY} & set(sys.modules)))
sys.exit(code)
"""


def call(*words: str) -> tuple[int, list[str]]:
    """Run a command of glsd; return its exit code and its lines, the last of which lists the heavy imports."""
    done = subprocess.run([sys.executable, "-c", LIST_HEAVY, *words], capture_output=True, text=True)
    return done.returncode, [*done.stderr.splitlines(), *done.stdout.splitlines()]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy_and_is_one_screen(command):
    code, lines = call(command, "--help")
    assert code == 0
    assert lines[-1] == "heavy:"
    assert 3 < len(lines[:-1]) <= 40
    assert max(map(len, lines)) <= 130
    assert any(
        f"{word}{command}" in line for line in lines for word in ("glsd ", "launch/", "launch/slurm/")
    ), "no example"


@pytest.mark.parametrize(
    "words", [["--help"], ["pretrain", "--optim.epoch", "3"], ["evaluate", "--k", "many"]]
)
def test_a_mistake_is_told_before_anything_heavy_is_imported(words):
    code, lines = call(*words)
    assert code == (0 if words == ["--help"] else 2)
    assert lines[-1] == "heavy:"


@pytest.mark.parametrize("name", STAGES)
def test_help_names_what_is_set_first(name, capsys):
    module, kind = STAGES[name]
    with pytest.raises(SystemExit):
        load(kind, ["--help"], about=module.__doc__ or "", first=module.FIRST)
    text = capsys.readouterr().out
    assert text.startswith((module.__doc__ or "").strip())
    assert all(f"--{key} " in text for key in ("config", *module.FIRST, "help all", "print_config"))
    if name == "pretrain":
        wanted = (
            "--dry_run",
            "--resume",
            "--matching",
            "--optim.lr",
            "--optim.batch_size",
            "--model.backbone",
        )
        assert all(flag in text for flag in wanted)


@pytest.mark.parametrize("name", STAGES)
def test_help_all_explains_every_field(name, capsys):
    module, kind = STAGES[name]
    with pytest.raises(SystemExit):
        load(kind, ["--help", "all"], about=module.__doc__ or "", first=module.FIRST)
    text = capsys.readouterr().out
    for key in dotted_keys(yaml.safe_load(dump(kind()))):
        line = text.split(f"--{key} ", 2)[-1][:400]
        assert "(type:" in line, f"--{key} is not explained"


@pytest.mark.parametrize("name", STAGES)
def test_print_config_resolves(name, capsys):
    _, kind = STAGES[name]
    with pytest.raises(SystemExit):
        load(kind, ["--print_config"])
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(dump(kind()))


@pytest.mark.parametrize(
    "words", [["--help"], ["--optim.epoch", "3"], ["--optim.epochs", "many"], ["--config", "digit"]]
)
def test_a_demo_that_does_not_start_deletes_nothing(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "demo_out").mkdir()
    (tmp_path / "demo_out" / "kept").write_text("")
    code, _ = call("demo", *words)
    assert code == (0 if words == ["--help"] else 2)
    assert (tmp_path / "demo_out" / "kept").exists()
