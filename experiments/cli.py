"""What the programs share: settings from the command line, errors as one line, and records without folders."""

import argparse
import contextlib
import dataclasses
import difflib
import errno
import functools
import json
import math
import pathlib
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax
import tyro
from rich.table import Table
from rich.text import Text

from experiments.compiled import keep_compiled
from tim4rec_jax.checks import listed, shortened
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.files import write_atomically
from tim4rec_jax.parallel.processes import ProcessError, is_main
from tim4rec_jax.training.checkpoint import CheckpointError
from tim4rec_jax.training.signals import Interrupted, explain

Settings = TypeVar("Settings")
EXPECTED_ERRORS = (
    ValueError,
    OSError,
    CheckpointError,
    FloatingPointError,
    ModuleNotFoundError,
    ProcessError,
)


# Options of earlier versions, and what does as they did.
RETIRED = {
    "model.time_mode": "--model.name=tim4rec_causal for causal, --model.name=tim4rec for faithful",
    "model.use_time": "--model.name=ssd4rec for false, --model.name=tim4rec or tim4rec_causal for true",
    "train.loss_implementation": "--train.loss_in_tiles, and --model.kernels for its backend",
    **dict.fromkeys(
        ("model.ssd_implementation", "model.conv_implementation", "model.scan_implementation"), "--model.kernels"
    ),
}


