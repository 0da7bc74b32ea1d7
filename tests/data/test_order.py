import itertools
import math

import numpy as np
import pytest

from glsd.data.order import (
    EpochOrder,
    epoch_length,
    epoch_samples,
    micro_batches,
    rank_positions,
)
from glsd.errors import UserError

SIZES = [7, 1, 5, 9, 4, 12]


def listed(**changes) -> list[int]:
    order = EpochOrder(SIZES, **{"seed": 3, "epoch": 2, "window_shards": 2, **changes})
    return [order[position] for position in range(len(order))]


def literal_order(sizes, seed, epoch, window_shards):
    """The definition written out: shuffle the shards, cut into windows, shuffle each window's samples."""

    def shuffled(items, stream, part):
        raw = np.random.Philox(key=[seed, stream], counter=[0, 0, part, epoch]).random_raw(len(items))
        return [item for _, item in sorted(zip(raw.tolist(), items, strict=True), key=lambda pair: pair[0])]

    samples = np.split(np.arange(sum(sizes)), np.cumsum(sizes)[:-1])
    shards = shuffled(range(len(sizes)), 0x736861726473, 0)
    result = []
    for part, start in enumerate(range(0, len(sizes), window_shards)):
        window = [int(i) for shard in shards[start : start + window_shards] for i in samples[shard]]
        result += shuffled(window, 0x73616D706C6573, part)
    return result


@pytest.mark.parametrize("window_shards", [1, 2, 4, 5, 6, 100])
def test_order_is_the_literal_definition_and_a_permutation(window_shards):
    order = listed(window_shards=window_shards)
    assert order == literal_order(SIZES, 3, 2, window_shards)
    assert sorted(order) == list(range(sum(SIZES)))


def test_order_depends_on_seed_epoch_and_sizes_alone():
    assert listed() == listed()
    orders = [
        listed(),
        listed(seed=4),
        listed(epoch=3),
        listed(seed=-1),
        listed(seed=2, epoch=3),
        listed(window_shards=3),
    ]
    assert len({tuple(order) for order in orders}) == len(orders)


def test_order_is_pinned():
    # Frozen values: a change here silently breaks the resume of every run that is under way.
    assert listed()[:8] == [33, 36, 26, 35, 29, 28, 34, 32]


def test_random_access_in_any_order():
    whole = listed()
    order = EpochOrder(SIZES, seed=3, epoch=2, window_shards=2)
    for position in np.random.default_rng(0).integers(0, len(order), 200).tolist():
        assert order[position] == whole[position]
    assert len(order._windows) <= 2
    for wrong in (-1, len(order)):
        with pytest.raises(IndexError):
            order[wrong]


def test_empty_shards_are_skipped():
    order = EpochOrder([0, 3, 0, 0, 2, 0], seed=0, epoch=0, window_shards=1)
    assert sorted(order[p] for p in range(5)) == [0, 1, 2, 3, 4]


def test_shuffle_is_uniform():
    # Each of 5 samples should come first in a fifth of 4,000 epochs; 5 standard deviations are 126.
    firsts = np.bincount(
        [EpochOrder([2, 3], seed=1, epoch=e, window_shards=2)[0] for e in range(4000)], minlength=5
    )
    assert abs(firsts - 800).max() < 127


def test_hundred_million_samples_cost_two_windows():
    order = EpochOrder(np.full(10_000, 10_000), seed=0, epoch=1, window_shards=4)
    assert len(order) == 100_000_000
    positions = [0, 99_999_999, 50_000_000, 40_000, 39_999]
    assert len({order[p] for p in positions}) == 5
    assert sum(window.nbytes for window in order._windows.values()) <= 2 * 40_000 * 8


@pytest.mark.parametrize(("sizes", "window"), [([], 1), ([0], 1), ([3], 0)])
def test_bad_orders(sizes, window):
    with pytest.raises(UserError):
        EpochOrder(sizes, seed=0, epoch=0, window_shards=window)


