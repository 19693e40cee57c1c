"""Batches of training examples: gathered inside the step from a log that lies on the device, or by Grain on the host.

For a seed both give the same batches in the same order, and both start at any batch of any epoch. A loader gives the
places of each batch that it is asked for, all by default; places from the batch size on hold rows of weight 0.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import flax.struct
import grain
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tim4rec_jax.data.examples import Examples, Windows, gather_windows
from tim4rec_jax.data.interactions import InteractionLog


@flax.struct.dataclass
class Batch:
    """Examples of one step.

    Attributes:
      items: int32 [b, l], padded on the right with 0.
      lengths: int32 [b], at least 1.
      timestamps: float32 or int32 [b, l] seconds, padded with 0.
      targets: int32 [b].
      weights: float32 [b]; 0 marks a row that only fills the batch.
    """

    items: Array
    lengths: Array
    timestamps: Array
    targets: Array
    weights: Array


# What the seconds of a log are on the device, by `data.timestamp_precision`.
DEVICE_TIME = {"float32": np.float32, "int64": np.int32}


def timestamps_for_device(timestamps: np.ndarray, precision: str) -> np.ndarray:
    """Casts int64 seconds to what the model reads.

    Args:
      timestamps: int64 seconds, any shape.
      precision: "float32" (as the original program has them) or "int64", held as int32 on the device.

    Raises:
      ValueError: where a second does not fit into int32.
    """
    require_timestamps_fit(timestamps, precision)
    return timestamps.astype(DEVICE_TIME[precision])


def require_timestamps_fit(timestamps: np.ndarray, precision: str) -> None:
    """Refuses what `timestamps_for_device` refuses.

    Raises:
      ValueError: where a second does not fit into int32.
    """
    limits = np.iinfo(np.int32)
    if precision == "float32" or not timestamps.size:
        return
    if timestamps.max() > limits.max or timestamps.min() < limits.min:
        worst = timestamps.max() if timestamps.max() > limits.max else timestamps.min()
        raise ValueError(
            f"timestamp {worst} does not fit into the int32 seconds of timestamp_precision='int64' "
            f"(at most {limits.max}, 2038-01-19); if these are milliseconds give seconds, else choose 'float32'"
        )


def epoch_order(seed: int, epoch: int, num_examples: int) -> np.ndarray:
    """Returns the order of the examples in an epoch, int [n]; a function of its arguments alone."""
    # Shuffling int32 draws the same order as `permutation`, whose int64 take twice the memory.
    order = np.arange(num_examples, dtype=np.int32 if num_examples < 2**31 else np.int64)
    np.random.Generator(np.random.Philox(key=[seed, epoch])).shuffle(order)
    return order


class Loader(Protocol):
    """Gives what a step needs to have its batch.

    Attributes:
      num_batches: steps of an epoch; the last one may be short and is filled with rows of weight 0.
      resident: arrays that stay on the device and are handed to every step.
    """

    num_batches: int
    resident: Any

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Yields the payload of every batch of an epoch from batch `start` on."""
        ...

    def examples_before(self, epoch: int, batch: int) -> int:
        """Returns how many examples the batches of an epoch before `batch` hold."""
        ...

    def batch(self, resident: Any, payload: Any) -> Any:
        """Turns a payload into the batch (`Batch`, or `packed_loader.PackedBatch`), inside the jitted step."""
        ...


@dataclass(frozen=True)
class _Plan:
    """Which examples each batch holds, at the places of it that are asked for."""

    examples: Examples
    batch_size: int
    seed: int
    places: range

    @property
    def num_batches(self) -> int:
        return -(-len(self.examples) // self.batch_size)

    def rows(self, order: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns users, ends and weights [places] of a batch; behind its end stands its first example, weight 0."""
        chosen = order[batch * self.batch_size : (batch + 1) * self.batch_size]
        places = np.arange(self.places.start, self.places.stop)
        real = places < len(chosen)
        filled = chosen[np.where(real, places, 0)]
        return self.examples.users[filled], self.examples.ends[filled], real.astype(np.float32)

    def examples_before(self, epoch: int, batch: int) -> int:
        return min(batch * self.batch_size, len(self.examples))


def _to_batch(windows: Windows, weights: Any) -> Batch:
    return Batch(windows.items, windows.lengths, windows.timestamps, windows.targets, weights)


class DeviceLoader:
    """Keeps the log on the device; a payload is two integers and a weight an example, gathered inside the step."""

    def __init__(
        self, log: InteractionLog, examples: Examples, *, max_len: int, batch_size: int, seed: int, precision: str,
        places: range | None = None,
    ) -> None:  # fmt: skip
        self._plan = _Plan(examples, batch_size, seed, places or range(batch_size))
        self.num_batches = self._plan.num_batches
        self.examples_before = self._plan.examples_before
        timestamps = timestamps_for_device(log.timestamps, precision)
        self.resident = jax.device_put((np.asarray(log.items, np.int32), timestamps, np.asarray(log.offsets, np.int32)))
        self._max_len = max_len

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[np.ndarray, ...]]:
        """Yields (users, ends, weights) of every batch from `start` on."""
        order = epoch_order(self._plan.seed, epoch, len(self._plan.examples))
        for batch in range(start, self.num_batches):
            yield self._plan.rows(order, batch)

    def batch(self, resident: tuple[Array, ...], payload: tuple[Array, ...]) -> Batch:
        """Gathers the windows, inside the jitted step."""
        users, ends, weights = payload
        return _to_batch(gather_windows(*resident, users, ends, self._max_len, xp=jnp), weights)


@dataclass(frozen=True)
class _HostBatches:
    """The batches of one epoch as a random-access source for Grain."""

    gather: Callable[[int], Any]
    num_batches: int

    def __len__(self) -> int:
        return self.num_batches

    def __getitem__(self, batch: int) -> Any:
        return self.gather(batch)


def prefetched(gather: Callable[[int], Any], num_batches: int, start: int) -> Iterator[Any]:
    """Yields `gather(batch)` for every batch from `start` on, in order, made a few ahead in Grain's threads."""
    batches = grain.MapDataset.source(_HostBatches(gather, num_batches))[start:]
    yield from batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))


class GrainLoader:
    """Gathers whole batches on the host, a few ahead of the step, in Grain's threads.

    The log stays where it is, also in a mapped file: seconds are cast a batch at a time.
    """

    def __init__(
        self, log: InteractionLog, examples: Examples, *, max_len: int, batch_size: int, seed: int, precision: str,
        places: range | None = None,
    ) -> None:  # fmt: skip
        self._plan = _Plan(examples, batch_size, seed, places or range(batch_size))
        self.num_batches = self._plan.num_batches
        self.examples_before = self._plan.examples_before
        self.resident = ()
        require_timestamps_fit(log.timestamps, precision)
        self._columns = (log.items, log.timestamps, log.offsets)
        self._seconds, self._max_len = DEVICE_TIME[precision], max_len

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields every batch from `start` on."""
        order = epoch_order(self._plan.seed, epoch, len(self._plan.examples))

        def gather(batch: int) -> Batch:
            users, ends, weights = self._plan.rows(order, batch)
            windows = gather_windows(*self._columns, users, ends, self._max_len, xp=np)
            return _to_batch(windows._replace(timestamps=windows.timestamps.astype(self._seconds)), weights)

        yield from prefetched(gather, self.num_batches, start)

    def batch(self, resident: tuple[()], payload: Batch) -> Batch:
        """The payload is the batch."""
        return payload


LOADERS = {"device": DeviceLoader, "grain": GrainLoader}
