"""Kills experiments.stream by SIGKILL many times, starts it by the same command, and compares with an unkilled run.

file        --events, --state and --output; killed in the first second, while it starts, during a save (a temporary
            file of the table is there) and while it takes in lines
pipe        lines through standard input, answers read from standard output; killed in the first second and after some
            answers. The producer goes on with the line that the program asks for at its start.

Counted are events lost and doubled in the table, answers missing, doubled and different, and lines from standard input
that were answered, and so acknowledged, and then not held. The run is small, with random parameters. Any such count
over 0, or a table of other bits, makes the exit code 1.
"""

import argparse
import collections
import contextlib
import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile
import threading
import time
from typing import Any

import numpy as np
from rich.table import Table

from experiments.benchmarks.small_run import draw_lines, make_run, spawn
from experiments.cli import OptionParser
from tim4rec_jax.checks import require
from tim4rec_jax.run_dir import environment

USERS = 100
SAVES = 200
_MOST_SECONDS = 900
_MOMENTS = ("first second", "start", "save", "save", "lines", "lines")


def _parse(rest: list[str]) -> argparse.Namespace:
    parser = OptionParser(prog="experiments.benchmark stream_kills")
    parser.add_argument("--events", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=50, help="of the program that reads a file")
    parser.add_argument("--pipe-kills", type=int, default=5, help="of the program that reads standard input")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(rest)
    for name, least in (("events", 100), ("kills", 1), ("pipe_kills", 0)):
        require(getattr(options, name) >= least, f"--{name}={getattr(options, name)} must be at least {least}")
    return options


