import itertools
import os
import signal
import time
from dataclasses import fields
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from glsd.batches import BrokenSample, CropBatch
from glsd.data.crops import crop_sample
from glsd.data.order import EpochOrder
from glsd.data.pretrain_loader import MatchRule, PretrainDataset, pretrain_loader
from glsd.errors import UserError
from glsd.geometry import geometric_match
from glsd.packing.write import pack_samples
from glsd.shards.find import find_shards
from glsd.shards.store import open_shards
from tests.helpers.small_shards import noise_image
from tests.helpers.usual_spec import usual_spec

MORE_WORKERS_THAN_CORES = "ignore:This DataLoader will create"
SPEC = usual_spec(global_size=16, local_size=8, num_local=3)
SETUP: dict[str, Any] = {
    "crop_spec": SPEC,
    "match_rule": None,
    "seed": 5,
    "window_shards": 2,
    "consumed": 0,
    "batch_size": 6,
    "micro_batch": 3,
    "rank": 0,
    "world_size": 1,
    "num_workers": 0,
    "pin_memory": False,
}


pytestmark = pytest.mark.usefixtures("own_cache")


def batches(shards, count: int, **changes) -> list[CropBatch]:
    return list(itertools.islice(pretrain_loader(shards, **{**SETUP, **changes}), count))


def same(first: CropBatch, second: CropBatch) -> bool:
    pairs = [
        (getattr(first, f.name), getattr(second, f.name)) for f in fields(CropBatch) if f.name != "match"
    ]
    if first.match is not None and second.match is not None:
        pairs += [(first.match.index, second.match.index), (first.match.weight, second.match.weight)]
        pairs += zip(first.match.needed, second.match.needed, strict=True)  # type: ignore[arg-type]
    return (first.match is None) == (second.match is None) and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b for a, b in pairs
    )


def test_each_view_is_that_of_crop_sample(make_shards):
    pattern, packed = make_shards(5, 4, 6)
    shards = open_shards(pattern)
    made = batches(shards, 6)
    for number, batch in enumerate(made):
        epoch, first = divmod(
            3 * number, 12
        )  # 15 images: two batches of 6 an epoch, the tail of 3 is dropped
        order = EpochOrder([5, 4, 6], seed=5, epoch=epoch, window_shards=2)
        assert batch.indices.tolist() == [order[first + i] for i in range(3)]
        assert batch.broken == ()
        for image in range(3):
            index = order[first + image]
            assert batch.keys[image] == shards.key(index)
            crops = crop_sample(packed[index][0], SPEC, seed=5, epoch=epoch, position=first + image)
            for view in range(2):
                assert torch.equal(batch.global_crops[view, image], crops.global_crops[view])
                assert torch.equal(batch.global_boxes[view, image], crops.boxes[view])
                assert torch.equal(batch.global_photometric[view, image], crops.photometric[view])
            for view in range(3):
                assert torch.equal(batch.local_crops[view, image], crops.local_crops[view])
                assert torch.equal(batch.local_boxes[view, image], crops.boxes[2 + view])
                assert torch.equal(batch.local_photometric[view, image], crops.photometric[2 + view])


def test_no_local_crops(make_shards):
    pattern, _ = make_shards(6)
    (batch,) = batches(
        open_shards(pattern), 1, crop_spec=usual_spec(global_size=16, local_size=8, num_local=0)
    )
    assert batch.local_crops.shape == (0, 3, 3, 8, 8)
    assert (batch.local_boxes.shape, batch.local_photometric.shape[0]) == ((0, 3, 4), 0)
    assert batch.global_crops.shape == (2, 3, 3, 16, 16)


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_patches_are_matched_by_place_where_the_crops_are_made(make_shards, num_local, num_workers):
    pattern, _ = make_shards(6)
    spec = usual_spec(global_size=16, local_size=8, num_local=num_local)
    rule = MatchRule(stride=4, hinge=True, hinge_factor=0.7)
    changes = {"crop_spec": spec, "match_rule": rule, "num_workers": num_workers}
    for batch in batches(open_shards(pattern), 2, **changes):
        boxes = [batch.global_boxes, batch.local_boxes]
        want = geometric_match(boxes, [16, 8], stride=4, hinge=True, hinge_factor=0.7)
        assert batch.match is not None
        assert torch.equal(batch.match.index, want.index)
        assert torch.equal(batch.match.weight, want.weight)
        assert 0 < want.weight.mean() < 1


