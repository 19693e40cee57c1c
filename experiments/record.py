"""Writes a finished run as one JSON file of evidence: what was run, on what, and what came out.

    python -m experiments.record --run=runs/beauty_tim4rec --output=experiments/results/beauty_tim4rec.json

The file holds command, commit, versions, device, seed, data fingerprint, settings, every validation and the test.
Folders of the machine are left out of paths.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.command_line import parse_settings, run_program
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.files import write_atomically
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


def without_folders(text: str) -> str:
    """Cuts the folders of an absolute path, also behind an option's equals sign."""
    option, equals, value = text.rpartition("=")
    return f"{option}{equals}{pathlib.PurePath(value).name}" if value.startswith("/") else text


def settings_without_folders(config: ExperimentConfig) -> dict[str, Any]:
    """Returns settings ready for JSON, without what belongs to a machine: folders of paths, and the cache's."""
    settings = config.to_dict()
    for name in ("path", "item_path"):
        settings["data"][name] = settings["data"][name] and without_folders(settings["data"][name])
    settings["data"].pop("cache_dir")
    return settings


def command_without_folders(command: Sequence[str]) -> list[str]:
    """Returns a command line without the folders of absolute paths."""
    return [without_folders(argument) for argument in command]


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


def program(argv: list[str]) -> int:
    """The program behind `main`."""
    arguments = parse_settings(Arguments, argv, prog="experiments.record")
    require_no_run_file(arguments.output)
    text = json.dumps(evidence(arguments.run, arguments.note), indent=1) + "\n"
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, text.encode())
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """The program; returns its exit code."""
    return run_program(program, argv)


if __name__ == "__main__":
    sys.exit(main())
