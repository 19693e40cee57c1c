"""Recommends what comes next, for a user of the log, a history given by hand, or a file of either.

    python -m experiments.recommend --run=runs/ml1m --user=42 --k=10
    python -m experiments.recommend --run=runs/ml1m --history="1193,661,914" --times="978300760,978302109,978301968"
    python -m experiments.recommend --run=runs/ml1m --input=histories.jsonl --output=top.parquet --exclude-seen

A line of the input file is {"user": "42"} or {"history": ["1193", "661"], "times": [978300760, 978302109]}, times
optional. Where times are missing they are assumed, and the output says so. The output file has one row a recommended
item: line, user, rank, item_id, score, title, assumed_gap (seconds; null where times are known).

The last max_len events of a history are read, as in evaluation. A causal model's state can hold all of them, however
many they are: --full-history (see also experiments.stream, which keeps the states).
"""

import dataclasses
import json
import pathlib
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import polars as pl
from rich.console import Console
from rich.table import Table
from rich.text import Text

from experiments.cli import parse_settings, run_program
from experiments.configs import config_names, load_config
from tim4rec_jax.checks import listed, shortened, shown
from tim4rec_jax.files import replacing
from tim4rec_jax.models import build_model
from tim4rec_jax.run_dir import read_config, require_no_run_file
from tim4rec_jax.serving.recommender import History, Recommendation, Recommender
from tim4rec_jax.serving.streaming import require_streamable
from tim4rec_jax.serving.user_table import UserTable

HISTORIES_AT_ONCE = 4096
# Bytes of the longest line of an input file.
LONGEST_LINE = 2**26


@dataclass(frozen=True)
class Arguments:
    """Recommends what comes next; give one of --user, --history and --input.

    Attributes:
      run: the run folder.
      user: raw id of a user of the run's log.
      history: raw item ids, oldest first, separated by commas.
      times: seconds since 1970, one an item of --history, separated by commas.
      input: JSON-lines file with a user or a history a line.
      output: Parquet file for the recommendations of --input.
      k: items to recommend.
      exclude_seen: leave the items of the history out; lists are shorter where fewer than k are left.
      full_history: read whole histories instead of their last max_len events; for causal models.
    """

    run: pathlib.Path
    user: str | None = None
    history: str | None = None
    times: str | None = None
    input: pathlib.Path | None = None
    output: pathlib.Path | None = None
    k: int = 10
    exclude_seen: bool = False
    full_history: bool = False