def _options(settings: Any, prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yields the option of every field of nested dataclasses, as in --train.learning_rate, with its type."""
    hints = typing.get_type_hints(type(settings))
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if field.name in getattr(settings, "UNREAD", ()):
            continue
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", hints[field.name]


def _folded(option: str) -> str:
    return option.replace("-", "_").lstrip("_")


def _known_option(option: str, hints: Mapping[str, Any]) -> tuple[str, bool]:
    """Returns the name of an option as the settings have it, and whether it was given as its opposite.

    Raises:
      ValueError: for an unknown option (the nearest are shown).
    """
    known = {_folded(name): name for name in hints}
    plain = _folded(option)
    if plain in known:
        return known[plain], False
    head, dot, last = plain.rpartition(".")
    opposite = known.get(head + dot + last.removeprefix("no_"), "") if last.startswith("no_") else ""
    if hints.get(opposite) is bool:
        return opposite, True
    if (gone := head + dot + last.removeprefix("no_")) in RETIRED:
        raise ValueError(f"{shortened(option, 60)} is gone; give {RETIRED[gone]}")
    near = difflib.get_close_matches(plain, known, n=3, cutoff=0.4) or sorted(known)
    raise ValueError(f"unknown option {shortened(option, 60)}; nearest: {listed([known[n] for n in near], 160, ', ')}")


_FLAG_VALUES = {"true": True, "1": True, "false": False, "0": False}


def yes_or_no(text: str) -> bool:
    """Reads the value of a yes-or-no option.

    Raises:
      ValueError: it is neither true nor false.
    """
    if text.lower() not in _FLAG_VALUES:
        raise ValueError("expected true or false")
    return _FLAG_VALUES[text.lower()]


def _kinds(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def _expected(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "a text",
        pathlib.Path: "a path",
        types.NoneType: "None",
    }
    if typing.get_origin(hint) is tuple:
        return f"{_expected(typing.get_args(hint)[0])}, or several with commas between them"
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    return names[hint] if hint in names else " or ".join(map(_expected, _kinds(hint)))


def read_value(name: str, hint: Any, text: str) -> Any:
    """Returns a setting's value from its text; a number must be finite.

    Raises:
      ValueError: the text is no value of the setting's type; setting, value and what is expected are named.
    """
    for kind in _kinds(hint):
        if kind is types.NoneType and text == "None":
            return None
        if kind is bool and text.lower() in _FLAG_VALUES:
            return yes_or_no(text)
        if typing.get_origin(kind) is Literal and text in typing.get_args(kind):
            return text
        if kind in (int, float):
            with contextlib.suppress(ValueError):
                if math.isfinite(number := kind(text)):
                    return number
        if kind is pathlib.Path and text not in ("", "None"):
            return pathlib.Path(text)
        if kind is str and not (text == "None" and types.NoneType in _kinds(hint)):
            return text
    raise ValueError(f"{name}={shortened(text, 60)}: expected {_expected(hint)}")


def _read_list(option: str, hint: Any, words: Sequence[str]) -> tuple[Any, ...]:
    kind = typing.get_args(hint)[0]
    # A text may itself hold commas.
    parts = words if kind is str else [part.strip() for word in words for part in word.split(",")]
    try:
        return tuple(read_value(option, kind, part) for part in parts)
    except ValueError:
        raise ValueError(f"{option}={shortened(' '.join(words), 60)}: expected {_expected(hint)}") from None


def _read_options(arguments: Sequence[str], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the value of every option given; of one given twice the last.

    Raises:
      ValueError: for a word that belongs to no option, an unknown option, a value that is none, or texts listed twice.
    """
    found: dict[str, Any] = {}
    at = 0
    while at < len(arguments):
        option, equals, value = arguments[at].partition("=")
        at += 1
        if not option.startswith("--") or option == "--":
            raise ValueError(f"{shortened(arguments[at - 1], 60)!r} belongs to no option; options begin with --")
        name, opposite = _known_option(option, hints)
        hint, words = hints[name], [value] if equals else []
        is_list = typing.get_origin(hint) is tuple
        # What follows is this option's; of a yes-or-no option only if it says so.
        while not equals and at < len(arguments) and not arguments[at].startswith("--"):
            if (hint is bool and arguments[at].lower() not in _FLAG_VALUES) or (words and not is_list):
                break
            words.append(arguments[at])
            at += 1
        if is_list:
            if name in found and typing.get_args(hint)[0] is str:
                raise ValueError(f"{option} is there twice; give all its values at once")
            found[name] = _read_list(option, hint, words)
        elif not words and hint is not bool:
            raise ValueError(f"{option} has no value: expected {_expected(hint)}")
        else:
            read = read_value(option, hint, words[0] if words else "true")
            found[name] = not read if opposite else read
    return found


def _with_values(settings: Any, found: Mapping[str, Any], prefix: str = "--") -> Any:
    changes = {}
    for field in dataclasses.fields(settings):
        path, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if field.name in getattr(settings, "UNREAD", ()):
            continue
        if dataclasses.is_dataclass(value):
            changes[field.name] = _with_values(value, found, f"{path}.")
        else:
            changes[field.name] = found.get(path, value)
        if changes[field.name] is tyro.MISSING:
            raise ValueError(f"give {path}, as in {path}=..")
    return dataclasses.replace(settings, **changes)


def parse_settings(
    cls: type[Settings],
    arguments: Sequence[str],
    default: Settings | None = None,
    others: Sequence[Settings] = (),
    **options: Any,
) -> Settings:
    """Reads dataclass settings from --field=value, --field value and, for yes or no, --field and --no-field.

    Lists are values with commas or blanks between them. `--help` shows them all (`tyro.cli`) and ends the program.

    Args:
      cls: the dataclass; its fields may be dataclasses.
      arguments: the command line without the program.
      default: settings to start from; `tyro.MISSING` marks those that must be given. None: those of the class.
      others: settings that the same command line is also for; options of theirs alone are passed over.
      options: prog and description of `tyro.cli`.

    Raises:
      ValueError: for an unknown option (the nearest are shown), a value of another type or out of range, or a missing
        one; the option, the value and what is expected are named.
    """
    if default is None:
        needed = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        default = cls(**dict.fromkeys(needed, tyro.MISSING))
    if "--help" in arguments or "-h" in arguments:
        return tyro.cli(cls, args=["--help"], default=default, **options)
    known = {name: hint for settings in (*others, default) for name, hint in _options(settings)}
    return _with_values(default, _read_options(arguments, known))


def peek(arguments: Sequence[str], option: str, default: str | None = None) -> str | None:
    """Returns the value of an option that decides what the others start from.

    Raises:
      ValueError: the option has no value.
    """
    finder = OptionParser(add_help=False)
    finder.add_argument(option, default=default, dest="value")
    return finder.parse_known_args(arguments)[0].value


def has_option(arguments: Sequence[str], option: str) -> bool:
    """Tells whether an option is given, whatever its value."""
    return any(argument.partition("=")[0] == option for argument in arguments)


def nearest(name: str, names: Iterable[str]) -> str:
    """Returns the names most like one that is unknown, for a message; all where none is like it."""
    return ", ".join(difflib.get_close_matches(name, list(names), n=3, cutoff=0.3) or names)


class OptionParser(argparse.ArgumentParser):
    """A parser without abbreviations whose complaint is a ValueError of one line that names the option."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> typing.NoReturn:
        raise ValueError(message.removeprefix("argument "))

    def add_flag(self, name: str, meaning: str) -> None:
        """Adds a yes-or-no option: --name, --name=true or --name=false."""
        self.add_argument(name, nargs="?", const=True, default=False, type=_flag, help=meaning)


def _flag(text: str) -> bool:
    try:
        return yes_or_no(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


OUT_OF_MEMORY = (
    "lower train.batch_size, train.microbatch_tokens, eval.batch_size or model.max_len, set "
    "train.loss_in_tiles, or use more devices (parallel.strategy, parallel.catalogue_shards); what was saved "
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
        keep_compiled(note)
        return program(list(sys.argv[1:] if argv is None else argv))
    except Interrupted as stopped:
        if is_main():
            print(explain(stopped))
        return stopped.exit_code
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


def program(run: Callable[[list[str]], int]) -> Callable[[Sequence[str] | None], int]:
    """Makes a function of the command line the `main` of a program; see `run_program`."""

    @functools.wraps(run)
    def main(argv: Sequence[str] | None = None) -> int:
        return run_program(run, argv)

    return main


def note(line: str) -> None:
    """Prints a line about what is done beside the answer."""
    print(line, file=sys.stderr)


def without_folders(text: str) -> str:
    """Cuts the folders of an absolute path, also behind an option's equals sign."""
    option, equals, value = text.rpartition("=")
    return f"{option}{equals}{pathlib.PurePath(value).name}" if value.startswith("/") else text


def command_without_folders(command: Sequence[str]) -> list[str]:
    """Returns a command line without the folders of absolute paths."""
    return [without_folders(argument) for argument in command]


def settings_without_folders(config: ExperimentConfig) -> dict[str, Any]:
    """Returns settings ready for JSON, without what belongs to a machine: folders of paths, and the cache's."""
    settings = config.to_dict()
    for name in ("path", "item_path"):
        settings["data"][name] = settings["data"][name] and without_folders(settings["data"][name])
    settings["data"].pop("cache_dir")
    settings["eval"]["users"] = config.eval.users and without_folders(config.eval.users)
    return settings


def write_json(path: pathlib.Path, record: Any) -> None:
    """Writes a record into a file, whole or not at all, and makes its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(record, indent=1, allow_nan=False) + "\n").encode())


def table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str = "",
    caption: str = "",
    left: Sequence[int] = (0,),
) -> Table:
    """Returns a table for the terminal; the columns `left` are aligned to the left and may fold."""
    shown = Table(title=Text(title) if title else None, caption=Text(caption) if caption else None)
    for place, name in enumerate(header):
        shown.add_column(name, justify="left" if place in left else "right", overflow="fold")
    for row in rows:
        shown.add_row(*map(Text, row))
    return shown


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1) -> list[str]:
    """Returns the lines of a Markdown table and an empty one; the first `left` columns are aligned to the left."""
    rule = ["---"] * left + ["---:"] * (len(header) - left)
    shown = [[cell.replace("|", "\\|") for cell in row] for row in (header, rule, *rows)]
    return [f"| {' | '.join(cells)} |" for cells in shown] + [""]
