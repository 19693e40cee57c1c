"""Types: what `[tool.pyright]` names has no errors."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.mark.exhaustive
@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed; it is of the dev extra")
def test_pyright_finds_no_error():
    command = ["pyright", "-p", "pyproject.toml", "--pythonpath", sys.executable, "--outputjson"]
    report = json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600).stdout)
    assert report["summary"]["filesAnalyzed"] > 100
    errors = [found for found in report["generalDiagnostics"] if found["severity"] == "error"]
    assert not errors, "\n".join(f"{e['file']}:{e['range']['start']['line'] + 1} {e['message']}" for e in errors)
