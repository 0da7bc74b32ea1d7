"""The report of a run: what it says is what the run's files say, and a real browser is content with it."""

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from glsd.cli.use import report
from glsd.config.parse import dump
from glsd.errors import UserError
from glsd.inference.report import write_report
from glsd.packing.folder import pack_folder
from glsd.runtime.sections import watched
from glsd.show import curves
from tests.helpers.small_shards import scene
from tests.helpers.trained import TRAINED, trained_networks

CHROMIUM = shutil.which("chromium")
SCORES = {"top1": 0.4757, "top5": 0.9028}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A run with metrics, evaluations and one picture, and seven photographs, packed as its shards."""
    root = tmp_path_factory.mktemp("report")
    trained_networks(root)
    for number in range(7):
        (root / "photos").mkdir(exist_ok=True)
        scene(number).save(root / "photos" / f"{number}.png")
    pack_folder(root / "photos", root / "shards", workers=0)
    run = root / "pretrained"
    shards = str(root / "shards" / "train-*.tar")
    config = dump(TRAINED).replace("shards: ''", f"shards: '{shards}'", 1)
    assert shards in config
    (run / "config.yaml").write_text(config)
    rows = [
        {
            "step": step,
            "loss": 8 / step,
            "grad_norm": float("nan"),
            "lr": 1e-3,
            "probe": {"knn20_top1": step / 10},
            "timing": {"images_per_s": 5.0},
            "quiet": True,
        }
        for step in (1, 2, 4)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "lo')
    record = {"model": "teacher of <run>", "step": 7, "protocol": "k-NN & more", "result": {"k=20": SCORES}}
    (run / "evals.json").write_text(json.dumps([record]))
    scene(0).save(run / "first_batch.png")
    return root


class Reader(HTMLParser):
    """What a page consists of."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data


def test_the_page_says_what_the_files_say(world):
    page = write_report(world / "pretrained")
    assert page == world / "pretrained" / "report.html"
    raw = page.read_text()
    reader = Reader()
    reader.feed(raw)
    for said in (
        "pretraining without labels",
        "step 7",
        "teacher of <run>",
        "k-NN & more",
        "k=20: top1 47.57 %, top5 90.28 %",
        "loss: 8 at step 1, 2 at step 4, between 2 and 8",
        "probe.knn20_top1: 0.1 at step 1, 0.4 at step 4",
    ):
        assert said in reader.text, said
    assert "grad_norm: " not in reader.text  # never finite
    pictures = [attributes for tag, attributes in reader.tags if tag == "img"]
    assert len(pictures) == 4  # the first batch, attention, patch colors, the map
    assert all(len(picture["alt"]) > 20 for picture in pictures)
    identities = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    assert not re.search(r"(src|href)=.?(https?:)?//", raw)
    assert write_report(world / "pretrained").read_text() == raw  # nothing of it hangs on time or chance


def test_images_that_are_gone_are_said_so(world, tmp_path):
    run = shutil.copytree(world / "pretrained", tmp_path / "moved")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace(str(world / "shards"), "/nowhere"))
    text = write_report(run).read_text()
    assert "s training images: no shard matches" in text
    with pytest.raises(UserError, match="no such file"):
        write_report(run, images=["nowhere.png"])


def test_the_command_and_mistakes(world, tmp_path, capsys):
    out = tmp_path / "x.html"
    report.main([str(world / "tuned"), str(world / "photos"), "--out", str(out)])
    assert f"wrote {out}" in capsys.readouterr().out
    assert "metric learning" in out.read_text()
    assert "not evaluated yet" in out.read_text()
    with pytest.raises(UserError, match="is not a run"):
        write_report(world / "weights.safetensors")
    run = shutil.copytree(world / "pretrained", tmp_path / "damaged")
    (run / "evals.json").write_text('[{"model": 3}]')
    with pytest.raises(UserError, match=r"evals\.json is damaged"):
        write_report(run)
    shutil.copy(world / "pretrained" / "evals.json", run)
    (run / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 1 is damaged"):
        write_report(run)


def test_charts_leave_out_what_is_no_number():
    found = curves.charts(
        watched([{"step": 1, "loss": float("inf"), "lr": True, "sd": None}, {"step": 2, "loss": 3}])
    )
    assert list(found) == ["Loss"]
    assert found["Loss"][0].said == "loss: 3 at step 2, 3 at step 2, between 3 and 3"


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")
@pytest.mark.parametrize(("scheme", "width"), [("light", 1200), ("dark", 390)])
def test_in_a_browser(world, scheme, width):
    """No error, no request, every picture loads, nothing is wider than a phone, and axe-core finds nothing."""
    from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]
    from playwright.sync_api import sync_playwright

    file = write_report(world / "pretrained", out=Path(world) / f"{scheme}.html")
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        said: list[str] = []
        asked: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        assert page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.images.length") == 4
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        dark = page.evaluate("getComputedStyle(document.body).backgroundColor") != "rgb(255, 255, 255)"
        assert dark == (scheme == "dark")
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "A"  # the list of sections comes first
        found = Axe().run(page).response["violations"]
        browser.close()
    assert not said
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert not found, [(one["id"], one["nodes"][0]["html"][:200]) for one in found]
