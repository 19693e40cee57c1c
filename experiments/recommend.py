"""Recommends what comes next, for a user of the log, a history given by hand, or a file of either.

    python -m experiments.recommend --run=runs/ml1m --user=42 --k=10
    python -m experiments.recommend --run=runs/ml1m --history="1193,661,914" --times="978300760,978302109,978301968"
    python -m experiments.recommend --run=runs/ml1m --input=histories.jsonl --output=top.parquet --exclude-seen
    python -m experiments.recommend --run=runs/ml1m --users=all --output=top.csv --deny_file=sold_out.txt
    python -m experiments.recommend --run=runs/ml1m --user=42 --items=movies.csv --where "genres~Drama" "year>=1990"
    python -m experiments.recommend --run=runs/ml1m --user=42 --score_items=1193,661
    python -m experiments.recommend --run=runs/ml1m --pairs=pairs.csv --output=scores.csv
    python -m experiments.recommend --run=runs/ml1m --similar=1193

A line of the input file is {"user": "42"} or {"history": ["1193", "661"], "times": [978300760, 978302109]}, times
optional; a user beside a history is its name. CSV, TSV and Parquet files have these as columns, lists in text with
commas. Where times are missing they are assumed, and the output says so. The output file, by its ending CSV, TSV,
Parquet or JSON lines, has one row per recommended item: line, user, rank, item_id, score, title, source (model or
popularity), assumed_gap (seconds; null where times are known), skipped (unknown items of the history).

Rules restrict the catalogue before it is ranked, so that lists are as long as the rules allow. The last max_len events
of a history are read, as in evaluation. A causal model's state can hold all of them, however many they are:
--full-history (see also experiments.stream, which keeps the states).
"""

import pathlib
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.text import Text

from experiments.cli import note, parse_settings, program, table
from tim4rec_jax.checks import require
from tim4rec_jax.run_dir import require_no_run_file
from tim4rec_jax.serving.history_file import (
    all_users,
    asked_history,
    given_history,
    item_scores,
    read_histories,
    read_users,
    recommend_pieces,
    score_pairs,
    top_k,
    whole_seconds,
)
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.row_files import require_ending
from tim4rec_jax.serving.rules import RuleOptions, Rules, comma_separated, rules_from_options
from tim4rec_jax.serving.streaming import load_streamable

SOURCES = ("user", "history", "input", "users", "pairs", "similar")
_FILES = ("input", "users", "pairs")


@dataclass(frozen=True)
class Arguments(RuleOptions):
    """Recommends what comes next; give one of --user, --history, --input, --users, --pairs and --similar.

    Attributes:
      run: the run folder.
      user: raw id of a user of the run's log.
      history: raw item ids, oldest first, separated by commas.
      times: seconds since 1970, one per item of --history, separated by commas.
      input: file with a user or a history per row (.jsonl, .csv, .tsv, .parquet).
      users: "all" users of the run's log, or a file of users: one per line, or a table with the column user.
      pairs: file with the columns user and item, to be scored.
      score_items: raw item ids, separated by commas, to be scored for --user or --history.
      similar: raw item ids, separated by commas: the items most like each, by the cosine of their embeddings.
      output: file for the answers to --input, --users and --pairs (.csv, .tsv, .parquet, .jsonl).
      k: items to recommend.
      full_history: read whole histories instead of their last max_len events; for causal models.
    """

    run: pathlib.Path
    user: str | None = None
    history: str | None = None
    times: str | None = None
    input: pathlib.Path | None = None
    users: pathlib.Path | None = None
    pairs: pathlib.Path | None = None
    score_items: str | None = None
    similar: str | None = None
    output: pathlib.Path | None = None
    k: int = 10
    full_history: bool = False


def check(arguments: Arguments) -> None:
    """Refuses options that do not go together.

    Raises:
      ValueError: unless exactly one of `SOURCES` is given, with its own companions only.
    """
    given = [name for name in SOURCES if getattr(arguments, name) is not None]
    got = " and ".join(f"--{name}" for name in given) or "none"
    choices = ", ".join(f"--{name}" for name in SOURCES[:-1])
    require(len(given) == 1, f"give exactly one of {choices} and --{SOURCES[-1]}; got {got}")
    [source] = given
    require(arguments.times is None or source == "history", f"--times belongs to --history; got {got}")
    scoring = arguments.score_items is not None
    require(not scoring or source in ("user", "history"), f"--score_items belongs to --user or --history; got {got}")
    scoring |= source in ("pairs", "similar")
    require(
        not (scoring and arguments.full_history), "--full_history is for lists; experiments.stream has scores of states"
    )
    output = arguments.output
    files = " and ".join(f"--{name}" for name in _FILES)
    require((output is None) == (source not in _FILES), f"--output belongs to {files}, which need it; got {got}")
    if output is not None:
        require_ending("--output", output)
        require_no_run_file(output)