@pytest.mark.slow
@pytest.mark.filterwarnings(MORE_WORKERS_THAN_CORES)
def test_workers_change_nothing(make_shards):
    pattern, _ = make_shards(5, 4, 6, change={3: b"text", 7: b""})
    shards = open_shards(pattern)
    expected = batches(shards, 9)
    assert sum(len(batch.broken) for batch in expected) >= 4
    for workers in (1, 3):
        made = batches(shards, 9, num_workers=workers)
        assert all(same(a, b) for a, b in zip(expected, made, strict=True))


def test_resume_anywhere_and_split_over_ranks(make_shards):
    pattern, _ = make_shards(5, 4, 6, change={3: b"text"})
    shards = open_shards(pattern)
    straight = batches(shards, 8)
    for step in (1, 2, 3):
        resumed = batches(open_shards(pattern), 8 - 2 * step, consumed=6 * step)
        assert all(same(a, b) for a, b in zip(straight[2 * step :], resumed, strict=True))
    ranks = [batches(shards, 4, rank=rank, world_size=2) for rank in range(2)]
    for step in range(4):
        whole = [index for batch in straight[2 * step : 2 * step + 2] for index in batch.indices.tolist()]
        assert [ranks[c % 2][step].indices.tolist()[c // 2] for c in range(6)] == whole
        halves = torch.cat([straight[2 * step].global_crops[0], straight[2 * step + 1].global_crops[0]])
        assert torch.equal(ranks[1][step].global_crops[0], halves[1::2])


def test_global_random_state_is_left_alone(make_shards):
    pattern, _ = make_shards(6)
    before = torch.get_rng_state()
    batches(open_shards(pattern), 2)
    assert torch.equal(before, torch.get_rng_state())


def test_a_broken_sample_is_replaced_and_keeps_its_crops(make_shards):
    pattern, packed = make_shards(6, 6, change={2: b"this is text", 9: b"", 4: noise_image(4)[:-200]})
    shards = open_shards(pattern)
    dataset = PretrainDataset(shards, seed=5, window_shards=2, crop_spec=SPEC)
    order = EpochOrder([6, 6], seed=5, epoch=1, window_shards=2)
    seen = []
    for position in range(12):
        sample = dataset[1, position]
        index = order[position]
        assert (sample.index == index) == (index not in (2, 9, 4))
        crops = crop_sample(packed[sample.index][0], SPEC, seed=5, epoch=1, position=position)
        assert torch.equal(sample.crops.global_crops, crops.global_crops)
        assert torch.equal(sample.crops.boxes, crops.boxes)
        if index != sample.index:
            record = sample.broken[0]
            assert record == BrokenSample(1, position, index, shards.key(index), record.reason, sample.index)
            seen.append((index, record.reason))
        assert [dataset[1, position].index, dataset[1, position].broken] == [sample.index, sample.broken]
    assert sorted(index for index, _ in seen) == [2, 4, 9]
    assert all(reason for _, reason in seen)
    again = PretrainDataset(open_shards(pattern), seed=5, window_shards=2, crop_spec=SPEC)
    assert [again[1, p].index for p in range(12)] == [dataset[1, p].index for p in range(12)]


def test_stand_ins_are_drawn_anew_for_every_seed_epoch_and_position(make_shards):
    pattern, _ = make_shards(40)
    shards = open_shards(pattern)
    drawn = []
    for seed in (0, 1):
        dataset = PretrainDataset(shards, seed=seed, window_shards=1, crop_spec=SPEC)
        drawn += [tuple(dataset._candidates(epoch, p))[1:] for epoch in range(3) for p in range(40)]
    assert len(set(drawn)) == len(drawn) == 240
    assert {len(one) for one in drawn} == {20}
    counts = np.bincount([index for one in drawn for index in one], minlength=40)
    assert np.abs(counts - 120).max() < 55  # 5 standard deviations


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_hopeless_shards_end_in_one_line(tmp_path, workers):
    pack_samples([(b"text", "jpg", None)] * 8, tmp_path, prefix="bad")
    shards = open_shards(str(tmp_path / "bad-*.tar"))
    with pytest.raises(
        UserError, match=r"sample '0.*bad-000000\.tar cannot be read.*20 drawn in its place"
    ) as caught:
        batches(shards, 1, num_workers=workers)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_shard_that_vanishes_while_workers_read(make_shards):
    pattern, _ = make_shards(6, 6)
    shards = open_shards(pattern)
    os.unlink(find_shards(pattern)[0])
    with pytest.raises(UserError, match="cannot read shard"):
        batches(shards, 4, num_workers=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 7, "micro_batch": 7}, "larger than the 6 images"),
        ({"micro_batch": -1}, "micro_batch is -1"),
        ({"num_workers": -1}, "num_workers is -1"),
        ({"window_shards": 0}, "window_shards is 0"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(make_shards, change, message):
    pattern, _ = make_shards(6)
    with pytest.raises(UserError, match=message):
        pretrain_loader(open_shards(pattern), **{**SETUP, **change})


@pytest.mark.slow
def test_workers_outlive_signals_and_end_with_the_loader(make_shards):
    pattern, _ = make_shards(6, 6)
    shards = open_shards(pattern)
    expected = batches(shards, 30)
    others = psutil.Process().children()
    stream = pretrain_loader(shards, **{**SETUP, "num_workers": 2})
    made = [next(stream)]
    workers = [child for child in psutil.Process().children() if child not in others]
    assert len(workers) == 2
    # From another process, as a scheduler does: the same signal from the training process itself is obeyed.
    numbers = [str(worker.pid) for worker in workers]
    for name in ("TERM", "INT", "USR1"):
        if os.spawnlp(os.P_WAIT, "kill", "kill", f"-{name}", *numbers) != 0:
            raise AssertionError("kill failed")
    made += list(itertools.islice(stream, 29))
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))
    assert all(worker.is_running() for worker in workers)
    del stream
    assert not psutil.wait_procs(workers, timeout=10)[1]


