"""What the programs share: settings from the command line, and errors as one line."""

import contextlib
import dataclasses
import difflib
import errno
import io
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import tyro

from tim4rec_jax.training.checkpoint import CheckpointError
from tim4rec_jax.training.processes import ProcessError

Settings = TypeVar("Settings")
EXPECTED_ERRORS = (
    ValueError, OSError, CheckpointError, FloatingPointError, ModuleNotFoundError, ProcessError,
)  # fmt: skip


def _options(settings: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yields the option of every field of nested dataclasses, as in --train.learning_rate, with its value."""
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value


def require_known_options(arguments: Sequence[str], default: object) -> None:
    """Refuses an unknown option and names the nearest ones.

    Raises:
      ValueError: for the first option that is not known.
    """
    folded = {name.replace("-", "_").lstrip("_"): name for name, _ in _options(default)}
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


_FLAG_VALUES = {"true": True, "1": True, "false": False, "0": False}


def with_flags(arguments: Sequence[str], default: object) -> list[str]:
    """Rewrites --model.use_time=False as --model.no-use-time, so that yes-or-no settings are given like all others.

    Raises:
      ValueError: for a value that is neither true nor false.
    """
    flags = {name.replace("-", "_"): name for name, value in _options(default) if isinstance(value, bool)}
    rewritten = []
    for argument in arguments:
        option, equals, value = argument.partition("=")
        if not equals or option.replace("-", "_") not in flags:
            rewritten.append(argument)
            continue
        if value.lower() not in _FLAG_VALUES:
            raise ValueError(f"{option}={value}: expected true or false")
        head, _, last = option.rpartition(".")
        negative = f"{head}.no-{last}" if head else f"--no-{option.lstrip('-')}"
        rewritten.append(option if _FLAG_VALUES[value.lower()] else negative)
    return rewritten


def parse_options(cls: type[Settings], arguments: Sequence[str], **options: Any) -> Settings:
    """Reads options by `tyro.cli`; of its page about a mistake one line is left.

    Raises:
      ValueError: for what is no option, or no value of one.
    """
    page = io.StringIO()
    try:
        with contextlib.redirect_stderr(page):
            return tyro.cli(cls, args=list(arguments), **options)
    except SystemExit as stop:
        if not stop.code:  # --help was asked for.
            raise
        # Frame and rules; the first part between two rules says what is wrong.
        lines = [line.strip("╭╮╰╯│+| ") for line in page.getvalue().splitlines()]
        framed = itertools.dropwhile(lambda line: not line.strip("─-"), lines[1:])
        said = itertools.takewhile(lambda line: line.strip("─-"), framed)
        raise ValueError(f"{' '.join(said)}; --help lists the options") from None


def parse_settings(cls: type[Settings], arguments: Sequence[str], default: Settings, **options: Any) -> Settings:
    """Reads dataclass settings by `tyro.cli`; a value that a setting refuses is our own error, not a page of usage.

    Raises:
      ValueError: for an unknown option (the nearest are shown) or a value out of range.
    """
    require_known_options(arguments, default)
    shown = io.StringIO()
    try:
        with contextlib.redirect_stderr(shown):
            return tyro.cli(cls, args=with_flags(arguments, default), default=default, **options)
    except SystemExit as stop:
        error: BaseException | None = stop
        while error is not None and type(error) is not ValueError:
            error = error.__context__
        # A message of several lines is not ours; the page that comes with it names the option.
        if error is not None and "\n" not in str(error):
            raise error from None
        sys.stderr.write(shown.getvalue())
        raise


OUT_OF_MEMORY = (
    "lower train.batch_size, train.microbatch_tokens, eval.batch_size or model.max_len, set "
    "train.loss_implementation=xla, or use more devices (parallel.strategy, parallel.catalogue_shards); what was saved "
    "is kept for --resume"
)


def _memory_complaint(error: BaseException) -> str | None:
    """One line about memory that ran out, on the host or on a device; None for another error."""
    first = str(error).strip().partition("\n")[0]
    if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in first:
        return None
    return f"out of memory ({first[:70] or type(error).__name__}): {OUT_OF_MEMORY}"


# Of a disk, not of what was asked for.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def _disk_advice(error: BaseException) -> str:
    if not isinstance(error, OSError) or error.errno not in _DISK_ERRORS:
        return ""
    return "; make room there or choose another folder: what was saved before is kept"


# Characters of an error on the screen.
LONGEST_ERROR = 290
# Of them for its end, which says what to do.
_END = 120


def one_line(message: str) -> str:
    """Returns a message as one line; of one too long for that the beginning and the end."""
    parts = [part.strip() for part in message.splitlines() if part.strip()]
    line = "".join(
        part + ("" if i + 1 == len(parts) else " " if part[-1] in ":;,." else "; ") for i, part in enumerate(parts)
    )
    if len(line) <= LONGEST_ERROR:
        return line
    return f"{line[: LONGEST_ERROR - _END - 3]} … {line[-_END:]}"


def run_program(program: Callable[[list[str]], int], argv: Sequence[str] | None = None) -> int:
    """Runs a program and prints an expected error as one line on standard error; returns the exit code.

    An error of several lines, or of more than 300 characters, loses what does not fit.
    """
    try:
        return program(list(sys.argv[1:] if argv is None else argv))
    except EXPECTED_ERRORS as error:
        print(f"error: {one_line(f'{error}{_disk_advice(error)}') or type(error).__name__}", file=sys.stderr)
    except RecursionError:
        print("error: the input is nested too deeply; give one that a program wrote", file=sys.stderr)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        complaint = _memory_complaint(error)
        if complaint is None:
            raise
        print(f"error: {one_line(complaint)}", file=sys.stderr)
    return 2
