"""Recommendations from a run folder: histories in, the k best items out, in jitted batches of few static shapes."""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.loader import timestamps_for_device
from tim4rec_jax.evaluation.full_sort import positions_read
from tim4rec_jax.evaluation.metrics import check_top_k
from tim4rec_jax.models import apply_method, item_scores, last_hidden, variables
from tim4rec_jax.notebook import html_table
from tim4rec_jax.run_dir import read_earlier_model_settings, read_histories, read_items
from tim4rec_jax.serving.ranking import best_columns, items_left, next_power_of_two, padded_lists, score_rows
from tim4rec_jax.training.stored_run import load_model, training_counts

BATCH_TOKENS = 2**15
SHORTEST_LENGTH = 8
LATEST_SECOND = 10**11  # the year 5138: larger numbers are milliseconds


@dataclasses.dataclass(frozen=True)
class History:
    """What one user did, oldest first.

    Attributes:
      items: [l] int32, item indices from 1 (rows of the embedding).
      timestamps: [l] int64 seconds since 1970, never backwards.
      label: how messages call it, such as "user '42'".
      assumed_gap: seconds put between consecutive items because no times were given; None where times were given.
      skipped: unknown items that were left out.
    """

    items: np.ndarray
    timestamps: np.ndarray
    label: str = "the history"
    assumed_gap: int | None = None
    skipped: int = 0


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One recommended item: its raw id, the model's score (a logit) and its title, None where no titles are known."""

    item_id: str
    score: float
    title: str | None


def nearest(word: str, known: Sequence[str]) -> str:
    """Returns the known names most like a word, quoted, for messages."""
    close = difflib.get_close_matches(word, known, n=3, cutoff=0.5) or list(known[:3])
    return ", ".join(repr(name) for name in close)


