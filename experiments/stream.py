"""Takes in events one line at a time, keeps a state for every user, and answers with recommendations.

    python -m experiments.stream --run=runs/ml1m --events=events.jsonl --state=users.npz --output=answers.jsonl
    tail -F events.jsonl | python -m experiments.stream --run=runs/ml1m --state=users.npz
    python -m experiments.stream --run=runs/ml1m --events=today.jsonl --state=users.npz --new-log

A line is {"user": "42", "item": "1193", "timestamp": 978300760}, an event, or {"user": "42", "recommend": 10,
"exclude_seen": true}, a question (exclude_seen optional), which is answered by one line {"line": .., "user": ..,
"items": [{"item": .., "score": .., "title": ..}]}. A bad line, and an event that goes back in time, is answered by
{"line": .., "error": ..} and skipped. Answers depend on the lines alone and on no clock. Events between two answers are
computed together, many users in one call.

With --state the program can be killed at any moment and be started again by the same command. The table of states is
saved at the start and the end, every --save-every lines, every --save-seconds, on Ctrl-C and on SIGTERM, together with
the number of lines it holds. An answer means that no line before it will be lost:
  --events=FILE    the file is the record: the lines that the table holds are skipped, after it has been made sure that
                   they are the same, and those after them are read again. A last line without a line break is still
                   being written and is not taken.
  standard input   lines are written to a journal beside the table (users.npz.journal) before an answer that rests on
                   them. At the start the program says how many lines it holds and expects the lines after them.
Answers in a file (--output) then stand there once each, as if nothing had happened. On standard output those since the
last save are given again, under the same numbers (from standard input only the last, which may not have been read).
Without --state nothing is kept: --output must be a new file. --new-log reads another log from its first line into the
same table.

New users start empty; with --warm the run's own users start with their stored histories. The model must be causal.
"""

import contextlib
import dataclasses
import os
import pathlib
import signal
import sys
from collections.abc import Iterator, Sequence

from experiments.command_line import parse_settings, run_program
from experiments.stream_lines import parsed
from experiments.stream_session import Arguments, Session, Stopped, Stopping, open_table
from tim4rec_jax.checks import require
from tim4rec_jax.files import locked, named_in_errors
from tim4rec_jax.serving.durable_log import Answers, Chain, Journal, LineReader, hashed
from tim4rec_jax.serving.user_table import LAST_SECOND
from tim4rec_jax.training.signals import handled


def journal_of(state: pathlib.Path) -> pathlib.Path:
    """Returns where the lines stand that came after a table of states was saved."""
    return state.with_name(f"{state.name}.journal")


def check(arguments: Arguments) -> Arguments:
    """Refuses options that do not go together; returns them with the files that links lead to.

    Raises:
      ValueError: for a number out of range, files that are the same, or a new log from standard input.
      FileNotFoundError: the folder of the table or of the answers is missing.
    """
    for name, least in (("batch_events", 1), ("save_every", 1), ("longest_line", 64), ("latest_time", 0)):
        value = getattr(arguments, name)
        require(value >= least, f"--{name}={value} must be at least {least}")
    require(
        arguments.latest_time <= LAST_SECOND, f"--latest_time={arguments.latest_time} must be {LAST_SECOND} at most"
    )
    seconds = arguments.save_seconds
    require(0 < seconds < float("inf"), f"--save_seconds={seconds} must be over 0 and finite")
    from_file = arguments.events != "-"
    require(from_file or not arguments.new_log, "--new_log needs --events=FILE; standard input always goes on")
    files = {"state": arguments.state} | {
        name: None if getattr(arguments, name) == "-" else pathlib.Path(getattr(arguments, name))
        for name in ("events", "output")
    }
    named = {name: path.resolve() for name, path in files.items() if path is not None}
    taken = [*named.values(), *([journal_of(named["state"])] if "state" in named else [])]
    require(
        len(set(taken)) == len(taken),
        f"{' and '.join(f'--{n}' for n in named)} must be different files, and none the table's .journal",
    )
    for name, path in named.items():
        if name != "events" and not path.parent.is_dir():
            raise FileNotFoundError(f"there is no folder {path.parent} for {files[name]}")
    state, output = named.get("state"), str(named.get("output", "-"))
    return dataclasses.replace(arguments, state=state, output=output)


