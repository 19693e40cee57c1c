"""Checkpoints come back bit for bit, and a tree that does not fit is refused."""

import collections
import threading

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from tests.training.saved_states import folder_names, restore_newest, sample_state, save_steps
from tim4rec_jax.training import checkpoint
from tim4rec_jax.training.checkpoint import Checkpointer

State = collections.namedtuple("State", "step params moments key")


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
        checkpointer.save_latest(1, sample_state(1), {})
        checkpointer.save_best(2, sample_state(2), {})
        third = threading.Thread(target=checkpointer.save_latest, args=(3, sample_state(3), {}))
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
            checkpointer.save_best(step, sample_state(step), {"ndcg@10": step / 100})
            checkpointer.save_latest(step, sample_state(step), {"epoch": step})
        checkpointer.wait()
        assert folder_names(tmp_path / "latest") == ["000003_step_30", "000004_step_20"]
        assert folder_names(tmp_path / "best") == ["000004_step_20"]
        step, params, info = checkpointer.restore_best(sample_state(0))
    assert (step, info) == (20, {"ndcg@10": 0.2})
    np.testing.assert_array_equal(params["w"], sample_state(20)["w"])
    assert restore_newest(tmp_path) == (20, [])


def test_previous_best_goes_only_after_the_new_one_is_complete(tmp_path, monkeypatch):
    seen = []
    prune = checkpoint._prune
    listing = lambda *args: (seen.append(folder_names(tmp_path / "best")), prune(*args))  # noqa: E731
    monkeypatch.setattr(checkpoint, "_prune", listing)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save_best(1, sample_state(1), {})
        checkpointer.save_best(2, sample_state(2), {})
    assert seen == [["000001_step_1"], ["000001_step_1", "000002_step_2"]]


def test_nothing_saved_yet(tmp_path):
    with Checkpointer(tmp_path / "none") as checkpointer:
        assert checkpointer.restore_latest(sample_state(0)) is None
        assert checkpointer.restore_best(sample_state(0)) is None
    assert not (tmp_path / "none").exists()


def test_every_misfit_is_named_at_once(tmp_path):
    save_steps(tmp_path, 5)
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
        checkpointer.save_latest(1, sample_state(1), progress)


def test_leaf_that_is_no_array_is_refused(tmp_path):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(ValueError, match="leaf a.name of type str is neither"):
        checkpointer.save_latest(1, {"a": {"name": "x"}}, {})
