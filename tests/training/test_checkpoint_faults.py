"""No fault of the disk or the process loses the checkpoint before it."""

import errno
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.training.saved_states import folder_names, largest_file, restore_newest, sample_state, save_steps
from tim4rec_jax.training import checkpoint
from tim4rec_jax.training.checkpoint import Checkpointer, CheckpointError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def _truncate(path: pathlib.Path) -> str:
    file = largest_file(path / "arrays")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    return f"has {size // 2} bytes instead of {size}"


def _delete(path: pathlib.Path) -> str:
    largest_file(path / "arrays").unlink()
    return "is missing"


def _flip_bit(path: pathlib.Path, name: str | None = None) -> str:
    file = path / name if name else largest_file(path / "arrays")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 16
    file.write_bytes(content)
    return "have changed"


def _flip_manifest(path: pathlib.Path) -> str:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"step": 2', '"step": 3'))
    return "manifest.json is not as it was written"


def _truncate_manifest(path: pathlib.Path) -> str:
    manifest = path / "manifest.json"
    manifest.write_text(manifest.read_text()[:100])
    return "manifest.json is missing or not readable"


def _drop_manifest(path: pathlib.Path) -> str:
    (path / "manifest.json").unlink()
    return "manifest.json is missing or not readable"


@pytest.mark.parametrize("damage", [_truncate, _delete, _flip_bit, _flip_manifest, _truncate_manifest, _drop_manifest])
def test_damaged_newest_falls_back_and_says_so(tmp_path, damage):
    save_steps(tmp_path, 1, 2)
    newest = tmp_path / "latest" / "000002_step_2"
    reason = damage(newest)
    step, reports = restore_newest(tmp_path)
    assert step == 1
    (report,) = reports
    assert report.startswith(f"checkpoint {newest} is damaged (")
    assert reason in report
    assert report.endswith(f"using {tmp_path / 'latest' / '000001_step_1'} instead")


def test_bit_flip_in_any_file_is_detected(tmp_path):
    save_steps(tmp_path, 1)
    newest = tmp_path / "latest" / "000001_step_1"
    files = [file for file in newest.rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        intact = file.read_bytes()
        _flip_bit(newest, str(file.relative_to(newest)))
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpointer.restore_latest(sample_state(0))
        file.write_bytes(intact)
    assert restore_newest(tmp_path) == (1, [])


@pytest.mark.exhaustive
def test_fifty_random_damages_are_all_detected(tmp_path):
    """Bits flipped, bytes cut off or added, in any file of a checkpoint, its manifest and Orbax's own files too."""
    intact = tmp_path / "intact"
    save_steps(intact, 1, 2)
    rng, damaged, ways = random.Random(0), set(), set()
    for number in range(50):
        folder = tmp_path / f"damaged_{number}"
        shutil.copytree(intact, folder)
        newest = folder / "latest" / "000002_step_2"
        file = rng.choice(sorted(f for f in newest.rglob("*") if f.is_file() and f.stat().st_size))
        content, way = bytearray(file.read_bytes()), rng.choice(["flip", "cut", "add"])
        if way == "flip":
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        elif way == "cut":
            del content[rng.randrange(len(content)) :]
        else:
            content += rng.randbytes(rng.randint(1, 9))
        file.write_bytes(content)
        step, reports = restore_newest(folder)
        assert step == 1, (number, way, file)
        assert len(reports) == 1 and str(newest) in reports[0] and "000001_step_1 instead" in reports[0]
        damaged.add(str(file.relative_to(newest)))
        ways.add(way)
    assert number == 49 and len(damaged) > 5 and len(ways) == 3


def test_all_damaged_names_the_folder_and_every_reason(tmp_path):
    save_steps(tmp_path, 1, 2)
    for path in (tmp_path / "latest").iterdir():
        _truncate(path)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore_latest(sample_state(0))
    message = str(error.value)
    assert f"no checkpoint in {tmp_path / 'latest'} is intact" in message
    assert "000001_step_1: " in message
    assert "000002_step_2: " in message


def test_half_written_save_is_named_and_then_cleared(tmp_path):
    save_steps(tmp_path, 1)
    half = tmp_path / "latest" / ".unfinished-000002_step_2"
    shutil.copytree(tmp_path / "latest" / "000001_step_1", half)
    step, reports = restore_newest(tmp_path)
    assert step == 1
    assert reports == [f"checkpoint {half} was never finished; using {tmp_path / 'latest' / '000001_step_1'} instead"]
    save_steps(tmp_path, 3)
    assert folder_names(tmp_path / "latest") == ["000001_step_1", "000003_step_3"]


def test_a_known_damaged_checkpoint_takes_no_place_among_those_kept(tmp_path):
    save_steps(tmp_path, 1, 2)
    _truncate(tmp_path / "latest" / "000002_step_2")
    with Checkpointer(tmp_path, report=lambda _: None) as checkpointer:
        checkpointer.restore_latest(sample_state(0))
        checkpointer.save_latest(2, sample_state(2), {"epoch": 2})
    assert folder_names(tmp_path / "latest") == ["000001_step_1", "000003_step_2"]


def test_other_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    save_steps(tmp_path, 1)
    monkeypatch.undo()
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match="has checkpoint format 2.*format 1"),
    ):
        checkpointer.restore_latest(sample_state(0))


