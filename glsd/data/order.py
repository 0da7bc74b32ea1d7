"""The order of an epoch, a function of (seed, epoch, shard sizes) alone, and what of it each rank reads."""

from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Int64

from glsd.contracts import UserError

# The high word of each Philox key: what else draws from the same seed (crops.py) stays apart from these
# numbers.
SHARD_STREAM, SAMPLE_STREAM = 0x736861726473, 0x73616D706C6573
CACHED_WINDOWS = 2  # neighbouring positions may straddle two windows


class EpochOrder:
    """``order[position]`` is the dataset index of a position of one epoch.

    Shards are shuffled, then samples are shuffled inside windows of ``window_shards`` consecutive shuffled
    shards: reads stay within a few files, and the memory is that of two windows, whatever the size of the
    data. Every index comes exactly once.
    """

    def __init__(
        self,
        shard_sizes: Int64[np.ndarray, " s"] | Sequence[int],
        *,
        seed: int,
        epoch: int,
        window_shards: int,
    ):
        """Raises UserError for an empty data set or a window of no shards."""
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if sizes.sum() < 1:
            raise UserError("the shards hold no samples: nothing to order")
        if window_shards < 1:
            raise UserError(f"window_shards is {window_shards}: expected at least 1")
        self._seed, self._epoch = seed, epoch
        shards = permutation(len(sizes), seed=seed, stream=SHARD_STREAM, epoch=epoch)
        self._sizes = sizes[shards]
        self._starts = (np.cumsum(sizes) - sizes)[shards]
        self._window_shards = window_shards
        last = np.minimum(np.arange(window_shards, len(sizes) + window_shards, window_shards), len(sizes)) - 1
        self._window_ends = np.cumsum(self._sizes)[last]
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._window_ends[-1])

    def __getitem__(self, position: int) -> int:
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        window = int(np.searchsorted(self._window_ends, position, side="right"))
        start = int(self._window_ends[window - 1]) if window else 0
        return int(self._indices(window)[position - start])

    def _indices(self, window: int) -> Int64[np.ndarray, " w"]:
        if window not in self._windows:
            part = slice(window * self._window_shards, (window + 1) * self._window_shards)
            spans = [
                np.arange(start, start + size)
                for start, size in zip(self._starts[part], self._sizes[part], strict=True)
            ]
            indices = np.concatenate(spans)
            shuffled = permutation(
                len(indices), seed=self._seed, stream=SAMPLE_STREAM, epoch=self._epoch, part=window
            )
            self._windows[window] = indices[shuffled]
            if len(self._windows) > CACHED_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]


def permutation(
    count: int, *, seed: int, stream: int, epoch: int = 0, part: int = 0
) -> Int64[np.ndarray, " n"]:
    """Return a random permutation of 0 .. count-1, the same with every release of numpy.

    The raw output of a bit generator is guaranteed to stay; what Generator.permutation makes of it is not.
    Sorting 64-bit numbers is uniform but for ties, whose probability is count^2 / 2^65; a stable sort settles
    them the same way everywhere.
    """
    return np.argsort(random_words(count, seed=seed, stream=stream, epoch=epoch, part=part), kind="stable")


def random_words(count: int, *, seed: int, stream: int, epoch: int = 0, part: int = 0) -> np.ndarray:
    """Return ``count`` uint64 of the Philox stream that (seed, stream, epoch, part) select."""
    # Explicit uint64: numpy would make floats of a list that mixes small numbers with ones above 2^63.
    key = np.array([seed % 2**64, stream], dtype=np.uint64)
    counter = np.array([0, 0, part, epoch], dtype=np.uint64)
    return np.random.Philox(key=key, counter=counter).random_raw(count)


def epoch_length(num_samples: int, batch_size: int) -> int:
    """Return how many positions of an epoch are used: whole batches; the ragged tail is dropped.

    Raises UserError if not even one batch is full.
    """
    if num_samples < batch_size:
        raise UserError(
            f"batch_size {batch_size} is larger than the {num_samples} images: use a smaller batch_size"
        )
    return num_samples // batch_size * batch_size


def rank_positions(
    *, consumed: int, epoch_length: int, batch_size: int, rank: int, world_size: int, micro_batch: int
) -> Iterator[list[tuple[int, int]]]:
    """Return one rank's endless micro-batches, lists of (epoch, position), from sample ``consumed`` on.

    Samples are counted over all epochs and ranks: number c is position c % epoch_length of epoch c //
    epoch_length, and rank r of R takes every c with c % R == r. So any number of ranks sees the same batches,
    and going on costs nothing. Raises UserError if the sizes do not divide each other.
    """
    if world_size < 1 or not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world_size")
    if batch_size < 1 or batch_size % world_size:
        raise UserError(f"batch_size {batch_size} does not divide over {world_size} processes")
    if micro_batch < 1 or batch_size // world_size % micro_batch:
        raise UserError(
            f"a micro-batch of {micro_batch} does not divide the {batch_size // world_size} images of a "
            f"process (batch_size {batch_size}, {world_size} processes)"
        )
    if epoch_length < 1 or epoch_length % batch_size:
        raise UserError(
            f"an epoch of {epoch_length} samples is not a whole number of batches of {batch_size}"
        )
    if consumed < 0 or consumed % batch_size:
        raise UserError(
            f"{consumed} samples were consumed, no whole number of batches of {batch_size}: keep the "
            "batch_size that the run was started with"
        )
    return _micro_batches(consumed + rank, epoch_length, world_size, micro_batch)


def _micro_batches(first: int, epoch_length: int, stride: int, size: int) -> Iterator[list[tuple[int, int]]]:
    while True:
        yield [divmod(first + i * stride, epoch_length) for i in range(size)]
        first += size * stride
