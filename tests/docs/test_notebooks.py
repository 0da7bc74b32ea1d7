"""The notebooks of the documents run from top to bottom, in an empty folder, and are stored without outputs."""

import os
import sys
from pathlib import Path

import nbclient
import nbformat
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "docs" / "notebooks").glob("*.ipynb"))
# Notebook -> what it must print, and what must be there afterwards.
PRINTED = {
    "own_images": ("240 images", "runs/mine/report.html"),
    "own_loop": ("step  25 loss", None),
    "search": ("searched  240 vectors", "found.png"),
}


def test_all_are_known():
    assert {path.stem for path in NOTEBOOKS} == set(PRINTED)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells), (
        "outputs are stored: clear them"
    )
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    printed = "".join(out.get("text", "") for cell in notebook.cells for out in cell.get("outputs", []))
    words, file = PRINTED[path.stem]
    assert words in printed
    assert "Traceback" not in printed
    assert "error:" not in printed
    assert file is None or (tmp_path / file).stat().st_size