def _reader(descriptor: int, session: Session, asked: Stopping) -> LineReader:
    """Passes over the lines of a file that the table holds, or begins another log.

    Raises:
      ValueError: the lines are not the same, and no other log was announced.
    """
    arguments, held, seen = session.arguments, session.lines, Chain()
    reader = LineReader(descriptor, arguments.longest_line, asked.wait)
    if arguments.events == "-":
        reader.copy = session.copy
        return reader
    while seen.lines < held.lines and (line := reader.next()):
        seen.add(line)
    if seen == held:
        return reader
    if not arguments.new_log:
        raise ValueError(
            f"{arguments.events} does not begin with the {held.lines} lines that {arguments.state} holds ({seen.lines} "
            "lines were compared); give the same log, or --new-log for another one"
        )
    session.lines, session.first, session.saved_lines = Chain(), 0, 0
    with named_in_errors(pathlib.Path(arguments.events)):
        os.lseek(descriptor, 0, os.SEEK_SET)
    return LineReader(descriptor, arguments.longest_line, asked.wait)


def _take_rest(reader: LineReader, session: Session) -> None:
    """Takes a last line without a line break if it is sure to be whole; says so if it is not."""
    rest = reader.rest()
    if rest == b"":
        return
    with contextlib.suppress(ValueError):
        # An object without its last bracket is no JSON: a pipe that was cut off ends in no other line.
        if session.arguments.events == "-" and rest is not None and parsed(rest):
            session.copy(rest + b"\n")
            session.take(hashed(rest))
            return
    print("note: the last line has no line break yet and was not taken", file=sys.stderr)


@contextlib.contextmanager
def _opened(arguments: Arguments) -> Iterator[tuple[int, Session]]:
    """Yields the input's descriptor and a session that holds every line taken in before."""
    with contextlib.ExitStack() as stack:
        if arguments.events == "-":
            require(sys.stdin is not None, "standard input is closed; give --events=FILE")
            source = sys.stdin
        else:
            source = stack.enter_context(pathlib.Path(arguments.events).open("rb", buffering=0))
        written = [arguments.state] if arguments.state is not None else []
        written += [pathlib.Path(arguments.output)] if arguments.output != "-" else []
        for path in written:
            stack.enter_context(locked(path))
        session = _begun(arguments, stack)
        session.start()
        yield source.fileno(), session


def _begun(arguments: Arguments, stack: contextlib.ExitStack) -> Session:
    """Opens what is kept and what is written."""
    state = arguments.state
    journal = None if state is None else Journal(journal_of(state))
    if journal is not None and journal.path.exists() and not state.exists():
        raise ValueError(
            f"{journal.path} holds lines that go on from {state}, which is not there; bring it back, or remove the "
            "journal as well to begin anew"
        )
    table, lines, given = open_table(arguments)
    session = Session(arguments, table, lines, journal=journal, first=lines.lines, saved_lines=lines.lines)
    if arguments.output != "-":
        session.answers = Answers(pathlib.Path(arguments.output), given)
        stack.callback(session.answers.close)
    return session


def run(arguments: Arguments) -> int:
    """Streams as asked; returns the exit code.

    Raises:
      FileNotFoundError, FileExistsError, ValueError, CheckpointError: the run, the table, the input or the output
        cannot be used.
      OSError: a file cannot be written; it is named, and the same command goes on where there is room again.
    """
    arguments = check(arguments)
    asked = Stopping()
    with handled(asked.take), _opened(arguments) as (source, session):
        if arguments.events == "-" and arguments.state is not None:
            count = session.lines.lines
            print(f"{arguments.state} holds {count:,} lines; give those from line {count + 1:,} on", file=sys.stderr)
        try:
            reader = _reader(source, session, asked)
            session.read(reader, asked)
            _take_rest(reader, session)
            if session.answers is not None:
                session.answers.cut()
        except Stopped:
            print(f"stopped by {signal.Signals(asked.signal).name}", file=sys.stderr)
        except BrokenPipeError:
            # What nobody read counts as unanswered, so the table stays as it was saved last.
            print(f"error: nobody reads the answers any more, at line {session.lines.lines}", file=sys.stderr)
            return 1
        session.end()
    print(session.summary(), file=sys.stderr)
    return 0 if asked.signal is None else 128 + asked.signal


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    return run(parse_settings(Arguments, argv, prog="experiments.stream"))


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
