"""Writes a finished run as one JSON file of evidence: what was run, on what, and what came out.

    python -m experiments.record --run=runs/beauty_tim4rec --output=experiments/results/beauty_tim4rec.json

The file holds command, commit, versions, device, seed, data fingerprint, settings, every validation and the test.
Folders of the machine are left out of paths.
"""

import pathlib
from dataclasses import dataclass
from typing import Any

from experiments.cli import command_without_folders, parse_settings, program, settings_without_folders, write_json
from tim4rec_jax.run_dir import read_config, read_environment, read_results, require_no_run_file
from tim4rec_jax.training.logging import read_metrics


@dataclass(frozen=True)
class Arguments:
    """Writes a finished run as one JSON file.

    Attributes:
      run: the run folder.
      output: the file to write.
      note: a sentence to keep with the numbers, for instance about the data.
    """

    run: pathlib.Path
    output: pathlib.Path
    note: str = ""


def evidence(run: pathlib.Path, note: str) -> dict[str, Any]:
    """Collects what a run folder says of a finished run.

    Raises:
      FileNotFoundError: the run is not finished.
    """
    environment, lines = read_environment(run), read_metrics(run)
    environment["command"] = command_without_folders(environment["command"])
    epochs = [{k: v for k, v in line.items() if k != "kind"} for line in lines if line["kind"] == "valid"]
    return {
        "note": note,
        "environment": environment,
        "config": settings_without_folders(read_config(run)),
        "results": read_results(run),
        "train_seconds": sum(epoch["train_seconds"] for epoch in epochs),
        "valid_seconds": sum(epoch["valid_seconds"] for epoch in epochs),
        "epochs": epochs,
    }


@program
def main(argv: list[str]) -> int:
    """Writes a run's evidence."""
    arguments = parse_settings(Arguments, argv, prog="experiments.record")
    require_no_run_file(arguments.output)
    write_json(arguments.output, evidence(arguments.run, arguments.note))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
