"""Imports point one way: stories -> {config, parts} -> {contracts, geometry, runtime.dist}; parts never import each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "glsd"
PARTS = ("data", "models", "losses", "optim", "evals", "runtime", "show")
COMMON = {"contracts", "geometry", "runtime.dist"}
STORIES = {"pretrain", "pretrain_plan", "pretrain_build", "distillation", "watch", "guard"}
STORIES |= {"finetune", "finetune_plan", "finetune_build", "finetune_losses", "finetune_watch"}
STORIES |= {"forecast", "evaluate", "eval_model", "eval_sets", "eval_retrieval", "run_folder"}
STORIES |= {"cluster_doctor", "cluster_doctor_shards"}
CONFIG = {"config", "eval_config", "finetune_config", "command_line"}


def imports_of(path: Path) -> set[str]:
    """The glsd modules that a file imports, as dotted names below glsd, wherever in the file they are imported."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name.removeprefix("glsd.") for name in found if name.startswith("glsd.")}


def allowed(module: str, imported: str) -> bool:
    top = module.split(".")[0]
    if any(imported == name or imported.startswith(f"{name}.") for name in COMMON):
        return module not in COMMON or imported.startswith("contracts")
    if top in PARTS:
        return imported.split(".")[0] == top
    if top in STORIES:
        return imported.split(".")[0] in {*PARTS, *CONFIG, *STORIES}
    return top in CONFIG and imported.split(".")[0] in CONFIG


MODULES = {
    str(path.relative_to(ROOT).with_suffix("")).replace("/", "."): path for path in sorted(ROOT.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    wrong = {name for name in imports_of(MODULES[module]) if not allowed(module, name)}
    assert not wrong, f"glsd.{module} must not import {wrong}"


def test_the_rule_can_fail():
    assert not allowed("losses.match", "models.heads.ProjectionHead")
    assert not allowed("data.crops", "config.DataConfig")
    assert not allowed("contracts", "geometry.patch_centers")
    assert not allowed("models.heads", "pretrain.pretrain")
    assert allowed("losses.center", "runtime.dist.all_reduce_sum")
    assert not allowed("losses.center", "runtime.meters.Meters")


@pytest.mark.parametrize("module", [m for m in MODULES if m not in ("runtime.dist", "runtime.sharding")])
def test_torch_distributed_lives_in_two_files(module):
    assert "torch.distributed" not in MODULES[module].read_text()


@pytest.mark.parametrize("module", MODULES)
def test_modules_stay_short(module):
    assert len(MODULES[module].read_text().splitlines()) <= 300