def test_epoch_length_drops_the_ragged_tail():
    assert [epoch_length(n, 4) for n in (4, 7, 8)] == [4, 4, 8]
    with pytest.raises(UserError, match="batch_size 9 is larger than the 8 images"):
        epoch_length(8, 9)


def positions(world_size, micro_batch, *, steps, consumed=0, batch_size=12, length=36):
    """What all ranks read in each step, as a list of sets."""
    streams = [
        rank_positions(
            consumed=consumed,
            epoch_length=length,
            batch_size=batch_size,
            rank=rank,
            world_size=world_size,
            micro_batch=micro_batch,
        )
        for rank in range(world_size)
    ]
    passes = math.ceil(math.ceil(batch_size / world_size) / (micro_batch or batch_size))
    result = []
    for _ in range(steps):
        parts = [next(stream) for stream in streams for _ in range(passes)]
        assert all(0 < len(part) <= (micro_batch or batch_size) for part in parts)
        step = [place for part in parts for place in part]
        assert len(step) == len(set(step)) == batch_size
        result.append(set(step))
    return result


@pytest.mark.parametrize(
    ("world_size", "micro_batch"),
    [
        (1, 12),
        (1, 4),
        (1, 5),
        (2, 6),
        (2, 3),
        (3, 2),
        (4, 1),
        (5, 0),
        (5, 2),
        (7, 0),
        (8, 0),
        (11, 2),
        (12, 1),
    ],
)
def test_any_number_of_ranks_reads_the_same_batches(world_size, micro_batch):
    steps = positions(world_size, micro_batch, steps=7)
    assert steps == positions(1, 12, steps=7)
    for epoch in range(2):
        read = set().union(*steps[3 * epoch : 3 * epoch + 3])
        assert read == {(epoch, position) for position in range(36)}


@pytest.mark.parametrize("world_size", range(1, 13))
@pytest.mark.parametrize("most", [0, 1, 2, 3, 5, 12])
def test_every_rank_makes_as_many_passes_and_no_image_is_left_out(world_size, most):
    def cut(most):
        return [
            micro_batches(batch_size=12, rank=rank, world_size=world_size, micro_batch=most)
            for rank in range(world_size)
        ]

    if most == 1 and 12 % world_size:
        with pytest.raises(UserError, match="use 2"):
            cut(most)
        return
    sizes = cut(most)
    assert len({len(passes) for passes in sizes}) == 1
    assert [sum(passes) for passes in sizes] == [
        len(range(rank, 12, world_size)) for rank in range(world_size)
    ]
    assert all(1 <= size <= (most or 12) for passes in sizes for size in passes)
    largest = math.ceil(12 / world_size)
    assert len(sizes[0]) == (math.ceil(largest / most) if most else 1)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_resume_by_consumed_on_another_number_of_ranks(world_size):
    straight = positions(2, 6, steps=8)
    assert positions(world_size, 1, steps=5, consumed=36) == straight[3:]
    far = positions(world_size, 1, steps=1, consumed=36 * 10**12)  # at once, however far
    assert far == [{(10**12, position) for position in range(12)}]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"world_size": 13}, "batch_size 12 is less than one image for each of the 13 ranks: start fewer"),
        ({"world_size": 5, "micro_batch": 1}, "micro_batch 1 cannot cut both into as many passes; use 2"),
        ({"micro_batch": -1}, "micro_batch is -1: expected 0 or more"),
        ({"rank": 1}, "rank 1 of 1"),
        ({"epoch_length": 30}, "whole number of batches"),
        ({"epoch_length": 0}, "whole number of batches"),
        ({"consumed": 6}, "keep the batch_size"),
        ({"consumed": -12}, "keep the batch_size"),
    ],
)
def test_sizes_that_do_not_fit(change, message):
    sizes = {
        "consumed": 0,
        "epoch_length": 36,
        "batch_size": 12,
        "rank": 0,
        "world_size": 1,
        "micro_batch": 12,
    }
    with pytest.raises(UserError, match=message):
        rank_positions(**{**sizes, **change})


