"""Batches of training examples: gathered inside the step from a log that lies on the device, or by Grain on the host.

For a seed both give the same batches in the same order, and both start at any batch of any epoch. A sampler says which
rows of the log a batch holds: prefixes with one target each, or packed rows that train on many positions. Of each batch
it gives the indices that it is asked for, all by default; those from the batch size on hold rows of weight 0.
"""

from collections.abc import Callable, Generator, Iterator
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.negatives import Negatives, Proposal, draw_negatives, make_proposal
from tim4rec_jax.data.packing import EpochRows, PackedPositions, PackedRows, pack_lengths, window_histories
from tim4rec_jax.data.splits import Examples, gather_windows


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


@flax.struct.dataclass
class PackedBatch:
    """Rows of one step, each of several histories one after the other.

    Attributes:
      items: int32 [b, l], padded on the right with 0.
      segment_ids: int32 [b, l], 1, 2, ... by the history of its row that a position belongs to, 0 in the padding.
      timestamps: float32 or int32 [b, l] seconds, padded with 0.
      targets: int32 [b, l], the item after each position's, or for the cloze the position's own; 0 in the padding.
      weights: float32 [b, l]; 0 marks padding and what is read only as context. Rows without any weight come last.
    """

    items: Array
    segment_ids: Array
    timestamps: Array
    targets: Array
    weights: Array


# What the seconds of a log are on the device, by `data.timestamp_precision`.
_DEVICE_TIME = {"float32": np.float32, "int64": np.int32}


def timestamps_for_device(timestamps: np.ndarray, precision: str) -> np.ndarray:
    """Casts int64 seconds to what the model reads.

    Args:
      timestamps: int64 seconds, any shape.
      precision: "float32" (as the original program has them) or "int64", held as int32 on the device.

    Raises:
      ValueError: where a second does not fit into int32.
    """
    _require_timestamps_fit(timestamps, precision)
    return timestamps.astype(_DEVICE_TIME[precision])


def _require_timestamps_fit(timestamps: np.ndarray, precision: str) -> None:
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


