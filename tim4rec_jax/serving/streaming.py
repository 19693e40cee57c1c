"""A causal model event by event: a state of constant size for each history, many histories in one call."""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.data.loader import timestamps_for_device
from tim4rec_jax.evaluation.metrics import check_top_k
from tim4rec_jax.models import MODELS, STATISTICS, build_model, item_scores, one_segment, variables
from tim4rec_jax.run_dir import read_config
from tim4rec_jax.serving.ranking import best_columns, items_left, next_power_of_two, padded_lists, score_rows
from tim4rec_jax.serving.recommender import Recommender

State = Any


def require_streamable(model: nn.Module) -> None:
    """Refuses a model that cannot go on from a state.

    Raises:
      ValueError: with what to train instead.
    """
    if not model.streamable:
        raise ValueError(
            f"the model {model.config.name!r} cannot go on from a state: it reads its whole history again for every "
            f"event; train one of {', '.join(name for name, known in MODELS.items() if known.streamable)}"
        )


def load_streamable(run: pathlib.Path, *, report: Callable[[str], None] = print) -> Recommender:
    """Reads a run whose model can go on from a state, as `Recommender.from_run`.

    Raises:
      ValueError: for another model, before anything of it is read.
    """
    try:
        require_streamable(build_model(read_config(run).model))
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from error
    return Recommender.from_run(run, report=report)


def fingerprint(model: nn.Module, params: Any, item_ids: Sequence[str]) -> str:
    """Returns a hash of a model's parameters, its settings that change scores, and its items in their order.

    Settings count by name and value where they differ from their default, so that later ones change no hash.
    """
    settings = {
        field.name: value
        for field in dataclasses.fields(model.config)
        if (value := getattr(model.config, field.name)) != field.default and not _changes_no_score(field.name)
    }
    return _digest([model.config.name, settings, list(item_ids)], params)


def _changes_no_score(setting: str) -> bool:
    return setting.endswith("dropout") or setting in (
        "module",
        "vocab_multiple",
        "kaiming_init",
        "chunk_size",
        "kernels",
    )


def earlier_fingerprint(settings: dict[str, Any], params: Any, item_ids: Sequence[str]) -> str:
    """Returns the hash by which the version with one class of settings for all models knew a model.

    Args:
      settings: the part "model" of the run's config.json as that version wrote it, statistics of the data included.
      params: its tree.
      item_ids: raw id of item 1, 2, ...
    """
    written = f"ModelConfig({', '.join(f'{name}={value!r}' for name, value in settings.items())})"
    return _digest([written, list(item_ids)], {name: part for name, part in params.items() if name != STATISTICS})


def _digest(named: list[Any], params: Any) -> str:
    digest = hashlib.sha256(json.dumps(named, sort_keys=True).encode())
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        array = np.asarray(leaf)
        digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


@functools.partial(jax.jit, static_argnames=("model", "batch"))
def _init_state(params: Any, *, model: nn.Module, batch: int) -> State:
    return model.apply(variables(params), batch, method="init_cache")


@functools.partial(jax.jit, static_argnames="model", donate_argnames="state")
def _extend(
    params: Any, state: State, items: jax.Array, lengths: jax.Array, timestamps: jax.Array, *, model: nn.Module
) -> tuple[State, jax.Array]:
    """The next state, and the hidden state after the last event of each row [b, d]."""
    segments = one_segment(lengths, items.shape[1])
    hidden, state = model.apply(variables(params), items, timestamps, segment_ids=segments, cache=state)
    return state, hidden[jnp.arange(items.shape[0]), jnp.maximum(lengths, 1) - 1]


