"""Counter-based draws: the numbers of every release, and that no two draws share a key."""

import itertools

import numpy as np

from glsd.metrics.linear import MAX_SEED
from glsd.rng import Stream, permutation, random_words, uniforms


def test_the_numbers_never_change():
    # Frozen values: a change here silently breaks the resume of every run that is under way.
    assert permutation(5, seed=0, stream=1).tolist() == [3, 2, 4, 1, 0]
    assert permutation(5, seed=-1, stream=1).tolist() == [3, 2, 4, 0, 1]
    assert uniforms(3, seed=0, stream=Stream.CROPS).tolist() == [
        0.18728837046588753,
        0.3778779212717954,
        0.21586510131340797,
    ]


def test_a_permutation_is_uniform():
    inside = np.array([permutation(3, seed=1, stream=9, epoch=e) for e in range(3000)])
    counts = [(inside == p).all(axis=1).sum() for p in itertools.permutations(range(3))]
    assert np.abs(np.array(counts) - 500).max() < 103  # 5 standard deviations


def test_every_number_of_a_key_counts_to_its_last_bit():
    keys = [
        {"seed": seed, "stream": stream, "epoch": epoch, "part": part}
        for seed in (0, 3, -3, 2**63 + 4, 2**63 + 5, MAX_SEED)
        for stream in (*Stream, 1, 2)
        for epoch in (0, 3)
        for part in (0, 3, 2**53, 2**53 + 1)
    ]
    first = [int(random_words(1, **key)[0]) for key in keys]
    assert len(set(first)) == len(keys)


def test_the_numbers_of_the_linear_probes_epochs_are_no_streams():
    assert sorted(Stream)[0] == 0
    assert sorted(Stream)[1] > 1_000_000_000
