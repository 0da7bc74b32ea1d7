"""Counter-based random draws: each is a function of the numbers that name it, not of earlier draws.

numpy guarantees the raw output of the Philox bit generator for all releases; it does not guarantee what its
distributions make of that output.
"""

import enum
import hashlib

import numpy as np
from jaxtyping import Float64, Int64, UInt64


@enum.unique
class Stream(enum.IntEnum):
    """What is drawn: the high word of every Philox key. The low word is the run's seed.

    A stream counts by (epoch, part). The comment says what these are where they are used.
    The linear probe also uses 1, 2, ...: the order of the images in that epoch of its training.
    """

    PROBE_WEIGHTS = 0  # initial weights of the linear probe
    PROBE_SPLIT = 2**63  # images that the linear probe holds out

    PACK = 0x7061636B  # order of the images in packed shards; part: run of the source
    SHARDS = 0x736861726473  # order of the shards; epoch
    SHARD_SHARE = 0x7368617265  # shards with a fractional weight that give one sample more; epoch
    SHARD_PART = 0x70617274  # samples of a shard with a fractional weight; epoch, shard
    SAMPLES = 0x73616D706C6573  # order of the samples; epoch, window of shards
    CROPS = 0x63726F7073  # boxes and colors of pretraining crops; epoch, position
    STAND_INS = 0x7374616E64696E  # images in the place of an unreadable one; epoch, position

    BATCH_CLASSES = 0x626174636C617373  # classes of a metric-learning batch; step
    BATCH_IMAGES = 0x626174696D616765  # images of a class in it; step, class
    BATCH_CROPS = 0x62617463726F70  # boxes of its crops; step, slot
    BATCH_STAND_INS = 0x6261747370617265  # images in the place of an unreadable one; step, slot


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of the random draws that a rank makes inside a step (stochastic depth)."""
    digest = hashlib.blake2b(f"{seed} {step} {rank}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch takes signed 64-bit seeds


def philox(*, seed: int, stream: int, epoch: int = 0, part: int = 0) -> np.random.Philox:
    """Return the bit generator that (seed, stream, epoch, part) select. The seed is any integer, the others >= 0."""
    # Explicit uint64: numpy turns a list of mixed large and small integers into float64 and loses digits.
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, 0, part, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter)


def random_words(
    count: int, *, seed: int, stream: int, epoch: int = 0, part: int = 0
) -> UInt64[np.ndarray, " n"]:
    """Return ``count`` random 64-bit words."""
    return philox(seed=seed, stream=stream, epoch=epoch, part=part).random_raw(count)


def uniforms(
    count: int, *, seed: int, stream: int, epoch: int = 0, part: int = 0
) -> Float64[np.ndarray, " n"]:
    """Return ``count`` numbers uniform in [0, 1)."""
    words = random_words(count, seed=seed, stream=stream, epoch=epoch, part=part)
    return (words >> np.uint64(11)) * 2.0**-53


def permutation(
    count: int, *, seed: int, stream: int, epoch: int = 0, part: int = 0
) -> Int64[np.ndarray, " n"]:
    """Return a random permutation of 0 .. count-1.

    It sorts 64-bit words: uniform but for ties, whose probability is count^2 / 2^65. The stable sort settles ties the
    same way everywhere.
    """
    return np.argsort(random_words(count, seed=seed, stream=stream, epoch=epoch, part=part), kind="stable")
