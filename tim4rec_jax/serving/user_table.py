"""The states of many users by raw id: events in, recommendations out, saved and loaded with their bits."""

import datetime
import json
import pathlib
from array import array
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from tim4rec_jax.serving import user_table_file
from tim4rec_jax.serving.ranking import next_power_of_two
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.streaming import Streamer, earlier_fingerprint, extend_rows, fingerprint
from tim4rec_jax.serving.user_table_file import LAST_SECOND

FIRST_CAPACITY = 64
PIECE_LENGTHS = (1, 4, 16, 64, 256)
MOST_ROWS = 4**6
BATCH_TOKENS = 2**15


class Event(NamedTuple):
    """One thing a user did: raw ids, and seconds since 1970."""

    user: str
    item: str
    timestamp: int


def _batch_rows(waiting: int, most: int) -> int:
    """A power of four, so that few programs compile: half full at least, or the next smaller one."""
    rows = 1
    while rows < waiting and rows < most:
        rows *= 4
    rows = min(rows, most)
    return rows if rows == 1 or 2 * waiting >= rows else rows // 4


class UserTable:
    """One row of model state a user; new users begin empty.

    Events are checked when they are given and computed when an answer, a save or `flush` needs them, many users in one
    call. Memory: `streamer.state_bytes()` per user, and 4 bytes per event where items are kept.

    Attributes:
      recommender: the run's model, ids and titles.
      keeps_items: every user's items are kept on the host, so that seen ones can be left out.
      notes: numbers and words saved with the table; not read here.
      pending: events given and not yet computed.
    """

    def __init__(self, recommender: Recommender, *, keep_items: bool = True) -> None:
        """Makes an empty table.

        Args:
          recommender: of a run whose model can go on from a state.
          keep_items: keep every user's items.

        Raises:
          ValueError: for a model that cannot go on from a state, or whose scores read the items, which are not kept.
        """
        self._reads_items = recommender.config.model.seen_bias
        if self._reads_items and not keep_items:
            raise ValueError("the model has seen_bias: its scores read every user's items; keep them (keep_items)")
        self.recommender, self.keeps_items = recommender, keep_items
        self.streamer = Streamer(recommender.model, recommender.params)
        self.notes: dict[str, Any] = {}
        self.pending = 0
        self._rows: dict[str, int] = {}
        self._last_times, self._events = array("q"), array("q")
        self._items: list[array] = []
        self._waiting: dict[int, tuple[array, array]] = {}
        self._table = self._empty(FIRST_CAPACITY)

    def _empty(self, rows: int) -> tuple[Any, jax.Array]:
        config = self.recommender.model.config
        return self.streamer.init_state(rows), jnp.zeros((rows, config.d_model), config.dtype)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, user: str) -> bool:
        return user in self._rows

    @property
    def users(self) -> list[str]:
        """Raw ids in order of their first event."""
        return list(self._rows)

    @property
    def hidden(self) -> jax.Array:
        """Hidden states [rows, d] after each user's last computed event, in order of `users`; later rows are empty."""
        return self._table[1]

    def events_of(self, user: str) -> int:
        """Returns how many events a user has; 0 for an unknown one."""
        row = self._rows.get(user)
        return 0 if row is None else self._events[row]

    def add(self, events: Iterable[Event]) -> None:
        """Takes in events, each user's oldest first: all of them, or none where one is refused.

        Raises:
          ValueError: for an unknown item (the nearest are shown), or a time that is no second or lies before the
            user's last; nothing has changed.
        """
        checked: list[tuple[str, int, int]] = []
        latest: dict[str, int | None] = {}
        for user, item, timestamp in events:
            label = f"user {user!r}"
            index = self.recommender.item_index(item, label)
            if user not in latest:
                row = self._rows.get(user)
                latest[user] = None if row is None else self._last_times[row]
            latest[user] = seconds = checked_time(timestamp, latest[user], f"{label}, item {item!r}")
            checked.append((user, index, seconds))
        for user, index, seconds in checked:
            self._queue(user, [index], [seconds])

    def add_histories(self, histories: Mapping[str, History]) -> None:
        """Takes in whole histories by user: all of them, or none where one is refused.

        Raises:
          ValueError: for a history that is empty or begins before the user's last event; nothing has changed.
        """
        for user, history in histories.items():
            if len(history.items) == 0:
                raise ValueError(f"{history.label} is empty; give at least 1 event")
            row = self._rows.get(user)
            checked_time(int(history.timestamps[0]), None if row is None else self._last_times[row], f"user {user!r}")
            checked_time(int(history.timestamps[-1]), int(history.timestamps[0]), f"user {user!r}")
        for user, history in histories.items():
            self._queue(user, history.items.tolist(), history.timestamps.tolist())

    def _queue(self, user: str, items: list[int], seconds: list[int]) -> None:
        row = self._rows.setdefault(user, len(self._rows))
        if row == len(self._events):
            self._last_times.append(0)
            self._events.append(0)
            if self.keeps_items:
                self._items.append(array("i"))
        self._last_times[row] = seconds[-1]
        self._events[row] += len(items)
        if self.keeps_items:
            self._items[row].extend(items)
        waiting_items, waiting_seconds = self._waiting.setdefault(row, (array("i"), array("i")))
        waiting_items.extend(items)
        waiting_seconds.extend(seconds)
        self.pending += len(items)

    def flush(self) -> None:
        """Computes the states of all events given so far."""
        self._grow()
        waiting, self._waiting, self.pending = self._waiting, {}, 0
        first = 0
        while waiting:
            # Rounds of one piece a user; within a round, users with pieces of like length together.
            pieces = {row: min(len(items) - first, PIECE_LENGTHS[-1]) for row, (items, _) in waiting.items()}
            for shorter, length in zip((0, *PIECE_LENGTHS), PIECE_LENGTHS, strict=False):
                rows = [row for row, size in pieces.items() if shorter < size <= length]
                most = min(MOST_ROWS, BATCH_TOKENS // length)
                while rows:
                    batch = _batch_rows(len(rows), most)
                    chosen, rows = rows[:batch], rows[batch:]
                    self._run({row: waiting[row] for row in chosen}, batch, length, first)
            first += PIECE_LENGTHS[-1]
            waiting = {row: events for row, events in waiting.items() if len(events[0]) > first}

    def _grow(self) -> None:
        capacity = self.hidden.shape[0]
        needed = capacity
        while needed < len(self._rows):
            needed *= 2
        if needed > capacity:
            more = self._empty(needed - capacity)
            self._table = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), self._table, more)

    def _run(self, events: dict[int, tuple[array, array]], batch: int, length: int, first: int) -> None:
        items, seconds = np.zeros((batch, length), np.int32), np.zeros((batch, length), np.int32)
        rows, lengths = np.full(batch, np.iinfo(np.int32).max, np.int32), np.zeros(batch, np.int32)
        for place, (row, (row_items, row_seconds)) in enumerate(events.items()):
            piece = row_items[first : first + length]
            rows[place], lengths[place] = row, len(piece)
            items[place, : len(piece)] = piece
            seconds[place, : len(piece)] = row_seconds[first : first + length]
        self._table = extend_rows(
            self.streamer.params, self._table, rows, items, lengths, seconds, model=self.streamer.model
        )

    def top_k(
        self, users: Sequence[str], k: int, *, exclude_seen: bool = False, allowed: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ranks the catalogue for users.

        Args:
          users: raw ids.
          k: items per user.
          exclude_seen: leave out what the user has had; needs the items to be kept.
          allowed: bool [v], the items that may be recommended; None for all.

        Returns:
          Item indices from 1 [n, k] int32 and their scores [n, k], best first; see `Streamer.top_k`.

        Raises:
          ValueError: for a user without events, a k that does not fit, or items that are not kept.
          FloatingPointError: where scores are not finite.
        """
        self._require_events(users)
        if exclude_seen and not self.keeps_items:
            raise ValueError("exclude_seen needs every user's items, which this table does not keep (keep_items)")
        self.flush()
        n = len(users)
        rows = np.zeros(next_power_of_two(max(1, n)), np.int32)
        rows[:n] = [self._rows[user] for user in users]
        labels = [f"user {user!r}" for user in users] + ["no user"] * (len(rows) - n)
        had = None
        if exclude_seen or self._reads_items:  # by filling rows nothing: their results are dropped
            had = [np.array(self._items[row] if i < n else [], np.int32) for i, row in enumerate(rows)]
        excluded = had if exclude_seen else None
        indices, scores = self.streamer.top_k(self.hidden[rows], k, excluded, labels, allowed, had)
        return indices[:n], scores[:n]

    def item_scores(self, user: str, items: np.ndarray) -> np.ndarray:
        """Returns the scores that `top_k` would give certain item indices for a user.

        Raises:
          ValueError: the user has no events.
          FloatingPointError: where scores are not finite.
        """
        self._require_events([user])
        self.flush()
        row = self._rows[user]
        had = [np.array(self._items[row], np.int32)] if self._reads_items else None
        [scores] = self.streamer.item_scores(self.hidden[np.array([row])], [items], had)
        return scores

    def _require_events(self, users: Sequence[str]) -> None:
        for user in users:
            if user not in self._rows:
                raise ValueError(
                    f"user {user!r} has no events; give at least one, start with --warm for the run's own users, or "
                    "with --unknown_users=popularity"
                )

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.streamer.model, self.streamer.params, self.recommender.item_ids)

    def _earlier_fingerprint(self) -> str | None:
        known = self.recommender
        settings = known.earlier_settings
        return None if settings is None else earlier_fingerprint(settings, known.params, known.item_ids)

    def save(self, path: pathlib.Path) -> None:
        """Writes the table into one file; a kill leaves the old file or the new one.

        Events that wait are saved as they are, so that what is computed together, and with it every bit, does not
        depend on when a table was saved.
        """
        self._grow()
        header = {
            "format": user_table_file.TABLE_FORMAT,
            "fingerprint": self._fingerprint,
            "keeps_items": self.keeps_items,
            "notes": self.notes,
        }
        arrays = {"users": user_table_file.text(json.dumps(self.users))}
        arrays |= {"last_times": np.array(self._last_times), "events": np.array(self._events)}
        if self.keeps_items:
            arrays["items"] = _joined(self._items)
        waiting = self._waiting.values()
        lengths = np.array([len(items) for items, _ in waiting], np.int64)
        parts = (np.array(list(self._waiting), np.int32), lengths, *(_joined(p) for p in _columns(waiting)))
        arrays |= dict(zip(user_table_file.WAITING, parts, strict=True))
        # Cut on the host: on the device every number of users would be another program.
        arrays |= {name: user_table_file.plain(np.asarray(leaf)[: len(self)]) for name, leaf in self._leaves().items()}
        user_table_file.write(path, header, arrays)

    def _leaves(self) -> dict[str, jax.Array]:
        """The leaves of the table by their paths."""
        leaves = jax.tree_util.tree_leaves_with_path(self._table)
        return {f"table{jax.tree_util.keystr(path)}": leaf for path, leaf in leaves}

    @classmethod
    def load(cls, path: pathlib.Path, recommender: Recommender) -> "UserTable":
        """Reads a table that `save` wrote.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: the file is damaged, has another format, or belongs to another model.
        """
        header, arrays = user_table_file.read(path)
        table = cls(recommender, keep_items=header.get("keeps_items") is True)
        if header.get("fingerprint") not in (table._fingerprint, table._earlier_fingerprint()):
            raise ValueError(
                f"{path} holds the states of another model or of other parameters; states mean nothing to a model that "
                "did not make them: give the run that made it, or replay the events into a new table"
            )
        rows = {name: np.zeros((1, *leaf.shape[1:]), leaf.dtype) for name, leaf in table._leaves().items()}
        try:
            user_table_file.check(arrays, header, rows, recommender.num_items)
        except ValueError as error:
            raise user_table_file.damaged(path, error) from error
        table._take(user_table_file.users(arrays["users"]), header["notes"], arrays)
        return table

    def _take(self, users: list[str], notes: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
        self.notes = notes
        self._rows = {user: row for row, user in enumerate(users)}
        self._last_times = array("q", arrays["last_times"].tobytes())
        self._events = array("q", arrays["events"].tobytes())
        if self.keeps_items:
            self._items = _parts(arrays["items"], arrays["events"])
        rows, lengths, items, seconds = (arrays[name] for name in user_table_file.WAITING)
        columns = zip(_parts(items, lengths), _parts(seconds, lengths), strict=True)
        self._waiting = dict(zip(rows.tolist(), columns, strict=True))
        self.pending = int(lengths.sum())
        self._grow()
        leaves, structure = jax.tree.flatten(self._table)
        filled = []
        for name, leaf in zip(self._leaves(), leaves, strict=True):
            rows = np.array(leaf)
            rows[: len(users)] = arrays[name].view(leaf.dtype)
            # A copy: the next call takes its memory over.
            filled.append(jnp.array(rows))
        self._table = jax.tree.unflatten(structure, filled)


def _joined(parts: Iterable[array]) -> np.ndarray:
    return np.frombuffer(b"".join(part.tobytes() for part in parts), np.int32)


def _columns(pairs: Iterable[tuple[array, array]]) -> tuple[list[array], list[array]]:
    pairs = list(pairs)
    return [first for first, _ in pairs], [second for _, second in pairs]


def _parts(values: np.ndarray, lengths: np.ndarray) -> list[array]:
    """Cuts one array per length out of a column."""
    ends = np.cumsum(lengths)
    return [array("i", values[end - n : end].tobytes()) for end, n in zip(ends.tolist(), lengths.tolist(), strict=True)]


def _day(second: int) -> str:
    return datetime.datetime.fromtimestamp(second, datetime.UTC).date().isoformat()


def checked_time(timestamp: Any, last: int | None, label: str) -> int:
    """Returns the seconds of a user's next event.

    Args:
      timestamp: as it was given.
      last: seconds of the user's last event; None before the first.
      label: what messages begin with.

    Raises:
      ValueError: it is no whole second of those that models read, or lies before the last.
    """
    if isinstance(timestamp, bool) or not isinstance(timestamp, int | np.integer):
        raise ValueError(f"{label}: timestamp {timestamp!r} must be a whole number of seconds since 1970")
    if not 0 <= timestamp <= LAST_SECOND:
        raise ValueError(
            f"{label}: timestamp {str(timestamp)[:20]} must lie in 0 to {LAST_SECOND} (2038-01-19); give seconds "
            "since 1970, not milliseconds"
        )
    if last is not None and timestamp < last:
        raise ValueError(
            f"{label}: timestamp {timestamp} goes backwards, the user's last event was at {last} "
            f"({_day(last)}); give each user's events oldest first"
        )
    return int(timestamp)
