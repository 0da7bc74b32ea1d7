"""The code of the documents runs, block by block, in a folder where the things it names exist."""

import re
from pathlib import Path

import pytest

from tests.helpers.small_shards import scene
from tests.helpers.trained import trained_networks

DOCS = Path(__file__).parents[1] / "docs"
PAGES = [page.name for page in sorted(DOCS.glob("*.md")) if "```python" in page.read_text()]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with a run ``runs/mine`` and eight pictures below ``photos``, in which the code runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    trained_networks(tmp_path / "runs")
    (tmp_path / "runs" / "pretrained").rename(tmp_path / "runs" / "mine")
    for number in range(8):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(path)


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, photos):
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "python.md":
        assert names["vectors"].shape == (8, 32)
        assert 0 < float(names["result"].matched_share) < 1
