"""A stream of events and questions, line by line: what was asked for, what is taken in, and what is kept of it."""

import contextlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from tim4rec_jax.checks import require
from tim4rec_jax.files import locked, named_in_errors
from tim4rec_jax.serving.durable_log import Answers, Chain, Journal, Line, LineReader, hashed, until_readable
from tim4rec_jax.serving.event_lines import UnknownItem, answer_line, error_line, parsed
from tim4rec_jax.serving.json_lines import as_json
from tim4rec_jax.serving.rules import RuleOptions, Rules, rules_from_options
from tim4rec_jax.serving.streaming import load_streamable
from tim4rec_jax.serving.user_table import LAST_SECOND, UserTable

IDLE_SECONDS = 1.0
# A save of a large table takes long: at most one part in so many of the time goes into saves.
SAVE_SHARE = 10


@dataclass(frozen=True)
class StreamOptions(RuleOptions):
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


def _note(line: str) -> None:
    print(line, file=sys.stderr)


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


def open_table(options: StreamOptions) -> tuple[UserTable, Chain, Chain | None]:
    """Reads the table of states, or makes a new one.

    Returns:
      The table, how many lines it holds, and how many answers the file of answers held then; None where the table
      knows no such file.

    Raises:
      FileNotFoundError, ValueError, CheckpointError: the run or the table cannot be read or do not fit.
    """
    recommender = load_streamable(options.run, report=_note)
    if options.state is None or not options.state.exists():
        table = UserTable(recommender, keep_items=options.keep_items)
        if options.warm:
            table.add_histories(recommender.stored_histories())
            table.flush()
        return table, Chain(), None
    table = UserTable.load(options.state, recommender)
    try:
        warm, held = table.notes["warm"], Chain.from_notes(table.notes["lines"])
        answers = {name: Chain.from_notes(position) for name, position in table.notes["answers"].items()}
    except (AttributeError, KeyError, ValueError) as error:
        raise ValueError(f"{options.state} is no table of experiments.stream, or is damaged: {error}") from error
    for name, stored in (("warm", warm), ("keep_items", table.keeps_items)):
        if stored != getattr(options, name):
            raise ValueError(
                f"{options.state} was made with {name}={stored}, not {getattr(options, name)}: start as before, or "
                "with another table"
            )
    return table, held, answers.get(answers_name(options))


def answers_name(options: StreamOptions) -> str | None:
    """The file of answers as seen from the table, so that both can be moved together."""
    if options.output == "-" or options.state is None:
        return None
    return os.path.relpath(options.output, options.state.parent)


@dataclass
class Session:
    """One run of the program: what it has taken in and given out.

    Attributes:
      options: what was asked for.
      table: the states.
      rules: what may be recommended.
      lines: how far the input has been read.
      answers: the file of answers; None for standard output.
      journal: of lines from standard input; None for another input, or where nothing is kept.
      quiet: answers are not shown on standard output, because they were shown before.
    """

    options: StreamOptions
    table: UserTable
    rules: Rules
    lines: Chain
    answers: Answers | None = None
    journal: Journal | None = None
    quiet: bool = False
    first: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"events": 0, "answers": 0, "errors": 0, "skipped": 0})
    began: float = field(default_factory=time.monotonic)
    saved_lines: int = 0
    next_save: float = 0.0

    def take(self, line: Line) -> dict[str, Any] | None:
        """Takes in a line; returns what it was answered, if it was."""
        self.lines.add(line)
        try:
            limits = {name: getattr(self.options, name) for name in ("longest_line", "latest_time")}
            answer = answer_line(self.table, line, **limits, rules=self.rules)
        except UnknownItem:
            answer = None
            self.counts["skipped"] += 1
        except (ValueError, FloatingPointError) as error:
            answer = error_line(error)
            self.counts["errors"] += 1
        else:
            self.counts["events"] += answer is None and (line.content or b"").strip() != b""
            self.counts["answers"] += answer is not None
        if answer is not None:
            answer = {"line": self.lines.lines} | answer
            self.give(answer)
        if self.table.pending >= self.options.batch_events:
            self.table.flush()
        if self.lines.lines - self.saved_lines >= self.options.save_every or time.monotonic() >= self.next_save:
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
            given = given | {answers_name(self.options): asdict(self.answers.position)}
        return {"warm": self.options.warm, "lines": asdict(self.lines), "answers": given}

    def save(self) -> None:
        """Saves the table with the lines it holds, if a file was asked for; events that wait are saved as they are."""
        began = time.monotonic()
        if self.options.state is not None:
            if self.answers is not None:
                self.answers.sync()
            if self.journal is not None:  # A table that is ahead of its journal could not be told from another's.
                self.journal.sync()
            self.table.notes = self.notes()
            self.table.save(self.options.state)
            if self.journal is not None:
                self.journal.begin(self.lines)
        self.saved_lines = self.lines.lines
        now = time.monotonic()
        self.next_save = now + max(self.options.save_seconds, SAVE_SHARE * (now - began))

    def start(self) -> None:
        """Takes in what the journal holds beyond the table; from here on a start can follow a kill at any moment."""
        self.next_save = time.monotonic() + self.options.save_seconds
        journal, self.journal = self.journal, None
        if journal is None:
            return
        if journal.path.exists():
            self._replay(journal)
        if self.notes() != self.table.notes:
            self.save()
        if self.options.events == "-":
            journal.begin(self.lines)
            self.journal = journal
        else:
            journal.remove()

    def _replay(self, journal: Journal) -> None:
        answer, self.quiet = None, True
        for line in journal.read(Chain(**asdict(self.lines)), self.options.longest_line):
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
        skipped = self.counts["skipped"]
        left_out = f", {skipped:,} events of unknown items skipped" if skipped else ""
        held = f"; {self.options.state} holds {self.lines.lines:,} lines" if self.options.state is not None else ""
        return (
            f"{self.lines.lines - self.first:,} lines: {self.counts['events']:,} events, {self.counts['answers']:,} "
            f"answers, {self.counts['errors']:,} bad lines{left_out}; {len(self.table):,} users of "
            f"{self.table.streamer.state_bytes():,} bytes each; {time.monotonic() - self.began:.1f} s{held}"
        )


