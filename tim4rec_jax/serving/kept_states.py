"""States of users between requests: what a causal model keeps of a whole history, gone on from as events come."""

import collections
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from tim4rec_jax.data.loader import timestamps_for_device
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.streaming import Streamer, extend_rows

# Columns of a call that takes events in.
PIECES = (1, 16, 256)


class KeptStates:
    """States of the users that were asked for last, on the host; others are computed again from their histories.

    A state is a function of the history alone (but for rounding, which depends on where it was cut), so nothing is lost
    with one.

    Attributes:
      most: users whose states are kept.
    """

    def __init__(self, recommender: Recommender, *, rows: int, most_bytes: int) -> None:
        """Keeps nothing yet.

        Args:
          recommender: of a model that can go on from a state.
          rows: most rows of a call, a power of two.
          most_bytes: of the states that are kept; one call's are kept in any case.

        Raises:
          ValueError: the model cannot go on from a state.
        """
        self._streamer = Streamer(recommender.model, recommender.params)
        self._precision = recommender.config.data.timestamp_precision
        self._rows = rows
        self.most = max(rows, most_bytes // self._streamer.state_bytes())
        self._kept: collections.OrderedDict[str, tuple[Any, int]] = collections.OrderedDict()
        config = recommender.model.config
        hidden = np.zeros((1, config.d_model), jax.numpy.dtype(config.dtype))
        self._empty = jax.tree.map(np.asarray, (self._streamer.init_state(1), hidden))

    def __len__(self) -> int:
        return len(self._kept)

    def warming(self) -> Iterator[None]:
        """Compiles every program, in steps of one."""
        for rows in {1, self._rows}:
            for length in PIECES:
                histories = [History(np.ones(length, np.int32), np.zeros(length, np.int64))] * rows
                self.hidden([None] * rows, histories)
                yield

    def hidden(self, users: Sequence[str | None], histories: Sequence[History]) -> np.ndarray:
        """Returns the hidden states [n, d] after whole histories.

        Args:
          users: whose they are; None for a history whose state is not kept.
          histories: n of them, of at least one event; a user's goes on from the one that came before under its name.
        """
        states: list[Any] = []
        done: list[int] = []
        for user, history in zip(users, histories, strict=True):
            state, count = self._kept.get(user, (self._empty, 0)) if user is not None else (self._empty, 0)
            if count > len(history.items):
                state, count = self._empty, 0
            states.append(state)
            done.append(count)
        while waiting := [i for i, history in enumerate(histories) if done[i] < len(history.items)]:
            for shorter, length in zip((0, *PIECES), PIECES, strict=False):
                left = {i: min(len(histories[i].items) - done[i], PIECES[-1]) for i in waiting}
                chosen = [i for i in waiting if shorter < left[i] <= length]
                for first in range(0, len(chosen), self._rows):
                    part = chosen[first : first + self._rows]
                    new = self._go_on(
                        [states[i] for i in part], [histories[i] for i in part], [done[i] for i in part], length
                    )
                    for i, state in zip(part, new, strict=True):
                        states[i] = state
                        done[i] += left[i]
                waiting = [i for i in waiting if i not in chosen]
        for user, state, count in zip(users, states, done, strict=True):
            if user is not None:
                self._kept[user] = state, count
                self._kept.move_to_end(user)
        while len(self._kept) > self.most:
            self._kept.popitem(last=False)
        return np.concatenate([hidden for _, hidden in states])

    def _go_on(self, states: list[Any], histories: list[History], done: list[int], length: int) -> list[Any]:
        """Returns the states after the next at most `length` events of each; one row alone, or all rows."""
        rows = 1 if len(states) == 1 else self._rows
        filled = states + [self._empty] * (rows - len(states))
        table = jax.tree.map(lambda *leaves: np.concatenate(leaves), *filled)
        items, times = np.zeros((rows, length), np.int32), np.zeros((rows, length), np.int64)
        lengths = np.zeros(rows, np.int32)
        for row, (history, first) in enumerate(zip(histories, done, strict=True)):
            part = slice(first, first + length)
            lengths[row] = len(history.items[part])
            items[row, : lengths[row]] = history.items[part]
            times[row, : lengths[row]] = history.timestamps[part]
        after = extend_rows(
            self._streamer.params,
            table,
            np.arange(rows, dtype=np.int32),
            items,
            lengths,
            timestamps_for_device(times, self._precision),
            model=self._streamer.model,
        )
        after = jax.device_get(after)
        # Each row owns its memory: one that is kept keeps no others.
        return [jax.tree.map(lambda leaf, row=row: leaf[row : row + 1].copy(), after) for row in range(len(states))]