def check(arguments: Arguments) -> None:
    """Refuses options that do not go together.

    Raises:
      ValueError: unless exactly one of user, history and input is given, each with its own companions only.
    """
    given = [f"--{name}" for name in ("user", "history", "input") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise ValueError(f"give exactly one of --user, --history and --input; got {' and '.join(given) or 'none'}")
    if arguments.times is not None and arguments.history is None:
        raise ValueError(f"--times belongs to --history; got {given[0]}")
    if (arguments.input is None) != (arguments.output is None):
        raise ValueError("--input and --output belong together: a JSON-lines file in, a Parquet file out")
    if arguments.output is not None and arguments.output.suffix.lower() != ".parquet":
        raise ValueError(
            f"--output={shortened(str(arguments.output), 80)}: the file is written as Parquet; end it in .parquet"
        )
    if arguments.output is not None:
        require_no_run_file(arguments.output)
    if arguments.input is not None and arguments.input.suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise ValueError(
            f"--input={shortened(str(arguments.input), 80)}: a JSON-lines file is read, one object a line, such as "
            '{"user": "42"}; convert it'
        )


class _Line(NamedTuple):
    """One good line of the input file: its number from 1, the user if it named one, and the history."""

    number: int
    user: str | None
    history: History


def _split(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if "" in parts:
        raise ValueError(f"{option}: nothing stands at position {parts.index('') + 1} of {text!r}; remove the comma")
    return parts


def _seconds(texts: Sequence[str]) -> list[int]:
    for text in texts:
        if re.fullmatch("-?[0-9]{1,20}", text) is None:
            raise ValueError(f"--times: {shown(text)} is not a whole number of seconds since 1970")
    return [int(text) for text in texts]


def raw_id(value: Any) -> str:
    """Returns a JSON string or whole number as a raw id; ids that look like numbers are often written as such."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise ValueError(f"id {shortened(json.dumps(value), 80)} must be a string or a whole number")
    try:
        str(value).encode()  # Text with half a character of UTF-16 can be written nowhere.
    except UnicodeEncodeError as error:
        raise ValueError(f"id {shown(value)} has half of a surrogate pair, which is no character") from error
    except ValueError as error:
        raise ValueError(f"id {shown(value)} is a number too long for an id") from error
    return str(value)


def _parse_line(recommender: Recommender, text: str) -> tuple[str | None, History]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON ({shortened(str(error), 80)})") from error
    if not isinstance(values, dict) or ("user" in values) == ("history" in values):
        raise ValueError('must be an object with either "user" or "history"')
    unknown = sorted(set(values) - ({"user"} if "user" in values else {"history", "times"}))
    if unknown:
        raise ValueError(f'unknown keys {unknown}; known: "user", or "history" with "times"')
    if "user" in values:
        user = raw_id(values["user"])
        return user, recommender.history_of_user(user)
    history, times = values["history"], values.get("times")
    if not isinstance(history, list):
        raise ValueError(f'"history" must be a list of item ids, not {shortened(json.dumps(history), 80)}')
    if times is not None and (
        not isinstance(times, list) or any(isinstance(t, bool) or not isinstance(t, int) for t in times)
    ):
        raise ValueError(f'"times" must be a list of whole seconds since 1970, not {shortened(json.dumps(times), 80)}')
    return None, recommender.history_from_ids([raw_id(item) for item in history], times)


def streamable_configs() -> list[str]:
    """Returns the experiments whose model can go on from a state."""
    names = []
    for name in config_names():
        model = build_model(dataclasses.replace(load_config(name).model, vocab_size=2))
        names += [name] if model.streamable else []
    return names


def load_streamable(run: pathlib.Path) -> Recommender:
    """Reads a run whose model can go on from a state.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: as `Recommender.from_run`.
      ValueError: for another model; it names the experiments whose models can.
    """
    try:
        require_streamable(build_model(read_config(run).model))
    except ValueError as error:
        raise ValueError(f"{run}: {error} (--config={listed(streamable_configs(), 60, ', ')})") from error
    return Recommender.from_run(run, report=lambda line: print(line, file=sys.stderr))


def top_k(
    recommender: Recommender, histories: Sequence[History], arguments: Arguments
) -> tuple[np.ndarray, np.ndarray]:
    """Ranks the catalogue after each history, as `Recommender.top_k`, from whole histories where that is asked for."""
    k, exclude_seen = arguments.k, arguments.exclude_seen
    if not arguments.full_history:
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


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"not JSON in UTF-8 (byte {error.start + 1}: {error.reason})") from error


def read_lines(recommender: Recommender, path: pathlib.Path) -> list[_Line]:
    """Reads an input file whole; blank lines are skipped.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: for bad lines, with their numbers, or a file without any line.
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
                text = _decoded(content)
                lines.append(_Line(number, *_parse_line(recommender, text)))
            except ValueError as error:
                bad.append(f"line {number}: {error}")
    if bad:
        more = f" (and {len(bad) - 1} more bad lines)" if len(bad) > 1 else ""
        raise ValueError(f"{path}: {shortened(bad[0], 160)}{more}; nothing was written")
    if not lines:
        raise ValueError(f"{path} holds no lines; write one JSON object a line")
    return lines


def _assumption(recommender: Recommender, history: History) -> str | None:
    if history.assumed_gap is None:
        return None
    unread = "" if recommender.model.uses_time else " (this model does not read times)"
    return (
        f"no times given: consecutive items are taken to lie {history.assumed_gap:,} s apart, the median of the run's "
        f"log, and the last at its newest event, {recommender.newest_time}{unread}"
    )


def show(recommendations: Sequence[Recommendation], title: str, caption: str | None) -> Table:
    """A table of one list; titles where they are known."""
    table = Table(title=Text(title), caption=None if caption is None else Text(caption))
    table.add_column("rank", justify="right")
    table.add_column("item", overflow="fold")
    table.add_column("score", justify="right")
    if any(r.title is not None for r in recommendations):
        table.add_column("title", overflow="fold")
    for rank, r in enumerate(recommendations, start=1):
        cells = [str(rank), Text(r.item_id), f"{r.score:.4f}", Text(r.title or "")]
        table.add_row(*cells[: len(table.columns)])
    return table


def recommend_file(recommender: Recommender, arguments: Arguments) -> str:
    """Recommends for every line of the input file and writes the output file, whole or not at all; says what it did.

    Raises:
      FileNotFoundError: the input file or the folder of the output file is missing.
      ValueError: for bad lines, or a k that does not fit.
    """
    lines = read_lines(recommender, arguments.input)
    if not arguments.output.absolute().parent.is_dir():
        raise FileNotFoundError(
            f"there is no folder {arguments.output.absolute().parent} to write {arguments.output} to"
        )
    k = arguments.k
    indices, scores = top_k(recommender, [line.history for line in lines], arguments)
    # A history that leaves fewer than k items unseen has a shorter list, which goes on with item 0.
    listed = indices.reshape(-1) > 0
    flat = indices.reshape(-1)[listed] - 1
    repeat = np.repeat(np.arange(len(lines)), k)[listed]
    table = pl.DataFrame(
        {
            "line": pl.Series([line.number for line in lines], dtype=pl.Int64).gather(repeat),
            "user": pl.Series([line.user for line in lines], dtype=pl.String).gather(repeat),
            "rank": np.tile(np.arange(1, k + 1, dtype=np.int32), len(lines))[listed],
            "item_id": pl.Series(recommender.item_ids, dtype=pl.String).gather(flat),
            "score": scores.reshape(-1)[listed],
            "title": pl.Series(recommender.titles or [None] * recommender.num_items, dtype=pl.String).gather(flat),
            "assumed_gap": pl.Series([line.history.assumed_gap for line in lines], dtype=pl.Int64).gather(repeat),
        }
    )
    with replacing(arguments.output) as temporary:
        table.write_parquet(temporary)
    assumed = sum(line.history.assumed_gap is not None for line in lines)
    short = int(np.count_nonzero((indices == 0).any(axis=1)))
    note = f"; {assumed:,} histories came without times (column assumed_gap)" if assumed else ""
    note += f"; {short:,} have seen so much that their lists are shorter" if short else ""
    return f"{arguments.output}: {k} items for each of {len(lines):,} histories{note}"


def run(arguments: Arguments, console: Console) -> None:
    """Recommends as asked and prints what was done.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run or the input cannot be read, or the settings do not fit.
      FloatingPointError: the model's scores are not finite.
    """
    check(arguments)
    if arguments.full_history:
        recommender = load_streamable(arguments.run)
    else:
        recommender = Recommender.from_run(arguments.run, report=lambda line: print(line, file=sys.stderr))
    if arguments.input is not None:
        console.print(Text(recommend_file(recommender, arguments)), soft_wrap=True)
        return
    if arguments.user is not None:
        history = recommender.history_of_user(arguments.user)
    else:
        times = None if arguments.times is None else _seconds(_split("--times", arguments.times))
        history = recommender.history_from_ids(_split("--history", arguments.history), times)
    [recommendations] = recommender.named(*top_k(recommender, [history], arguments))
    title = f"next for {history.label}, after {len(history.items)} events"
    console.print(show(recommendations, title, _assumption(recommender, history)))


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    run(parse_settings(Arguments, argv, prog="experiments.recommend"), Console())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
