"""The labeled sets of the k-NN probe: compared by name, and refused where every answer would be wrong."""

from dataclasses import replace

import pytest

from glsd.config.pretrain import PretrainConfig
from glsd.errors import UserError
from glsd.packing.write import pack_samples
from glsd.pretrain.report import open_probe
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
    sets = open_probe(cfg)
    assert sets is not None
    return [shards.labels().tolist() for shards in sets]


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
        open_probe(configured(["a", "b"], ["c", "d"]))
