"""Class groups and P x M batches: literal properties."""

import math
import time

import numpy as np
import pytest

from glsd.data.balanced import (
    ClassGroups,
    balanced_batch,
    class_groups,
    rank_slots,
    split_classes,
)
from glsd.errors import UserError


def groups_of(labels: np.ndarray) -> ClassGroups:
    return class_groups(labels, key_of=str, drop_lone=False)


def groups_of_sizes(*sizes: int) -> ClassGroups:
    """Classes 10, 20, ... of these sizes, shuffled over the data set."""
    labels = np.repeat(10 * np.arange(1, len(sizes) + 1), sizes)
    return groups_of(np.random.default_rng(0).permutation(labels))


# ------------------------------------------------------------------------------------------- classes


def test_groups_are_the_images_of_each_label():
    labels = np.array([7, 3, 3, 12, 7, 3, 12])
    groups = groups_of(labels)
    assert groups.labels.tolist() == [3, 7, 12]
    assert [groups.images(rank).tolist() for rank in range(3)] == [[1, 2, 5], [0, 4], [3, 6]]


def test_lone_classes_are_refused_or_left_out():
    labels = np.array([4, 4, 9, 6, 5, 5])
    with pytest.raises(
        UserError,
        match=r"^labels: 2 of 4 classes have one image .*\(first: class 6, image img3\): .* drop_lone true$",
    ) as caught:
        class_groups(labels, key_of=lambda index: f"img{index}", drop_lone=False)
    assert "\n" not in str(caught.value)
    groups = class_groups(labels, key_of=str, drop_lone=True)
    assert groups.labels.tolist() == [4, 5]
    assert [groups.images(rank).tolist() for rank in range(2)] == [[0, 1], [4, 5]]


@pytest.mark.parametrize(("share", "held_out"), [(0.2, 2), (0.5, 5), (0.9, 9), (0.14, 1)])
def test_split_holds_out_the_last_classes(share, held_out):
    labels = np.random.default_rng(1).permutation(np.repeat(np.arange(10) * 3, 4))
    groups = groups_of(labels)
    train, val = split_classes(groups, share)
    assert train.labels.tolist() == (np.arange(10 - held_out) * 3).tolist()
    assert val.tolist() == np.flatnonzero(labels >= 3 * (10 - held_out)).tolist()
    assert not set(labels[val]) & set(labels[train.members])
    assert sorted([*val.tolist(), *train.members.tolist()]) == list(range(40))
    for rank in range(len(train)):
        assert train.images(rank).tolist() == groups.images(rank).tolist()


def test_a_share_of_nothing_and_shares_that_cannot_be():
    groups = groups_of_sizes(2, 2, 2)
    train, val = split_classes(groups, 0.0)
    assert (train.labels.tolist(), len(val)) == (groups.labels.tolist(), 0)
    for share in (0.1, 0.9, 1.0, -0.2, math.nan):
        with pytest.raises(UserError, match=rf"^val_share is {share}: it holds out . of 3 classes"):
            split_classes(groups, share)


# ------------------------------------------------------------------------------------------- batches


def test_every_batch_has_p_distinct_classes_of_m_distinct_images():
    groups = groups_of_sizes(5, 9, 3, 30, 4, 3)
    for step in range(200):
        indices, ranks = balanced_batch(groups, seed=1, step=step, classes=4, images_per_class=3)
        assert len(set(indices.tolist())) == 12
        by_class = ranks.reshape(4, 3)
        assert (by_class == by_class[:, :1]).all()
        assert len(set(by_class[:, 0].tolist())) == 4
        for index, rank in zip(indices.tolist(), ranks.tolist(), strict=True):
            assert index in groups.images(rank)


def test_small_classes_repeat_their_images_evenly():
    groups = groups_of_sizes(2, 3, 50)
    for step in range(20):
        indices, ranks = balanced_batch(groups, seed=1, step=step, classes=3, images_per_class=8)
        for rank, counts in ((0, [4, 4]), (1, [2, 3, 3]), (2, [1] * 8)):
            drawn = indices[ranks == rank]
            assert sorted(np.unique(drawn, return_counts=True)[1].tolist()) == counts


def test_classes_of_a_batch_are_drawn_from_independently():
    groups = groups_of(np.arange(80) // 8)
    agree = 0
    for step in range(300):
        indices, _ = balanced_batch(groups, seed=2, step=step, classes=2, images_per_class=1)
        agree += int(indices[0] % 8 == indices[1] % 8)
    assert abs(agree - 300 / 8) < 5 * math.sqrt(300 * 1 / 8 * 7 / 8)


def test_a_batch_is_a_function_of_seed_and_step():
    groups = groups_of_sizes(*[6] * 20)

    def draw(seed, step):
        made = balanced_batch(groups, seed=seed, step=step, classes=5, images_per_class=2)
        return tuple(np.concatenate(made).tolist())

    drawn = {(seed, step): draw(seed, step) for seed in (0, 1, -1, 2**63 + 5) for step in range(30)}
    assert len(set(drawn.values())) == len(drawn)
    for key in ((1, 17), (0, 0), (-1, 29)):
        assert draw(*key) == drawn[key]


def test_classes_and_images_are_drawn_uniformly():
    """Counts within five standard deviations; images of a class and first places in a batch too."""
    sizes = [4, 8, 4, 16, 4, 4, 6, 4, 4, 10]
    groups = groups_of_sizes(*sizes)
    steps, p, m = 1500, 3, 2
    made = [balanced_batch(groups, seed=3, step=s, classes=p, images_per_class=m) for s in range(steps)]
    drawn = np.stack([ranks for _, ranks in made])[:, ::m]

    def near(counts, share, number):
        return (np.abs(counts - number * share) < 5 * math.sqrt(number * share * (1 - share))).all()

    assert near(np.bincount(drawn.ravel(), minlength=10), p / 10, steps)
    assert near(np.bincount(drawn[:, 0], minlength=10), 1 / 10, steps)
    images = np.bincount(np.concatenate([indices for indices, _ in made]), minlength=sum(sizes))
    for rank, size in enumerate(sizes):
        assert near(images[groups.images(rank)], p / 10 * m / size, steps)
    pairs = {tuple(sorted(row)) for row in drawn[:, :2].tolist()}
    assert len(pairs) == 45  # every pair of classes meets


def test_many_classes_are_cheap():
    groups = groups_of(np.arange(60_000) % 11_318)
    balanced_batch(groups, seed=0, step=0, classes=56, images_per_class=2)
    start = time.process_time()
    for step in range(10):
        balanced_batch(groups, seed=0, step=step, classes=56, images_per_class=2)
    assert (time.process_time() - start) / 10 < 0.05


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 6, 12])
def test_slots_of_ranks_follow_each_other(world_size):
    parts = [rank_slots(12, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [slot for part in parts for slot in part] == list(range(12))