class Program:
    """The program over one log, in one folder.

    Attributes:
      folder: holds the log, the table and the answers.
      lines: the log.
    """

    def __init__(self, run: pathlib.Path, folder: pathlib.Path, lines: list[bytes], cache: pathlib.Path) -> None:
        """Makes the folder with the log."""
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(b"".join(lines))
        self.folder, self.lines = folder, lines
        self.table, self.answers = folder / "users.npz", folder / "answers.jsonl"
        # Starts find the compiled programs of those before them.
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(cache),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        self._options = [f"--run={run}", f"--state={self.table}", f"--save-every={max(1, len(lines) // SAVES)}"]

    def start(self, *, piped: bool = False) -> subprocess.Popen:
        """The one command."""
        options = [] if piped else [f"--events={self.folder / 'events.jsonl'}", f"--output={self.answers}"]
        with (self.folder / "errors.txt").open("wb") as errors:
            return spawn("stream", *self._options, *options, environment=self._environment, errors=errors, piped=piped)

    def errors(self) -> str:
        """What the last process said."""
        return (self.folder / "errors.txt").read_text(encoding="utf-8", errors="replace")

    def finish(self, process: subprocess.Popen) -> None:
        """Waits for the end.

        Raises:
          ValueError: the program ended with an error.
        """
        with process:
            try:
                code = process.wait(_MOST_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                raise
        require(code == 0, f"experiments.stream ended with {code}: {self.errors()[-200:].strip()}")


def _version(file: pathlib.Path) -> int | None:
    """Tells one saved table from the next."""
    with contextlib.suppress(FileNotFoundError):
        return file.stat().st_ino
    return None


def _until(process: subprocess.Popen, happened: Any) -> bool:
    """Waits closely until something happened; returns whether it did before the process ended."""
    deadline = time.monotonic() + _MOST_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if happened():
            return True
        time.sleep(0.0005)
    return False


def _await_moment(program: Program, process: subprocess.Popen, moment: str, rng: random.Random, usual: dict) -> None:
    """Waits until it is time to kill."""
    if moment == "first second":
        time.sleep(rng.uniform(0, 1))
    elif moment == "start":
        time.sleep(rng.uniform(0, usual["start"]))
    elif moment == "save":
        folder = program.folder
        for left in reversed(range(rng.randrange(1, 4))):
            _until(process, lambda: any(name.endswith(".tmp") for name in os.listdir(folder)))
            if left:
                _until(process, lambda: not any(name.endswith(".tmp") for name in os.listdir(folder)))
        time.sleep(rng.uniform(0, 0.004))
    else:
        before = _version(program.table)
        _until(process, lambda: _version(program.table) != before)
        time.sleep(rng.uniform(0, usual["lines"]))


def kill_file(program: Program, kills: int, rng: random.Random, usual: dict[str, float]) -> list[dict[str, Any]]:
    """Kills and starts so many times and then lets the program end; returns the moments of the kills.

    Args:
      program: in a new folder.
      kills: how many processes are killed while they run.
      rng: draws the moments.
      usual: seconds of a start, and the longest wait after lines have been taken.
    """
    killed, starts = [], 0
    moments = [_MOMENTS[i % len(_MOMENTS)] for i in range(kills)]
    rng.shuffle(moments)
    while len(killed) < kills and starts < 2 * kills:
        moment, began, starts = moments[len(killed)], time.monotonic(), starts + 1
        process = program.start()
        _await_moment(program, process, moment, rng, usual)
        saving = any(name.endswith(".tmp") for name in os.listdir(program.folder))
        process.kill()
        if process.wait() == 0:  # It came to its end before.
            continue
        require(process.returncode == -9, f"experiments.stream ended with {process.returncode}: {program.errors()}")
        killed.append(
            {"moment": moment, "seconds": round(time.monotonic() - began, 3), "saving": saving}
            | {"answers": program.answers.read_bytes().count(b"\n") if program.answers.exists() else 0}
        )
    require(
        len(killed) == kills, f"only {len(killed)} of {kills} processes were killed before the end; give more events"
    )
    program.finish(program.start())
    return killed


def _asked_from(program: Program, process: subprocess.Popen) -> int | None:
    """How many lines the program says that it holds; None if it was killed before it said so."""
    said = " lines; give those from line "
    if not _until(process, lambda: said in program.errors() and program.errors().endswith("\n")):
        return None
    return int(program.errors().split(said)[1].split()[0].replace(",", "")) - 1


def _feed(process: subprocess.Popen, content: bytes) -> None:
    with contextlib.suppress(BrokenPipeError, ValueError), process.stdin:
        process.stdin.write(content)


def kill_pipe(program: Program, kills: int, rng: random.Random) -> dict[str, Any]:
    """The same with lines through pipes; returns what was answered by line, and what was held back after each kill."""
    answers: dict[int, bytes] = {}
    found = {"kills": 0, "given_again": 0, "answers_different": 0, "acknowledged_lost": 0}
    asked = sum(b'"recommend"' in line for line in program.lines)
    for attempt in range(kills + 1):
        process = program.start(piped=True)
        last = attempt == kills
        with process, process.stdout:
            if attempt == 0 and kills > 1:
                time.sleep(rng.uniform(0, 1))
                process.kill()
            held = _asked_from(program, process)
            if held is not None:
                found["acknowledged_lost"] += max(0, max(answers, default=0) - held)
                feeder = threading.Thread(target=_feed, args=(process, b"".join(program.lines[held:])))
                feeder.start()
                left = rng.randrange(1, max(2, 2 * asked // (kills + 1)))
                reading = True
                while reading and (line := process.stdout.readline()).endswith(b"\n"):
                    number = json.loads(line)["line"]
                    found["given_again"] += number in answers
                    found["answers_different"] += answers.setdefault(number, line) != line
                    left -= 1
                    reading = last or left > 0
                if not last:
                    time.sleep(rng.uniform(0, 0.05))
                    process.kill()
                feeder.join()
            else:
                process.stdin.close()
            if last:
                program.finish(process)
            else:
                found["kills"] += process.wait() == -9
    return found | {"answers": answers}


def _table(file: pathlib.Path) -> dict[str, np.ndarray]:
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def compared(whole: Program, killed: Program, answers: dict[int, bytes] | None = None) -> dict[str, Any]:
    """Counts what differs from the unkilled run.

    Args:
      whole: unkilled.
      killed: killed and started again.
      answers: by line, where they were read from standard output.
    """
    expected = _by_line(whole.answers.read_bytes().splitlines(keepends=True))
    require(max(map(len, expected.values()), default=1) == 1, "the unkilled run gave an answer twice")
    given = {line: [answer] for line, answer in answers.items()} if answers is not None else None
    if given is None:
        given = _by_line(killed.answers.read_bytes().splitlines(keepends=True))
    ours, theirs = _table(killed.table), _table(whole.table)
    logged = collections.Counter(e["user"] for e in map(json.loads, killed.lines) if "item" in e)
    users = json.loads(ours["users"].tobytes())
    more = {user: int(n) - logged[user] for user, n in zip(users, ours["events"], strict=True)}
    more |= {user: -n for user, n in logged.items() if user not in more}
    # Notes also name the file of answers, which the other way of reading does not have.
    notes = [json.loads(table["header"].tobytes())["notes"]["lines"] for table in (ours, theirs)]
    compared_arrays = set(theirs) - ({"header", "hash"} if answers is not None else set())
    return {
        "events": sum(logged.values()),
        "events_lost": -sum(n for n in more.values() if n < 0),
        "events_doubled": sum(n for n in more.values() if n > 0),
        "answers": len(expected),
        "answers_missing": len(expected.keys() - given.keys()),
        "answers_doubled": sum(len(lines) - 1 for lines in given.values()),
        "answers_different": sum(given[line][0] != expected.get(line, [b""])[0] for line in given),
        "table_bytes": sum(array.nbytes for array in ours.values()),
        "table_equal": notes[0] == notes[1]
        and set(ours) == set(theirs)
        and all(ours[name].tobytes() == theirs[name].tobytes() for name in compared_arrays),
    }


def _by_line(answers: list[bytes]) -> dict[int, list[bytes]]:
    found = collections.defaultdict(list)
    for answer in answers:
        found[json.loads(answer)["line"]].append(answer)
    return found


def _is_good(counts: dict[str, Any]) -> bool:
    bad = ("events_lost", "events_doubled", "answers_missing", "answers_doubled", "answers_different")
    return counts["table_equal"] and not any(counts[name] for name in bad) and not counts.get("acknowledged_lost")


def _unkilled(program: Program) -> dict[str, float]:
    """Lets the program run to its end; returns the seconds until lines came and those it took lines."""
    program.finish(program.start())  # compiles
    program.table.unlink(), program.answers.unlink()
    began, process = time.monotonic(), program.start()
    _until(process, program.table.exists)
    started = time.monotonic()
    program.finish(process)
    return {"start": started - began, "lines": time.monotonic() - started}


def run(options: argparse.Namespace, rest: list[str]) -> tuple[dict[str, Any], Table]:
    """Kills both ways of reading; returns the record and its table."""
    chosen = _parse(rest)
    rng, results = random.Random(chosen.seed), {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        item_ids = make_run(folder / "run", chosen.seed)
        lines = draw_lines(item_ids, chosen.seed, chosen.events, USERS, chosen.events // 20)
        whole, by_file, by_pipe = (
            Program(folder / "run", folder / way, lines, folder / "compiled") for way in ("whole", "file", "pipe")
        )
        seconds = _unkilled(whole)
        print(f"unkilled: {seconds['start']:.1f} s to start, {seconds['lines']:.1f} s of lines", file=sys.stderr)
        # All waits among lines together come to about a quarter of the log.
        killed = kill_file(by_file, chosen.kills, rng, seconds | {"lines": 1.5 * seconds["lines"] / chosen.kills})
        results["file"] = {"kills": len(killed), **compared(whole, by_file), "killed": killed}
        if chosen.pipe_kills:
            found = kill_pipe(by_pipe, chosen.pipe_kills, rng)
            counts = compared(whole, by_pipe, found.pop("answers"))
            counts["answers_different"] += found.pop("answers_different")
            results["pipe"] = counts | found
    table = Table(title="killed by SIGKILL and started again, against an unkilled run")
    for column in ("way", "kills", "events lost", "doubled", "answers missing", "doubled", "different", "table equal"):
        table.add_column(column, justify="right")
    for way, counts in results.items():
        shown = ("kills", "events_lost", "events_doubled", "answers_missing", "answers_doubled", "answers_different")
        table.add_row(way, *(f"{counts[name]:,}" for name in shown), str(counts["table_equal"]))
    record = {"environment": environment(), "settings": vars(chosen), "unkilled_seconds": seconds, "results": results}
    return record | {"failed": not all(map(_is_good, results.values()))}, table
