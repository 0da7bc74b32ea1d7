"""The P x M loader: crops, any number of ranks, resuming, images that cannot be read."""

import io
import itertools
import math
import os
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from glsd.batches import BrokenSample, LabeledCrops
from glsd.data.balanced import (
    ClassGroups,
    balanced_batch,
    class_groups,
    split_classes,
)
from glsd.data.balanced_loader import balanced_loader
from glsd.data.crops import (
    AREA_DRAWS,
    ASPECT_DRAWS,
    DRAWS,
    crop_uniforms,
    cut,
    random_crop,
)
from glsd.data.decode import decode
from glsd.errors import UserError
from glsd.rng import Stream
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image

MORE_WORKERS_THAN_CORES = "ignore:This DataLoader will create"
SETUP: dict[str, Any] = {
    "size": 16,
    "scale": (0.2, 1.0),
    "flip_prob": 0.5,
    "seed": 5,
    "classes": 4,
    "images_per_class": 3,
    "first_step": 0,
    "rank": 0,
    "world_size": 1,
    "num_workers": 0,
    "pin_memory": False,
}


pytestmark = pytest.mark.usefixtures("own_cache")


def batches(shards, count: int, **changes) -> list[LabeledCrops]:
    groups = groups_of(shards.labels())
    return list(itertools.islice(balanced_loader(shards, groups, **{**SETUP, **changes}), count))


def same(first: LabeledCrops, second: LabeledCrops) -> bool:
    tensors = all(
        torch.equal(getattr(first, name), getattr(second, name)) for name in ("images", "labels", "indices")
    )
    return tensors and (first.keys, first.broken) == (second.keys, second.broken)