@functools.partial(jax.jit, static_argnames="model", donate_argnames="table")
def extend_rows(
    params: Any,
    table: tuple[State, jax.Array],
    rows: jax.Array,
    items: jax.Array,
    lengths: jax.Array,
    timestamps: jax.Array,
    *,
    model: nn.Module,
) -> tuple[State, jax.Array]:
    """Goes on with some rows of a table of states.

    Args:
      params: the model's.
      table: states of n rows, and their hidden states [n, d]; given up, the result takes its place.
      rows: int32 [b], each at most once; n or more for rows that only fill the batch.
      items: int32 [b, l], padded on the right.
      lengths: int32 [b], at least 1 but in filling rows.
      timestamps: int32 [b, l] seconds.
      model: the module.
    """
    before = jax.tree.map(lambda leaf: leaf.at[rows].get(mode="clip"), table[0])
    segments = one_segment(lengths, items.shape[1])
    hidden, state = model.apply(variables(params), items, timestamps, segment_ids=segments, cache=before)
    last = hidden[jnp.arange(items.shape[0]), jnp.maximum(lengths, 1) - 1]
    return jax.tree.map(lambda leaf, new: leaf.at[rows].set(new, mode="drop"), table, (state, last))


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _top_k(
    params: Any,
    hidden: jax.Array,
    seen: jax.Array | None,
    excluded: jax.Array,
    allowed: jax.Array | None,
    *,
    model: nn.Module,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    return best_columns(item_scores(model, variables(params), hidden, seen), excluded, k, allowed)


@functools.partial(jax.jit, static_argnames="model")
def _scores_of(
    params: Any, hidden: jax.Array, seen: jax.Array | None, columns: jax.Array, *, model: nn.Module
) -> jax.Array:
    return jnp.take_along_axis(item_scores(model, variables(params), hidden, seen), columns, axis=1)


def _label(labels: Sequence[str] | None, row: int) -> str:
    return f"row {row}" if labels is None else labels[row]


class Streamer:
    """A trained causal model, event by event.

    A state belongs to a batch of histories and is given up to the call that goes on from it.

    Attributes:
      model: the module.
      params: its parameters.
      num_items: v - 1, items of the catalogue.
    """

    def __init__(self, model: nn.Module, params: Any) -> None:
        """Takes a model from `build_model` and its parameters.

        Raises:
          ValueError: for a model that cannot go on from a state.
        """
        require_streamable(model)
        self.model, self.params = model, params
        self.num_items = model.config.vocab_size - 1

    def init_state(self, batch: int) -> State:
        """Returns the state before the first event of `batch` histories; its size does not depend on their length."""
        # Every leaf owns its memory, which the next call takes over.
        return jax.tree.map(jnp.copy, _init_state(self.params, model=self.model, batch=batch))

    def state_bytes(self) -> int:
        """Returns the bytes of one history's state, of its hidden state and nothing else."""
        shapes = jax.eval_shape(lambda params: self.model.apply(variables(params), 1, method="init_cache"), self.params)
        hidden = self.model.config.d_model * jnp.dtype(self.model.config.dtype).itemsize
        return hidden + sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))

    def step(self, state: State, items: np.ndarray, timestamps: np.ndarray) -> tuple[State, jax.Array]:
        """Takes in one event of every history.

        Args:
          state: of b histories; must not be used again.
          items: int [b], item indices from 1.
          timestamps: int [b] seconds since 1970.

        Returns:
          The next state, and the hidden states [b, d], from which `top_k` ranks.

        Raises:
          ValueError: for an unknown item, a time that is no second, or (where the model reads times) one before the
            history's last; the state is as it was and may be used again.
        """
        items, timestamps = np.asarray(items), np.asarray(timestamps)
        return self.extend(state, items[:, None], np.ones(items.shape[:1], np.int32), timestamps[:, None])

    def extend(
        self, state: State, items: np.ndarray, lengths: np.ndarray, timestamps: np.ndarray
    ) -> tuple[State, jax.Array]:
        """Takes in several events of every history: pieces of any size give what one pass gives.

        Args:
          state: of b histories; must not be used again.
          items: int [b, l], item indices from 1, padded on the right.
          lengths: int [b], events of each row, 0 to l.
          timestamps: int [b, l] seconds since 1970.

        Returns:
          The next state, and the hidden states [b, d] after the last event of each row; not to be read at length 0.

        Raises:
          ValueError: as `step`.
        """
        items, lengths, timestamps = (np.asarray(a) for a in (items, lengths, timestamps))
        self._check(state, items, lengths, timestamps)
        inside = np.arange(items.shape[1]) < lengths[:, None]
        return _extend(
            self.params,
            state,
            np.where(inside, items, 0).astype(np.int32),
            lengths.astype(np.int32),
            timestamps_for_device(np.where(inside, timestamps, 0), "int64"),
            model=self.model,
        )

    def _check(self, state: State, items: np.ndarray, lengths: np.ndarray, timestamps: np.ndarray) -> None:
        if timestamps.shape != items.shape or lengths.shape != items.shape[:1]:
            raise ValueError(
                f"items {items.shape}, lengths {lengths.shape} and timestamps {timestamps.shape} must be [b, l], [b] "
                "and [b, l]"
            )
        for name, array in (("items", items), ("lengths", lengths), ("timestamps", timestamps)):
            if array.dtype.kind not in "iu":
                raise ValueError(f"{name} are {array.dtype}; give whole numbers")
        inside = np.arange(items.shape[1]) < lengths[:, None]
        for row, column in np.argwhere(inside & ((items < 1) | (items > self.num_items)))[:1]:
            raise ValueError(
                f"row {row}: unknown item {items[row, column]}; items are 1 to {self.num_items}; the state is unchanged"
            )
        events = getattr(state, "events", None)
        if events is None:
            return
        last = np.where(np.asarray(events) > 0, np.asarray(state.timestamps), np.iinfo(np.int32).min)
        previous = np.concatenate([last[:, None], timestamps[:, :-1]], axis=1)
        for row, column in np.argwhere(inside & (timestamps < previous))[:1]:
            raise ValueError(
                f"row {row}: time {timestamps[row, column]} goes backwards, the last event was at "
                f"{previous[row, column]}; the state is unchanged"
            )

    def top_k(
        self,
        hidden: jax.Array,
        k: int,
        exclude: Sequence[np.ndarray] | None = None,
        labels: Sequence[str] | None = None,
        allowed: np.ndarray | None = None,
        seen: Sequence[np.ndarray] | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the catalogue.

        Args:
          hidden: [b, d] from `step` or `extend`.
          k: items per row.
          exclude: item indices to leave out of each row's list, b arrays; None leaves out nothing.
          labels: how messages call the rows; None counts them from 0.
          allowed: bool [v], the items that may be recommended; None for all.
          seen: item indices of each row's history, b arrays, which models with `seen_bias` score by.

        Returns:
          Item indices from 1 [b, k] int32 and their scores [b, k], best first; equal scores in order of index. A list
          of which fewer are left goes on with item 0 of score -inf.

        Raises:
          ValueError: for a k under 1, or over the catalogue.
          FloatingPointError: where scores are not finite.
        """
        check_top_k((k,), self.num_items)
        self._require_seen(seen)
        excluded = [np.unique(row) for row in exclude] if exclude is not None else [np.zeros(0, np.int32)] * len(hidden)
        tile = score_rows(self.num_items + 1)
        # Cut and filled on the host: on the device every number of rows would be another program.
        rows = np.asarray(hidden)
        parts = [
            self._top_k_tile(
                rows[first : first + tile],
                k,
                None if seen is None else seen[first : first + tile],
                excluded[first : first + tile],
                allowed,
            )
            for first in range(0, len(rows), tile)
        ]
        indices, scores, finite = (np.concatenate(column) for column in zip(*parts, strict=True))
        if not finite.all():
            raise FloatingPointError(
                f"the scores of {_label(labels, int(np.argmin(finite)))} are not finite; the parameters or the state "
                "hold NaN or infinity"
            )
        return indices, scores

    def _require_seen(self, seen: Sequence[np.ndarray] | None) -> None:
        if self.model.config.seen_bias and seen is None:
            raise ValueError("the model has seen_bias: its scores depend on the items of the history; give `seen`")

    def _padded_seen(self, seen: Sequence[np.ndarray] | None, rows: int) -> np.ndarray | None:
        """Returns the items of each row's history, filled with 0; None where scores do not read them."""
        if seen is None or not self.model.config.seen_bias:
            return None
        return padded_lists([np.unique(row) for row in seen], rows)

    def item_scores(
        self, hidden: jax.Array, items: Sequence[np.ndarray], seen: Sequence[np.ndarray] | None = None
    ) -> list[np.ndarray]:
        """Returns the scores that `top_k` would give certain items: of each row those of its item indices, float32."""
        self._require_seen(seen)
        rows = _filled(np.asarray(hidden))
        columns = self._padded_seen(seen, len(rows)), padded_lists(items, len(rows))
        scores = np.asarray(_scores_of(self.params, rows, *columns, model=self.model))
        for row, ids in enumerate(items):
            if not np.isfinite(scores[row, : len(ids)]).all():
                raise FloatingPointError(f"the scores of row {row} are not finite; the parameters or the state are not")
        return [scores[row, : len(ids)] for row, ids in enumerate(items)]

    def _top_k_tile(
        self,
        hidden: np.ndarray,
        k: int,
        seen: Sequence[np.ndarray] | None,
        excluded: list[np.ndarray],
        allowed: np.ndarray | None,
    ) -> tuple[np.ndarray, ...]:
        """One device call; sizes are rounded up to powers of two, so that later calls find a compiled program."""
        n, hidden = len(hidden), _filled(hidden)
        columns = self._padded_seen(seen, len(hidden)), padded_lists(excluded, len(hidden))
        width = min(next_power_of_two(k), self.num_items)
        best, indices, finite = jax.device_get(
            _top_k(self.params, hidden, *columns, allowed, model=self.model, k=width)
        )
        return items_left(indices, best)[:n, :k], best[:n, :k], finite[:n]


def _filled(rows: np.ndarray) -> np.ndarray:
    """Returns a power of two of rows, those after the given ones zeros."""
    more = next_power_of_two(len(rows)) - len(rows)
    return np.concatenate([rows, np.zeros((more, rows.shape[1]), rows.dtype)]) if more else rows