def _asked_history(recommender: Recommender, arguments: Arguments, rules: Rules) -> History:
    if arguments.history is None:
        return asked_history(recommender, str(arguments.user), rules)
    times = None if arguments.times is None else comma_separated("--times", arguments.times)
    items = comma_separated("--history", arguments.history)
    return given_history(recommender, items, times and whole_seconds(times, "--times"), rules)


def _caption(recommender: Recommender, history: History) -> str:
    parts = []
    if not len(history.items):
        parts.append("source: popularity in the training part; the score is how often an item occurs there")
    if history.skipped:
        parts.append(f"{history.skipped} unknown items were skipped")
    if history.assumed_gap is not None:
        unread = "" if recommender.model.uses_time else " (this model does not read times)"
        parts.append(
            f"no times given: consecutive items are taken to lie {history.assumed_gap:,} s apart, the median of the "
            f"run's log, and the last at its newest event, {recommender.newest_time}{unread}"
        )
    return "; ".join(parts)


def _print(
    recommender: Recommender, console: Console, indices: np.ndarray, scores: np.ndarray, title: str, caption: str = ""
) -> None:
    [items] = recommender.named(indices[None], scores[None])
    cells = [(str(rank), r.item_id, f"{r.score:.4f}", r.title or "") for rank, r in enumerate(items, start=1)]
    columns = 4 if any(r.title is not None for r in items) else 3
    header = ("rank", "item", "score", "title")[:columns]
    console.print(table(header, [row[:columns] for row in cells], title=title, caption=caption, left=(1, 3)))


def _indices(recommender: Recommender, option: str, text: str, rules: Rules) -> np.ndarray:
    items = comma_separated(option, text)
    kept = [item for item in items if not rules.skip_items or item in recommender.index_of_item]
    require(bool(kept), f"{option} names no item of the run")
    if len(kept) < len(items):
        note(f"{option}: {len(items) - len(kept)} of {len(items)} ids are no item of the run and were skipped")
    return np.array([recommender.item_index(item, option) for item in kept], np.int32)


def _write(recommender: Recommender, arguments: Arguments, output: pathlib.Path, rules: Rules) -> str:
    if arguments.pairs is not None:
        return score_pairs(recommender, arguments.pairs, output, rules=rules)
    if arguments.input is not None:
        pieces = read_histories(recommender, arguments.input, rules)
    elif str(arguments.users) == "all":
        pieces = all_users(recommender)
    else:
        pieces = read_users(recommender, pathlib.Path(str(arguments.users)), rules)
    how = {"rules": rules, "whole_histories": arguments.full_history}
    return recommend_pieces(recommender, pieces, output, arguments.k, **how)


def run(arguments: Arguments, console: Console) -> None:
    """Recommends as asked and prints what was done.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run or the input cannot be read, or the settings do not fit.
      FloatingPointError: the model's scores are not finite.
    """
    check(arguments)
    recommender = (load_streamable if arguments.full_history else Recommender.from_run)(arguments.run, report=note)
    rules = rules_from_options(arguments, recommender.index_of_item, report=note)
    if arguments.output is not None:
        console.print(Text(_write(recommender, arguments, arguments.output, rules)), soft_wrap=True)
        return
    if arguments.similar is not None:
        items = _indices(recommender, "--similar", arguments.similar, rules)
        found = recommender.similar(items.tolist(), arguments.k, allowed=rules.allowed)
        for item, indices, scores in zip(items, *found, strict=True):
            name = recommender.item_ids[item - 1]
            _print(recommender, console, indices, scores, f"most like item {name!r}", "score: cosine of the embeddings")
        return
    history = _asked_history(recommender, arguments, rules)
    caption = _caption(recommender, history)
    if arguments.score_items is not None:
        items = _indices(recommender, "--score_items", arguments.score_items, rules)
        [scores] = item_scores(recommender, [history], [items])
        title = f"scores for {history.label}, after {len(history.items)} events"
        _print(recommender, console, items, scores, title, caption)
        return
    how = {"rules": rules, "whole_histories": arguments.full_history}
    [indices], [scores] = top_k(recommender, [history], arguments.k, **how)
    title = f"next for {history.label}, after {len(history.items)} events"
    _print(recommender, console, indices, scores, title, caption)


@program
def main(argv: list[str]) -> int:
    """Recommends as asked."""
    run(parse_settings(Arguments, argv, prog="experiments.recommend"), Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
