"""The histories of users, and the events that come: on the disk before they count, and there after a kill."""

import bisect
import contextlib
import hashlib
import itertools
import json
import pathlib
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cached_property
from typing import Any

import numpy as np

from tim4rec_jax.checks import require, shown
from tim4rec_jax.files import locked
from tim4rec_jax.serving import user_table_file
from tim4rec_jax.serving.durable_log import Chain, Journal, hashed
from tim4rec_jax.serving.event_lines import LONGEST_USER, parsed
from tim4rec_jax.serving.event_stream import journal_of
from tim4rec_jax.serving.json_lines import as_json
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.user_table import Event, checked_time
from tim4rec_jax.serving.user_table_file import LAST_SECOND

KIND = "user_histories"
_ARRAYS = {"users": "uint8", "lengths": "int64", "items": "int32", "times": "int64"}
# A line of the journal: an id of four bytes a character, escaped, and an item's.
LONGEST_LINE = 2**20


class UserHistories:
    """What every user did: the histories of a run's log, and the events that came since.

    Memory: 12 bytes per event that came, beside the run's own.

    Attributes:
      recommender: the run's ids and histories.
      events: how many came since.
    """

    def __init__(self, recommender: Recommender) -> None:
        """Begins with the run's histories alone."""
        self.recommender, self.events = recommender, 0
        self._known = set(recommender.users)
        self._in_order = sorted(recommender.users)
        self._new_in_order: list[str] = []
        self._new: dict[str, tuple[array, array]] = {}

    def __len__(self) -> int:
        return len(self._in_order) + len(self._new_in_order)

    def __contains__(self, user: str) -> bool:
        return user in self._known or user in self._new

    def users(self, prefix: str = "", most: int = 100) -> list[str]:
        """Returns at most so many ids that begin with a text, in order, users of the log first."""
        found: list[str] = []
        for ids in (self._in_order, self._new_in_order):
            first = bisect.bisect_left(ids, prefix)
            some = itertools.islice(ids, first, first + most - len(found))
            found += itertools.takewhile(lambda user: user.startswith(prefix), some)
        return found

    def history(self, user: str) -> History:
        """Returns all events of a user; none of an unknown one."""
        stored = self.recommender.history_of_user(user, empty_if_unknown=True)
        if user not in self._new:
            return stored
        items, times = (np.frombuffer(part, part.typecode) for part in self._new[user])
        return History(
            np.concatenate([stored.items, items.astype(np.int32)]),
            np.concatenate([stored.timestamps, times.astype(np.int64)]),
            stored.label,
        )

    def last_time(self, user: str) -> int | None:
        """Returns the second of a user's last event; None of an unknown one."""
        if user in self._new:
            return self._new[user][1][-1]
        times = self.recommender.history_of_user(user, empty_if_unknown=True).timestamps
        return int(times[-1]) if len(times) else None

    def check(self, events: Iterable[Event], after: dict[str, int], latest_time: int = LAST_SECOND) -> dict[str, int]:
        """Refuses events that cannot be taken in.

        Args:
          events: of items of the catalogue, each user's oldest first.
          after: seconds of the last events of users that were checked and are not added yet.
          latest_time: later ones are refused.

        Returns:
          `after` with the seconds of these.

        Raises:
          ValueError: an id is too long, an item unknown, or a time is no second, too late, or before the user's last.
        """
        after = dict(after)
        for user, item, timestamp in events:
            require(
                len(user) <= LONGEST_USER or user in self,
                f"user {shown(user, 40)} has {len(user)} characters, over {LONGEST_USER}",
            )
            label = f"user {shown(user, 60)}, item {shown(item, 60)}"
            require(item in self.recommender.index_of_item, f"{label}: the run has no such item")
            last = after[user] if user in after else self.last_time(user)
            after[user] = checked_time(timestamp, last, label)
            require(timestamp <= latest_time, f"{label}: timestamp {timestamp} is over latest_time={latest_time}")
        return after

    def add(self, events: Iterable[Event]) -> None:
        """Takes in events that were checked."""
        for user, item, timestamp in events:
            if user not in self._new:
                if user not in self._known:
                    bisect.insort(self._new_in_order, user)
                self._new[user] = array("i"), array("q")
            items, times = self._new[user]
            items.append(self.recommender.index_of_item[item])
            times.append(timestamp)
            self.events += 1

    @cached_property
    def digest(self) -> str:
        """A hash of the run's log, of which the events that came are the rest."""
        known, digest = self.recommender, hashlib.sha256()
        digest.update(json.dumps([known.item_ids, known.users]).encode())
        for part in known.columns:
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def save(self, path: pathlib.Path, lines: Chain) -> None:
        """Writes the events that came into one file; a kill leaves the old file or the new one.

        Args:
          path: the file.
          lines: of the journal that it holds.
        """
        items, times = array("i"), array("q")
        for new_items, new_times in self._new.values():
            items.extend(new_items)
            times.extend(new_times)
        header = {"format": user_table_file.TABLE_FORMAT, "kind": KIND, "log": self.digest, "lines": asdict(lines)}
        lengths = [len(times) for _, times in self._new.values()]
        arrays = {
            "users": user_table_file.text(json.dumps(list(self._new))),
            "lengths": np.array(lengths, np.int64),
            "items": np.frombuffer(items, np.int32),
            "times": np.frombuffer(times, np.int64),
        }
        user_table_file.write(path, header, arrays)

    def load(self, path: pathlib.Path) -> Chain:
        """Reads what `save` wrote; returns the lines of the journal that it holds.

        Raises:
          ValueError: the file is damaged, something else, or goes on from another log.
        """
        header, arrays = user_table_file.read(path)
        require(
            header.get("kind") == KIND, f"{path} is no state of experiments.serve; choose another place for --state"
        )
        require(
            header.get("log") == self.digest,
            f"{path} goes on from another log than the run's; give the run it was made with, or another --state",
        )
        try:
            users = _checked(arrays, self.recommender.num_items)
            lines = Chain.from_notes(header.get("lines"))
        except (ValueError, KeyError) as error:
            raise user_table_file.damaged(path, error) from error
        for user, end, length in zip(users, np.cumsum(arrays["lengths"]), arrays["lengths"], strict=True):
            part = slice(end - length, end)
            self._new[user] = array("i", arrays["items"][part].tobytes()), array("q", arrays["times"][part].tobytes())
        self._new_in_order = sorted(user for user in users if user not in self._known)
        self.events = len(arrays["items"])
        return lines


