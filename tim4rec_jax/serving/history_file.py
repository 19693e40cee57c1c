"""A file of users and histories in, a table of the best items after each out."""

import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import shortened
from tim4rec_jax.files import replacing
from tim4rec_jax.serving.json_lines import raw_id, read_json, require_keys, shown_json
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.user_table import UserTable

HISTORIES_AT_ONCE = 4096
# Bytes of the longest line of an input file.
LONGEST_LINE = 2**26


class HistoryLine(NamedTuple):
    """One good line of an input file: its number from 1, the user if it named one, and the history."""

    number: int
    user: str | None
    history: History


def _parsed(recommender: Recommender, content: bytes) -> tuple[str | None, History]:
    values = read_json(content)
    if not isinstance(values, dict) or ("user" in values) == ("history" in values):
        raise ValueError('must be an object with either "user" or "history"')
    require_keys(values, {"user"} if "user" in values else {"history", "times"})
    if "user" in values:
        user = raw_id(values["user"])
        return user, recommender.history_of_user(user)
    history, times = values["history"], values.get("times")
    if not isinstance(history, list):
        raise ValueError(f'"history" must be a list of item ids, not {shown_json(history)}')
    if times is not None and (not isinstance(times, list) or any(type(t) is not int for t in times)):
        raise ValueError(f'"times" must be a list of whole seconds since 1970, not {shown_json(times)}')
    return None, recommender.history_from_ids([raw_id(item) for item in history], times)


def read_histories(recommender: Recommender, path: pathlib.Path) -> list[HistoryLine]:
    """Reads a file of lines {"user": "42"} or {"history": ["1193", "661"], "times": [978300760, 978302109]}.

    Blank lines are skipped; times may be missing.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: for bad lines, the first with its number, or a file without any line.
    """
    lines, bad = [], []
    with path.open("rb") as file:
        for number, content in enumerate(iter(lambda: file.readline(LONGEST_LINE + 1), b""), start=1):
            if not content.strip():
                continue
            # One without an end, as of a device, would fill the memory.
            if len(content) > LONGEST_LINE:
                raise ValueError(f"{path}: line {number} has over {LONGEST_LINE:,} bytes; nothing was written")
            try:
                lines.append(HistoryLine(number, *_parsed(recommender, content)))
            except ValueError as error:
                bad.append(f"line {number}: {error}")
    if bad:
        more = f" (and {len(bad) - 1} more bad lines)" if len(bad) > 1 else ""
        raise ValueError(f"{path}: {shortened(bad[0], 160)}{more}; nothing was written")
    if not lines:
        raise ValueError(f"{path} holds no lines; write one JSON object per line")
    return lines


def top_k(
    recommender: Recommender,
    histories: Sequence[History],
    k: int,
    *,
    exclude_seen: bool = False,
    whole_histories: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the catalogue as `Recommender.top_k`, if asked for from all events of a history, not its last max_len.

    Args:
      recommender: for whole histories, of a model that can go on from a state.
      histories: n of them.
      k: items per list.
      exclude_seen: leave the items of a history out of its list.
      whole_histories: read all events.

    Returns:
      Item indices int32 [n, k] (0 where nothing is left) and scores float32 [n, k].

    Raises:
      ValueError: the model cannot go on from a state, or k does not fit.
    """
    if not whole_histories:
        return recommender.top_k(histories, k, exclude_seen=exclude_seen)
    recommender.check(histories, k)
    parts = []
    for first in range(0, len(histories), HISTORIES_AT_ONCE):
        table = UserTable(recommender, keep_items=exclude_seen)
        named = {str(i): history for i, history in enumerate(histories[first : first + HISTORIES_AT_ONCE])}
        table.add_histories(named)
        parts.append(table.top_k(list(named), k, exclude_seen=exclude_seen))
    indices, scores = (np.concatenate(part) for part in zip(*parts, strict=True))
    return indices, scores


def table_of_lists(
    recommender: Recommender, lines: Sequence[HistoryLine], indices: np.ndarray, scores: np.ndarray
) -> pl.DataFrame:
    """Returns a row per recommended item: line, user, rank, item_id, score, title, assumed_gap.

    Args:
      recommender: names the items.
      lines: n of them.
      indices: int [n, k] item indices, 0 where a list has ended.
      scores: float [n, k].
    """
    kept = indices.reshape(-1) > 0
    items = indices.reshape(-1)[kept] - 1
    line = np.repeat(np.arange(len(lines)), indices.shape[1])[kept]
    return pl.DataFrame(
        {
            "line": pl.Series([line.number for line in lines], dtype=pl.Int64).gather(line),
            "user": pl.Series([line.user for line in lines], dtype=pl.String).gather(line),
            "rank": np.tile(np.arange(1, indices.shape[1] + 1, dtype=np.int32), len(lines))[kept],
            "item_id": pl.Series(recommender.item_ids, dtype=pl.String).gather(items),
            "score": scores.reshape(-1)[kept],
            "title": pl.Series(recommender.titles or [None] * recommender.num_items, dtype=pl.String).gather(items),
            "assumed_gap": pl.Series([line.history.assumed_gap for line in lines], dtype=pl.Int64).gather(line),
        }
    )


def recommend_file(
    recommender: Recommender,
    source: pathlib.Path,
    output: pathlib.Path,
    k: int,
    *,
    exclude_seen: bool = False,
    whole_histories: bool = False,
) -> str:
    """Recommends for every line of a file and writes `table_of_lists` as Parquet, whole or not at all.

    Args:
      recommender: see `top_k`, as k, exclude_seen and whole_histories.
      source: see `read_histories`.
      output: takes the place of a file that is there.

    Returns:
      What was done, in a line.

    Raises:
      FileNotFoundError: the input file or the folder of the output file is missing.
      ValueError: for bad lines, or settings that do not fit.
    """
    lines = read_histories(recommender, source)
    if not output.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {output.absolute().parent} to write {output} to")
    histories = [line.history for line in lines]
    indices, scores = top_k(recommender, histories, k, exclude_seen=exclude_seen, whole_histories=whole_histories)
    with replacing(output) as temporary:
        table_of_lists(recommender, lines, indices, scores).write_parquet(temporary)
    assumed = sum(history.assumed_gap is not None for history in histories)
    short = int(np.count_nonzero((indices == 0).any(axis=1)))
    said = f"{output}: {k} items for each of {len(lines):,} histories"
    said += f"; {assumed:,} histories came without times (column assumed_gap)" if assumed else ""
    return said + (f"; {short:,} have seen so much that their lists are shorter" if short else "")
