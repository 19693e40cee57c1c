"""Checkpoints come back bit for bit, and no fault of the disk or the process loses the one before."""

import collections
import errno
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tim4rec_jax.training import checkpoint
from tim4rec_jax.training.checkpoint import Checkpointer, CheckpointError

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
State = collections.namedtuple("State", "step params moments key")


def _state(value: float) -> dict:
    return {"w": jnp.full((4, 3), value, jnp.float32), "b": jnp.arange(5) + int(value)}


def _names(folder: pathlib.Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def _save(folder: pathlib.Path, *steps: int) -> None:
    with Checkpointer(folder) as checkpointer:
        for step in steps:
            checkpointer.save_latest(step, _state(step), {"epoch": step})


def _restore(folder: pathlib.Path) -> tuple[int, list[str]]:
    reports: list[str] = []
    with Checkpointer(folder, report=reports.append) as checkpointer:
        step, state, progress = checkpointer.restore_latest(_state(0))
    assert progress == {"epoch": step}
    jax.tree.map(np.testing.assert_array_equal, state, _state(step))
    return step, reports


def _largest_file(path: pathlib.Path) -> pathlib.Path:
    return max((file for file in path.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def test_every_kind_of_leaf_comes_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    odd = np.array([np.nan, np.inf, -0.0, 1e-45, np.float32(0.1)], np.float32)
    state = State(
        step=17,
        params={
            "f32": jnp.asarray(odd),
            "f32_nan_payload": np.array([0x7FC01234], np.uint32).view(np.float32),
            "bf16": jnp.asarray(rng.normal(size=(3, 4)).astype(ml_dtypes.bfloat16)),
            "f64": rng.normal(size=7),
            "i64": np.array([2**62 + 1, -5]),
            "u32": jnp.array([7, 2**32 - 1], jnp.uint32),
            "bool": np.array([True, False]),
            "empty": jnp.zeros((0, 3)),
            "scalar": np.float32(0.1),
            "with.dot": jnp.ones(()),
        },
        moments=[(), None, (jnp.arange(3),), 0.1, True],
        key=jax.random.split(jax.random.key(3), 2),
    )
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_latest(17, state, {"epoch": 2, "best": None, "history": [0.1, 0.2]})
        step, restored, progress = checkpointer.restore_latest(state)
    assert (step, progress) == (17, {"epoch": 2, "best": None, "history": [0.1, 0.2]})
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    for (path, before), after in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(restored), strict=True):
        assert type(after) is type(before), path
        if path[0] == jax.tree_util.GetAttrKey("key"):
            assert after.dtype == before.dtype
            before, after = jax.random.key_data(before), jax.random.key_data(after)
        before, after = np.asarray(before), np.asarray(after)
        assert (before.dtype, before.shape, before.tobytes()) == (after.dtype, after.shape, after.tobytes()), path


def test_abstract_template_and_placement(tmp_path):
    device = jax.devices()[0]
    state = {"free": jnp.ones(3), "pinned": jax.device_put(jnp.ones(3), device), "key": jax.random.key(1)}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_best(1, state, {})
        _, like_arrays, _ = checkpointer.restore_best(state)
        _, like_shapes, _ = checkpointer.restore_best(jax.eval_shape(lambda: state))
    assert (like_arrays["free"].committed, like_arrays["pinned"].committed) == (False, True)
    np.testing.assert_array_equal(like_shapes["pinned"], np.ones(3))
    assert jnp.array_equal(jax.random.normal(like_shapes["key"]), jax.random.normal(state["key"]))


def test_restored_and_saved_buffers_survive_donation(tmp_path, monkeypatch):
    may_write = threading.Event()
    write = checkpoint._write_checkpoint

    def write_later(*args):
        assert may_write.wait(30)
        write(*args)

    monkeypatch.setattr(checkpoint, "_write_checkpoint", write_later)
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    expected = np.arange(1000, dtype=np.float32)
    on_host = np.arange(10)
    state = {"w": jnp.asarray(expected) + 0, "n": jnp.arange(4000) + 0}
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_latest(1, state | {"on_host": on_host}, {})
        on_host[:] = -1
        for _ in range(3):
            state = jax.block_until_ready(step(state))
        may_write.set()
        for _ in range(2):  # donating what was restored must not reach the files or a later restore either
            _, restored, _ = checkpointer.restore_latest(state | {"on_host": on_host})
            np.testing.assert_array_equal(restored.pop("on_host"), np.arange(10))
            np.testing.assert_array_equal(restored["w"], expected)
            np.testing.assert_array_equal(restored["n"], np.arange(4000))
            jax.block_until_ready(step(restored))


def test_save_returns_before_the_write_and_limits_what_waits(tmp_path, monkeypatch):
    may_write, begun = threading.Event(), []
    monkeypatch.setattr(checkpoint, "_write_checkpoint", lambda *args: (begun.append(args[1]), may_write.wait(30)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_latest(1, _state(1), {})
        checkpointer.save_best(2, _state(2), {})
        third = threading.Thread(target=checkpointer.save_latest, args=(3, _state(3), {}))
        third.start()
        third.join(0.2)
        assert third.is_alive()
        assert begun == [1]
        may_write.set()
        third.join(30)
        checkpointer.wait()
        assert begun == [1, 2, 3]


def test_keeps_two_latest_and_one_best(tmp_path):
    with Checkpointer(tmp_path) as checkpointer:
        for step in (10, 20, 30, 20):  # training may go back to an earlier step
            checkpointer.save_best(step, _state(step), {"ndcg@10": step / 100})
            checkpointer.save_latest(step, _state(step), {"epoch": step})
        checkpointer.wait()
        assert _names(tmp_path / "latest") == ["000003_step_30", "000004_step_20"]
        assert _names(tmp_path / "best") == ["000004_step_20"]
        step, params, info = checkpointer.restore_best(_state(0))
    assert (step, info) == (20, {"ndcg@10": 0.2})
    np.testing.assert_array_equal(params["w"], _state(20)["w"])
    assert _restore(tmp_path) == (20, [])


def test_previous_best_goes_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []
    prune = checkpoint._prune
    monkeypatch.setattr(checkpoint, "_prune", lambda *args: (seen.append(_names(tmp_path / "best")), prune(*args)))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_best(1, _state(1), {})
        checkpointer.save_best(2, _state(2), {})
    assert seen == [["000001_step_1"], ["000001_step_1", "000002_step_2"]]


def test_nothing_saved_yet(tmp_path):
    with Checkpointer(tmp_path / "none") as checkpointer:
        assert checkpointer.restore_latest(_state(0)) is None
        assert checkpointer.restore_best(_state(0)) is None
    assert not (tmp_path / "none").exists()


def test_every_misfit_is_named_at_once(tmp_path):
    _save(tmp_path, 5)
    template = {"w": jnp.zeros((4, 2)), "b": jnp.zeros(5, jnp.float32), "new": {"x": jnp.zeros(1)}}
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="3 of 3 leaves differ") as error:
        checkpointer.restore_latest(template)
    message = str(error.value)
    assert "000001_step_5 belongs to other settings" in message
    assert "w: float32[4,3] in the checkpoint, float32[4,2] in this program" in message
    assert "b: int32[5] in the checkpoint, float32[5] in this program" in message
    assert "new.x: absent in the checkpoint, float32[1] in this program" in message


@pytest.mark.parametrize("progress", [{"best": float("-inf")}, {"a": np.float32(1)}, {"a": (1, 2)}, {1: 2}])
def test_progress_that_json_would_change_is_refused(tmp_path, progress):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="does not survive JSON"):
        checkpointer.save_latest(1, _state(1), progress)


def test_leaf_that_is_no_array_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="leaf a.name of type str is neither"):
        checkpointer.save_latest(1, {"a": {"name": "x"}}, {})


def _truncate(path: pathlib.Path) -> str:
    file = _largest_file(path / "arrays")
    size = file.stat().st_size
    file.write_bytes(file.read_bytes()[: size // 2])
    return f"has {size // 2} bytes instead of {size}"


def _delete(path: pathlib.Path) -> str:
    _largest_file(path / "arrays").unlink()
    return "is missing"


def _flip_bit(path: pathlib.Path, name: str | None = None) -> str:
    file = path / name if name else _largest_file(path / "arrays")
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
    _save(tmp_path, 1, 2)
    newest = tmp_path / "latest" / "000002_step_2"
    reason = damage(newest)
    step, reports = _restore(tmp_path)
    assert step == 1
    (report,) = reports
    assert report.startswith(f"checkpoint {newest} is damaged (")
    assert reason in report
    assert report.endswith(f"using {tmp_path / 'latest' / '000001_step_1'} instead")


def test_bit_flip_in_any_file_is_detected(tmp_path):
    _save(tmp_path, 1)
    newest = tmp_path / "latest" / "000001_step_1"
    files = [file for file in newest.rglob("*") if file.is_file()]
    assert len(files) > 3
    for file in files:
        intact = file.read_bytes()
        _flip_bit(newest, str(file.relative_to(newest)))
        with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError, match="no checkpoint in"):
            checkpointer.restore_latest(_state(0))
        file.write_bytes(intact)
    assert _restore(tmp_path) == (1, [])


def test_all_damaged_names_the_folder_and_every_reason(tmp_path):
    _save(tmp_path, 1, 2)
    for path in (tmp_path / "latest").iterdir():
        _truncate(path)
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(CheckpointError) as error:
        checkpointer.restore_latest(_state(0))
    message = str(error.value)
    assert f"no checkpoint in {tmp_path / 'latest'} is intact" in message
    assert "000001_step_1: " in message
    assert "000002_step_2: " in message


def test_half_written_save_is_named_and_then_cleared(tmp_path):
    _save(tmp_path, 1)
    half = tmp_path / "latest" / ".unfinished-000002_step_2"
    shutil.copytree(tmp_path / "latest" / "000001_step_1", half)
    step, reports = _restore(tmp_path)
    assert step == 1
    assert reports == [f"checkpoint {half} was never finished; using {tmp_path / 'latest' / '000001_step_1'} instead"]
    _save(tmp_path, 3)
    assert _names(tmp_path / "latest") == ["000001_step_1", "000003_step_3"]


def test_a_known_damaged_checkpoint_takes_no_place_among_those_kept(tmp_path):
    _save(tmp_path, 1, 2)
    _truncate(tmp_path / "latest" / "000002_step_2")
    with Checkpointer(tmp_path, report=lambda _: None) as checkpointer:
        checkpointer.restore_latest(_state(0))
        checkpointer.save_latest(2, _state(2), {"epoch": 2})
    assert _names(tmp_path / "latest") == ["000001_step_1", "000003_step_2"]


def test_other_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    _save(tmp_path, 1)
    monkeypatch.undo()
    with (
        Checkpointer(tmp_path) as checkpointer,
        pytest.raises(CheckpointError, match="has checkpoint format 2.*format 1"),
    ):
        checkpointer.restore_latest(_state(0))


def test_disk_that_is_known_to_be_too_small(tmp_path, monkeypatch):
    _save(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_latest(2, {"w": np.zeros(100_000)}, {})
        with pytest.raises(
            CheckpointError, match="needs about 0.8 MB, 0.1 MB are free.*before, 000001_step_1, is kept"
        ):
            checkpointer.wait()
    assert _restore(tmp_path) == (1, [])


@pytest.mark.parametrize("place", ["_seal", "_flush_and_hash", "write_atomically"])
def test_disk_full_at_any_stage_keeps_the_previous(tmp_path, monkeypatch, place):
    _save(tmp_path, 1)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpointer = Checkpointer(tmp_path)
    monkeypatch.setattr(checkpoint, place, full)
    checkpointer.save_latest(2, _state(2), {"epoch": 2})
    checkpointer.save_best(2, _state(2), {})  # queued behind the failure: must not be begun
    with pytest.raises(CheckpointError, match="No space left on device") as error:
        checkpointer.wait()
    assert f"the checkpoint of step 2 could not be saved in {tmp_path / 'latest'}" in str(error.value)
    assert not list((tmp_path / "latest").glob(".unfinished*"))
    assert not (tmp_path / "best").exists()
    monkeypatch.undo()
    assert _restore(tmp_path) == (1, [])
    checkpointer.save_latest(3, _state(3), {"epoch": 3})  # room again: training may go on
    checkpointer.close()
    assert _restore(tmp_path) == (3, [])


def test_error_of_a_save_reaches_the_next_save(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "write_atomically", lambda *_: (_ for _ in ()).throw(OSError("disk is gone")))
    reports: list[str] = []
    with pytest.raises(KeyboardInterrupt), Checkpointer(tmp_path, report=reports.append) as checkpointer:
        checkpointer.save_latest(1, _state(1), {})
        checkpointer.save_latest(2, _state(2), {})
        with pytest.raises(CheckpointError, match="step 1 could not be saved.*no checkpoint before it"):
            checkpointer.save_latest(3, _state(3), {})
        checkpointer.save_latest(4, _state(4), {})
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
    assert _names(tmp_path / "latest") == ["000001_step_1"]


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
