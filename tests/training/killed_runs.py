"""A program that trains by forking, kills its children at random moments and starts them again; writes what happened.

    python -m tests.training.killed_runs out.json folder kills option...

Everything is imported before it forks and JAX has not started by then, so that an attempt costs no imports.
"""

import json
import os
import pathlib
import random
import signal
import sys
import time
import traceback

from experiments import train


def start(options: list[str], log: pathlib.Path = pathlib.Path(os.devnull)) -> int:
    """Starts a training in a child; returns its process id. What it prints goes to a file."""
    child = os.fork()
    if child:
        return child
    log = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    code = 70
    try:
        code = train.main(options)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def finish(options: list[str]) -> float:
    """Trains to the end; returns the seconds it took."""
    started = time.monotonic()
    _, status = os.waitpid(start(options), 0)
    assert os.waitstatus_to_exitcode(status) == 0, f"{options} ended with {status}"
    return time.monotonic() - started


def options_of(options: list[str], folder: pathlib.Path) -> list[str]:
    resume = ["--resume"] if (folder / "config.json").exists() else []
    return [*options, f"--run_dir={folder}", *resume]


def main(output: str, base: str, kills: str, *options: str) -> None:
    folder, rng, options = pathlib.Path(base), random.Random(0), list(options)
    # The first compiles; the second tells how long a run takes.
    finish(options_of(options, folder / "reference"))
    seconds = finish(options_of(options, folder / "again"))
    found, run = [], 0
    while len(found) < int(kills):
        here = folder / f"run_{run}"
        child = start(options_of(options, here))
        time.sleep(rng.uniform(0.05, 0.6) * seconds)
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == -signal.SIGKILL:
            metrics = here / "metrics.jsonl"
            found.append([run, metrics.read_bytes().count(b"\n") if metrics.exists() else -1])
        else:
            assert code == 0, f"run {run} ended with {code}"
            run += 1
    finish(options_of(options, folder / f"run_{run}"))
    pathlib.Path(output).write_text(json.dumps({"kills": found, "runs": run + 1, "seconds": seconds}))


if __name__ == "__main__":
    main(*sys.argv[1:])
