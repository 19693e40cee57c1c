"""Lists and fetches the wheels that a GPU machine without a network lacks: Python 3.12 on 64-bit x86 Linux.

    python -m experiments.gpu_wheels --dest=wheels --present=pip-freeze.txt

What the project needs, with the kernels that jax-triton calls, is read from pyproject.toml; what is there already from
what `pip freeze` prints on that machine. A package that is there is left out, unless pyproject.toml asks for another
version. Drivers and CUDA are not fetched: JAX with its CUDA plugin is taken to be there. Every wheel's size is printed,
and the command that installs them there.
"""

import json
import pathlib
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from experiments.cli import parse_settings, program

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXTRAS = ("gluon",)
_PYTHON = {"python_version": "3.12", "python_full_version": "3.12.0"}
# Pip takes each glibc by itself: a wheel for an older one does not count as one for this.
_PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (5, 12, 17, 24, 27, 28, 31, 34, 35)]
_PLATFORMS += ["manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64"]
_TARGET = ["--only-binary=:all:", "--python-version=3.12", "--implementation=cp", "--quiet"]
_TARGET += [f"--platform={platform}" for platform in _PLATFORMS]

_INSTALL = "python3 -m pip install --no-index --no-deps {dest}/*.whl"


@dataclass(frozen=True)
class Arguments:
    """Lists and fetches the wheels that a GPU machine without a network lacks.

    Attributes:
      dest: folder for the wheels; None lists them alone.
      present: what `pip freeze` prints there; None is an empty machine.
      extras: of pyproject.toml, beside what the project needs anyway.
    """

    dest: pathlib.Path | None = None
    present: pathlib.Path | None = None
    extras: tuple[str, ...] = EXTRAS


def requirements(project: dict[str, Any], extras: Iterable[str]) -> list[Requirement]:
    """Returns what pyproject.toml asks for on Python 3.12, with some of its extras, which may name each other.

    Raises:
      ValueError: for an extra that there is not.
    """
    offered = project["project"]["optional-dependencies"]
    found, waiting, seen = list(project["project"]["dependencies"]), list(extras), set()
    while waiting:
        extra = waiting.pop(0)
        if extra not in offered:
            raise ValueError(f"--extras={extra}: pyproject.toml has {', '.join(offered)}")
        if extra in seen:
            continue
        seen.add(extra)
        for line in offered[extra]:
            if Requirement(line).name == project["project"]["name"]:
                waiting.extend(sorted(Requirement(line).extras))
            else:
                found.append(line)
    read = [Requirement(line) for line in found]
    return [one for one in read if one.marker is None or one.marker.evaluate(_PYTHON)]


def normal(name: str) -> str:
    """Returns a package's name as it is compared."""
    return re.sub(r"[-_.]+", "-", name).lower()


def read_present(text: str) -> dict[str, str]:
    """Returns the versions of what `pip freeze` lists; "" where a package comes from a file."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"\s*([A-Za-z0-9][\w.-]*)\s*(?:==\s*([^\s;]+)|@|$)", line):
            found[normal(match[1])] = match[2] or ""
    return found


def lacking(resolved: dict[str, str], present: dict[str, str], wanted: list[Requirement]) -> list[str]:
    """Returns "name==version" of what is not there, or there in a version that the project does not take."""
    refused = {
        normal(one.name)
        for one in wanted
        if present.get(normal(one.name)) and not one.specifier.contains(present[normal(one.name)], prereleases=True)
    }
    return [f"{name}=={v}" for name, v in resolved.items() if normal(name) not in present or normal(name) in refused]


def _pip(*arguments: str) -> None:
    """Runs pip.

    Raises:
      ValueError: it failed.
    """
    ran = subprocess.run([sys.executable, "-m", "pip", *arguments], stderr=subprocess.PIPE, text=True)
    if ran.returncode:
        errors = [line for line in ran.stderr.splitlines() if line.startswith("ERROR")] or ran.stderr.splitlines()
        raise ValueError(f"pip: {errors[0] if errors else ran.returncode}")


def resolve(wanted: list[Requirement]) -> dict[str, str]:
    """Asks pip which packages in which versions an empty machine needs; downloads no large wheel."""
    with tempfile.TemporaryDirectory() as folder:
        report = pathlib.Path(folder) / "report.json"
        asked = [str(one).partition(";")[0] for one in wanted]
        # Where it runs with another Python, pip compares that one with what packages require, not the target.
        other = [] if sys.version_info[:2] == (3, 12) else ["--ignore-requires-python"]
        dry = ["install", *other, "--dry-run", "--ignore-installed", f"--report={report}", f"--target={folder}/none"]
        _pip(*dry, *_TARGET, *asked)
        found = [one["metadata"] for one in json.loads(report.read_text())["install"]]
    return {one["name"]: one["version"] for one in found}


def sizes(dest: pathlib.Path) -> Table:
    """The wheels by size, and their sum."""
    wheels = sorted(dest.glob("*.whl"), key=lambda wheel: -wheel.stat().st_size)
    table = Table(title="wheels")
    table.add_column("wheel")
    table.add_column("MB", justify="right")
    for wheel in wheels:
        table.add_row(wheel.name, f"{wheel.stat().st_size / 1e6:.1f}")
    table.add_row(f"{len(wheels)} in all", f"{sum(wheel.stat().st_size for wheel in wheels) / 1e6:.1f}")
    return table


@program
def main(argv: list[str]) -> int:
    """Lists and fetches wheels."""
    arguments = parse_settings(Arguments, argv, prog="experiments.gpu_wheels")
    wanted = requirements(tomllib.loads((ROOT / "pyproject.toml").read_text()), arguments.extras)
    present = read_present(arguments.present.read_text()) if arguments.present else {}
    missing = lacking(resolve(wanted), present, wanted)
    console = Console()
    if arguments.dest is None or not missing:
        console.print("\n".join(missing) or "nothing is missing")
        return 0
    arguments.dest.mkdir(parents=True, exist_ok=True)
    _pip("download", "--no-deps", "--ignore-requires-python", f"--dest={arguments.dest}", *_TARGET, *missing)
    console.print(sizes(arguments.dest))
    console.print(_INSTALL.format(dest=arguments.dest.name), soft_wrap=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
