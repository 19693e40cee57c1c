"""Users and histories in, lists or scores out: one after the other, or a file of them piece by piece."""

import itertools
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import shortened
from tim4rec_jax.serving.json_lines import raw_id, require_keys, shown_json
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.row_files import ROWS_AT_ONCE, Row, read_rows, writing_rows
from tim4rec_jax.serving.rules import NO_RULES, Rules, comma_separated
from tim4rec_jax.serving.user_table import UserTable


class HistoryLine(NamedTuple):
    """One good line of an input file: its number from 1, the user if it named one, and the history."""

    number: int
    user: str | None
    history: History


def asked_history(recommender: Recommender, user: str, rules: Rules = NO_RULES) -> History:
    """Returns a user's stored history; of an unknown user an empty one, where rules have an answer to that."""
    return recommender.history_of_user(user, empty_if_unknown=rules.popular_users)


def given_history(
    recommender: Recommender, items: Sequence[str], times: Sequence[int] | None, rules: Rules = NO_RULES
) -> History:
    """Returns a history given by hand, see `Recommender.history_from_ids`."""
    return recommender.history_from_ids(items, times, skip_unknown=rules.skip_items, may_be_empty=rules.popular_users)


def whole_seconds(words: Iterable[str], name: str) -> list[int]:
    """Reads times.

    Raises:
      ValueError: one is no whole number.
    """
    words = list(words)
    for word in words:
        if re.fullmatch("-?[0-9]{1,20}", word) is None:
            raise ValueError(f"{name}: {shortened(repr(word), 80)} is not a whole number of seconds since 1970")
    return [int(word) for word in words]


def _line(recommender: Recommender, values: dict[str, Any], rules: Rules) -> tuple[str | None, History]:
    if "user" not in values and "history" not in values:
        raise ValueError('must be an object with "user", "history" or both')
    require_keys(values, {"user", "history", "times"})
    user, history, times = (values.get(name) for name in ("user", "history", "times"))
    user = None if user is None else raw_id(user)
    if history is None:
        if times is not None or user is None:
            raise ValueError('"times" belong to a "history"' if user is not None else '"history" must be a list')
        return user, asked_history(recommender, user, rules)
    if not isinstance(history, list):
        raise ValueError(f'"history" must be a list of item ids, not {shown_json(history)}')
    if times is not None and (not isinstance(times, list) or any(type(t) is not int for t in times)):
        raise ValueError(f'"times" must be a list of whole seconds since 1970, not {shown_json(times)}')
    return user, given_history(recommender, [raw_id(item) for item in history], times, rules)


def _from_table(values: dict[str, Any]) -> dict[str, Any]:
    """Makes lists of the texts with commas that a CSV file holds."""
    values = dict(values)
    if isinstance(values.get("history"), str):
        values["history"] = comma_separated('"history"', values["history"])
    if isinstance(values.get("times"), str):
        values["times"] = whole_seconds(comma_separated('"times"', values["times"]), '"times"')
    return values


class _Parsed:
    """Rows that are checked as they are read; of bad ones the first is kept and the others counted."""

    def __init__(self, path: pathlib.Path, rows: Iterator[Row]) -> None:
        self.path, self.rows, self.count, self.bad, self.first_bad = path, rows, 0, 0, ""

    def pieces(self, parse: Any) -> Iterator[list[Any]]:
        """Yields lists of what `parse(number, values)` makes of the rows, at most `ROWS_AT_ONCE` each.

        Raises:
          ValueError: once all is read, where a row was bad, or there was none.
        """
        while rows := list(itertools.islice(self.rows, ROWS_AT_ONCE)):
            piece = []
            for number, values in rows:
                try:
                    if isinstance(values, ValueError):
                        raise values
                    piece.append(parse(number, values))
                except ValueError as error:
                    self.first_bad = self.first_bad or f"line {number}: {error}"
                    self.bad += 1
            self.count += len(piece)
            if not self.bad and piece:
                yield piece
        if self.bad:
            more = f" (and {self.bad - 1} more bad lines)" if self.bad > 1 else ""
            raise ValueError(f"{self.path}: {shortened(self.first_bad, 160)}{more}; nothing was written")
        if not self.count:
            raise ValueError(f"{self.path} holds no lines; write one JSON object per line, or a table of a row each")


def read_histories(
    recommender: Recommender, path: pathlib.Path, rules: Rules = NO_RULES
) -> Iterator[list[HistoryLine]]:
    """Yields pieces of a file of lines {"user": "42"} or {"history": ["1193", "661"], "times": [978300760, 978302109]}.

    A line may have both; the user is then a name for the history. Of .csv, .tsv and .parquet files these are columns,
    lists in text with commas between their members. Blank lines are skipped; times may be missing.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: for bad lines, the first with its number, or a file without any line.
    """
    is_table = path.suffix.lower() in (".csv", ".tsv", ".parquet")

    def parse(number: int, values: dict[str, Any]) -> HistoryLine:
        return HistoryLine(number, *_line(recommender, _from_table(values) if is_table else values, rules))

    yield from _Parsed(path, read_rows(path, ("user", "history", "times"))).pieces(parse)


