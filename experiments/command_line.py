"""What the programs share: settings from the command line, and errors as one line."""

import difflib
import sys
from collections.abc import Callable, Sequence

from tim4rec_jax.training.checkpoint import CheckpointError

EXPECTED_ERRORS = (ValueError, FileNotFoundError, FileExistsError, CheckpointError, FloatingPointError, PermissionError)


def option_names(fields: object, prefix: str = "--") -> list[str]:
    """Returns the option of every field of nested dataclasses, as in --train.learning_rate."""
    import dataclasses

    names = []
    for field in dataclasses.fields(fields):  # type: ignore[arg-type]
        value = getattr(fields, field.name)
        if dataclasses.is_dataclass(value):
            names += option_names(value, f"{prefix}{field.name}.")
        else:
            names.append(f"{prefix}{field.name}")
    return names


def require_known_options(arguments: Sequence[str], known: Sequence[str]) -> None:
    """Refuses an unknown option and names the nearest ones.

    Raises:
      ValueError: for the first option that is not known.
    """
    folded = {name.replace("-", "_").lstrip("_"): name for name in known}
    for argument in arguments:
        if not argument.startswith("--") or argument == "--":
            continue
        option = argument.split("=", 1)[0]
        plain = option.replace("-", "_").lstrip("_")
        bare = plain.replace("no_", "", 1) if plain.split(".")[-1].startswith("no_") else plain
        if plain in folded or bare in folded or plain == "help":
            continue
        near = difflib.get_close_matches(plain, folded, n=3, cutoff=0.4) or sorted(folded)
        raise ValueError(f"unknown option {option}; nearest: {', '.join(folded[n] for n in near)}")


def run_program(program: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a program and prints an expected error as one line on standard error; returns the exit code."""
    try:
        return program(list(sys.argv[1:] if argv is None else argv))
    except EXPECTED_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