def journal_of(state: pathlib.Path) -> pathlib.Path:
    """Returns where the lines stand that came after a table of states was saved."""
    return state.with_name(f"{state.name}.journal")


def open_reader(descriptor: int, session: Session, asked: Stopping) -> LineReader:
    """Passes over the lines of a file that the table holds, or begins another log.

    Raises:
      ValueError: the lines are not the same, and no other log was announced.
    """
    options, held, seen = session.options, session.lines, Chain()
    reader = LineReader(descriptor, options.longest_line, asked.wait)
    if options.events == "-":
        reader.copy = session.copy
        return reader
    while seen.lines < held.lines and (line := reader.next()):
        seen.add(line)
    if seen == held:
        return reader
    if not options.new_log:
        raise ValueError(
            f"{options.events} does not begin with the {held.lines} lines that {options.state} holds ({seen.lines} "
            "lines were compared); give the same log, or --new-log for another one"
        )
    session.lines, session.first, session.saved_lines = Chain(), 0, 0
    with named_in_errors(pathlib.Path(options.events)):
        os.lseek(descriptor, 0, os.SEEK_SET)
    return LineReader(descriptor, options.longest_line, asked.wait)


def take_rest(reader: LineReader, session: Session) -> None:
    """Takes a last line without a line break if it is sure to be whole; says so if it is not."""
    rest = reader.rest()
    if rest == b"":
        return
    with contextlib.suppress(ValueError):
        # An object without its last bracket is no JSON: a pipe that was cut off ends in no other line.
        if session.options.events == "-" and rest is not None and parsed(rest):
            session.copy(rest + b"\n")
            session.take(hashed(rest))
            return
    _note("note: the last line has no line break yet and was not taken")


@contextlib.contextmanager
def opened(options: StreamOptions) -> Iterator[tuple[int, Session]]:
    """Yields the input's descriptor and a session that holds every line taken in before."""
    with contextlib.ExitStack() as stack:
        if options.events == "-":
            require(sys.stdin is not None, "standard input is closed; give --events=FILE")
            source = sys.stdin
        else:
            source = stack.enter_context(pathlib.Path(options.events).open("rb", buffering=0))
        written = [options.state] if options.state is not None else []
        written += [pathlib.Path(options.output)] if options.output != "-" else []
        for path in written:
            stack.enter_context(locked(path))
        session = _begun(options, stack)
        session.start()
        yield source.fileno(), session


def _begun(options: StreamOptions, stack: contextlib.ExitStack) -> Session:
    """Opens what is kept and what is written."""
    state = options.state
    journal = None if state is None else Journal(journal_of(state))
    if state is not None and journal is not None and journal.path.exists() and not state.exists():
        raise ValueError(
            f"{journal.path} holds lines that go on from {state}, which is not there; bring it back, or remove the "
            "journal as well to begin anew"
        )
    table, lines, given = open_table(options)
    rules = rules_from_options(options, table.recommender.index_of_item, report=_note)
    session = Session(options, table, rules, lines, journal=journal, first=lines.lines, saved_lines=lines.lines)
    if options.output != "-":
        session.answers = Answers(pathlib.Path(options.output), given)
        stack.callback(session.answers.close)
    return session
