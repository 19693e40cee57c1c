"""Files of user states made by hand or damaged: a table or one line, and no program per number of users."""

import json
import random
import zipfile

import jax
import numpy as np
import pytest

from tim4rec_jax.serving import user_table_file
from tim4rec_jax.serving.user_table import Event, UserTable

START = 978_300_000


@pytest.fixture(scope="module")
def table(causal_recommender):
    table = UserTable(causal_recommender)
    table.add([Event(user, f"i{i + 1}", START + i) for i, user in enumerate("abcabc")])
    table.flush()
    table.add([Event("b", "i9", START + 50), Event("b", "i8", START + 50)])
    return table


@pytest.fixture
def stored(table, tmp_path):
    path = tmp_path / "users.npz"
    table.save(path)
    return path, *user_table_file.read(path)


def test_events_that_wait_are_saved_as_they_are(table, stored, causal_recommender):
    loaded = UserTable.load(stored[0], causal_recommender)
    assert (loaded.pending, table.pending) == (2, 2)
    np.testing.assert_array_equal(
        loaded.top_k(["b"], 4)[1], UserTable.load(stored[0], causal_recommender).top_k(["b"], 4)[1]
    )


def _text(value):
    return user_table_file.text(json.dumps(value))


CHANGES = {
    "users are no list": {"users": _text({"a": 1})},
    "users are numbers": {"users": _text([1, 2, 3])},
    "a user is missing": {"users": _text(["a", "b"])},
    "a user is there twice": {"users": _text(["a", "b", "a"])},
    "half a character": {"users": _text(["a", "b", "\ud800"])},
    "nested users": {"users": np.frombuffer(b"[" * 9000, np.uint8)},
    "negative times": {"last_times": np.array([-1, 2, 3])},
    "fewer times": {"last_times": np.array([1, 2])},
    "negative events": {"events": np.array([-2, -4, -2])},
    "huge events": {"events": np.array([2, 4, 2]) * 10**18},
    "events as floats": {"events": np.array([2.0, 4.0, 2.0])},
    "an item of no catalogue": {"items": np.full(8, 31, np.int32)},
    "item 0": {"items": np.zeros(8, np.int32)},
    "fewer items": {"items": np.ones(7, np.int32)},
    "a waiting row of nobody": {"waiting_rows": np.array([3], np.int32)},
    "more waiting than events": {"waiting_lengths": np.array([5])},
    "no waiting": {"waiting_lengths": np.array([0])},
    "waiting item 99": {"waiting_items": np.array([1, 99], np.int32)},
    "waiting backwards": {"waiting_seconds": np.array([START + 51, START + 50], np.int32)},
    "waiting elsewhen": {"waiting_seconds": np.array([START, START], np.int32)},
    "nothing more": {"more": np.zeros(1)},
}


@pytest.mark.parametrize("change", CHANGES)
def test_hand_made_tables(stored, causal_recommender, change):
    """With a true hash, so that every array stands for itself."""
    path, header, arrays = stored
    user_table_file.write(path, header, arrays | CHANGES[change])
    with pytest.raises(ValueError, match="is no table of user states, or is damaged: ") as caught:
        UserTable.load(path, causal_recommender)
    assert "\n" not in str(caught.value)


def test_states_of_another_shape(stored, causal_recommender):
    path, header, arrays = stored
    for name in [name for name in arrays if name.startswith("table")]:
        for wrong in (arrays[name][:2], arrays[name].astype(np.float64), arrays[name][None]):
            user_table_file.write(path, header, arrays | {name: wrong})
            with pytest.raises(ValueError, match="expected"):
                UserTable.load(path, causal_recommender)
        user_table_file.write(path, header, {other: array for other, array in arrays.items() if other != name})
        with pytest.raises(ValueError, match="the arrays differ in"):
            UserTable.load(path, causal_recommender)
    for changed in ({"notes": []}, {"keeps_items": 1}, {"keeps_items": False}):
        user_table_file.write(path, header | changed, arrays)
        with pytest.raises(ValueError, match="is no table of user states, or is damaged"):
            UserTable.load(path, causal_recommender)


def test_nothing_is_unpacked_beyond_the_file(stored, causal_recommender, tmp_path):
    path = tmp_path / "bomb.npz"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("users.npy", bytes(10**7))
    with pytest.raises(ValueError, match="'users.npy' is compressed"):
        UserTable.load(path, causal_recommender)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(
            "header.npy",
            b"\x93NUMPY\x01\x00v\x00{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }\n",
        )
    with pytest.raises(ValueError, match="has 0 bytes"):
        UserTable.load(path, causal_recommender)
    np.savez(path, header=np.array([{}], object))
    with pytest.raises(ValueError, match="an array is of another kind"):
        UserTable.load(path, causal_recommender)


def test_damage_anywhere_is_noticed(stored, causal_recommender):
    """Cut, flipped and doubled pieces: the table that was saved, or one line."""
    path, _, arrays = stored
    content, rng = path.read_bytes(), random.Random(7)
    for _ in range(300):
        changed = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 5])):
            at, size = rng.randrange(len(changed)), rng.choice([1, 1, 4, 200])
            what = rng.randrange(4)
            if what == 0:
                changed[at] ^= 1 << rng.randrange(8)
            elif what == 1:
                del changed[at : at + size]
            elif what == 2:
                changed[at:at] = changed[at : at + size]
            else:
                changed[at : at + size] = rng.randbytes(size)
        path.write_bytes(changed)
        try:
            found = user_table_file.read(path)[1]
        except ValueError as error:
            assert "\n" not in str(error) and len(str(error)) < 400
        else:
            assert {name: array.tobytes() for name, array in found.items()} == {
                name: array.tobytes() for name, array in arrays.items()
            }


def test_programs_do_not_grow_with_users_and_saves(causal_recommender, tmp_path):
    compiled = []
    table, path = UserTable(causal_recommender), tmp_path / "users.npz"

    def grow(first, last):
        for i in range(first, last):
            table.add([Event(f"u{i}", "i1", START)])
            table.save(path)
            table.top_k([f"u{j}" for j in range(max(0, i - i % 4), i + 1)], 1 + i % 5)
        for i in range(3):
            table.add([Event(f"u{j}", "i2", START) for j in range(i, last)])
            table.flush()
        UserTable.load(path, causal_recommender)

    grow(0, 40)

    def count(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(count)
    try:
        grow(40, 62)
        assert len(compiled) == 0
        jax.jit(lambda x: x + len(compiled))(1.0)
        assert len(compiled) == 1
    finally:
        jax.monitoring.unregister_event_duration_listener(count)
