"""Takes in events one line at a time, keeps a state for every user, and answers with recommendations.

    python -m experiments.stream --run=runs/ml1m --events=events.jsonl --state=users.npz --output=answers.jsonl
    tail -F events.jsonl | python -m experiments.stream --run=runs/ml1m --state=users.npz
    python -m experiments.stream --run=runs/ml1m --events=today.jsonl --state=users.npz --new-log

A line is {"user": "42", "item": "1193", "timestamp": 978300760}, an event, or {"user": "42", "recommend": 10,
"exclude_seen": true, "allow": ["1193"], "deny": []}, a question (the last three optional), answered by one line
{"line": .., "user": .., "source": "model", "items": [{"item": .., "score": .., "title": ..}]}. {"user": "42",
"score": ["1193"]} asks for scores, {"item": "1193", "similar": 10} for items like one. Rules for all questions are
options (--allow, --deny, --where ..), as of experiments.recommend; with --unknown_users=popularity users without events
get the most frequent items, of source "popularity". A bad line, and an event that goes back in time, is answered by
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

import dataclasses
import pathlib
import signal

from experiments.cli import note, parse_settings, program
from tim4rec_jax.checks import require
from tim4rec_jax.serving.event_stream import (
    Stopped,
    Stopping,
    StreamOptions,
    journal_of,
    open_reader,
    opened,
    take_rest,
)
from tim4rec_jax.serving.user_table import LAST_SECOND
from tim4rec_jax.training.signals import handled


def check(options: StreamOptions) -> StreamOptions:
    """Refuses options that do not go together; returns them with the files that links lead to.

    Raises:
      ValueError: for a number out of range, files that are the same, or a new log from standard input.
      FileNotFoundError: the folder of the table or of the answers is missing.
    """
    for name, least in (("batch_events", 1), ("save_every", 1), ("longest_line", 64), ("latest_time", 0)):
        value = getattr(options, name)
        require(value >= least, f"--{name}={value} must be at least {least}")
    require(options.latest_time <= LAST_SECOND, f"--latest_time={options.latest_time} must be {LAST_SECOND} at most")
    seconds = options.save_seconds
    require(0 < seconds < float("inf"), f"--save_seconds={seconds} must be over 0 and finite")
    from_file = options.events != "-"
    require(from_file or not options.new_log, "--new_log needs --events=FILE; standard input always goes on")
    files = {"state": options.state} | {
        name: None if getattr(options, name) == "-" else pathlib.Path(getattr(options, name))
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
    return dataclasses.replace(options, state=state, output=output)


def run(options: StreamOptions) -> int:
    """Streams as asked; returns the exit code.

    Raises:
      FileNotFoundError, FileExistsError, ValueError, CheckpointError: the run, the table, the input or the output
        cannot be used.
      OSError: a file cannot be written; it is named, and the same command goes on where there is room again.
    """
    options = check(options)
    asked = Stopping()
    with handled(asked.take), opened(options) as (source, session):
        if options.events == "-" and options.state is not None:
            count = session.lines.lines
            note(f"{options.state} holds {count:,} lines; give those from line {count + 1:,} on")
        try:
            reader = open_reader(source, session, asked)
            session.read(reader, asked)
            take_rest(reader, session)
            if session.answers is not None:
                session.answers.cut()
        except Stopped:
            note(f"stopped by {signal.Signals(asked.signal).name}")
        except BrokenPipeError:
            # What nobody read counts as unanswered, so the table stays as it was saved last.
            note(f"error: nobody reads the answers any more, at line {session.lines.lines}")
            return 1
        session.end()
    note(session.summary())
    return 0 if asked.signal is None else 128 + asked.signal


@program
def main(argv: list[str]) -> int:
    """Streams as asked."""
    return run(parse_settings(StreamOptions, argv, prog="experiments.stream"))


if __name__ == "__main__":
    raise SystemExit(main())