@pytest.mark.slow
def test_a_worker_obeys_the_training_process(make_shards):
    pattern, _ = make_shards(6)
    others = psutil.Process().children()
    stream = pretrain_loader(open_shards(pattern), **{**SETUP, "num_workers": 1})
    next(stream)
    (worker,) = (child for child in psutil.Process().children() if child not in others)
    os.kill(worker.pid, signal.SIGTERM)
    patience = time.monotonic() + 10
    while worker.status() != psutil.STATUS_ZOMBIE:  # seen without reaping it, which is torch's business
        assert time.monotonic() < patience
        time.sleep(0.01)


@pytest.mark.slow
def test_workers_end_when_the_training_process_is_killed(make_shards):
    pattern, _ = make_shards(6)
    shards = open_shards(pattern)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            stream = pretrain_loader(shards, **{**SETUP, "num_workers": 2})
            next(stream)
            os.write(writer, b".")
            time.sleep(60)
        finally:
            os._exit(1)
    os.read(reader, 1)
    workers = psutil.Process(child).children()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(workers) == 2
    assert not psutil.wait_procs(workers, timeout=20)[1]


@pytest.mark.photos
@pytest.mark.slow
@pytest.mark.filterwarnings(MORE_WORKERS_THAN_CORES)
def test_photographs_with_and_without_workers(photos):
    shards = open_shards(str(photos / "pretrain_caltech101" / "train-{000000..000007}.tar"))
    setup = {
        "crop_spec": usual_spec(),
        "batch_size": 32,
        "micro_batch": 16,
        "consumed": 32 * 170,
        "window_shards": 4,
    }
    expected = batches(shards, 14, **setup)  # over the border of the first epoch of 176 batches
    made = batches(shards, 14, **setup, num_workers=3)
    assert all(same(a, b) for a, b in zip(expected, made, strict=True))
    assert all(batch.broken == () for batch in expected)


def test_png_and_jpeg_side_by_side(tmp_path):
    samples = [
        (noise_image(n, "PNG"), "png", None) if n % 2 else (noise_image(n), "jpg", None) for n in range(6)
    ]
    pack_samples(samples, tmp_path, prefix="mixed")
    made = batches(open_shards(str(tmp_path / "mixed-*.tar")), 2)
    assert sum(len(batch.keys) for batch in made) == 6
    assert all(batch.broken == () for batch in made)
