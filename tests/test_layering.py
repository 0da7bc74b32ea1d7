"""Imports point one way, torch.distributed lives in one room, and files, folders and functions keep their size."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "glsd"
BASE = {"arrays", "errors", "batches", "geometry", "precision", "rng", "files"}
PARTS = {"models", "losses", "optim", "metrics", "show", "runtime"}
DATA = {"shards", "data", "packing", "audit"}
# Room (or file at the root) -> what it may import, besides itself.
MAY_IMPORT = {
    "errors": set(),
    **{file: {"errors"} for file in BASE - {"errors"}},
    "geometry": {"errors", "batches"},
    "cluster": BASE,
    **dict.fromkeys(PARTS, BASE | {"cluster"}),
    "shards": BASE,
    "data": BASE | {"shards"},
    "packing": BASE | {"shards", "data"},
    "audit": BASE | {"shards", "data", "packing"},
    "config": {"errors", "files"},
    "slurm": {"errors", "config"},
    "loading": BASE | {"config", "models", "runtime"},
    # Packing, too: what a folder or a list holds is said there, once.
    # The cluster, too: several ranks embed. And the losses, whose diffusion orders what a search has found again.
    "inference": BASE
    | {"models", "losses", "metrics", "show", "cluster", "runtime"}
    | {"shards", "data", "packing", "config", "loading"},
    "export": BASE | {"models", "shards", "data", "config", "loading", "runtime", "evaluate", "inference"},
    "doctor": BASE | {"cluster", "shards"},
    "evaluate": BASE | PARTS | DATA | {"cluster", "config", "loading"},
    "pretrain": BASE | PARTS | DATA | {"cluster", "config", "loading", "evaluate"},
    "finetune": BASE | PARTS | DATA | {"cluster", "config", "loading", "evaluate"},
}
# The command line sees everything, and nobody sees it.
MAY_IMPORT["cli"] = set(MAY_IMPORT)
MAY_IMPORT["__main__"] = {"cli"}
MAY_IMPORT["__init__"] = {"errors", "inference"}

MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in sorted(ROOT.rglob("*.py"))
}
FOLDERS = sorted({path.parent for path in MODULES.values()})
MOST_FILES, MOST_LINES, MOST_FUNCTION_LINES = 13, 400, 60
# The stories read top to bottom.
STORIES = {("pretrain.train", "pretrain"), ("finetune.train", "finetune"), ("evaluate.run", "evaluate")}


def imports_of(path: Path) -> set[str]:
    """The glsd modules that a file imports, as dotted names below glsd, wherever in the file they are imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    assert not any(name.split(".")[0] in ("launch", "tests") for name in found), path
    return {name.removeprefix("glsd.") for name in found if name.startswith("glsd.")}


def allowed(module: str, imported: str) -> bool:
    room, other = module.split(".")[0], imported.split(".")[0]
    return other in (room, "__version__") or other in MAY_IMPORT[room]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    wrong = {name for name in imports_of(MODULES[module]) if not allowed(module, name)}
    assert not wrong, f"glsd.{module} must not import {wrong}"


def test_every_room_has_its_rule():
    assert {module.split(".")[0] for module in MODULES} <= set(MAY_IMPORT)


def test_the_rule_can_fail():
    assert not allowed("losses.match", "models.heads.ProjectionHead")
    assert not allowed("data.crops", "config.pretrain.DataConfig")
    assert not allowed("errors", "geometry.patch_centers")
    assert not allowed("models.heads", "pretrain.train.pretrain")
    assert not allowed("shards.store", "data.order.EpochOrder")
    assert not allowed("evaluate.run", "finetune.train.finetune")
    assert not allowed("pretrain.train", "finetune.train.finetune")
    assert not allowed("loading", "losses.ranking")
    assert not allowed("runtime.run", "cli.door")
    assert allowed("losses.center", "cluster.dist.all_reduce_sum")
    assert not allowed("losses.center", "runtime.meters.Meters")


@pytest.mark.parametrize("module", [m for m in MODULES if not m.startswith("cluster.")])
def test_torch_distributed_lives_in_one_room(module):
    assert "torch.distributed" not in MODULES[module].read_text()


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_one_idea(module):
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= MOST_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and (module, node.name) not in STORIES:
            assert (node.end_lineno or 0) - node.lineno < MOST_FUNCTION_LINES, f"{node.name} is too long"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_is_one_room(folder):
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= MOST_FILES
