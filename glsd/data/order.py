"""The order of an epoch, a function of (seed, epoch, shard sizes, shard weights) alone, and the share of each rank."""

import itertools
from collections import OrderedDict
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from glsd.errors import UserError
from glsd.rng import Stream, permutation

CACHED_WINDOWS = 2  # neighboring positions may straddle two windows


class EpochOrder:
    """The order of one epoch: ``order[position]`` is a dataset index.

    Shards are shuffled, then samples are shuffled inside windows of ``window_shards`` consecutive shuffled shards. So
    reads stay within a few files, and memory holds two windows, whatever the size of the data. Every index comes exactly
    once by default. A shard of weight 2.25 comes twice, and a quarter of its samples, new ones each epoch, a third time.
    """

    def __init__(
        self,
        shard_sizes: Int64[np.ndarray, " s"] | Sequence[int],
        *,
        seed: int,
        epoch: int,
        window_shards: int,
        shard_weights: Float64[np.ndarray, " s"] | None = None,
    ):
        """Raises UserError for an empty data set or a ``window_shards`` below 1."""
        sizes = np.asarray(shard_sizes, dtype=np.int64)
        if window_shards < 1:
            raise UserError(f"window_shards is {window_shards}: expected at least 1")
        self._seed, self._epoch = seed, epoch
        shards, counts = _passes(sizes, shard_weights, seed=seed, epoch=epoch)
        if counts.sum() < 1:
            raise UserError("the shards hold no samples: nothing to order")
        shuffled = permutation(len(shards), seed=seed, stream=Stream.SHARDS, epoch=epoch)
        self._shards, self._counts = shards[shuffled], counts[shuffled]
        self._sizes, self._starts = sizes, np.cumsum(sizes) - sizes
        self._window_shards = window_shards
        num = len(shards)
        last = np.minimum(np.arange(window_shards, num + window_shards, window_shards), num) - 1
        self._window_ends = np.cumsum(self._counts)[last]
        self._windows: OrderedDict[int, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._window_ends[-1])

    def __getitem__(self, position: int) -> int:
        window = self.window_of(position)
        return int(self._indices(window)[position - self.bounds(window).start])

    @property
    def num_windows(self) -> int:
        """Windows of the epoch."""
        return len(self._window_ends)

    def window_of(self, position: int) -> int:
        """Return the window of a position."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} of {len(self)}")
        return int(np.searchsorted(self._window_ends, position, side="right"))

    def bounds(self, window: int) -> range:
        """Return the positions of a window."""
        return range(int(self._window_ends[window - 1]) if window else 0, int(self._window_ends[window]))

    def shards_of(self, window: int) -> list[int]:
        """Return the shards that a window reads from."""
        return list(dict.fromkeys(self._shards[self._passes_of(window)].tolist()))

    def _passes_of(self, window: int) -> slice:
        return slice(window * self._window_shards, (window + 1) * self._window_shards)

    def _indices(self, window: int) -> Int64[np.ndarray, " w"]:
        if window not in self._windows:
            passes = self._passes_of(window)
            shards = zip(self._shards[passes].tolist(), self._counts[passes].tolist(), strict=True)
            indices = np.concatenate([self._samples(*shard) for shard in shards])
            stream = {"seed": self._seed, "stream": Stream.SAMPLES, "epoch": self._epoch, "part": window}
            self._windows[window] = indices[permutation(len(indices), **stream)]
            if len(self._windows) > CACHED_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(window)
        return self._windows[window]

    def _samples(self, shard: int, count: int) -> Int64[np.ndarray, " t"]:
        """Return the indices that one pass over a shard reads: all of them, or ``count`` random ones."""
        start, size = int(self._starts[shard]), int(self._sizes[shard])
        if count == size:
            return np.arange(start, start + size)
        drawn = permutation(size, seed=self._seed, stream=Stream.SHARD_PART, epoch=self._epoch, part=shard)
        return start + np.sort(drawn[:count])


def epoch_samples(
    shard_sizes: Int64[np.ndarray, " s"], shard_weights: Float64[np.ndarray, " s"] | None = None
) -> int:
    """Return the number of positions of an epoch."""
    return int(_passes(shard_sizes, shard_weights, seed=0, epoch=0)[1].sum())


def _passes(
    sizes: Int64[np.ndarray, " s"], weights: Float64[np.ndarray, " s"] | None, *, seed: int, epoch: int
) -> tuple[Int64[np.ndarray, " t"], Int64[np.ndarray, " t"]]:
    """Return the passes over shards of an epoch: the shard, and how many samples are read. All epochs have the same sum."""
    shards = np.arange(len(sizes))
    if weights is None:
        return shards, sizes
    whole = np.floor(weights).astype(np.int64)
    # Rounded over all shards together, in a new order each epoch: a share of less than one sample comes in some epochs
    # and not in others.
    order = permutation(len(sizes), seed=seed, stream=Stream.SHARD_SHARE, epoch=epoch)
    wanted = np.cumsum(((weights - whole) * sizes)[order])
    share = np.empty_like(sizes)
    share[order] = np.diff(np.floor(np.append(0.0, wanted) + 1e-6)).astype(np.int64)
    some = share > 0
    return np.append(np.repeat(shards, whole), shards[some]), np.append(np.repeat(sizes, whole), share[some])


def epoch_length(num_samples: int, batch_size: int) -> int:
    """Return how many positions of an epoch are used: whole batches, without the ragged tail.

    Raises UserError if not even one batch is full.
    """
    if num_samples < batch_size:
        raise UserError(
            f"batch_size {batch_size} is larger than the {num_samples} images: use a smaller batch_size"
        )
    return num_samples // batch_size * batch_size


def check_rank(rank: int, world_size: int) -> None:
    """Raise UserError unless 0 <= rank < world_size."""
    if not 0 <= rank < world_size:
        raise UserError(f"rank {rank} of {world_size}: expected 0 <= rank < world_size")


def micro_batches(*, batch_size: int, rank: int, world_size: int, micro_batch: int) -> tuple[int, ...]:
    """Return how many images a rank has in each forward pass of one step. Every rank has the same number of passes.

    Of R ranks, each takes every R-th image of a batch, so their shares differ by at most one image. A share is cut into the
    fewest passes of at most ``micro_batch`` images (0: one pass). Raises UserError if a rank would have a pass without an
    image.
    """
    check_rank(rank, world_size)
    if batch_size < world_size:
        raise UserError(
            f"batch_size {batch_size} is less than one image for each of the {world_size} ranks: start fewer ranks"
        )
    if micro_batch < 0:
        raise UserError(f"micro_batch is {micro_batch}: expected 0 or more")
    smallest, largest = batch_size // world_size, -(-batch_size // world_size)
    passes = -(-largest // micro_batch) if micro_batch else 1
    if passes > smallest:
        raise UserError(
            f"batch_size {batch_size} gives some of the {world_size} ranks {smallest} images and others {largest}: "
            f"micro_batch {micro_batch} cannot cut both into as many passes; use {micro_batch + 1}"
        )
    share = len(range(rank, batch_size, world_size))
    return tuple(len(range(part, share, passes)) for part in range(passes))


def rank_positions(
    *, consumed: int, epoch_length: int, batch_size: int, rank: int, world_size: int, micro_batch: int
) -> Iterator[list[tuple[int, int]]]:
    """Return one rank's endless micro-batches, lists of (epoch, position), from sample ``consumed`` on.

    Samples are counted over all epochs and ranks: sample c is position c % epoch_length of epoch c // epoch_length. Rank r
    of R takes the samples of a batch with c % R == r, cut as micro_batches() says. So any number of ranks sees the same
    batches, and resuming costs nothing. Raises UserError for sizes that do not fit together.
    """
    sizes = micro_batches(batch_size=batch_size, rank=rank, world_size=world_size, micro_batch=micro_batch)
    if epoch_length < 1 or epoch_length % batch_size:
        raise UserError(
            f"an epoch of {epoch_length} samples is not a whole number of batches of {batch_size}"
        )
    if consumed < 0 or consumed % batch_size:
        raise UserError(
            f"{consumed} samples were consumed, not a whole number of batches of {batch_size}: keep the batch_size "
            "that the run started with"
        )
    return _positions(consumed, epoch_length, batch_size, range(rank, batch_size, world_size), sizes)


def _positions(
    first: int, epoch_length: int, batch_size: int, share: range, sizes: Sequence[int]
) -> Iterator[list[tuple[int, int]]]:
    while True:
        rest = iter(share)
        for size in sizes:
            yield [divmod(first + place, epoch_length) for place in itertools.islice(rest, size)]
        first += batch_size
