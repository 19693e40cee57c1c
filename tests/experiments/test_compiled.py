"""Programs keep what they compiled, in a bounded folder of their own or in the one that was set, and need neither."""

import os
import subprocess
import sys

import pytest

from experiments import compiled
from tests.serving.tiny_run import make_causal_config, make_log, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    make_run(path, make_log(), make_causal_config())
    return path


def _recommend(run, **variables):
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMP", "JAX_PERS"))}
    command = [sys.executable, "-m", "experiments.recommend", f"--run={run}", "--user=u1", "--k=2"]
    done = subprocess.run(command, capture_output=True, text=True, env=env | variables)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_compiled_is_kept_and_read_again(run, tmp_path):
    """Also where files are damaged: they are compiled again."""
    folder = tmp_path / "compiled"
    out, err = _recommend(run, TIM4REC_JAX_COMPILED=str(folder))
    kept = _files(folder)
    assert kept and err == ""
    before = [(path, path.stat().st_mtime_ns) for path in kept]
    assert _recommend(run, TIM4REC_JAX_COMPILED=str(folder)) == (out, "")
    assert [(path, path.stat().st_mtime_ns) for path in _files(folder)] == before
    for path in kept:
        path.write_bytes(path.read_bytes()[:50])
    assert _recommend(run, TIM4REC_JAX_COMPILED=str(folder))[0] == out


@pytest.mark.exhaustive
def test_what_is_set_wins_and_a_folder_that_cannot_be_written_costs_a_note(run, tmp_path):
    own = tmp_path / "own"
    out, err = _recommend(
        run,
        TIM4REC_JAX_COMPILED=str(tmp_path / "other"),
        JAX_COMPILATION_CACHE_DIR=str(own),
        JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS="0",
    )
    assert _files(own) and not (tmp_path / "other").exists() and err == ""
    (tmp_path / "file").write_text("")
    same, err = _recommend(run, TIM4REC_JAX_COMPILED=str(tmp_path / "file"))
    assert same == out and err.startswith("note: compiled programs are not kept (") and err.count("\n") == 1


def test_the_oldest_leave(tmp_path):
    for i in range(5):
        path = tmp_path / f"{i}-cache"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - i, 1000 - i))
    compiled.prune(tmp_path, 250)
    assert [path.name for path in _files(tmp_path)] == ["0-cache", "1-cache"]
