"""Recommends what comes next, for a user of the log, a history given by hand, or a file of either.

    python -m experiments.recommend --run=runs/ml1m --user=42 --k=10
    python -m experiments.recommend --run=runs/ml1m --history="1193,661,914" --times="978300760,978302109,978301968"
    python -m experiments.recommend --run=runs/ml1m --input=histories.jsonl --output=top.parquet --exclude-seen

A line of the input file is {"user": "42"} or {"history": ["1193", "661"], "times": [978300760, 978302109]}, times
optional. Where times are missing they are assumed, and the output says so. The output file has one row per recommended
item: line, user, rank, item_id, score, title, assumed_gap (seconds; null where times are known).

The last max_len events of a history are read, as in evaluation. A causal model's state can hold all of them, however
many they are: --full-history (see also experiments.stream, which keeps the states).
"""

import pathlib
import re
from dataclasses import dataclass

from rich.console import Console
from rich.text import Text

from experiments.cli import note, parse_settings, program, table
from tim4rec_jax.checks import require, shortened, shown
from tim4rec_jax.run_dir import require_no_run_file
from tim4rec_jax.serving.history_file import recommend_file, top_k
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.streaming import load_streamable


@dataclass(frozen=True)
class Arguments:
    """Recommends what comes next; give one of --user, --history and --input.

    Attributes:
      run: the run folder.
      user: raw id of a user of the run's log.
      history: raw item ids, oldest first, separated by commas.
      times: seconds since 1970, one per item of --history, separated by commas.
      input: JSON-lines file with a user or a history per line.
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
    source, output = arguments.input, arguments.output
    given = [f"--{name}" for name in ("user", "history", "input") if getattr(arguments, name) is not None]
    got = " and ".join(given) or "none"
    require(len(given) == 1, f"give exactly one of --user, --history and --input; got {got}")
    require(arguments.times is None or arguments.history is not None, f"--times belongs to --history; got {given[0]}")
    together = "--input and --output belong together: a JSON-lines file in, a Parquet file out"
    require((source is None) == (output is None), together)
    if source is None or output is None:
        return
    if output.suffix.lower() != ".parquet":
        raise ValueError(f"--output={shortened(str(output), 80)}: the file is written as Parquet; end it in .parquet")
    require_no_run_file(output)
    if source.suffix.lower() in (".csv", ".tsv", ".parquet"):
        raise ValueError(
            f"--input={shortened(str(source), 80)}: a JSON-lines file is read, one object per line, such as "
            '{"user": "42"}; convert it'
        )


def _split(option: str, text: str) -> list[str]:
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if "" in parts:
        raise ValueError(f"{option}: nothing stands at position {parts.index('') + 1} of {text!r}; remove the comma")
    return parts


def _asked_history(recommender: Recommender, arguments: Arguments) -> History:
    if arguments.user is not None:
        return recommender.history_of_user(arguments.user)
    times = None if arguments.times is None else _split("--times", arguments.times)
    for text in times or []:
        if re.fullmatch("-?[0-9]{1,20}", text) is None:
            raise ValueError(f"--times: {shown(text)} is not a whole number of seconds since 1970")
    return recommender.history_from_ids(_split("--history", arguments.history), times and [int(text) for text in times])


def _assumption(recommender: Recommender, history: History) -> str:
    unread = "" if recommender.model.uses_time else " (this model does not read times)"
    return (
        f"no times given: consecutive items are taken to lie {history.assumed_gap:,} s apart, the median of the run's "
        f"log, and the last at its newest event, {recommender.newest_time}{unread}"
    )


def run(arguments: Arguments, console: Console) -> None:
    """Recommends as asked and prints what was done.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run or the input cannot be read, or the settings do not fit.
      FloatingPointError: the model's scores are not finite.
    """
    check(arguments)
    recommender = (load_streamable if arguments.full_history else Recommender.from_run)(arguments.run, report=note)
    k, how = arguments.k, {"exclude_seen": arguments.exclude_seen, "whole_histories": arguments.full_history}
    if arguments.input is not None and arguments.output is not None:
        said = recommend_file(recommender, arguments.input, arguments.output, k, **how)
        console.print(Text(said), soft_wrap=True)
        return
    history = _asked_history(recommender, arguments)
    [items] = recommender.named(*top_k(recommender, [history], k, **how))
    cells = [(str(rank), r.item_id, f"{r.score:.4f}", r.title or "") for rank, r in enumerate(items, start=1)]
    columns = 4 if any(r.title is not None for r in items) else 3
    title = f"next for {history.label}, after {len(history.items)} events"
    caption = _assumption(recommender, history) if history.assumed_gap is not None else ""
    header = ("rank", "item", "score", "title")[:columns]
    console.print(table(header, [row[:columns] for row in cells], title=title, caption=caption, left=(1, 3)))


@program
def main(argv: list[str]) -> int:
    """Recommends as asked."""
    run(parse_settings(Arguments, argv, prog="experiments.recommend"), Console())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
