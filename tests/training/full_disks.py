"""A program that trains by forking on disks that are too small or read-only, and then goes on where there is room.

    unshare --mount --map-root-user python -m tests.training.full_disks out.json folder option...

It mounts file systems in memory, for which it needs a namespace of its own.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
from typing import Any

from tests.training.killed_runs import finish, options_of, start

# From one that does not hold the settings to one that holds some checkpoints; the whole run takes more than all.
KILOBYTES = (4, 40, 150, 250, 400)


def train_on(disk: pathlib.Path, options: list[str], mount: str, before: pathlib.Path | None = None) -> dict[str, Any]:
    """Trains in a run folder on a new disk; what is in it at the end is moved beside the disk."""
    disk.mkdir()
    run, kept, said = disk / "run", disk.with_name(f"{disk.name}_run"), disk.with_name(f"{disk.name}.log")
    subprocess.run(["mount", "-t", "tmpfs", "-o", mount, "none", disk], check=True)
    try:
        if before is not None:
            shutil.copytree(before, run)
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        _, status = os.waitpid(start(options_of(options, run), said), 0)
        if run.exists():
            shutil.copytree(run, kept)
    finally:
        subprocess.run(["umount", disk], check=True)
    checkpoints = sorted(path.name for path in kept.glob("checkpoints/*/*"))
    code = os.waitstatus_to_exitcode(status)
    return {"disk": disk.name, "code": code, "said": said.read_text(), "checkpoints": checkpoints, "run": kept.name}


def main(output: str, base: str, *options: str) -> None:
    folder, options = pathlib.Path(base), list(options)
    finish(options_of(options, folder / "reference"))
    found = [train_on(folder / f"full_{size}", options, f"size={size}k") for size in KILOBYTES]
    half = folder / found[-1]["run"]
    found.append(train_on(folder / "read_only", options, "size=64m", before=half))
    found.append(train_on(folder / "read_only_new", options, "ro"))
    for run in found:
        finish(options_of(options, folder / run["run"]))
    pathlib.Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
