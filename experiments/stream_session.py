"""One run of experiments.stream: what it was asked, what it has taken in, and what it keeps."""

import os
import pathlib
import sys
import time
from dataclasses import asdict, dataclass, field
from typing import Any

from experiments.recommend import load_streamable
from experiments.stream_lines import answer_line, as_json, error_line
from tim4rec_jax.files import named_in_errors
from tim4rec_jax.serving.durable_log import Answers, Chain, Journal, Line, LineReader, until_readable
from tim4rec_jax.serving.user_table import LAST_SECOND, UserTable

IDLE_SECONDS = 1.0
# A save of a large table takes long: at most one part in so many of the time goes into saves.
SAVE_SHARE = 10


@dataclass(frozen=True)
class Arguments:
    """Keeps the states of users over a log of events and recommends from them.

    Attributes:
      run: the run folder of a causal model.
      events: JSON-lines file, or - for standard input.
      state: file of the table of states; read at the start if it is there.
      output: JSON-lines file for the answers, or - for standard output.
      warm: the run's users start with their stored histories.
      keep_items: keep every user's items (4 bytes per event), which exclude_seen needs.
      new_log: the events may be another log than the one the table was made from.
      batch_events: most events that wait to be computed together.
      save_every: most lines between two saves.
      save_seconds: most seconds between two saves; more where saves take long.
      longest_line: bytes of the longest line that is read.
      latest_time: events after this second since 1970 are refused; one far ahead makes all true ones late.
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
    save_seconds: float = 60.0
    longest_line: int = 2**20
    latest_time: int = LAST_SECOND


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

    def take(self, number: int) -> None:
        """Handles a signal."""
        self.signal = number
        if self.waiting:
            raise Stopped

    def wait(self, descriptor: int, seconds: float | None) -> bool:
        """Waits for input; see `until_readable`.

        Raises:
          Stopped: where a signal came before or comes while it waits.
        """
        self.waiting = True
        try:
            self.meet()
            return until_readable(descriptor, seconds)
        finally:
            self.waiting = False

    def meet(self) -> None:
        """Raises Stopped where a signal came."""
        if self.signal is not None:
            raise Stopped


def open_table(arguments: Arguments) -> tuple[UserTable, Chain, Chain | None]:
    """Reads the table of states, or makes a new one.

    Returns:
      The table, how many lines it holds, and how many answers the file of answers held then; None where the table
      knows no such file.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run or the table cannot be read or do not fit.
    """
    recommender = load_streamable(arguments.run)
    if arguments.state is None or not arguments.state.exists():
        table = UserTable(recommender, keep_items=arguments.keep_items)
        if arguments.warm:
            table.add_histories(recommender.stored_histories())
            table.flush()
        return table, Chain(), None
    table = UserTable.load(arguments.state, recommender)
    try:
        warm, held = table.notes["warm"], Chain.from_notes(table.notes["lines"])
        answers = {name: Chain.from_notes(position) for name, position in table.notes["answers"].items()}
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{arguments.state} is no table of experiments.stream, or is damaged: {error}") from error
    for name, stored in (("warm", warm), ("keep_items", table.keeps_items)):
        if stored != getattr(arguments, name):
            raise ValueError(
                f"{arguments.state} was made with {name}={stored}, not {getattr(arguments, name)}: start as before, or "
                "with another table"
            )
    return table, held, answers.get(answers_name(arguments))


def answers_name(arguments: Arguments) -> str | None:
    """The file of answers as seen from the table, so that both can be moved together."""
    if arguments.output == "-":
        return None
    return os.path.relpath(arguments.output, arguments.state.parent)


@dataclass
class Session:
    """One run of the program: what it has taken in and given out.

    Attributes:
      arguments: what was asked for.
      table: the states.
      lines: how far the input has been read.
      answers: the file of answers; None for standard output.
      journal: of lines from standard input; None for another input, or where nothing is kept.
      quiet: answers are not shown on standard output, because they were shown before.
    """

    arguments: Arguments
    table: UserTable
    lines: Chain
    answers: Answers | None = None
    journal: Journal | None = None
    quiet: bool = False
    first: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"events": 0, "answers": 0, "errors": 0})
    began: float = field(default_factory=time.monotonic)
    saved_lines: int = 0
    next_save: float = 0.0

    def take(self, line: Line) -> dict[str, Any] | None:
        """Takes in a line; returns what it was answered, if it was."""
        self.lines.add(line)
        try:
            limits = {name: getattr(self.arguments, name) for name in ("longest_line", "latest_time")}
            answer = answer_line(self.table, line, **limits)
        except (ValueError, FloatingPointError) as error:
            answer = error_line(error)
            self.counts["errors"] += 1
        else:
            self.counts["events"] += answer is None and line.content.strip() != b""
            self.counts["answers"] += answer is not None
        if answer is not None:
            answer = {"line": self.lines.lines} | answer
            self.give(answer)
        if self.table.pending >= self.arguments.batch_events:
            self.table.flush()
        if self.lines.lines - self.saved_lines >= self.arguments.save_every or time.monotonic() >= self.next_save:
            self.save()
        return answer

    def give(self, answer: dict[str, Any]) -> None:
        """Writes an answer, after the lines that it rests on."""
        if self.journal is not None:
            self.journal.sync()
        if self.answers is not None:
            self.answers.write(as_json(answer))
        elif not self.quiet:
            try:
                with named_in_errors(pathlib.Path("standard output")):
                    sys.stdout.buffer.write(as_json(answer) + b"\n")
                    sys.stdout.buffer.flush()
            except OSError:
                # What is left in the buffer would fail once more at the end of the program.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                raise

    def copy(self, content: bytes) -> None:
        """Takes bytes of lines into the journal, as they come."""
        if self.journal is not None:
            self.journal.append(content)

    def notes(self) -> dict[str, Any]:
        """What is saved with the table: how far the input goes, and each file of answers."""
        given = self.table.notes.get("answers", {})
        if self.answers is not None:
            given = given | {answers_name(self.arguments): asdict(self.answers.position)}
        return {"warm": self.arguments.warm, "lines": asdict(self.lines), "answers": given}

    def save(self) -> None:
        """Saves the table with the lines it holds, if a file was asked for; events that wait are saved as they are."""
        began = time.monotonic()
        if self.arguments.state is not None:
            if self.answers is not None:
                self.answers.sync()
            if self.journal is not None:  # A table that is ahead of its journal could not be told from another's.
                self.journal.sync()
            self.table.notes = self.notes()
            self.table.save(self.arguments.state)
            if self.journal is not None:
                self.journal.begin(self.lines)
        self.saved_lines = self.lines.lines
        now = time.monotonic()
        self.next_save = now + max(self.arguments.save_seconds, SAVE_SHARE * (now - began))

    def start(self) -> None:
        """Takes in what the journal holds beyond the table; from here on a start can follow a kill at any moment."""
        self.next_save = time.monotonic() + self.arguments.save_seconds
        journal, self.journal = self.journal, None
        if journal is None:
            return
        if journal.path.exists():
            self._replay(journal)
        if self.notes() != self.table.notes:
            self.save()
        if self.arguments.events == "-":
            journal.begin(self.lines)
            self.journal = journal
        else:
            journal.remove()

    def _replay(self, journal: Journal) -> None:
        answer, self.quiet = None, True
        for line in journal.read(Chain(**asdict(self.lines)), self.arguments.longest_line):
            answer = self.take(line)
        self.quiet = False
        # The last line may have been killed before its answer was read; all before it were answered.
        if answer is not None and self.answers is None:
            self.give(answer)

    def read(self, reader: LineReader, asked: Stopping) -> None:
        """Reads lines until the input ends.

        Raises:
          Stopped: where somebody asks; everything read has been taken in.
        """
        while not reader.ended:
            asked.meet()
            line = reader.next(IDLE_SECONDS if self.lines.lines > self.saved_lines else None)
            if line is not None:
                self.take(line)
            elif not reader.midway:
                if self.journal is not None:
                    self.journal.sync()
                if time.monotonic() >= self.next_save:
                    self.save()

    def end(self) -> None:
        """Saves the table and tidies up, where the input ended or somebody asked to stop."""
        if self.notes() != self.table.notes:
            self.save()
        if self.journal is not None:
            self.journal.remove()

    def summary(self) -> str:
        """One line that says what was done."""
        held = f"; {self.arguments.state} holds {self.lines.lines:,} lines" if self.arguments.state is not None else ""
        return (
            f"{self.lines.lines - self.first:,} lines: {self.counts['events']:,} events, {self.counts['answers']:,} "
            f"answers, {self.counts['errors']:,} bad lines; {len(self.table):,} users of "
            f"{self.table.streamer.state_bytes():,} bytes each; {time.monotonic() - self.began:.1f} s{held}"
        )
