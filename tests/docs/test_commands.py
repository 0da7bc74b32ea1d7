"""The commands of the documents run, block by block, as a reader would type them; blocks that run are marked ``sh``.

What a page needs is made first: photographs in class folders, a query, and for most pages what the quickstart leaves behind.
Training is shortened by further flags, which the program ``glsd`` of this test adds; nothing else differs.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.small_shards import scene

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
# Page -> files that must be there afterwards. The later ones begin with what the quickstart has made.
FRESH = {
    "README.md": ["runs/mine/report.html", "photos.parquet", "found.png"],
    "docs/quickstart.md": ["shards/val-000000.tar", "runs/mine/pictures/pca.png", "photos.parquet"],
}
LATER = {
    "docs/use-the-model.md": ["photos.parquet", "found.png"],
    "docs/export.md": ["out/model.safetensors", "out/README.md"],
    "docs/evaluate.md": ["runs/mine/evals.json", "runs/mine/report.html", "matches.png", "map.png"],
    "docs/retrieval.md": ["runs/mine-dml/evals.json"],
}
SMALL = {
    "pretrain": "--model.backbone vit_tiny_patch16_224 --model.timm_args depth=1 embed_dim=32 num_heads=2 patch_size=8 "
    "--data.global_size 32 --data.local_size 16 --head.num_prototypes 64 --optim.max_steps 4 --optim.batch_size 8 "
    "--data.num_workers 0 --optim.precision no",
    "finetune": "--optim.max_steps 2 --data.num_workers 0 --optim.batch_size 4",
    "evaluate": "--data.num_workers 0",
}


def make_world(folder: Path) -> None:
    """Make photos/, val/ and query.jpg, and a program ``glsd`` that shortens what trains."""
    for split, count in (("photos", 48), ("val", 16)):
        for number in range(count):
            path = folder / split / ("cats", "dogs", "mice", "birds")[number % 4] / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            scene(number).save(path)
    scene(3).save(folder / "query.jpg")
    (folder / "bin").mkdir()
    cases = "".join(f'  {name}) shift; set -- {name} "$@" {flags} ;;\n' for name, flags in SMALL.items())
    program = folder / "bin" / "glsd"
    program.write_text(f'#!/bin/bash\ncase "$1" in\n{cases}esac\nexec {sys.executable} -P -m glsd "$@"\n')
    program.chmod(0o755)


def run_page(page: str, folder: Path) -> None:
    """Run the commands of a page in order. Each must end well."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    environment = {
        **os.environ,
        "PATH": f"{folder}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    for block in blocks:
        script = f"set -euo pipefail\n{block}"
        ended = subprocess.run(
            ["bash", "-c", script], cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        assert ended.returncode == 0, f"{page}:\n{block}\n{ended.stdout}\n{ended.stderr}"


@pytest.fixture(scope="module")
def used(tmp_path_factory) -> Path:
    """What a reader of the quickstart has."""
    folder = tmp_path_factory.mktemp("docs")
    make_world(folder)
    run_page("docs/quickstart.md", folder)
    return folder


def test_a_newcomer(tmp_path):
    make_world(tmp_path)
    run_page("README.md", tmp_path)
    assert all((tmp_path / file).stat().st_size for file in FRESH["README.md"])


def test_the_quickstart(used):
    assert all((used / file).stat().st_size for file in FRESH["docs/quickstart.md"])


@pytest.mark.parametrize("page", LATER)
def test_a_later_page(page, used, tmp_path):
    folder = shutil.copytree(used, tmp_path / "world")
    (folder / "photos.parquet").unlink()
    run_page(page, folder)
    assert all((folder / file).stat().st_size for file in LATER[page])


def test_no_page_with_commands_is_left_out():
    pages = [ROOT / "README.md", *DOCS.glob("*.md")]
    assert {str(page.relative_to(ROOT)) for page in pages if "\n```sh\n" in page.read_text()} == {
        *FRESH,
        *LATER,
    }
