"""Takes in events one line at a time, keeps a state for every user, and answers with recommendations.

    python -m experiments.stream --run=runs/ml1m --events=events.jsonl --state=users.npz --output=answers.jsonl
    tail -F events.jsonl | python -m experiments.stream --run=runs/ml1m --state=users.npz
    python -m experiments.stream --run=runs/ml1m --events=today.jsonl --state=users.npz --new-log

A line is {"user": "42", "item": "1193", "timestamp": 978300760}, an event, or {"user": "42", "recommend": 10,
"exclude_seen": true}, a question (exclude_seen optional), which is answered by one line {"line": .., "user": ..,
"items": [{"item": .., "score": .., "title": ..}]}. A bad line, and an event that goes back in time, is answered by
{"line": .., "error": ..} and skipped. Events between two answers are computed together, many users in one call.

The table of states is saved at the end, every --save-every lines, on Ctrl-C and on SIGTERM, together with the number of
lines it holds. Started again with the same file, the program skips these lines, after it has made sure that they are
the same; from standard input it expects the lines after them. Lines that were answered after the last save are then
answered again, by the same answers under the same numbers. --new-log reads another log from its first line into the
same table.

New users start empty; with --warm the run's own users start with their stored histories. The model must be causal.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TextIO

import tyro

from experiments.command_line import run_program
from experiments.recommend import load_streamable, raw_id
from tim4rec_jax.serving.user_table import Event, UserTable


@dataclass(frozen=True)
class Arguments:
    """Keeps the states of users over a log of events and recommends from them.

    Attributes:
      run: the run folder of a causal model.
      events: JSON-lines file, or - for standard input.
      state: file of the table of states; read at the start if it is there.
      output: JSON-lines file for the answers, or - for standard output.
      warm: the run's users start with their stored histories.
      keep_items: keep every user's items (4 bytes an event), which exclude_seen needs.
      new_log: the events are another log than the one the table was made from.
      batch_events: most events that wait to be computed together.
      save_every: lines between two saves.
    """

    run: pathlib.Path
    events: str = "-"
    state: pathlib.Path | None = None
    output: str = "-"
    warm: bool = False
    keep_items: bool = True
    new_log: bool = False
    batch_events: int = 4096
    save_every: int = 1_000_000

    def __post_init__(self) -> None:
        for name in ("batch_events", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name}={getattr(self, name)} must be at least 1")


class Stopped(Exception):
    """Somebody asked the program to stop while it waited for input."""


@dataclass
class Stopping:
    """Whether somebody asked the program to stop.

    Attributes:
      signal: which signal came, or None.
      waiting: a signal may break off what the program does, for it only waits for input.
    """

    signal: int | None = None
    waiting: bool = False

    def take(self, number: int, _: Any) -> None:
        """Handles a signal."""
        self.signal = number
        if self.waiting:
            raise Stopped

    def next_line(self, stream: BinaryIO) -> bytes:
        """Reads a line; empty at the end of the input.

        Raises:
          Stopped: where a signal came before or comes while it waits.
        """
        self.waiting = True
        try:
            if self.signal is not None:
                raise Stopped
            return stream.readline()
        finally:
            self.waiting = False


@contextlib.contextmanager
def stopping() -> Iterator[Stopping]:
    """Turns Ctrl-C and SIGTERM into a request that is met between two lines."""
    asked = Stopping()
    before = {number: signal.signal(number, asked.take) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@dataclass
class Progress:
    """How far a log has been read.

    Attributes:
      lines: lines of the log so far.
      digest: hash of these lines in hexadecimal, each chained to the one before.
      first: lines that were there when the program started.
      answers, errors, events: since then.
    """

    lines: int = 0
    digest: str = ""
    first: int = 0
    answers: int = 0
    errors: int = 0
    events: int = 0
    began: float = field(default_factory=time.monotonic)

    def count(self, line: bytes) -> None:
        """Takes in a line."""
        self.lines += 1
        self.digest = hashlib.sha256(self.digest.encode() + line.rstrip(b"\r\n")).hexdigest()


def open_table(arguments: Arguments) -> tuple[UserTable, Progress]:
    """Reads the table of states, or makes a new one.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run or the table cannot be read or do not fit.
    """
    if arguments.state is not None and not arguments.state.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {arguments.state.absolute().parent} for {arguments.state}")
    recommender = load_streamable(arguments.run)
    if arguments.state is None or not arguments.state.exists():
        table = UserTable(recommender, keep_items=arguments.keep_items)
        table.notes["warm"] = arguments.warm
        if arguments.warm:
            table.add_histories(recommender.stored_histories())
            table.flush()
        return table, Progress()
    table = UserTable.load(arguments.state, recommender)
    for name, stored in (("warm", table.notes["warm"]), ("keep_items", table.keeps_items)):
        if stored != getattr(arguments, name):
            raise ValueError(
                f"{arguments.state} was made with {name}={stored}, not {getattr(arguments, name)}: start as before, or "
                "with another table"
            )
    if arguments.new_log:
        return table, Progress()
    lines, digest = table.notes["lines"], table.notes["digest"]
    return table, Progress(lines=lines, digest=digest, first=lines)


def skip_read_lines(stream: BinaryIO, arguments: Arguments, progress: Progress) -> None:
    """Passes over the lines that the table holds.

    Raises:
      ValueError: where they are not the same.
    """
    seen = Progress()
    while seen.lines < progress.lines and (line := stream.readline()):
        seen.count(line)
    if seen.digest != progress.digest:
        raise ValueError(
            f"{arguments.events} does not begin with the {progress.lines} lines that {arguments.state} holds "
            f"({seen.lines} lines were compared); give the same log, or --new-log for another one"
        )


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(values, dict) or "user" not in values or ("item" in values) == ("recommend" in values):
        raise ValueError('must be an object with "user" and either "item" and "timestamp", or "recommend"')
    known = {"user", "item", "timestamp"} if "item" in values else {"user", "recommend", "exclude_seen"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"unknown keys {unknown}; known: {sorted(known)}")
    return values


def take_line(table: UserTable, line: bytes) -> dict[str, Any] | None:
    """Takes in an event, or answers a question.

    Returns:
      The answer without its line number; None for an event.

    Raises:
      ValueError: for a line that says neither, or what the table refuses; nothing has changed.
      FloatingPointError: where scores are not finite.
    """
    values = _parsed(line)
    user = raw_id(values["user"])
    if "item" in values:
        if "timestamp" not in values:
            raise ValueError('"timestamp" is missing: seconds since 1970')
        table.add([Event(user, raw_id(values["item"]), values["timestamp"])])
        return None
    k, exclude_seen = values["recommend"], values.get("exclude_seen", False)
    if isinstance(k, bool) or not isinstance(k, int):
        raise ValueError(f'"recommend" must be a whole number of items, not {json.dumps(k)}')
    if not isinstance(exclude_seen, bool):
        raise ValueError(f'"exclude_seen" must be true or false, not {json.dumps(exclude_seen)}')
    [items] = table.recommender.named(*table.top_k([user], k, exclude_seen=exclude_seen))
    return {"user": user, "items": [{"item": r.item_id, "score": r.score, "title": r.title} for r in items]}


def save(table: UserTable, progress: Progress, path: pathlib.Path | None) -> None:
    """Saves the table with the lines it holds; only computes what waits where no file was asked for."""
    table.flush()
    if path is not None:
        table.notes |= {"lines": progress.lines, "digest": progress.digest}
        table.save(path)


def read_events(
    stream: BinaryIO, output: TextIO, table: UserTable, progress: Progress, arguments: Arguments, asked: Stopping
) -> None:
    """Reads lines until the input ends or somebody asks to stop.

    Raises:
      Stopped: where somebody asks; everything read has been taken in.
    """
    while line := asked.next_line(stream):
        progress.count(line)
        if line.strip():
            try:
                answer = take_line(table, line)
            except ValueError as error:
                answer = {"error": str(error)}
                progress.errors += 1
            else:
                progress.events += answer is None
                progress.answers += answer is not None
            if answer is not None:
                output.write(json.dumps({"line": progress.lines} | answer, ensure_ascii=False) + "\n")
                output.flush()
        if table.pending >= arguments.batch_events:
            table.flush()
        if progress.lines % arguments.save_every == 0:
            save(table, progress, arguments.state)


def _summary(table: UserTable, progress: Progress, arguments: Arguments) -> str:
    seconds = time.monotonic() - progress.began
    held = f"; {arguments.state} holds {progress.lines:,} lines" if arguments.state is not None else ""
    return (
        f"{progress.lines - progress.first:,} lines: {progress.events:,} events, {progress.answers:,} answers, "
        f"{progress.errors:,} bad lines; {len(table):,} users of {table.streamer.state_bytes():,} bytes each; "
        f"{seconds:.1f} s{held}"
    )


@contextlib.contextmanager
def _opened(arguments: Arguments, goes_on: bool) -> Iterator[tuple[BinaryIO, TextIO]]:
    with contextlib.ExitStack() as stack:
        source: BinaryIO = sys.stdin.buffer
        if arguments.events != "-":
            source = stack.enter_context(pathlib.Path(arguments.events).open("rb"))
        target: TextIO = sys.stdout
        if arguments.output != "-":
            mode = "a" if goes_on else "x"
            target = stack.enter_context(pathlib.Path(arguments.output).open(mode, encoding="utf-8"))
        yield source, target


def run(arguments: Arguments) -> int:
    """Streams as asked; returns the exit code.

    Raises:
      FileNotFoundError, FileExistsError, ValueError, CheckpointError: the run, the table, the input or the output
        cannot be used.
      FloatingPointError: the model's scores are not finite; the table is not saved.
    """
    with stopping() as asked:
        table, progress = open_table(arguments)
        goes_on = arguments.state is not None and arguments.state.exists()
        with _opened(arguments, goes_on) as (source, target):
            if arguments.events != "-":
                skip_read_lines(source, arguments, progress)
            try:
                read_events(source, target, table, progress, arguments, asked)
            except Stopped:
                print(f"stopped by {signal.Signals(asked.signal).name}", file=sys.stderr)
            except BrokenPipeError:
                # What nobody read counts as unanswered, so the table stays as it was saved last.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                print(f"error: nobody reads the answers any more, at line {progress.lines}", file=sys.stderr)
                return 1
            save(table, progress, arguments.state)
    print(_summary(table, progress, arguments), file=sys.stderr)
    return 0 if asked.signal is None else 128 + asked.signal


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    return run(tyro.cli(Arguments, args=argv, prog="experiments.stream"))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
