"""The probe: its sets, compared by name; what it measures with and without labels; its pictures."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

import glsd
from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.packing.write import pack_samples
from glsd.pretrain.probe import in_rows, open_probe
from glsd.shards.store import open_shards
from tests.helpers.runs import rows, train
from tests.helpers.small_shards import noise_image

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def configured(tmp_path):
    """The function that packs a train and a val set of the classes given, and returns the configuration of their probe."""

    def make(train: list[str], val: list[str]) -> PretrainConfig:
        for name, classes in (("train", train), ("val", val)):
            rows = [(noise_image(10 * label), "jpg", label) for label in range(len(classes))]
            pack_samples(rows, tmp_path / name / "-".join(classes), prefix=name, classes=classes)
        cfg = PretrainConfig()
        watch = replace(
            cfg.watch,
            probe_every=1,
            probe_k=1,
            probe_train_shards=f"{tmp_path}/train/{'-'.join(train)}/*.tar",
            probe_val_shards=f"{tmp_path}/val/{'-'.join(val)}/*.tar",
        )
        return replace(cfg, watch=watch)

    return make


def labels_of(cfg: PretrainConfig) -> list[list[int]]:
    sets = open_probe(cfg, open_shards(cfg.watch.probe_train_shards))
    assert sets is not None
    assert sets.train is not None
    return [part.shards.labels()[part.chosen].tolist() for part in (sets.train, sets.val)]


def test_sets_of_a_probe_are_compared_by_name(configured, capsys):
    assert labels_of(configured(["a", "b", "c"], ["c", "a", "b"])) == [[0, 1, 2], [2, 0, 1]]
    assert capsys.readouterr().out == ""
    assert labels_of(configured(["a", "b"], ["d", "b", "e"])) == [[0, 1], [2, 1, 3]]
    assert capsys.readouterr().out == (
        "warning: 2 of 3 classes of watch.probe_val_shards are not in watch.probe_train_shards: 2 of 3 images count as wrong\n"
    )


def test_a_probe_without_a_common_class_is_refused(configured):
    with pytest.raises(
        UserError, match=r"^no class of watch\.probe_val_shards is in watch\.probe_train_shards, so every"
    ):
        labels_of(configured(["a", "b"], ["c", "d"]))


def test_without_labels_images_of_the_training_are_measured_in_short_rows():
    for total, count in ((5, 10), (40, 33), (1000, 64), (100_000, 2048), (17, 16)):
        chosen = in_rows(total, count)
        assert len(chosen) == min(total, count)
        assert (np.diff(chosen) > 0).all()
        assert (chosen[0], chosen[-1] < total) == (0, True)
    assert np.flatnonzero(np.diff(in_rows(100_000, 2048)) > 1).tolist() == list(range(15, 2047, 16))


def test_the_probe_of_a_run_without_labels(tiny_run):
    """RankMe of both networks at the start and at the end, in the rows, and the pictures, in TensorBoard as well."""
    run = train(tiny_run(optim__max_steps=3, watch__probe_every=2, watch__pictures="true"))
    probes = {row["step"]: row["probe"] for row in rows(run) if "probe" in row}
    assert list(probes) == [0, 2, 3]
    for found in probes.values():
        assert found["rankme"] == found["teacher_cls"]["rankme"]
        assert 1 <= found["rankme"] <= 32
        assert not any("knn" in key for key in found)
    drawn = sorted(path.name for path in (run / "pictures").iterdir())
    assert drawn == ["attention.png", "map.png", "neighbors.png", "pca.png"]
    for name in drawn:
        assert np.asarray(Image.open(run / "pictures" / name).convert("L")).std() > 5
    board = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0})
    board.Reload()
    steps = {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}
    assert steps.pop("6_pictures/map") == [3]
    assert [steps.pop(f"6_pictures/{name}") for name in ("first_batch", "first_batch_local")] == [[0], [0]]
    assert steps == {f"6_pictures/{name}": [0, 2, 3] for name in ("attention", "neighbors", "pca")}
    sprites = list((run / "tensorboard").rglob("sprite.png"))
    titles = list((run / "tensorboard").rglob("metadata.tsv"))
    assert (len(sprites), len(titles)) == (1, 1)
    assert len(titles[0].read_text().splitlines()) == 48


def test_the_best_checkpoint_is_that_of_the_best_probe(tiny_run, digit_shards):
    """Also after a kill, which resumes before the last probe, and for those who load it."""
    labeled = {
        "probe_train_shards": f"{digit_shards}/train-*.tar",
        "probe_val_shards": f"{digit_shards}/val-*.tar",
        "probe_every": 1,
        "probe_k": 3,
        "keep_every": 4,
    }
    flags = {f"watch__{key}": value for key, value in labeled.items()}
    straight = train(tiny_run("straight", optim__max_steps=6, **flags))
    train(tiny_run("resumed", optim__max_steps=3, **flags))
    resumed = train(tiny_run("resumed", optim__max_steps=6, resume="auto", **flags))
    for run in (straight, resumed):
        scores = {row["step"]: row["probe"]["knn3_top1"] for row in rows(run) if "probe" in row}
        assert list(scores) == list(range(7))
        best = max(range(1, 7), key=lambda step: (scores[step], -step))
        folders = {path.name for path in (run / "checkpoints").iterdir()}
        assert folders == {"best", "latest", *(f"step_{step:08}" for step in {best, 4, 5, 6})}
        assert glsd.load(run, which="best").step == best
        assert glsd.load(run).step == 6
    chosen = (straight / "checkpoints/best").readlink()
    train(tiny_run("straight", optim__max_steps=7, resume="auto", **flags | {"watch__probe_every": 0}))
    assert (straight / "checkpoints/best").readlink() == chosen
    assert chosen == (resumed / "checkpoints/best").readlink()


def test_pictures_of_a_run_with_labels_name_the_classes(tiny_run, digit_shards, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        "glsd.show.neighbors.draw_neighbors", lambda path, *_, **given: seen.update(given) or path.touch()
    )
    monkeypatch.setattr("glsd.runtime.meters.Meters.picture", lambda *_: None)
    labeled = {
        "probe_train_shards": f"{digit_shards}/train-*.tar",
        "probe_val_shards": f"{digit_shards}/val-*.tar",
    }
    flags = {f"watch__{key}": value for key, value in labeled.items()}
    train(
        tiny_run(optim__max_steps=1, watch__probe_every=1, watch__probe_k=3, watch__pictures="true", **flags)
    )
    assert seen["neighbor_labels"].shape == (6, 6)
    assert len(seen["query_labels"]) == 6