class PrefixSampler:
    """Examples of one target each, told by two integers and a weight.

    A sampler has `columns` of the log; `draw(epoch)` draws an order, `indices(drawn, batch)` are small arrays that tell
    what a batch of it holds, and `gather(columns, indices, xp)` is that batch, timestamps in their dtype: with NumPy,
    or with `xp=jax.numpy` inside `jax.jit`.

    Args:
      log: cleaned log.
      examples: the training part.
      max_len: l, latest items before a target that are read.
      batch_size: examples of a step.
      seed: of the epochs' orders.
      batch_indices: of each batch that are given; None is all.
    """

    def __init__(
        self,
        log: InteractionLog,
        examples: Examples,
        *,
        max_len: int,
        batch_size: int,
        seed: int,
        batch_indices: range | None = None,
    ) -> None:
        self.columns = log.items, log.timestamps, log.offsets
        self.num_batches = -(-len(examples) // batch_size)
        self._examples, self._max_len, self._batch_size, self._seed = examples, max_len, batch_size, seed
        self._given = batch_indices or range(batch_size)

    def draw(self, epoch: int) -> np.ndarray:
        """Draws the order of the examples."""
        return epoch_order(self._seed, epoch, len(self._examples))

    def indices(self, drawn: np.ndarray, batch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Returns users, ends and weights; behind the end of a batch stands its first example, weight 0."""
        chosen = drawn[batch * self._batch_size : (batch + 1) * self._batch_size]
        given = np.arange(self._given.start, self._given.stop)
        real = given < len(chosen)
        filled = chosen[np.where(real, given, 0)]
        return self._examples.users[filled], self._examples.ends[filled], real.astype(np.float32)

    def examples_before(self, epoch: int, batch: int) -> int:
        """Returns how many examples the batches of an epoch before `batch` hold."""
        return min(batch * self._batch_size, len(self._examples))

    def gather(self, columns: tuple[Any, ...], indices: tuple[Any, Any, Any], xp: ModuleType) -> Batch:
        """Gathers the windows."""
        (items, timestamps, offsets), (users, ends, weights) = columns, indices
        return Batch(*gather_windows(items, timestamps, offsets, users, ends, self._max_len, xp=xp), weights)


class PackedSampler:
    """Rows of several histories that train on many positions, told by an index and two marks per position.

    Every event before the training part's last of a user is read, and trained on with the event after it as its target.
    For the cloze the last one is read, too, and each event is its own target, to be masked there.

    Args:
      log, seed, batch_indices: as of `PrefixSampler`.
      examples: the training part, every prefix of a user up to some length.
      max_len: l, positions of a row.
      context: see `packing.window_histories`.
      batch_size: rows of a step.
      cloze: see above.
    """

    def __init__(
        self,
        log: InteractionLog,
        examples: Examples,
        *,
        max_len: int,
        context: int | None,
        cloze: bool = False,
        batch_size: int,
        seed: int,
        batch_indices: range | None = None,
    ) -> None:
        if log.num_rows > np.iinfo(np.int32).max:
            raise ValueError(
                f"the log has {log.num_rows} rows, more than the {np.iinfo(np.int32).max} of int32 indices"
            )
        self.columns = log.items, log.timestamps
        targets = np.bincount(examples.users, minlength=log.num_users)
        windows = window_histories(targets + (cloze & (targets > 0)), max_len, context)
        self._cloze = cloze
        first_rows = (log.offsets[windows.users] + windows.firsts).astype(np.int32)
        self._rows = PackedRows(windows, first_rows, pack_lengths(windows.ends - windows.firsts, max_len), seed)
        self.fill_share = self._rows.pattern.fill_share
        self.num_batches = -(-self._rows.pattern.num_rows // batch_size)
        self._batch_size, self._given = batch_size, batch_indices or range(batch_size)
        self._kept: tuple[int, EpochRows] | None = None  # The last epoch asked for.

    def draw(self, epoch: int) -> EpochRows:
        """Draws which windows share a row, and the order of the rows."""
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._rows.epoch(epoch)
        return self._kept[1]

    def indices(self, drawn: EpochRows, batch: int) -> PackedPositions:
        """Returns where each position lies in the log."""
        first = batch * self._batch_size
        return self._rows.positions(drawn, first + self._given.start, len(self._given), stop=first + self._batch_size)

    def examples_before(self, epoch: int, batch: int) -> int:
        """Returns how many positions the batches of an epoch before `batch` train on, or may mask."""
        before = self.draw(epoch).targets_before
        return int(before[min(batch * self._batch_size, len(before) - 1)])

    def gather(self, columns: tuple[Any, ...], indices: PackedPositions, xp: ModuleType) -> PackedBatch:
        """Gathers the rows."""
        items, timestamps = columns
        real = indices.rows >= 0
        rows = xp.where(real, indices.rows, 0)
        return PackedBatch(
            items=xp.where(real, items[rows], 0),
            segment_ids=xp.where(real, xp.cumsum(indices.starts, axis=1, dtype=np.int32), 0),
            timestamps=xp.where(real, timestamps[rows], 0),
            targets=xp.where(real, items[rows if self._cloze else rows + real], 0),
            weights=xp.asarray(indices.trained, np.float32),
        )


class Loader:
    """Gives what a step needs to have its batch, and the negatives of the step where there is a `proposal`.

    On the device lie the log's columns, and what is given for a batch are its indices, to be gathered inside the step.
    On the host whole batches are gathered, a few ahead of the step, in Grain's threads; the log stays where it is, also
    in a mapped file, and seconds are cast a batch at a time.

    Args:
      sampler: of the batches.
      on_device: where to gather.
      precision: of timestamps, see `timestamps_for_device`.
      proposal: that negatives are drawn from.
      num_negatives: of a step.

    Attributes:
      num_batches: steps of an epoch; the last one may be short and is filled with rows of weight 0.
      resident: arrays that stay on the device and are handed to every step.

    Raises:
      ValueError: where a second does not fit into int32.
    """

    def __init__(
        self,
        sampler: PrefixSampler | PackedSampler,
        *,
        on_device: bool,
        precision: str,
        proposal: Proposal | None = None,
        num_negatives: int = 0,
    ) -> None:
        self.sampler: Any = sampler  # Which alone knows what it draws and reads.
        self.num_batches = sampler.num_batches
        self.examples_before = sampler.examples_before
        self._on_device, self._seconds, self._num_negatives = on_device, _DEVICE_TIME[precision], num_negatives
        items, timestamps, *others = sampler.columns
        _require_timestamps_fit(timestamps, precision)
        columns = ()
        if on_device:
            columns = items, timestamps.astype(self._seconds), *(other.astype(np.int32) for other in others)
        self.resident = jax.device_put((columns, proposal))

    def epoch(self, epoch: int, start: int = 0) -> Generator[Any]:
        """Yields the payload of every batch of an epoch from batch `start` on."""
        drawn = self.sampler.draw(epoch)
        if self._on_device:
            yield from (self.sampler.indices(drawn, batch) for batch in range(start, self.num_batches))
            return

        def gather(batch: int) -> Any:
            gathered = self.sampler.gather(self.sampler.columns, self.sampler.indices(drawn, batch), np)
            return gathered.replace(timestamps=gathered.timestamps.astype(self._seconds))

        yield from _prefetched(gather, start, self.num_batches)

    def batch(self, resident: tuple[Any, Any], payload: Any) -> Any:
        """Turns a payload into the `Batch` or `PackedBatch`, inside the jitted step."""
        return self.sampler.gather(resident[0], payload, jnp) if self._on_device else payload

    def negatives(self, resident: tuple[Any, Any], key: Array) -> Negatives:
        """Draws the step's negatives, inside the jitted step."""
        return draw_negatives(resident[1], key, self._num_negatives)


def _prefetched(gather: Callable[[int], Any], start: int, stop: int) -> Iterator[Any]:
    import grain  # What answers from a model needs no loader, and starts sooner.

    batches = grain.MapDataset.range(start, stop).map(gather)
    yield from batches.to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=8))


