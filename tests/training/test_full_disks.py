"""A full or read-only disk ends a run with one clear line, and what was saved before is what it goes on from."""

import json
import subprocess

import pytest

from tests.training.forked_runs import OPTIONS, require_same_runs, run_forking
from tests.training.full_disks import KILOBYTES

NAMESPACE = ["unshare", "--mount", "--map-root-user"]


def refusal() -> str | None:
    """Says why this system mounts no file system in memory; None where it does."""
    try:
        command = [*NAMESPACE, "mount", "-t", "tmpfs", "none", "/mnt"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except OSError as error:
        return str(error)
    return done.stderr.strip() if done.returncode else None


@pytest.mark.exhaustive
def test_disks_that_are_full_or_read_only(tmp_path):
    if (reason := refusal()) is not None:
        pytest.skip(f"no small disk can be mounted here: {reason}")
    output = tmp_path / "found.json"
    run_forking("full_disks", str(output), str(tmp_path), *OPTIONS, folder=tmp_path, before=NAMESPACE)
    found = json.loads(output.read_text())
    assert len(found) == len(KILOBYTES) + 2
    for run in found:
        assert run["code"] == 2, run
        (error,) = [line for line in run["said"].splitlines() if line.startswith("error: ")]
        assert "Traceback" not in run["said"], run
        reason = "Read-only file system" if run["disk"].startswith("read_only") else "o space"
        assert reason in error.replace("not enough free space", "no space") and run["disk"] in error, error
    # The smallest holds no settings, the largest some checkpoints; the others fail between.
    assert not found[0]["checkpoints"] and found[len(KILOBYTES) - 1]["checkpoints"]
    require_same_runs([tmp_path / run["run"] for run in found], tmp_path / "reference")