def read_users(recommender: Recommender, path: pathlib.Path, rules: Rules = NO_RULES) -> Iterator[list[HistoryLine]]:
    """Yields pieces of a file of users: an id per line, or a table with the column user.

    Raises:
      FileNotFoundError, ValueError: as `read_histories`.
    """

    def parse(number: int, values: dict[str, Any]) -> HistoryLine:
        if "user" not in values:
            raise ValueError("names no user")
        user = raw_id(values["user"])
        return HistoryLine(number, user, asked_history(recommender, user, rules))

    yield from _Parsed(path, read_rows(path, ("user",), plain_column="user")).pieces(parse)


def all_users(recommender: Recommender) -> Iterator[list[HistoryLine]]:
    """Yields pieces of all users of the run's log, numbered from 1."""
    for first in range(0, len(recommender.users), ROWS_AT_ONCE):
        users = recommender.users[first : first + ROWS_AT_ONCE]
        yield [
            HistoryLine(number, user, recommender.history_of_user(user)) for number, user in enumerate(users, first + 1)
        ]


def top_k(
    recommender: Recommender,
    histories: Sequence[History],
    k: int,
    *,
    rules: Rules = NO_RULES,
    whole_histories: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks what rules leave of the catalogue as `Recommender.top_k`; after an empty history what is popular.

    Args:
      recommender: for whole histories, of a model that can go on from a state.
      histories: n of them; empty ones only where the rules have an answer to that.
      k: items per list.
      rules: what may be recommended.
      whole_histories: read all events of a history, not its last max_len.

    Returns:
      Item indices int32 [n, k] (0 where nothing is left) and scores float32 [n, k]; of an empty history counts.

    Raises:
      ValueError: the model cannot go on from a state, k does not fit, or a history is empty.
    """
    empty = np.array([rules.popular_users and len(history.items) == 0 for history in histories], bool)
    full = [history for history, is_empty in zip(histories, empty, strict=True) if not is_empty]
    recommender.check(full, k)
    indices, scores = np.zeros((len(histories), k), np.int32), np.zeros((len(histories), k), np.float32)
    if empty.any():
        indices[empty], scores[empty] = recommender.popular(k, allowed=rules.allowed)
    if full:
        restricted = {"exclude_seen": rules.exclude_seen, "allowed": rules.allowed}
        if whole_histories:
            indices[~empty], scores[~empty] = _whole(recommender, full, k, **restricted)
        else:
            indices[~empty], scores[~empty] = recommender.top_k(full, k, **restricted)
    return indices, scores


def _whole(
    recommender: Recommender, histories: Sequence[History], k: int, *, exclude_seen: bool, allowed: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    parts = []
    for first in range(0, len(histories), ROWS_AT_ONCE):
        table = UserTable(recommender, keep_items=exclude_seen or recommender.config.model.seen_bias)
        named = {str(i): history for i, history in enumerate(histories[first : first + ROWS_AT_ONCE])}
        table.add_histories(named)
        parts.append(table.top_k(list(named), k, exclude_seen=exclude_seen, allowed=allowed))
    indices, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    return indices, scores


def item_scores(
    recommender: Recommender, histories: Sequence[History], items: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """Scores certain items after each history as `Recommender.item_scores`; after an empty one by their counts."""
    full = [i for i, history in enumerate(histories) if len(history.items)]
    scores = list(items)
    for i in set(range(len(histories))).difference(full):
        scores[i] = recommender.training_counts[items[i]].astype(np.float32)
    found = recommender.item_scores([histories[i] for i in full], [items[i] for i in full]) if full else []
    for i, row in zip(full, found, strict=True):
        scores[i] = row
    return scores


def table_of_lists(
    recommender: Recommender, lines: Sequence[HistoryLine], indices: np.ndarray, scores: np.ndarray
) -> pl.DataFrame:
    """Returns a row per recommended item: line, user, rank, item_id, score, title, source, assumed_gap, skipped.

    Args:
      recommender: names the items.
      lines: n of them.
      indices: int [n, k] item indices, 0 where a list has ended.
      scores: float [n, k].
    """
    kept = indices.reshape(-1) > 0
    line = np.repeat(np.arange(len(lines)), indices.shape[1])[kept]
    rank = np.tile(np.arange(1, indices.shape[1] + 1, dtype=np.int32), len(lines))[kept]
    return _table(recommender, lines, line, {"rank": rank}, indices.reshape(-1)[kept], scores.reshape(-1)[kept])


def _table(
    recommender: Recommender,
    lines: Sequence[HistoryLine],
    line: np.ndarray,
    places: dict[str, np.ndarray],
    items: np.ndarray,
    scores: np.ndarray,
) -> pl.DataFrame:
    """Returns a row per item: of each its line in `lines`, further columns, its index and its score."""
    histories = [one.history for one in lines]
    sources = ["model" if len(history.items) else "popularity" for history in histories]
    return pl.DataFrame(
        {
            "line": pl.Series([one.number for one in lines], dtype=pl.Int64).gather(line),
            "user": pl.Series([one.user for one in lines], dtype=pl.String).gather(line),
            **places,
            "item_id": recommender.id_column.gather(items - 1),
            "score": scores,
            "title": recommender.title_column.gather(items - 1),
            "source": pl.Series(sources, dtype=pl.String).gather(line),
            "assumed_gap": pl.Series([history.assumed_gap for history in histories], dtype=pl.Int64).gather(line),
            "skipped": pl.Series([history.skipped for history in histories], dtype=pl.Int32).gather(line),
        }
    )


class _Counts:
    """What is said of a file at its end."""

    def __init__(self) -> None:
        self.lines = self.assumed = self.short = self.popular = self.skipped = self.changed = 0

    def add(self, lines: Sequence[HistoryLine], indices: np.ndarray) -> None:
        self.lines += len(lines)
        self.short += int(np.count_nonzero((indices == 0).any(axis=1)))
        for line in lines:
            self.assumed += line.history.assumed_gap is not None
            self.popular += len(line.history.items) == 0
            self.skipped += line.history.skipped
            self.changed += line.history.skipped > 0

    def said(self) -> str:
        parts = [
            (self.assumed, f"{self.assumed:,} histories came without times (column assumed_gap)"),
            (self.short, f"{self.short:,} lists are shorter, because no more items are left to them"),
            (self.popular, f"{self.popular:,} are of unknown users or empty histories: the popular items (source)"),
            (self.skipped, f"{self.skipped:,} unknown items in {self.changed:,} histories were skipped"),
        ]
        return "".join(f"; {text}" for count, text in parts if count)


def recommend_pieces(
    recommender: Recommender,
    pieces: Iterator[list[HistoryLine]],
    output: pathlib.Path,
    k: int,
    *,
    rules: Rules = NO_RULES,
    whole_histories: bool = False,
) -> str:
    """Recommends for pieces of lines and writes `table_of_lists` by the output's ending, whole or not at all.

    Args:
      recommender: see `top_k`, as k, rules and whole_histories.
      pieces: of `read_histories`, `read_users` or `all_users`.
      output: takes the place of a file that is there.

    Returns:
      What was done, in a line.

    Raises:
      FileNotFoundError: the input file or the folder of the output file is missing.
      ValueError: for bad lines, or settings that do not fit.
    """
    recommender.check([], k)
    counts = _Counts()
    with writing_rows(output) as write:
        for lines in pieces:
            histories = [line.history for line in lines]
            indices, scores = top_k(recommender, histories, k, rules=rules, whole_histories=whole_histories)
            write(table_of_lists(recommender, lines, indices, scores))
            counts.add(lines, indices)
    return f"{output}: {k} items for each of {counts.lines:,} histories{counts.said()}"


def score_pairs(
    recommender: Recommender, source: pathlib.Path, output: pathlib.Path, *, rules: Rules = NO_RULES
) -> str:
    """Scores a file of pairs, columns user and item, and writes a row per pair in their order.

    Columns of the output: line, user, item_id, score, title, source, assumed_gap, skipped. Pairs are scored whatever
    lists the rules have.

    Returns, Raises:
      As `recommend_pieces`; pairs of unknown items are skipped and counted where the rules say so.
    """
    unknown = pairs = popular = 0

    def parse(number: int, values: dict[str, Any]) -> tuple[HistoryLine, int]:
        require_keys(values, {"user", "item"})
        if not {"user", "item"} <= values.keys():
            raise ValueError('a pair has "user" and "item"')
        user, item = raw_id(values["user"]), raw_id(values["item"])
        line = HistoryLine(number, user, asked_history(recommender, user, rules))
        if rules.skip_items and item not in recommender.index_of_item:
            return line, 0
        return line, recommender.item_index(item, f"user {user!r}")

    with writing_rows(output) as write:
        for piece in _Parsed(source, read_rows(source, ("user", "item"))).pieces(parse):
            known = [(line, item) for line, item in piece if item]
            unknown += len(piece) - len(known)
            pairs += len(known)
            of_user: dict[str | None, list[int]] = {}
            for place, (line, _) in enumerate(known):
                of_user.setdefault(line.user, []).append(place)
            items = np.array([item for _, item in known], np.int64)
            histories = [known[places[0]][0].history for places in of_user.values()]
            scores = np.zeros(len(known), np.float32)
            found = item_scores(recommender, histories, [items[places] for places in of_user.values()])
            for places, row in zip(of_user.values(), found, strict=True):
                scores[places] = row
            lines = [line for line, _ in known]
            popular += sum(len(line.history.items) == 0 for line in lines)
            write(_table(recommender, lines, np.arange(len(lines)), {}, items, scores))
    said = f"{output}: scores of {pairs:,} pairs"
    said += f"; {popular:,} of unknown users, by how often the item occurs (source)" if popular else ""
    return said + (f"; {unknown:,} pairs of unknown items were skipped" if unknown else "")