def joined(parts: list[LabeledCrops]) -> LabeledCrops:
    return LabeledCrops(
        images=torch.cat([part.images for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
        indices=torch.cat([part.indices for part in parts]),
        keys=tuple(key for part in parts for key in part.keys),
        broken=tuple(broken for part in parts for broken in part.broken),
    )


def groups_of(labels: np.ndarray) -> ClassGroups:
    return class_groups(labels, key_of=str, drop_lone=False)


def crop_by_hand(raw: bytes, *, seed: int, step: int, slot: int) -> torch.Tensor:
    """The random resized crop written out, one try at a time."""
    image = decode(raw)
    height, width = image.shape[1:]
    u = crop_uniforms(1, seed=seed, epoch=step, position=slot, stream=Stream.BATCH_CROPS)[0].tolist()
    for u_area, u_aspect in zip(u[AREA_DRAWS], u[ASPECT_DRAWS], strict=True):
        area = (0.2 + 0.8 * u_area) * height * width
        aspect = (3 / 4) ** (1 - u_aspect) * (4 / 3) ** u_aspect
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if w <= width and h <= height:
            break
    else:
        raise AssertionError("no box fits: choose other images")
    x, y = int(u[DRAWS["x"]] * (width - w + 1)), int(u[DRAWS["y"]] * (height - h + 1))
    crop = cut(image, torch.tensor([[x, y, x + w, y + h]]).double(), 16)[0]
    return crop.flip(-1) if u[DRAWS["flip"]] < 0.5 else crop


def test_rows_are_the_drawn_images_cropped(make_shards):
    pattern, packed = make_shards(20, 15)
    shards = open_shards(pattern)
    groups = groups_of(shards.labels())
    for step, batch in enumerate(batches(shards, 3)):
        indices, ranks = balanced_batch(groups, seed=5, step=step, classes=4, images_per_class=3)
        assert batch.indices.tolist() == indices.tolist()
        assert batch.labels.tolist() == ranks.tolist()
        assert batch.images.dtype == torch.uint8
        assert batch.broken == ()
        for slot, index in enumerate(indices.tolist()):
            assert packed[index][2] == groups.labels[ranks[slot]]
            assert batch.keys[slot] == shards.key(index)
            by_hand = crop_by_hand(packed[index][0], seed=5, step=step, slot=slot)
            assert torch.equal(batch.images[slot], by_hand)


def test_scale_and_flip_are_obeyed():
    raw = noise_image(1, "PNG")
    key = {"size": 24, "seed": 0, "step": 0, "slot": 2}
    plain = random_crop(raw, scale=(0.3, 0.3), flip_prob=0.0, **key)
    flipped = random_crop(raw, scale=(0.3, 0.3), flip_prob=1.0, **key)
    assert torch.equal(plain, flipped.flip(-1))
    assert not torch.equal(plain, flipped)
    assert not torch.equal(plain, random_crop(raw, scale=(0.9, 0.9), flip_prob=0.0, **key))
    assert not torch.equal(plain, random_crop(raw, scale=(0.3, 0.3), flip_prob=0.0, **{**key, "slot": 3}))


def test_resume_at_any_step(make_shards):
    pattern, _ = make_shards(20, 15, change={3: b"text", 8: b""})
    straight = batches(open_shards(pattern), 7)
    assert any(batch.broken for batch in straight)
    assert not any(same(a, b) for a, b in itertools.combinations(straight, 2))
    for step in (1, 4, 6):
        resumed = batches(open_shards(pattern), 7 - step, first_step=step)
        assert all(same(a, b) for a, b in zip(straight[step:], resumed, strict=True))


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_hold_contiguous_parts_of_the_same_batch(make_shards, world_size):
    pattern, _ = make_shards(20, 15, change={3: b"text", 8: b""})
    shards = open_shards(pattern)
    whole = batches(shards, 5)
    parts = [batches(shards, 5, rank=rank, world_size=world_size) for rank in range(world_size)]
    for step in range(5):
        assert len({len(part[step].keys) for part in parts}) == 1
        assert same(joined([part[step] for part in parts]), whole[step])


@pytest.mark.slow
@pytest.mark.filterwarnings(MORE_WORKERS_THAN_CORES)
def test_workers_change_nothing(make_shards):
    pattern, _ = make_shards(20, 15, change={3: b"text", 8: b""})
    shards = open_shards(pattern)
    expected = batches(shards, 9)
    assert sum(len(batch.broken) for batch in expected) >= 2
    for workers in (1, 2):
        made = batches(shards, 9, num_workers=workers)
        assert all(same(a, b) for a, b in zip(expected, made, strict=True))


def test_global_random_state_is_left_alone(make_shards):
    pattern, _ = make_shards(20, 15)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].tolist()  # type: ignore[index]
    batches(open_shards(pattern), 2)
    assert torch.equal(before, torch.get_rng_state())
    assert numpy_before == np.random.get_state()[1].tolist()  # type: ignore[index]


def test_a_broken_image_is_replaced_within_its_class(make_shards):
    """Labels are number % 7: class 3 has the images 3, 10, 17, 24, 31, of which two cannot be read."""
    pattern, packed = make_shards(20, 15, change={3: b"text", 17: noise_image(17)[:-300], 6: b""})
    shards = open_shards(pattern)
    groups = groups_of(shards.labels())
    stand_ins: dict[int, set[int]] = {3: set(), 17: set(), 6: set()}
    for step, batch in enumerate(batches(shards, 40)):
        drawn, _ = balanced_batch(groups, seed=5, step=step, classes=4, images_per_class=3)
        replaced = np.flatnonzero(batch.indices.numpy() != drawn)
        assert set(replaced.tolist()) == set(np.flatnonzero(np.isin(drawn, [3, 17, 6])).tolist())
        for slot in replaced.tolist():
            used = int(batch.indices[slot])
            records = [record for record in batch.broken if record.position == slot]
            record = records[0]
            index = int(drawn[slot])
            assert record == BrokenSample(step, slot, index, shards.key(index), record.reason, used)
            assert record.reason
            assert packed[used][2] == groups.labels[batch.labels[slot]] == packed[index][2]
            assert batch.keys[slot] == shards.key(used)
            by_hand = crop_by_hand(packed[used][0], seed=5, step=step, slot=slot)
            assert torch.equal(batch.images[slot], by_hand)  # the stand-in gets the crop of the slot
            class_mates = drawn[batch.labels.numpy() == int(batch.labels[slot])]
            free = (
                set(groups.images(int(batch.labels[slot])).tolist()) - set(class_mates.tolist()) - {3, 17, 6}
            )
            assert used in free or not free  # an image that is not in the batch, if there is one
            stand_ins[index].add(used)
    assert stand_ins[3] == stand_ins[17] == {10, 24, 31}
    assert stand_ins[6] == {13, 20, 27, 34}


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_class_of_which_nothing_can_be_read(make_shards, workers):
    pattern, _ = make_shards(20, 15, change=dict.fromkeys(range(2, 35, 7), b"text"))
    with pytest.raises(
        UserError,
        match=r"sample '0.*s-00000[01]\.tar cannot be read \(.+\), nor can any.* 5 images of its class 2:",
    ) as caught:
        batches(open_shards(pattern), 9, num_workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_shard_that_vanishes_while_workers_read(make_shards):
    pattern, _ = make_shards(20, 15)
    shards = open_shards(pattern)
    groups = groups_of(shards.labels())
    stream = balanced_loader(shards, groups, **{**SETUP, "num_workers": 1})
    os.unlink(shards.paths[0])
    with pytest.raises(UserError, match="cannot read shard"):
        list(itertools.islice(stream, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 5}, r"batch_size 12 does not divide over 5 ranks"),
        ({"rank": 1}, "rank 1 of 1"),
        ({"num_workers": -1}, "num_workers is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(make_shards, change, message):
    pattern, _ = make_shards(14)
    shards = open_shards(pattern)
    with pytest.raises(UserError, match=message) as caught:
        balanced_loader(shards, groups_of(shards.labels()), **{**SETUP, **change})
    assert "\n" not in str(caught.value)


def test_labeled_digits(digit_shards):
    shards = open_shards(f"{digit_shards}/train-*.tar")
    labels = shards.labels()
    train, val = split_classes(groups_of(labels), 0.3)
    stream = balanced_loader(shards, train, **{**SETUP, "size": 32, "images_per_class": 4})
    for batch in itertools.islice(stream, 10):
        assert batch.images.shape == (16, 3, 32, 32)
        assert labels[batch.indices.numpy()].tolist() == train.labels[batch.labels.numpy()].tolist()
        assert not set(batch.indices.tolist()) & set(val.tolist())
    assert set(labels[val]) == {7, 8, 9}


@pytest.mark.photos
@pytest.mark.slow
@pytest.mark.filterwarnings(MORE_WORKERS_THAN_CORES)
def test_photographs_with_and_without_workers(photos):
    shards = open_shards(str(photos / "dml_grocery81" / "train-*.tar"))
    setup = {"size": 224, "classes": 16, "images_per_class": 2}
    expected = batches(shards, 4, **setup)
    assert all(batch.broken == () for batch in expected)
    made = batches(shards, 4, **setup, num_workers=2)
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))


def test_gray_and_png_side_by_side(make_shards):
    gray = io.BytesIO()
    Image.new("L", (30, 50), 77).save(gray, "PNG")
    pattern, _ = make_shards(14, change={0: gray.getvalue(), 7: noise_image(7, "WEBP")})
    made = batches(open_shards(pattern), 2, classes=7, images_per_class=2)
    for batch in made:
        assert batch.broken == ()
        assert (batch.images[batch.indices == 0] == 77).all()
