"""Recommendations from a run folder: histories in, the k best items out, in jitted batches of few static shapes."""

import dataclasses
import difflib
import functools
import pathlib
from collections.abc import Callable, Sequence
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
from tim4rec_jax.models import apply_method, last_hidden, variables
from tim4rec_jax.run_dir import read_earlier_model_settings, read_histories, read_items
from tim4rec_jax.serving.stored_run import load_model

SCORE_TILE_BYTES = 64 * 2**20
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
    """

    items: np.ndarray
    timestamps: np.ndarray
    label: str = "the history"
    assumed_gap: int | None = None


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """One recommended item: its raw id, the model's score (a logit) and its title, None where no titles are known."""

    item_id: str
    score: float
    title: str | None


def next_power_of_two(n: int) -> int:
    """Returns the least power of two that is at least n >= 1."""
    return 1 << (n - 1).bit_length()


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


def best_columns(scores: jax.Array, excluded: jax.Array, k: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Picks the k best columns a row, best first, never column 0, the padding; equal scores in order of index.

    Args:
      scores: [b, v].
      excluded: int [b, s] columns to leave out as well; 0 for none.
      k: columns a row.

    Returns:
      Scores [b, k], indices [b, k], and whether all scores of a row are finite [b].
    """
    finite = jnp.isfinite(scores).all(axis=1)
    scores = scores.at[jnp.arange(scores.shape[0])[:, None], excluded].set(-jnp.inf).at[:, 0].set(-jnp.inf)
    best, indices = jax.lax.top_k(scores, k)
    return best, indices, finite


def items_left(indices: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Puts item 0 where `best_columns` had nothing left but what is excluded, whose score is -inf."""
    return np.where(scores == -np.inf, 0, indices)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _top_k(
    params: Any,
    items: jax.Array,
    lengths: jax.Array,
    timestamps: jax.Array,
    excluded: jax.Array,
    *,
    model: nn.Module,
    k: int,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The k best items after each history, see `best_columns`."""
    hidden = last_hidden(model, variables(params), items, lengths, timestamps)
    return best_columns(apply_method(model, variables(params), "score", hidden), excluded, k)


class Recommender:
    """A trained model with the ids, titles and histories of its log.

    Attributes:
      earlier_settings: of the model, as a version with one class of settings for all models wrote them into the run;
        its tables of user states are known by them. None for other runs.
    """

    earlier_settings: dict[str, Any] | None = None

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
        self._histories = histories
        self._index_of_item = {item_id: index for index, item_id in enumerate(self.item_ids, start=1)}

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
        recommender.earlier_settings = read_earlier_model_settings(run)
        return recommender

    @cached_property
    def _row_of_user(self) -> dict[str, int]:
        return {user: row for row, user in enumerate(self._histories["user_id"].to_list())}

    @cached_property
    def typical_gap(self) -> int:
        """Median seconds between consecutive events of a user in the run's log."""
        gaps = self._histories.select(pl.col("timestamps").list.diff().explode().drop_nulls().median()).item()
        return 0 if gaps is None else round(gaps)

    @cached_property
    def newest_time(self) -> int:
        """Time of the newest event in the run's log, seconds since 1970."""
        return int(self._histories.select(pl.col("timestamps").list.max().max()).item())

    def history_of_user(self, raw_user_id: str) -> History:
        """The stored history of a user, test event included: what comes next is what nobody has seen yet.

        Args:
          raw_user_id: id as in the log.

        Raises:
          ValueError: for an unknown user; the nearest known ids are shown.
        """
        row = self._row_of_user.get(str(raw_user_id))
        if row is None:
            raise ValueError(
                f"unknown user {str(raw_user_id)!r}; "
                f"nearest known: {nearest(str(raw_user_id), list(self._row_of_user))}; "
                f"histories.parquet in the run folder lists all {len(self._row_of_user)} "
                "(users removed in cleaning are not among them: give their items as a history instead)"
            )
        stored = self._histories.row(row, named=True)
        return History(
            np.asarray(stored["items"], np.int32),
            np.asarray(stored["timestamps"], np.int64),
            label=f"user {str(raw_user_id)!r}",
        )

    def stored_histories(self) -> dict[str, History]:
        """Returns the histories of all users of the run's log by raw id; see `history_of_user`."""
        columns = self._histories.select("user_id", "items", "timestamps")
        return {
            user: History(np.asarray(items, np.int32), np.asarray(times, np.int64), label=f"user {user!r}")
            for user, items, times in columns.iter_rows()
        }

    def item_index(self, raw_item_id: str, label: str, place: str = "") -> int:
        """The index from 1 of an item.

        Args:
          raw_item_id: id as in the log.
          label: what messages begin with, such as "user '42'".
          place: where it stood, for messages.

        Raises:
          ValueError: for an unknown item; the nearest ids are shown.
        """
        index = self._index_of_item.get(raw_item_id)
        if index is None:
            raise ValueError(
                f"{label}: unknown item {raw_item_id!r}{place}; nearest known: {nearest(raw_item_id, self.item_ids)}; "
                f"item_ids.parquet in the run folder lists all {self.num_items}"
            )
        return index

    def history_from_ids(
        self, raw_item_ids: Sequence[str], times: Sequence[int] | None = None, *, label: str = "the history"
    ) -> History:
        """A history from raw item ids.

        Without times, consecutive items are taken to lie `typical_gap` seconds apart and the last of them at
        `newest_time`; the history says so in `assumed_gap`. A model without time does not read them.

        Args:
          raw_item_ids: ids as in the log, oldest first.
          times: whole seconds since 1970, one per item, never backwards.
          label: how messages call it.

        Raises:
          ValueError: for no item, an unknown item (the nearest ids are shown), a number of times that differs from the
            number of items, or times that are no seconds or go backwards.
        """
        ids = [str(item_id) for item_id in raw_item_ids]
        if not ids:
            raise ValueError(f"{label} is empty; give at least 1 item id")
        found = [self.item_index(item_id, label, f" at position {i}") for i, item_id in enumerate(ids, start=1)]
        items = np.array(found, np.int32)
        if times is None:
            steps_back = np.arange(len(ids))[::-1]
            return History(items, self.newest_time - steps_back * self.typical_gap, label, self.typical_gap)
        return History(items, _checked_times(times, len(ids), label), label)

    def recommend(
        self, histories: Sequence[History], k: int, *, exclude_seen: bool = False
    ) -> list[list[Recommendation]]:
        """The k items that come next most likely, best first, for each history; fewer where fewer are unseen.

        Args:
          histories: of any length; the last `max_len` events are read, as in evaluation.
          k: items per history.
          exclude_seen: leave every item of a history out of its list.

        Raises:
          ValueError: for an empty history, a k under 1, or a k over the catalogue.
          FloatingPointError: where scores are not finite.
        """
        return self.named(*self.top_k(histories, k, exclude_seen=exclude_seen))

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
        self, histories: Sequence[History], k: int, *, exclude_seen: bool = False
    ) -> tuple[np.ndarray, np.ndarray]:
        """As `recommend`, in arrays: a list that is shorter than k goes on with item 0 of score -inf.

        Args:
          histories: n of them, of any length; the last `max_len` events are read, as in evaluation.
          k: items per history.
          exclude_seen: leave every item of a history out of its list.

        Returns:
          Item indices from 1 [n, k] int32 and their scores [n, k] float32, best first; equal scores in order of index.

        Raises:
          ValueError: for an empty history, a k under 1, or a k over the catalogue.
          FloatingPointError: where scores are not finite.
        """
        self.check(histories, k)
        indices = np.zeros((len(histories), k), np.int32)
        scores = np.zeros((len(histories), k), np.float32)
        lengths = np.array([min(len(history.items), self.max_len) for history in histories], np.int32)
        order = np.argsort(lengths, kind="stable")
        first = 0
        while first < len(order):
            # Ascending lengths: the batch's static length is that of the last row that still fits.
            row_limit = self._row_limit(int(lengths[order[first]]))
            rows = order[first : first + row_limit]
            length = self._static_length(int(lengths[rows[-1]]))
            rows = rows[: self._row_limit(length)]
            length = self._static_length(int(lengths[rows[-1]]))
            indices[rows], scores[rows] = self._run(
                [histories[i] for i in rows], lengths[rows], length, k, exclude_seen
            )
            first += len(rows)
        return indices, scores

    def _static_length(self, length: int) -> int:
        return min(max(next_power_of_two(length), SHORTEST_LENGTH), self.max_len)

    def _row_limit(self, length: int) -> int:
        rows = min(BATCH_TOKENS // self._static_length(length), SCORE_TILE_BYTES // (4 * (self.num_items + 1)))
        return 1 << (max(1, rows).bit_length() - 1)

    def check(self, histories: Sequence[History], k: int) -> None:
        """Refuses what `top_k` cannot do; raises ValueError as it says."""
        check_top_k((k,), self.num_items)
        for history in histories:
            if len(history.items) == 0:
                raise ValueError(f"{history.label} is empty; give at least 1 item id")

    def _run(
        self, histories: Sequence[History], lengths: np.ndarray, length: int, k: int, exclude_seen: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """One device call; all sizes are rounded up to powers of two, so that later calls find a compiled program."""
        n = len(histories)
        b = next_power_of_two(n)
        seen = next_power_of_two(max(len(history.items) for history in histories)) if exclude_seen else 1
        items = np.zeros((b, length), np.int32)
        timestamps = np.zeros((b, max(length, self.config.model.max_len)), np.int64)
        excluded = np.zeros((b, seen), np.int32)
        for row, history in enumerate(histories):
            items[row, : lengths[row]] = history.items[-lengths[row] :]
            timestamps[row, : lengths[row]] = history.timestamps[-lengths[row] :]
            if exclude_seen:
                excluded[row, : len(history.items)] = history.items
        # Filling rows read item 0 once: any valid row will do, their results are dropped.
        filled_lengths = np.ones(b, np.int32)
        filled_lengths[:n] = lengths
        best, indices, finite = jax.device_get(
            _top_k(
                self.params,
                items,
                filled_lengths,
                timestamps_for_device(timestamps, self.config.data.timestamp_precision),
                excluded,
                model=self.model,
                k=min(next_power_of_two(k), self.num_items),
            )
        )
        if not finite[:n].all():
            raise FloatingPointError(
                f"the scores for {histories[int(np.argmin(finite[:n]))].label} are not finite; "
                "the run's parameters hold NaN or infinity: train again or choose another run"
            )
        return items_left(indices, best)[:n, :k], best[:n, :k]