def _checked_times(times: Sequence[int], num_items: int, label: str) -> np.ndarray:
    if len(times) != num_items:
        raise ValueError(f"{label} has {num_items} items but {len(times)} times; give one time an item, or none at all")
    seconds = np.asarray(times)
    if seconds.dtype.kind not in "iu":
        raise ValueError(f"{label}: times must be whole seconds since 1970, got {list(times)[:3]}")
    seconds = seconds.astype(np.int64)
    for limit, wrong in ((0, seconds < 0), (LATEST_SECOND, seconds > LATEST_SECOND)):
        if wrong.any():
            raise ValueError(
                f"{label}: time {seconds[wrong][0]} at position {np.argmax(wrong) + 1} is beyond {limit}; "
                "give seconds since 1970, not milliseconds"
            )
    backwards = np.flatnonzero(np.diff(seconds) < 0)
    if backwards.size:
        i = backwards[0]
        raise ValueError(
            f"{label}: times go backwards at position {i + 2}: {seconds[i + 1]} after {seconds[i]}; "
            "give items and times oldest first"
        )
    return seconds


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _top_k(
    params: Any,
    items: jax.Array,
    lengths: jax.Array,
    timestamps: jax.Array,
    seen: jax.Array | None,
    excluded: jax.Array,
    allowed: jax.Array | None,
    *,
    model: nn.Module,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best items after each history, see `best_columns`."""
    hidden = last_hidden(model, variables(params), items, lengths, timestamps)
    return best_columns(item_scores(model, variables(params), hidden, seen), excluded, k, allowed)


@functools.partial(jax.jit, static_argnames="model")
def _hidden(params: Any, items: jax.Array, lengths: jax.Array, timestamps: jax.Array, *, model: nn.Module) -> jax.Array:
    """The hidden state [b, d] after each history."""
    return last_hidden(model, variables(params), items, lengths, timestamps)


@functools.partial(jax.jit, static_argnames="model")
def _scores_of(
    params: Any,
    items: jax.Array,
    lengths: jax.Array,
    timestamps: jax.Array,
    seen: jax.Array | None,
    columns: jax.Array,
    *,
    model: nn.Module,
) -> jax.Array:
    """The scores [b, m] of the items `columns` [b, m] after each history."""
    hidden = last_hidden(model, variables(params), items, lengths, timestamps)
    return jnp.take_along_axis(item_scores(model, variables(params), hidden, seen), columns, axis=1)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _similar(
    params: Any, items: jax.Array, allowed: jax.Array | None, *, model: nn.Module, k: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k items of the greatest cosine with each of `items` [b], but itself; a row of zeros has cosine 0."""
    table = apply_method(model, variables(params), "item_table").astype(jnp.float32)
    norms = jnp.linalg.norm(table, axis=1, keepdims=True)
    table = table / jnp.where(norms > 0, norms, 1)
    cosines = jnp.matmul(table[items], table.T, precision="highest")
    return best_columns(cosines, items[:, None], k, allowed)


class Recommender:
    """A trained model with the ids, titles and histories of its log.

    Attributes:
      earlier_settings: of the model, as a version with one class of settings for all models wrote them into the run;
        its tables of user states are known by them. None for other runs.
      run: the run folder, where it came from one.
      users: raw ids of the users of the log.
      index_of_item: index from 1 of every raw item id.
    """

    earlier_settings: dict[str, Any] | None = None
    run: pathlib.Path | None = None

    def __init__(
        self,
        model: nn.Module,
        params: Any,
        config: ExperimentConfig,
        *,
        item_ids: Sequence[str],
        titles: Sequence[str | None] | None,
        histories: pl.DataFrame,
    ):
        """Holds what recommending needs; `from_run` reads it all from a run folder.

        Args:
          model: from `build_model(config.model)`.
          params: its parameter tree, see `models.variables`.
          config: reads model.max_len, eval.max_len and data.timestamp_precision.
          item_ids: raw id of item 1, 2, ...
          titles: title of item 1, 2, ..., or None where no titles are known.
          histories: columns user_id (String), items (List of item indices), timestamps (List of int64 seconds).
        """
        self.max_len = positions_read(config)
        self.model, self.params, self.config = model, params, config
        self.item_ids, self.titles = list(item_ids), None if titles is None else list(titles)
        self.num_items = len(self.item_ids)
        self.index_of_item = {item_id: index for index, item_id in enumerate(self.item_ids, start=1)}
        self._histories = histories.cast(
            {"user_id": pl.String, "items": pl.List(pl.Int32), "timestamps": pl.List(pl.Int64)}
        )
        self.users = self._histories["user_id"].to_list()
        self._items, self._times = (self._histories[name].explode().to_numpy() for name in ("items", "timestamps"))
        counts = self._histories["items"].list.len().to_numpy()
        self._offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])

    @classmethod
    def from_run(cls, run: pathlib.Path, *, report: Callable[[str], None] = print) -> "Recommender":
        """Reads a run folder; nothing outside it is needed.

        Args:
          run: the run folder.
          report: receives a line for every damaged checkpoint that had to be passed over.

        Raises:
          FileNotFoundError: the folder is no run, or holds no best checkpoint yet.
          ValueError: the run has another format, or its items do not fit its model.
          CheckpointError: best checkpoints are there but none is intact.
        """
        run = pathlib.Path(run)
        stored = load_model(run, report=report)
        items = read_items(run)
        if len(items) + 1 != stored.config.model.vocab_size:
            raise ValueError(
                f"{run}: item_ids.parquet lists {len(items)} items, but the model has "
                f"vocab_size={stored.config.model.vocab_size} (items + 1); the folder mixes two runs"
            )
        titles = None if items["title"].is_null().all() else items["title"].to_list()
        recommender = cls(
            stored.model,
            stored.params,
            stored.config,
            item_ids=items["item_id"].to_list(),
            titles=titles,
            histories=read_histories(run),
        )
        recommender.run = run
        recommender.earlier_settings = read_earlier_model_settings(run)
        return recommender

    @property
    def columns(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The log: items int32 and times int64 of all users' events, and the offset int64 of each user's first."""
        return self._items, self._times, self._offsets

    def __repr__(self) -> str:
        where = "" if self.run is None else f", run folder {self.run}"
        name = self.config.model.name
        return f"Recommender: {name}, {len(self.users):,} users, {self.num_items:,} items{where}"

    def _repr_html_(self) -> str:
        facts = {"model": self.config.model.name, "users": f"{len(self.users):,}", "items": f"{self.num_items:,}"}
        facts |= {"titles": "none" if self.titles is None else "known", "events read": f"{self.max_len:,}"}
        return html_table("Recommender", (), [*facts.items(), ("run folder", str(self.run))])

    @cached_property
    def _row_of_user(self) -> dict[str, int]:
        return {user: row for row, user in enumerate(self.users)}

    @cached_property
    def id_column(self) -> pl.Series:
        """Raw ids of items 1, 2, ..."""
        return pl.Series(self.item_ids, dtype=pl.String)

    @cached_property
    def title_column(self) -> pl.Series:
        """Titles of items 1, 2, ..., null where none is known."""
        return pl.Series(self.titles or [None] * self.num_items, dtype=pl.String)

    @cached_property
    def typical_gap(self) -> int:
        """Median seconds between consecutive events of a user in the run's log."""
        within = np.ones(len(self._times), bool)
        within[self._offsets[:-1]] = False
        gaps = np.diff(self._times, prepend=0)[within]
        return round(float(np.median(gaps))) if len(gaps) else 0

    @cached_property
    def newest_time(self) -> int:
        """Time of the newest event in the run's log, seconds since 1970."""
        return int(self._times.max())

    @cached_property
    def training_counts(self) -> np.ndarray:
        """How often each item occurs in the training part of the run's log, int64 [v]; without a run, in all of it."""
        if self.run is None:
            return np.bincount(self._items, minlength=self.num_items + 1)
        return training_counts(self.run)

    def _stored(self, row: int) -> History:
        events = slice(self._offsets[row], self._offsets[row + 1])
        return History(self._items[events], self._times[events], label=f"user {self.users[row]!r}")

    def history_of_user(self, raw_user_id: str, *, empty_if_unknown: bool = False) -> History:
        """The stored history of a user, test event included: what comes next is what nobody has seen yet.

        Args:
          raw_user_id: id as in the log.
          empty_if_unknown: return a history without events for an unknown user.

        Raises:
          ValueError: for an unknown user; the nearest known ids are shown.
        """
        user = str(raw_user_id)
        row = self._row_of_user.get(user)
        if row is not None:
            return self._stored(row)
        if empty_if_unknown:
            return History(np.zeros(0, np.int32), np.zeros(0, np.int64), label=f"user {user!r}")
        raise ValueError(
            f"unknown user {user!r}; nearest known: {nearest(user, self.users)}; "
            f"histories.parquet in the run folder lists all {len(self.users)} "
            "(users removed in cleaning are not among them: give their items as a history instead)"
        )

    def stored_histories(self) -> dict[str, History]:
        """Returns the histories of all users of the run's log by raw id; see `history_of_user`."""
        return {user: self._stored(row) for row, user in enumerate(self.users)}

    def item_index(self, raw_item_id: str, label: str, place: str = "") -> int:
        """The index from 1 of an item.

        Args:
          raw_item_id: id as in the log.
          label: what messages begin with, such as "user '42'".
          place: where it stood, for messages.

        Raises:
          ValueError: for an unknown item; the nearest ids are shown.
        """
        index = self.index_of_item.get(raw_item_id)
        if index is None:
            raise ValueError(
                f"{label}: unknown item {raw_item_id!r}{place}; nearest known: {nearest(raw_item_id, self.item_ids)}; "
                f"item_ids.parquet in the run folder lists all {self.num_items}"
            )
        return index

    def history_from_ids(
        self,
        raw_item_ids: Sequence[str],
        times: Sequence[int] | None = None,
        *,
        label: str = "the history",
        skip_unknown: bool = False,
        may_be_empty: bool = False,
    ) -> History:
        """A history from raw item ids.

        Without times, consecutive items are taken to lie `typical_gap` seconds apart and the last of them at
        `newest_time`; the history says so in `assumed_gap`. A model without time does not read them.

        Args:
          raw_item_ids: ids as in the log, oldest first.
          times: whole seconds since 1970, one per item, never backwards.
          label: how messages call it.
          skip_unknown: leave unknown items out and count them (`History.skipped`).
          may_be_empty: no item is no error.

        Raises:
          ValueError: for no item, an unknown item (the nearest ids are shown), a number of times that differs from the
            number of items, or times that are no seconds or go backwards.
        """
        ids = [str(item_id) for item_id in raw_item_ids]
        seconds = None if times is None else _checked_times(times, len(ids), label) if ids else np.zeros(0, np.int64)
        known = [i for i, item_id in enumerate(ids) if not skip_unknown or item_id in self.index_of_item]
        if not known and not may_be_empty:
            only = f"{label} has {len(ids)} items, all unknown" if ids else f"{label} is empty"
            raise ValueError(f"{only}; give at least 1 item id")
        found = [self.item_index(ids[i], label, f" at position {i + 1}") for i in known]
        items, skipped = np.array(found, np.int32), len(ids) - len(known)
        if seconds is None and len(items):
            steps_back = np.arange(len(items))[::-1]
            assumed = self.newest_time - steps_back * self.typical_gap
            return History(items, assumed, label, self.typical_gap, skipped)
        return History(items, np.zeros(0, np.int64) if seconds is None else seconds[known], label, None, skipped)

    def recommend(
        self,
        histories: Sequence[History],
        k: int,
        *,
        exclude_seen: bool = False,
        allowed: np.ndarray | None = None,
    ) -> list[list[Recommendation]]:
        """The k items that come next most likely, best first, for each history; fewer where fewer are left.

        Args:
          histories: of any length; the last `max_len` events are read, as in evaluation.
          k: items per history.
          exclude_seen: leave every item of a history out of its list.
          allowed: bool [v], the items that may be recommended, see `rules.allowed_items`; None for all.

        Raises:
          ValueError: for an empty history, a k under 1, or a k over the catalogue.
          FloatingPointError: where scores are not finite.
        """
        return self.named(*self.top_k(histories, k, exclude_seen=exclude_seen, allowed=allowed))

    def named(self, indices: np.ndarray, scores: np.ndarray) -> list[list[Recommendation]]:
        """Gives item indices [n, k] from 1 and their scores [n, k] their ids and titles; a list ends at item 0."""
        return [
            [
                Recommendation(self.item_ids[i - 1], float(score), None if self.titles is None else self.titles[i - 1])
                for i, score in zip(row, row_scores, strict=True)
                if i
            ]
            for row, row_scores in zip(indices, scores, strict=True)
        ]

    def top_k(
        self,
        histories: Sequence[History],
        k: int,
        *,
        exclude_seen: bool = False,
        allowed: np.ndarray | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `recommend`, in arrays: a list that is shorter than k goes on with item 0 of score -inf.

        Args:
          histories: n of them, of any length; the last `max_len` events are read, as in evaluation.
          k: items per history.
          exclude_seen: leave every item of a history out of its list.
          allowed: bool [v], see `recommend`.

        Returns:
          Item indices from 1 [n, k] int32 and their scores [n, k] float32, best first; equal scores in order of index.

        Raises:
          ValueError: for an empty history, a k under 1, or a k over the catalogue.
          FloatingPointError: where scores are not finite.
        """
        self.check(histories, k)
        indices = np.zeros((len(histories), k), np.int32)
        scores = np.zeros((len(histories), k), np.float32)
        width = min(next_power_of_two(k), self.num_items)
        for rows, inputs in self._batches(histories):
            b = len(inputs[0])
            excluded = padded_lists([histories[i].items if exclude_seen else () for i in rows], b)
            best, found, finite = jax.device_get(
                _top_k(
                    self.params, *inputs, self.seen(histories, rows, b), excluded, allowed, model=self.model, k=width
                )
            )
            n = len(rows)
            _require_finite(finite[:n], [histories[i].label for i in rows])
            indices[rows], scores[rows] = items_left(found, best)[:n, :k], best[:n, :k]
        return indices, scores

    def hidden(self, histories: Sequence[History]) -> np.ndarray:
        """Returns the hidden states after histories, float32 [n, d], whose scores `top_k` ranks.

        Raises:
          ValueError: for an empty history.
        """
        self.check(histories, 1)
        found = np.zeros((len(histories), self.config.model.d_model), np.float32)
        for rows, inputs in self._batches(histories):
            found[rows] = np.asarray(_hidden(self.params, *inputs, model=self.model))[: len(rows)]
        return found

    def item_scores(self, histories: Sequence[History], items: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns the scores that `top_k` would give certain items.

        Args:
          histories: n of them.
          items: for each, item indices from 1.

        Returns:
          For each, float32 scores in the order of its items.

        Raises:
          ValueError: for an empty history.
          FloatingPointError: where scores are not finite.
        """
        self.check(histories, 1)
        scores = [np.zeros(0, np.float32)] * len(histories)
        for rows, inputs in self._batches(histories):
            columns = padded_lists([items[i] for i in rows], len(inputs[0]))
            seen = self.seen(histories, rows, len(inputs[0]))
            found = np.asarray(_scores_of(self.params, *inputs, seen, columns, model=self.model))[: len(rows)]
            _require_finite(np.asarray(np.isfinite(found).all(axis=1)), [histories[i].label for i in rows])
            for i, row in zip(rows, found, strict=True):
                scores[i] = row[: len(items[i])]
        return scores

    def similar(
        self, items: Sequence[int], k: int, *, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items most like others by the cosine of their rows of the item table, each but itself.

        Args:
          items: n item indices from 1.
          k: items of a list.
          allowed: bool [v], see `recommend`.

        Returns:
          Item indices [n, k] int32 and cosines [n, k] float32, as `top_k`.

        Raises:
          ValueError: for a k under 1, or a k over the catalogue.
          FloatingPointError: where a cosine is not finite.
        """
        check_top_k((k,), self.num_items)
        rows, width = score_rows(self.num_items + 1), min(next_power_of_two(k), self.num_items)
        indices, cosines = np.zeros((len(items), k), np.int32), np.zeros((len(items), k), np.float32)
        for first in range(0, len(items), rows):
            part = np.asarray(items[first : first + rows], np.int32)
            n = len(part)
            padded = np.concatenate([part, np.zeros(next_power_of_two(n) - n, np.int32)])
            best, found, finite = jax.device_get(_similar(self.params, padded, allowed, model=self.model, k=width))
            _require_finite(finite[:n], [f"item {self.item_ids[i - 1]!r}" for i in part])
            chosen = slice(first, first + n)
            indices[chosen], cosines[chosen] = items_left(found, best)[:n, :k], best[:n, :k]
        return indices, cosines

    def popular(self, k: int, *, allowed: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Returns the items that occur most often in the training part, and how often, int32 [k] and float32 [k].

        Equal counts in order of index; a list that is shorter than k goes on as in `top_k`.
        """
        check_top_k((k,), self.num_items)
        counts = self.training_counts.astype(np.float32)
        counts[~allowed if allowed is not None else [0]] = -np.inf
        counts[0] = -np.inf
        best = np.argsort(-counts, kind="stable")[:k]
        return items_left(best, counts[best]).astype(np.int32), counts[best]

    def seen(self, histories: Sequence[History], rows: Sequence[int] | np.ndarray, b: int) -> np.ndarray | None:
        """Returns the items of whole histories, int32 [b, s], filled with 0; None where scores do not read them."""
        if not self.config.model.seen_bias:
            return None
        return padded_lists([np.unique(histories[i].items) for i in rows], b)

    def _batches(self, histories: Sequence[History]) -> Iterator[tuple[np.ndarray, tuple[np.ndarray, ...]]]:
        """Yields batches of few static shapes: places in `histories` [n], and items, lengths and times of b >= n."""
        lengths = np.array([min(len(history.items), self.max_len) for history in histories], np.int32)
        order = np.argsort(lengths, kind="stable")
        first = 0
        while first < len(order):
            # Ascending lengths: the batch's static length is that of the last row that still fits.
            row_limit = self._row_limit(int(lengths[order[first]]))
            rows = order[first : first + row_limit]
            length = self.static_length(int(lengths[rows[-1]]))
            rows = rows[: self._row_limit(length)]
            length = self.static_length(int(lengths[rows[-1]]))
            yield rows, self.inputs([histories[i] for i in rows], lengths[rows], length)
            first += len(rows)

    def static_length(self, length: int) -> int:
        """Returns the columns in which a history of so many read events is computed."""
        return min(max(next_power_of_two(length), SHORTEST_LENGTH), self.max_len)

    def _row_limit(self, length: int) -> int:
        return 1 << (
            max(1, min(BATCH_TOKENS // self.static_length(length), score_rows(self.num_items + 1))).bit_length() - 1
        )

    def check(self, histories: Sequence[History], k: int) -> None:
        """Refuses what `top_k` cannot do; raises ValueError as it says."""
        check_top_k((k,), self.num_items)
        for history in histories:
            if len(history.items) == 0:
                raise ValueError(f"{history.label} is empty; give at least 1 item id")

    def inputs(self, histories: Sequence[History], lengths: np.ndarray, length: int) -> tuple[np.ndarray, ...]:
        """Returns items, lengths and times of one call; as many rows as a power of two, for which programs are kept.

        Args:
          histories: n of them.
          lengths: int [n], how many of the last events of each are read, at least 1.
          length: columns, see `static_length`.
        """
        n = len(histories)
        b = next_power_of_two(n)
        items = np.zeros((b, length), np.int32)
        timestamps = np.zeros((b, max(length, self.config.model.max_len)), np.int64)
        for row, history in enumerate(histories):
            items[row, : lengths[row]] = history.items[-lengths[row] :]
            timestamps[row, : lengths[row]] = history.timestamps[-lengths[row] :]
        # Filling rows read item 0 once: any valid row will do, their results are dropped.
        filled_lengths = np.ones(b, np.int32)
        filled_lengths[:n] = lengths
        return items, filled_lengths, timestamps_for_device(timestamps, self.config.data.timestamp_precision)


def _require_finite(finite: np.ndarray, labels: Sequence[str]) -> None:
    if not finite.all():
        raise FloatingPointError(
            f"the scores for {labels[int(np.argmin(finite))]} are not finite; "
            "the run's parameters hold NaN or infinity: train again or choose another run"
        )
