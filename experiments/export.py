"""Writes a run's best model as programs that run with JAX and NumPy alone (StableHLO by jax.export).

    python -m experiments.export --run=runs/ml1m --output=exported --k=50

The folder holds recommend.jax_export (histories in, the k best items out; any number of histories a call), for causal
models also step.jax_export and top_k.jax_export (states in, states out), the parameters and the items with their raw
ids, embeddings and titles, and export.json, which says what goes in and what comes out. To run it:

    program = jax.export.deserialize(pathlib.Path("exported/recommend.jax_export").read_bytes())
    parameters = dict(numpy.load("exported/parameters.npz"))
    best, scores = program.call(parameters, items, lengths, timestamps, excluded)

JAX promises to read such files for six months after the release that wrote them; export anew after that.
"""

import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.console import Console
from rich.table import Table

from experiments.cli import parse_settings, run_program
from tim4rec_jax.serving.export import export_model
from tim4rec_jax.serving.recommender import Recommender


@dataclass(frozen=True)
class Arguments:
    """Writes a run's best model as programs that run without this library.

    Attributes:
      run: the run folder.
      output: folder to write; must not exist.
      k: items of a list.
      platforms: what the programs can run on, some of cpu, cuda, rocm and tpu.
    """

    run: pathlib.Path
    output: pathlib.Path
    k: int = 10
    platforms: tuple[Literal["cpu", "cuda", "rocm", "tpu"], ...] = ("cpu", "cuda", "tpu")


def run(arguments: Arguments) -> Table:
    """Exports as asked; returns a table of what was written.

    Raises:
      FileNotFoundError, FileExistsError, ValueError, CheckpointError: the run cannot be read, the folder is there, or
        the settings do not fit.
    """
    recommender = Recommender.from_run(arguments.run, report=lambda line: print(line, file=sys.stderr))
    description = export_model(recommender, arguments.output, k=arguments.k, platforms=arguments.platforms)
    table = Table(title=f"{arguments.output}, for {', '.join(description['platforms'])}", title_justify="left")
    table.add_column("file")
    table.add_column("KB", justify="right")
    table.add_column("call")
    calls = {program["file"]: program["call"] for program in description["programs"].values()}
    for file in sorted(arguments.output.iterdir()):
        table.add_row(file.name, f"{file.stat().st_size / 1000:,.1f}", calls.get(file.name, ""))
    return table


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    Console().print(run(parse_settings(Arguments, argv, prog="experiments.export")))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    raise SystemExit(main())
