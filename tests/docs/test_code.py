"""The code of the documents runs, block by block, in a folder where the things it names exist.

Blocks that need a network are marked ``py``, the others ``python``.
"""

import re
from pathlib import Path

import pytest

from glsd.cli.use import embed
from tests.helpers.small_shards import scene
from tests.helpers.trained import trained_networks

ROOT = Path(__file__).parents[2]
PAGES = [
    str(page.relative_to(ROOT))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    if "```python" in page.read_text()
]
MOST_LINES = 150  # of the README


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder with a run ``runs/mine``, eight pictures below ``photos``, and their vectors, in which the code runs."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    trained_networks(tmp_path / "runs")
    (tmp_path / "runs" / "pretrained").rename(tmp_path / "runs" / "mine")
    for number in range(8):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        scene(number).save(path)
    scene(3).save(tmp_path / "query.jpg")
    for file in ("photos.parquet", "photos.npy", "photos.safetensors"):
        embed.main(["runs/mine", "photos/", "--out", file, "--num_workers", "0"])


@pytest.mark.parametrize("page", PAGES)
def test_code_runs(page, photos):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.DOTALL | re.MULTILINE)
    names: dict = {}
    for block in blocks:
        exec(compile(block, page, "exec"), names)
    if page == "docs/python.md":
        assert names["vectors"].shape == (8, 32)
        assert 0 < float(names["result"].matched_share) < 1


def test_the_readme_stays_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= MOST_LINES


def test_every_page_is_reached():
    """Links between pages are checked by ``make docs``; these are the README's, and the site's list of pages."""
    readme = (ROOT / "README.md").read_text()
    linked = set(re.findall(r"\]\(([^)#:]+)\)", readme))
    assert all((ROOT / link).exists() for link in linked), linked
    listed = set(re.findall(r"[\w-]+\.md", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}
