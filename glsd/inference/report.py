"""The report of a run: what it was, what came out, how it went, and what the network sees, on one page."""

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glsd.config.finetune import FinetuneConfig
from glsd.config.parse import differences
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError, one_line
from glsd.files import replacing
from glsd.inference.images import Images, as_images
from glsd.inference.look import draw_attention_of, draw_map_of, draw_pca_of, evenly, training_images
from glsd.inference.model import Model, load
from glsd.loading import find_run, identify
from glsd.runtime.sections import watched
from glsd.show import curves, page

PICTURES = {
    "first_batch.png": "Crops of the first batch: a second global crop and the teacher's; lines join matched patches",
    "first_batch_local.png": "Crops of the first batch: a local crop and the teacher's; lines join matched patches",
    "pictures/neighbors.png": "Images and their nearest neighbors at the last probe: green is the image's class, red another one",
    "neighbors.png": "Query images and their nearest neighbors: green is the query's class, red another one",
}
SEEN = {
    "attention": "Where the class token looks: the image, the mean over the heads, then each head",
    "pca": "Patches by their first three principal components: parts that look alike have the same color in all images",
    "map": "A map of the embeddings: images that are alike lie close to each other",
}
FEW, MANY = 6, 400  # images in pictures of single images, and on the map


def write_report(path: Path, *, images: Any = None, out: Path | None = None) -> Path:
    """Write the page of the run (or of the run of the checkpoint) at ``path``, and return where it is.

    images: what pictures of the network show, as ``Model.embed`` takes them; None = images of the run's own training shards,
    and if these cannot be read, the page says why and goes without. out: the file; None = report.html in the run's folder.
    Raises UserError if ``path`` is no run, it has no checkpoint, given images cannot be read, or the page cannot be written.
    """
    run = find_run(path)
    if run is None:
        raise UserError(
            f"{path} is not a run: a report needs the folder that --out named, or one of its checkpoints"
        )
    config = identify(str(path)).config
    assert config is not None
    model = load(path)
    sections = [
        page.Section("Run", _about(model, run, config)),
        page.Section("Evaluations", _evaluations(run)),
        *_curves(run),
        page.Section("What the network sees", _pictures(model, run, images)),
        page.Section("Configuration", _configuration(run, config)),
    ]
    out = out or run / "report.html"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replacing(out) as file:
            file.write(page.page(f"glsd report: {run.name}", sections).encode())
    except OSError as problem:
        raise UserError(f"cannot write the report {out}: {one_line(problem)}") from problem
    return out


def _about(model: Model, run: Path, config: PretrainConfig | FinetuneConfig) -> str:
    stage = "metric learning" if isinstance(config, FinetuneConfig) else "pretraining without labels"
    quarantined = len(_lines(run / "quarantine.jsonl"))
    rows = [
        ("stage", stage),
        ("network", f"{config.model.backbone}, vectors of {model.width} numbers"),
        ("model", model.name),
        ("checkpoint", f"step {model.step}"),
        (
            "images",
            f"{model.transform.resize} pixels on the short side, center crop of {model.transform.crop}",
        ),
        ("unreadable images", f"{quarantined} (quarantine.jsonl)" if quarantined else "none"),
    ]
    return page.table(["what", "value"], rows)


def _evaluations(run: Path) -> str:
    file = run / "evals.json"
    if not file.is_file():
        return page.paragraph("This run was not evaluated yet: glsd evaluate --model RUN --protocol knn ...")
    rows: list[tuple[str, str, str, str]] = []
    try:
        for record in json.loads(file.read_text()):
            model, step, protocol = str(record["model"]), str(record["step"]), _protocol(record)
            rows += [(model, step, f"{name}: {scores}", protocol) for name, scores in _scores(record)]
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise UserError(f"{file} is damaged ({one_line(problem)}): move it away") from problem
    return page.table(["model", "step", "result", "protocol"], rows)


def _protocol(record: Mapping[str, Any]) -> str:
    protocol = record["protocol"]
    return "; ".join(protocol.values()) if isinstance(protocol, Mapping) else str(protocol)


def _scores(record: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return each table of shares in a record: its dotted name, and its numbers in percent."""
    found = []
    for name, value in record.items():
        if not isinstance(value, Mapping):
            continue
        shares = {
            key: x for key, x in value.items() if key in ("top1", "top5", "map_at_r") or "recall@" in key
        }
        if shares:
            found.append((prefix + name, ", ".join(f"{key} {100 * x:.2f} %" for key, x in shares.items())))
        else:
            found += _scores(value, "" if name == "result" else f"{prefix}{name} ")
    return found


def _curves(run: Path) -> list[page.Section]:
    found = curves.charts(watched(_lines(run / "metrics.jsonl")))
    return [
        page.Section(name, page.charts([(chart.svg, chart.said) for chart in items]))
        for name, items in found.items()
    ]


def _lines(file: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file; none if there is no such file. A last line that was cut off is left out."""
    if not file.is_file():
        return []
    rows = []
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except ValueError as problem:
            if number < len(lines):
                raise UserError(f"{file}, line {number} is damaged: {one_line(problem)}") from problem
    return rows


def _pictures(model: Model, run: Path, given: Any) -> str:
    found = [page.picture(run / name, says) for name, says in PICTURES.items() if (run / name).is_file()]
    try:
        images = training_images(model) if given is None else as_images(given)
        drawn = _seen(model, images)
    except UserError as problem:
        if given is not None:
            raise
        return "".join(found) + page.paragraph(f"No pictures: {problem}", soft=True)
    return "".join([*found, *drawn])


def _seen(model: Model, images: Images) -> list[str]:
    few = model.squares(images, evenly(len(images.names), FEW))
    many = model.squares(images, evenly(len(images.names), MANY))
    drawn = {"pca": lambda file: draw_pca_of(model, few, file)}
    if model.has_class_token:
        drawn = {"attention": lambda file: draw_attention_of(model, few, file), **drawn}
    if len(many.names) >= 5:
        drawn["map"] = lambda file: draw_map_of(model, many, file)
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for name, draw in drawn.items():
            draw(Path(folder) / name)
            found.append(page.picture(Path(folder) / name, SEEN[name]))
    return found


def _configuration(run: Path, config: Any) -> str:
    rows = [(key, value) for key, value in differences(config).items()]
    parts = [page.table(["key", "value beside the default"], rows)] if rows else []
    for name in ("config.yaml", "env.txt"):
        if (run / name).is_file():
            parts.append(page.folded(name, (run / name).read_text(errors="replace")))
    return "".join(parts)