def _checked(arrays: dict[str, np.ndarray], num_items: int) -> list[str]:
    """Returns the users of arrays that are those of a file; raises ValueError for others."""
    found = {name: array.dtype.name for name, array in arrays.items()}
    require(found == _ARRAYS, f"the arrays are {shown(found)}")
    users, lengths, items, times = (arrays[name] for name in _ARRAYS)
    ids = user_table_file.users(users)
    require(lengths.shape == (len(ids),), f"lengths has shape {lengths.shape}")
    require(bool((lengths >= 1).all() and (lengths <= items.size).all()), "lengths are no lengths")
    require(items.shape == times.shape == (int(lengths.sum()),), f"items has shape {items.shape}, times {times.shape}")
    require(bool(((items >= 1) & (items <= num_items)).all()), "items are not of the catalogue")
    require(bool(((times >= 0) & (times <= LAST_SECOND)).all()), "times are no seconds")
    inside = np.ones(times.size, bool)
    inside[np.cumsum(lengths) - lengths] = False
    require(bool((np.diff(times, prepend=0)[inside] >= 0).all()), "times go backwards")
    return ids


class DurableHistories:
    """User histories of which every event was written to the disk before it counts.

    Beside the file `state` stands a journal with a line per event that came since the file was written. One process
    writes them.

    Attributes:
      histories: of the users.
      path: the file; None keeps nothing, and takes in nothing.
      lines: events ever taken in, as lines of the journal.
    """

    def __init__(self, histories: UserHistories, path: pathlib.Path | None) -> None:
        """Takes what `opened` has read."""
        self.histories, self.path, self.lines = histories, path, Chain()
        self._journal = None if path is None else Journal(journal_of(path))
        self._saved = 0

    @property
    def unsaved(self) -> int:
        """Events that only the journal holds."""
        return self.lines.lines - self._saved

    def append(self, events: Sequence[Event]) -> None:
        """Takes in events that were checked; they are on the disk when this returns.

        Raises:
          OSError: the disk takes no more; the file is named, and nothing has changed.
        """
        assert self._journal is not None
        lines = [as_json({"user": user, "item": item, "timestamp": at}) for user, item, at in events]
        if not self._journal.is_open:
            self.save()
        try:
            for line in lines:
                self._journal.append(line + b"\n")
            self._journal.sync()
        except OSError:
            self._journal.undo()
            raise
        for line in lines:
            self.lines.add(hashed(line))
        self.histories.add(events)

    def save(self) -> None:
        """Writes the file, and begins the journal anew."""
        if self.path is None or self._journal is None:
            return
        self.histories.save(self.path, self.lines)
        self._saved = self.lines.lines
        self._journal.begin(self.lines)

    def start(self) -> None:
        """Reads the file and then the journal's lines that it does not hold; a torn last line was never acknowledged.

        Raises:
          ValueError: one of them is damaged, something else, or of another log.
        """
        if self.path is None or self._journal is None:
            return
        journal = self._journal.path
        if self.path.exists():
            self.lines = self.histories.load(self.path)
            self._saved = self.lines.lines
        else:
            require(
                not journal.exists(),
                f"{journal} goes on from {self.path}, which is not there; bring it back, or remove the journal and its "
                "events",
            )
        if journal.exists():
            for line in self._journal.read(Chain(**asdict(self.lines)), LONGEST_LINE):
                self.lines.add(line)
                self.histories.add([_event_of(line.content, journal, self.lines.lines, self.histories)])
        if self.unsaved or not self.path.exists():
            self.save()
        else:
            self._journal.begin(self.lines)

    def close(self) -> None:
        """Saves what came since, and lets the files go."""
        if self._journal is not None:
            if self.unsaved:
                self.save()
            self._journal.remove()


def _event_of(content: bytes | None, journal: pathlib.Path, number: int, histories: UserHistories) -> Event:
    try:
        values: dict[str, Any] = parsed(content or b"")
        event = Event(values["user"], values["item"], values["timestamp"])
        histories.check([event], {})
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{journal}: event {number} is damaged: {shown(str(error))}") from error
    return event


@contextlib.contextmanager
def opened(recommender: Recommender, path: pathlib.Path | None) -> Iterator[DurableHistories]:
    """Yields the histories with everything that was taken in before, and nobody else writing them.

    What came is saved when the body ends, not when it raises: the journal then holds it.

    Args:
      recommender: of the run.
      path: the file; None keeps nothing.

    Raises:
      FileNotFoundError: the file's folder is missing.
      ValueError: another process has the file, or it does not fit (see `DurableHistories.start`).
    """
    with contextlib.ExitStack() as stack:
        if path is not None:
            if not path.parent.is_dir():
                raise FileNotFoundError(f"there is no folder {path.parent} for {path}")
            stack.enter_context(locked(path))
        durable = DurableHistories(UserHistories(recommender), path)
        durable.start()
        yield durable
        durable.close()