def make_loader(
    config: ExperimentConfig, log: InteractionLog, examples: Examples, batch_indices: range | None = None
) -> Loader:
    """Returns the loader that the settings ask for, by `train.positions`, `data.loader` and `train.loss`.

    Args:
      config: of the run.
      log: cleaned log.
      examples: the training part.
      batch_indices: of each batch that are given, one after the other; None is all. Those from `train.batch_size` on
        hold rows of weight 0.

    Raises:
      ValueError: if timestamps do not fit, or a window's context leaves nothing to train on.
    """
    train, model = config.train, config.model
    options = {"max_len": model.max_len, "batch_size": train.batch_size, "seed": train.seed}
    if train.positions == "last":
        sampler = PrefixSampler(log, examples, batch_indices=batch_indices, **options)
    else:
        sampler = PackedSampler(
            log,
            examples,
            context=train.window_context,
            cloze=train.positions == "masked",
            batch_indices=batch_indices,
            **options,
        )
    drawing = {}
    if train.loss == "sampled_ce":
        rows = log.offsets[examples.users] + examples.ends
        if train.positions == "masked":
            rows = np.concatenate([log.offsets[np.unique(examples.users)], rows])
        counts = np.bincount(log.items[rows], minlength=model.vocab_size)
        proposal = make_proposal(counts, train.negatives_power)
        drawing = {"proposal": proposal, "num_negatives": train.num_negatives}
    return Loader(
        sampler, on_device=config.data.loader == "device", precision=config.data.timestamp_precision, **drawing
    )