def test_disk_that_is_known_to_be_too_small(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_latest(2, {"w": np.zeros(100_000)}, {})
        with pytest.raises(
            CheckpointError, match="needs about 0.8 MB, 0.1 MB are free.*before, 000001_step_1, is kept"
        ):
            checkpointer.wait()
    assert restore_newest(tmp_path) == (1, [])


@pytest.mark.parametrize("place", ["sealed", "_flush_and_hash", "write_atomically", "write_arrays", "sync_folder"])
def test_disk_full_at_any_stage_keeps_the_previous(tmp_path, monkeypatch, place):
    save_steps(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setattr(checkpoint, place, full)
    checkpointer.save_latest(2, sample_state(2), {"epoch": 2})
    checkpointer.save_best(2, sample_state(2), {})  # queued behind the failure: must not be begun
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        checkpointer.wait()
    assert f"the checkpoint of step 2 could not be saved in {tmp_path / 'latest'}" in str(error.value)
    assert not list((tmp_path / "latest").glob(".unfinished*"))
    assert not (tmp_path / "best").exists()
    monkeypatch.undo()
    assert restore_newest(tmp_path) == (1, [])
    checkpointer.save_latest(3, sample_state(3), {"epoch": 3})  # room again: training may go on
    checkpointer.close()
    assert restore_newest(tmp_path) == (3, [])


def test_error_of_a_save_reaches_the_next_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
    reports: list[str] = []
    with pytest.raises(KeyboardInterrupt), Checkpointer(tmp_path, report=reports.append) as checkpointer:
        checkpointer.save_latest(1, sample_state(1), {})
        checkpointer.save_latest(2, sample_state(2), {})
        with pytest.raises(CheckpointError, match="step 1 could not be saved.*no checkpoint before it"):
            checkpointer.save_latest(3, sample_state(3), {})
        checkpointer.save_latest(4, sample_state(4), {})
        raise KeyboardInterrupt  # must not be hidden by the error of the last save
    (report,) = reports
    assert "step 4 could not be saved" in report


_WRITER_WITH_FILE_LIMIT = """
import pathlib, resource, sys
import numpy as np
from tim4rec_jax.training.checkpoint import Checkpointer, CheckpointError
folder = pathlib.Path(sys.argv[1])
rng = np.random.default_rng(0)
with Checkpointer(folder) as checkpointer:
    checkpointer.save_latest(1, {"w": np.ones(10)}, {})
    checkpointer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
    try:
        checkpointer.save_latest(2, {"w": rng.normal(size=200_000)}, {})
        checkpointer.wait()
    except CheckpointError as error:
        print(error)
    step, state, _ = checkpointer.restore_latest({"w": np.zeros(10)})
    print("restored", step, state["w"].sum())
"""


def test_write_refused_by_the_operating_system(tmp_path):
    """A file size limit makes the kernel refuse Orbax's own writes, as a full disk does."""
    result = subprocess.run(
        [sys.executable, "-c", _WRITER_WITH_FILE_LIMIT, str(tmp_path)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    message, restored = result.stdout.strip().splitlines()
    assert f"the checkpoint of step 2 could not be saved in {tmp_path / 'latest'}" in message
    assert "File too large" in message
    assert "It needs about 1.6 MB" in message
    assert "000001_step_1, is kept" in message
    assert restored == "restored 1 10.0"
    assert "Traceback" not in result.stderr  # the one clear message, not the tracebacks of the writer's threads
    assert folder_names(tmp_path / "latest") == ["000001_step_1"]


_ENDLESS_WRITER = """
import itertools, pathlib, sys
import numpy as np
from tim4rec_jax.training.checkpoint import Checkpointer
with Checkpointer(pathlib.Path(sys.argv[1]), report=lambda _: None) as checkpointer:
    template = {"w": np.zeros((300, 300)), "n": np.zeros(7, np.int32)}
    last = checkpointer.restore_latest(template)
    first = 1 if last is None else last[0] + 1
    for step in itertools.count(first):
        state = {"w": np.full((300, 300), float(step)), "n": np.full(7, step, np.int32)}
        checkpointer.save_best(step, state, {"step": step})
        checkpointer.save_latest(step, state, {"step": step})
        print(step, flush=True)
"""


def test_kill_during_saves_always_leaves_a_restorable_checkpoint(tmp_path):
    template = {"w": np.zeros((300, 300)), "n": np.zeros(7, np.int32)}
    rng = random.Random(0)
    reached = 0
    for _ in range(3):
        writer = subprocess.Popen(
            [sys.executable, "-c", _ENDLESS_WRITER, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        for _ in range(3):
            printed = int(writer.stdout.readline())
        time.sleep(rng.uniform(0, 0.15))
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        with Checkpointer(tmp_path, report=lambda _: None) as checkpointer:
            for restore in (checkpointer.restore_latest, checkpointer.restore_best):
                step, state, info = restore(template)
                assert info == {"step": step}
                assert (state["w"] == step).all()
                assert (state["n"] == step).all()
                assert step >= printed - 1  # a save returns while at most one before it is still being written
        assert step > reached
        reached = step
