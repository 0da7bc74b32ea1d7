import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.data.decode import decode
from glsd.data.eval_loader import eval_loader, evenly_spread, rank_indices
from glsd.data.photometric import MEAN, STD
from glsd.data.transform import center_square
from glsd.errors import UserError
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image

MORE_WORKERS_THAN_CORES = "ignore:This DataLoader will create"
SETUP: dict[str, Any] = {
    "resize": 20,
    "crop": 16,
    "batch_size": 4,
    "rank": 0,
    "world_size": 1,
    "num_workers": 0,
}


pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 20])
def test_every_image_once_and_as_many_rows_on_each_rank(world_size):
    parts = [rank_indices(13, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    read = np.concatenate(parts)
    assert sorted(read[read >= 0].tolist()) == list(range(13))
    assert len(read) - 13 < world_size


def test_limit_is_spread_evenly():
    chosen = evenly_spread(np.full(1000, -1), 7)
    assert len(set(chosen.tolist())) == 7
    assert set(np.diff(chosen).tolist()) <= {142, 143}
    assert evenly_spread(np.arange(5)[::-1], 9).tolist() == list(range(5))
    assert evenly_spread(np.arange(0), 3).tolist() == []


@pytest.mark.parametrize("order", ["sorted", "in turn", "shuffled"])
def test_limit_keeps_the_share_of_each_class(order):
    """In turn, every tenth image would be of one class; sorted, the first ones would."""
    labels = {"sorted": np.arange(200) // 20, "in turn": np.arange(200) % 10}.get(order, np.arange(200) % 10)
    if order == "shuffled":
        np.random.default_rng(0).shuffle(labels)
    for limit in (10, 20, 55, 199):
        chosen = evenly_spread(labels, limit)
        assert len(chosen) == limit
        assert (np.diff(chosen) > 0).all()
        counts = np.bincount(labels[chosen], minlength=10)
        assert set(counts.tolist()) <= {limit // 10, -(-limit // 10)}


@pytest.mark.parametrize("world_size", [1, 3])
def test_labels_indices_and_padding(make_shards, world_size):
    pattern, packed = make_shards(5, 6)
    shards = open_shards(pattern)
    loaders = [
        eval_loader(shards, **{**SETUP, "rank": r, "world_size": world_size}) for r in range(world_size)
    ]
    read = []
    for loader in loaders:
        made = list(loader)
        assert len(made) == len(loader) == len(loaders[0])
        for batch in made:
            assert batch.images.shape[1:] == (3, 16, 16)
            for index, label, image in zip(
                batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True
            ):
                if index < 0:
                    assert label == -1
                    continue
                read.append(index)
                assert label == packed[index][2]
                pixels = center_square(decode(packed[index][0]), resize_to=20, crop=16) / 255
                mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
                torch.testing.assert_close(image, (pixels - mean) / std)
    assert sorted(read) == list(range(11))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_only_the_chosen_images(make_shards, world_size):
    pattern, packed = make_shards(5, 6, change={7: b"text"})
    shards = open_shards(pattern)
    everything = {
        int(index): image
        for batch in eval_loader(shards, **SETUP)
        for index, image in zip(batch.indices, batch.images, strict=True)
    }
    chosen = np.array([1, 4, 5, 7, 10])
    setup = {**SETUP, "batch_size": 2, "world_size": world_size, "chosen": chosen}
    loaders = [eval_loader(shards, **{**setup, "rank": rank}) for rank in range(world_size)]
    read = []
    for loader in loaders:
        made = list(loader)
        assert len(made) == len(loaders[0])
        for batch in made:
            for index, label, image in zip(
                batch.indices.tolist(), batch.labels.tolist(), batch.images, strict=True
            ):
                if index >= 0:
                    read.append(index)
                    assert label == packed[index][2]
                    assert torch.equal(image, everything[index])
    assert sorted(read) == [1, 4, 5, 10]
    assert [broken.index for loader in loaders for broken in loader.broken] == [7]


def test_limit_counts_within_the_chosen(make_shards):
    shards = open_shards(make_shards(5, 6)[0])

    def read(**change):
        return torch.cat([b.indices for b in eval_loader(shards, **{**SETUP, **change})]).tolist()

    chosen = np.array([0, 2, 3, 5, 8, 9])
    assert read(chosen=chosen, limit=3) == [0, 2, 3]  # the labels are the numbers: 0, 8, 2, 9, 3, 5 by class
    assert read(chosen=chosen, limit=20) == chosen.tolist()
    assert read(chosen=np.arange(11), limit=4) == read(limit=4)
    assert list(eval_loader(shards, **{**SETUP, "chosen": chosen[:0]})) == []


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_broken_images_are_listed_not_fatal(make_shards, workers):
    pattern, _ = make_shards(9, change={4: b"text", 7: b""})
    loader = eval_loader(open_shards(pattern), **{**SETUP, "num_workers": workers})
    for _ in range(2):  # twice: the list starts anew
        indices = torch.cat([batch.indices for batch in loader])
        assert indices.tolist() == [0, 1, 2, 3, -1, 5, 6, -1, 8]
        assert [(b.index, b.key) for b in loader.broken] == [(4, "00000004"), (7, "00000007")]
        assert all(b.reason for b in loader.broken)


@pytest.mark.slow
@pytest.mark.filterwarnings(MORE_WORKERS_THAN_CORES)
def test_workers_change_nothing(make_shards):
    pattern, _ = make_shards(9, 8)
    shards = open_shards(pattern)
    expected = list(eval_loader(shards, **SETUP))
    for workers in (1, 3):
        made = list(eval_loader(shards, **{**SETUP, "num_workers": workers}))
        assert all(torch.equal(a.images, b.images) for a, b in zip(expected, made, strict=True))


@pytest.mark.parametrize(("width", "height"), [(500, 375), (375, 500), (40, 33), (256, 256), (100, 257)])
def test_protocol_against_pil(width, height):
    """Short side to 64, bicubic with antialiasing, center 56: Pillow's own resize within rounding."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([128 + 100 * np.sin(x / 9), 128 + 100 * np.cos(y / 7), (x + y) % 256], axis=-1).astype(
        np.uint8
    )
    image = Image.fromarray(pixels)
    scale = 64 / min(width, height)
    size = (64, int(height * scale)) if width <= height else (int(width * scale), 64)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - 56) / 2), round((size[1] - 56) / 2)
    expected = np.asarray(resized.crop((left, top, left + 56, top + 56))).astype(int)
    ours = center_square(torch.from_numpy(pixels).permute(2, 0, 1), resize_to=64, crop=56)
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.max() <= 4
    assert difference.mean() < 0.3


def test_extreme_aspect_needs_no_gigabytes():
    line = torch.zeros(3, 1, 60_000, dtype=torch.uint8)
    line[:, :, 29_990:30_010] = 200
    square = center_square(line, resize_to=256, crop=224)
    assert square.shape == (3, 224, 224)
    assert (square == 200).all()


def test_any_format(tmp_path, make_shards):
    gray = io.BytesIO()
    Image.new("L", (30, 50), 77).save(gray, "PNG")
    pattern, _ = make_shards(3, change={0: gray.getvalue(), 1: noise_image(1, "WEBP")})
    (batch,) = eval_loader(open_shards(pattern), **SETUP)
    assert batch.indices.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "change", [{"crop": 30}, {"crop": 0}, {"batch_size": 0}, {"limit": -1}, {"rank": 2}, {"num_workers": -1}]
)
def test_settings_that_cannot_work(make_shards, change):
    pattern, _ = make_shards(3)
    with pytest.raises(UserError):
        list(eval_loader(open_shards(pattern), **{**SETUP, **change}))


@pytest.mark.photos
@pytest.mark.slow
def test_photographs_over_three_ranks(photos):
    shards = open_shards(str(photos / "pretrain_caltech101" / "val-*.tar"))
    setup: dict[str, Any] = {"resize": 64, "crop": 56, "batch_size": 100, "world_size": 3, "num_workers": 1}
    rows = [batch for rank in range(3) for batch in eval_loader(shards, rank=rank, **setup)]
    indices, labels = (torch.cat([getattr(b, name) for b in rows]) for name in ("indices", "labels"))
    real = indices >= 0
    assert indices[real].sort().values.tolist() == list(range(915))
    assert labels[real][indices[real].argsort()].tolist() == shards.labels().tolist()
