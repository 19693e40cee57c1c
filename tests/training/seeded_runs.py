"""A program that trains the same runs twice by forking, each in a process of its own.

python -m tests.training.seeded_runs folder option...
"""

import pathlib
import sys

from tests.training.killed_runs import finish

LOADERS = ("device", "grain")


def main(base: str, *options: str) -> None:
    for loader in LOADERS:
        for number in range(2):
            finish([*options, f"--data.loader={loader}", f"--run_dir={pathlib.Path(base) / f'{loader}_{number}'}"])


if __name__ == "__main__":
    main(*sys.argv[1:])
