"""A recommender whose calls have few static shapes, all compiled before the first answer."""

import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.models import item_scores, last_hidden, variables
from tim4rec_jax.serving.kept_states import KeptStates
from tim4rec_jax.serving.ranking import best_columns, items_left, next_power_of_two, score_rows
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.time_mask import TimeMask

# Rows of a call that looks for similar items.
SIMILAR_ROWS = (1, 8)
_COMPILED = "/jax/core/compile/backend_compile_duration"
_NOTHING = np.zeros(0, np.int32)


class Compilations:
    """How many programs this process has compiled, or fetched from what was kept of them."""

    def __init__(self) -> None:
        self.count, self._lock = 0, threading.Lock()

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        if event == _COMPILED:
            with self._lock:
                self.count += 1


@functools.cache
def compilations() -> Compilations:
    """Returns the counter, which counts from the first call on."""
    counter = Compilations()
    jax.monitoring.register_event_duration_secs_listener(counter._heard)
    return counter


class _Asked(NamedTuple):
    """What is asked of each row: bool [b, v] items to rank, int [b, m] items to score, bool [b, v] items seen."""

    allowed: Any
    scored: Any
    seen: Any


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _rank(
    params: Any, items: jax.Array, lengths: jax.Array, timestamps: jax.Array, asked: _Asked, *, model: nn.Module, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return _rank_hidden(params, last_hidden(model, variables(params), items, lengths, timestamps), asked, model, k)


@functools.partial(jax.jit, static_argnames=("model", "k"))
def _rank_states(
    params: Any, hidden: jax.Array, asked: _Asked, *, model: nn.Module, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    return _rank_hidden(params, hidden, asked, model, k)


def _rank_hidden(
    params: Any, hidden: jax.Array, asked: _Asked, model: nn.Module, k: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    scores = item_scores(model, variables(params), hidden, asked.seen)
    best, indices, finite = best_columns(scores, jnp.zeros((scores.shape[0], 1), jnp.int32), k, asked.allowed)
    return best, indices, finite, jnp.take_along_axis(scores, asked.scored, axis=1)


class Row(NamedTuple):
    """One history to rank the catalogue after.

    Attributes:
      history: with at least one event.
      allowed: bool [v], the items to rank; None for all.
      scored: int [m] item indices whose scores are wanted as well.
      user: whose history it is, where its state may be kept.
    """

    history: History
    allowed: np.ndarray | None = None
    scored: np.ndarray = _NOTHING
    user: str | None = None


class Ranked(NamedTuple):
    """What a row was answered.

    Attributes:
      indices: int32 [n] item indices, best first, n at most k; equal scores in order of index.
      scores: float32 [n].
      scored: float32 [m], the scores of the row's own items.
      finite: whether all of the model's scores are; the others mean nothing where they are not.
    """

    indices: np.ndarray
    scores: np.ndarray
    scored: np.ndarray
    finite: bool


class PreparedRecommender:
    """Ranks as `Recommender` does, in shapes that `warm` has compiled.

    A row alone, and as many as there can be together, are computed in the shape, and so with the bits, that
    `Recommender.top_k` gives them; in between as many as the next power of two, in one of two lengths.

    Attributes:
      recommender: of a run.
      rows: most rows of a call.
      k: items of every list, at most the catalogue.
      scored: most items of a row that are scored by name.
      states: of the users asked for last, where whole histories are read; else None.
    """

    def __init__(
        self,
        recommender: Recommender,
        *,
        rows: int = 32,
        k: int = 100,
        scored: int = 64,
        state_bytes: int | None = None,
    ) -> None:
        """Chooses the shapes.

        Args:
          recommender: of a run.
          rows: see the attributes, as k and scored; fewer where the catalogue is large.
          state_bytes: read whole histories, and keep so many bytes of states; None reads the last max_len events.

        Raises:
          ValueError: whole histories are to be read by a model that cannot go on from a state.
        """
        self.recommender, self.scored = recommender, scored
        self.rows = min(1 << (rows.bit_length() - 1), score_rows(recommender.num_items + 1))
        self.k = min(k, recommender.num_items)
        longest = recommender.max_len
        self._lengths = sorted({recommender.static_length(length) for length in (max(1, longest // 4), longest)})
        self._everything = np.ones(recommender.num_items + 1, bool)
        self.mask = TimeMask(recommender)
        self.states = None
        if state_bytes is not None:
            self.states = KeptStates(recommender, rows=self.rows, most_bytes=state_bytes)

    def shapes(self) -> list[tuple[int, int]]:
        """Returns rows and columns of every call that ranks."""
        if self.states is not None:
            return [(1 << i, 1) for i in range(self.rows.bit_length())]
        longest = self.recommender.max_len
        every = sorted({self.recommender.static_length(length) for length in range(1, longest + 1)})
        powers = [1 << i for i in range(self.rows.bit_length())]
        return [(b, length) for b in powers for length in (every if b in (1, self.rows) else self._lengths)]

    def warm(self) -> None:
        """Compiles every program, and runs each once more so that the first answer finds nothing cold."""
        for _ in self.warming():
            pass

    def warming(self) -> Iterator[None]:
        """Does what `warm` does, in steps of a program, after any of which it may be left."""
        if self.states is not None:
            yield from self.states.warming()
        for b, length in self.shapes():
            row = Row(History(np.ones(length, np.int32), np.zeros(length, np.int64)))
            for _ in range(2):
                self._call([row] * b, length)
            yield
        for b in SIMILAR_ROWS:
            for _ in range(2):
                self.similar([1] * b)
            yield
        self.mask.warm()
        yield

    def rank(self, rows: Sequence[Row]) -> list[Ranked]:
        """Ranks the catalogue after each history, of which the last max_len events are read, or all with states."""
        lengths = [min(len(row.history.items), self.recommender.max_len) for row in rows]
        order = sorted(range(len(rows)), key=lambda i: lengths[i])
        ranked: list[Ranked | None] = [None] * len(rows)
        for first in range(0, len(order), self.rows):
            places = order[first : first + self.rows]
            longest = lengths[places[-1]]
            length = 1 if self.states is not None else self._length(len(places), longest)
            for place, answer in zip(places, self._call([rows[i] for i in places], length), strict=True):
                ranked[place] = answer
        return [answer for answer in ranked if answer is not None]

    def _length(self, rows: int, longest: int) -> int:
        """Returns the columns of a call, one of `shapes`."""
        length = self.recommender.static_length(longest)
        if next_power_of_two(rows) in (1, self.rows):
            return length
        return next(other for other in self._lengths if other >= length)

    def _call(self, rows: Sequence[Row], length: int) -> list[Ranked]:
        histories, b = [row.history for row in rows], next_power_of_two(len(rows))
        allowed = np.empty((b, len(self._everything)), bool)
        scored = np.zeros((b, self.scored), np.int32)
        for place, row in enumerate(rows):
            allowed[place] = self._everything if row.allowed is None else row.allowed
            scored[place, : len(row.scored)] = row.scored
        allowed[len(rows) :] = True
        seen = None
        if self.recommender.config.model.seen_bias:
            seen = np.zeros(allowed.shape, bool)
            for place, history in enumerate(histories):
                seen[place, history.items] = True
        asked = _Asked(allowed, scored, seen)
        model, params = self.recommender.model, self.recommender.params
        if self.states is None:
            lengths = np.array([min(len(history.items), length) for history in histories], np.int32)
            inputs = self.recommender.inputs(histories, lengths, length)
            found = _rank(params, *inputs, asked, model=model, k=self.k)
        else:
            hidden = self.states.hidden([row.user for row in rows], histories)
            filled = np.concatenate([hidden, np.zeros((b - len(hidden), hidden.shape[1]), hidden.dtype)])
            found = _rank_states(params, filled, asked, model=model, k=self.k)
        best, indices, finite, of_scored = jax.device_get(found)
        counts = np.count_nonzero(items_left(indices, best), axis=1)
        return [
            Ranked(indices[i, : counts[i]], best[i, : counts[i]], of_scored[i, : len(row.scored)], bool(finite[i]))
            for i, row in enumerate(rows)
        ]

    def similar(self, items: Sequence[int], allowed: np.ndarray | None = None) -> list[tuple[np.ndarray, np.ndarray]]:
        """Returns for each item index those most like it and their cosines, at most k; see `Recommender.similar`.

        Raises:
          FloatingPointError: where a cosine is not finite.
        """
        answers, allowed = [], self._everything if allowed is None else allowed
        most = SIMILAR_ROWS[-1]
        for first in range(0, len(items), most):
            part = list(items[first : first + most])
            rows = next(b for b in SIMILAR_ROWS if b >= len(part))
            filled = part + part[:1] * (rows - len(part))
            indices, cosines = self.recommender.similar(filled, self.k, allowed=allowed)
            for row in range(len(part)):
                left = np.count_nonzero(indices[row])
                answers.append((indices[row, :left], cosines[row, :left]))
        return answers
