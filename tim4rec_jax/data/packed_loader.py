"""Batches that train on every position of packed rows, gathered inside the step or by Grain on the host.

As in `data.loader`, both give the same batches for a seed and start at any batch of any epoch.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.examples import Examples
from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.loader import (
    DEVICE_TIME,
    LOADERS,
    Loader,
    prefetched,
    require_timestamps_fit,
    timestamps_for_device,
)
from tim4rec_jax.data.negatives import SamplingLoader, make_proposal
from tim4rec_jax.data.packing import EpochRows, PackedPositions, PackedRows, pack_lengths, window_histories


@flax.struct.dataclass
class PackedBatch:
    """Rows of one step, each of several histories one after the other.

    Attributes:
      items: int32 [b, l], padded on the right with 0.
      segment_ids: int32 [b, l], 1, 2, ... by the history of its row that a position belongs to, 0 in the padding.
      timestamps: float32 or int32 [b, l] seconds, padded with 0.
      targets: int32 [b, l], the item after each position's, 0 in the padding.
      weights: float32 [b, l]; 0 marks padding and what is read only as context. Rows without any weight come last.
    """

    items: Array
    segment_ids: Array
    timestamps: Array
    targets: Array
    weights: Array


def gather_positions(
    log_items: Any, log_timestamps: Any, positions: PackedPositions, xp: ModuleType = np
) -> PackedBatch:
    """Gathers packed rows from the flat log, with NumPy or, with `xp=jax.numpy`, inside `jax.jit`.

    Args:
      log_items: int32 [rows].
      log_timestamps: [rows], seconds in any dtype; the batch keeps it.
      positions: [b, l] rows of the log.
      xp: array module of the arguments.
    """
    real = positions.rows >= 0
    rows = xp.where(real, positions.rows, 0)
    return PackedBatch(
        items=xp.where(real, log_items[rows], 0),
        segment_ids=xp.where(real, xp.cumsum(positions.starts, axis=1, dtype=np.int32), 0),
        timestamps=xp.where(real, log_timestamps[rows], 0),
        targets=xp.where(real, log_items[rows + real], 0),
        weights=positions.trained.astype(np.float32),
    )


class _PackedPlan:
    """Which rows each batch holds; the last epoch asked for is kept."""

    def __init__(
        self, log: InteractionLog, examples: Examples, *, max_len: int, context: int | None, batch_size: int, seed: int,
        places: range,
    ) -> None:  # fmt: skip
        if log.num_rows > np.iinfo(np.int32).max:
            raise ValueError(
                f"the log has {log.num_rows} rows, more than the {np.iinfo(np.int32).max} of int32 indices"
            )
        windows = window_histories(np.bincount(examples.users, minlength=log.num_users), max_len, context)
        first_rows = (log.offsets[windows.users] + windows.firsts).astype(np.int32)
        self.packed = PackedRows(windows, first_rows, pack_lengths(windows.ends - windows.firsts, max_len), seed)
        self._batch_size, self._places = batch_size, places
        self.num_batches = -(-self.packed.pattern.num_rows // batch_size)
        self._kept: tuple[int, EpochRows] | None = None

    def epoch(self, epoch: int) -> EpochRows:
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self.packed.epoch(epoch)
        return self._kept[1]

    def positions(self, rows: EpochRows, batch: int) -> PackedPositions:
        first = batch * self._batch_size
        return self.packed.positions(rows, first + self._places.start, len(self._places), stop=first + self._batch_size)

    def examples_before(self, epoch: int, batch: int) -> int:
        before = self.epoch(epoch).targets_before
        return int(before[min(batch * self._batch_size, len(before) - 1)])


class PackedDeviceLoader:
    """Keeps the log on the device; a payload is an index and two marks a position, gathered inside the step.

    Args:
      log: cleaned log.
      examples: the training part, every prefix of a user up to some length.
      max_len: l, positions of a row.
      context: see `packing.window_histories`.
      batch_size: rows of a step.
      seed: of the epochs' orders.
      precision: of timestamps, see `loader.timestamps_for_device`.
      places: of each batch that are given, see `loader`; None is all.
    """

    def __init__(
        self, log: InteractionLog, examples: Examples, *, max_len: int, context: int | None, batch_size: int, seed: int,
        precision: str, places: range | None = None,
    ) -> None:  # fmt: skip
        options = {"max_len": max_len, "context": context, "batch_size": batch_size, "seed": seed}
        self._plan = _PackedPlan(log, examples, places=places or range(batch_size), **options)
        self.num_batches = self._plan.num_batches
        self.fill_share = self._plan.packed.pattern.fill_share
        self.examples_before = self._plan.examples_before
        timestamps = timestamps_for_device(log.timestamps, precision)
        self.resident = jax.device_put((np.asarray(log.items, np.int32), timestamps))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PackedPositions]:
        """Yields the positions of every batch from `start` on."""
        rows = self._plan.epoch(epoch)
        for batch in range(start, self.num_batches):
            yield self._plan.positions(rows, batch)

    def batch(self, resident: tuple[Array, ...], payload: PackedPositions) -> PackedBatch:
        """Gathers the rows, inside the jitted step."""
        return gather_positions(*resident, payload, xp=jnp)


class PackedGrainLoader:
    """Gathers whole batches on the host, a few ahead of the step; see `PackedDeviceLoader` for the arguments."""

    def __init__(
        self, log: InteractionLog, examples: Examples, *, max_len: int, context: int | None, batch_size: int, seed: int,
        precision: str, places: range | None = None,
    ) -> None:  # fmt: skip
        options = {"max_len": max_len, "context": context, "batch_size": batch_size, "seed": seed}
        self._plan = _PackedPlan(log, examples, places=places or range(batch_size), **options)
        self.num_batches = self._plan.num_batches
        self.fill_share = self._plan.packed.pattern.fill_share
        self.examples_before = self._plan.examples_before
        self.resident = ()
        require_timestamps_fit(log.timestamps, precision)
        self._columns, self._seconds = (np.asarray(log.items, np.int32), log.timestamps), DEVICE_TIME[precision]

    def epoch(self, epoch: int, start: int = 0) -> Iterator[PackedBatch]:
        """Yields every batch from `start` on."""
        rows = self._plan.epoch(epoch)

        def gather(batch: int) -> PackedBatch:
            gathered = gather_positions(*self._columns, self._plan.positions(rows, batch), xp=np)
            return gathered.replace(timestamps=gathered.timestamps.astype(self._seconds))

        yield from prefetched(gather, self.num_batches, start)

    def batch(self, resident: tuple[()], payload: PackedBatch) -> PackedBatch:
        """The payload is the batch."""
        return payload


PACKED_LOADERS = {"device": PackedDeviceLoader, "grain": PackedGrainLoader}


def make_loader(
    config: ExperimentConfig, log: InteractionLog, examples: Examples, places: range | None = None
) -> Loader:
    """Returns the loader that the settings ask for, by `train.positions`, `data.loader` and `train.loss`.

    Args:
      config: of the run.
      log: cleaned log.
      examples: the training part.
      places: of each batch that are given, one after the other; None is all. Those from `train.batch_size` on hold rows
        of weight 0.

    Raises:
      ValueError: if timestamps do not fit, or a window's context leaves nothing to train on.
    """
    options = {
        "max_len": config.model.max_len, "batch_size": config.train.batch_size, "seed": config.train.seed,
        "precision": config.data.timestamp_precision, "places": places,
    }  # fmt: skip
    if config.train.positions == "last":
        loader = LOADERS[config.data.loader](log, examples, **options)
    else:
        loader = PACKED_LOADERS[config.data.loader](log, examples, context=config.train.window_context, **options)
    if config.train.loss != "sampled_ce":
        return loader
    targets = log.items[log.offsets[examples.users] + examples.ends]
    proposal = make_proposal(np.bincount(targets, minlength=config.model.vocab_size), config.train.negatives_power)
    return SamplingLoader(loader, proposal, config.train.num_negatives)