WEIGHTS = np.array(
    [1.0, 3.0, 0.5, 0.0, 2.25, 0.1]
)  # of SIZES: full passes 7 + 3 + 8 samples, parts of 2.5 + 1 + 1.2


def weighted(epoch: int, *, seed: int = 3, sizes=SIZES, weights=WEIGHTS, window_shards: int = 2) -> list[int]:
    return listed(epoch=epoch, seed=seed, window_shards=window_shards, shard_weights=weights)


def counts_by_shard(order: list[int]) -> np.ndarray:
    owners = np.repeat(np.arange(len(SIZES)), SIZES)
    return np.bincount(owners[order], minlength=len(SIZES))


def test_weights_of_one_change_nothing():
    assert weighted(2, weights=np.ones(len(SIZES))) == listed()


def test_weighted_epochs_all_have_the_same_length():
    lengths = {len(weighted(epoch, seed=seed)) for epoch in range(40) for seed in range(3)}
    assert lengths == {7 + 3 + 8 + 4}
    assert epoch_samples(np.array(SIZES), WEIGHTS) == 22
    assert epoch_samples(np.array(SIZES)) == sum(SIZES)


def test_a_weight_says_how_often_each_sample_comes():
    for epoch in range(20):
        times = np.bincount(weighted(epoch), minlength=sum(SIZES))
        parts = np.split(times, np.cumsum(SIZES)[:-1])
        assert parts[0].tolist() == [1] * 7
        assert parts[1].tolist() == [3]
        assert set(parts[2]) <= {0, 1}  # a partial pass has no sample twice
        assert parts[3].tolist() == [0] * 9
        assert set(parts[4]) <= {2, 3}
        assert set(parts[5]) <= {0, 1}
        assert abs(counts_by_shard(weighted(epoch)) - WEIGHTS * SIZES).max() < 1


@pytest.mark.slow
def test_partial_passes_reach_every_sample_equally_often():
    epochs = 1000
    times = np.bincount(np.concatenate([weighted(epoch) for epoch in range(epochs)]), minlength=sum(SIZES))
    expected = np.repeat(WEIGHTS, SIZES) * epochs
    # 0.3 of a sample in 22 is lost to rounding, in one of the three shards with parts.
    fractional = np.repeat(WEIGHTS % 1 > 0, SIZES)
    assert np.array_equal(times[~fractional], expected[~fractional])
    spread = 5 * np.sqrt(epochs * 0.25)
    assert (abs(times - expected)[fractional] < spread + 0.3 / 3 * epochs).all()
    for shard in (2, 4, 5):  # all samples of a shard are equally likely
        mine = np.split(times, np.cumsum(SIZES)[:-1])[shard]
        assert np.ptp(mine) < 2 * spread


def test_windows_name_the_shards_they_read():
    order = EpochOrder(SIZES, seed=3, epoch=2, window_shards=2, shard_weights=WEIGHTS)
    owners = np.repeat(np.arange(len(SIZES)), SIZES)
    read: list[set[int]] = [set() for _ in range(order.num_windows)]
    for position in range(len(order)):
        read[order.window_of(position)].add(int(owners[order[position]]))
    assert [set(order.shards_of(window)) for window in range(order.num_windows)] == read


@pytest.mark.parametrize("world_size", [1, 2, 64])
@pytest.mark.parametrize("sizes", [[640], [1, 600, 39], [10] * 64])
def test_an_epoch_comes_once_whatever_the_shards_and_ranks(sizes, world_size):
    length = epoch_length(sum(sizes), 64)
    order = EpochOrder(sizes, seed=0, epoch=1, window_shards=4)
    seen = []
    for rank in range(world_size):
        stream = rank_positions(
            consumed=length,
            epoch_length=length,
            batch_size=64,
            rank=rank,
            world_size=world_size,
            micro_batch=64 // world_size,
        )
        for places in itertools.islice(stream, length // 64):
            assert {epoch for epoch, _ in places} == {1}
            seen += [order[position] for _, position in places]
    assert sorted(seen) == list(range(640))
