"""Many users' states: any order and grouping of events, saved and loaded with their bits, refusals without traces."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from tim4rec_jax.serving import user_table, user_table_file
from tim4rec_jax.serving.recommender import History, Recommender
from tim4rec_jax.serving.user_table import Event, UserTable

START = 978_300_000


@pytest.fixture
def table(causal_recommender):
    return UserTable(causal_recommender)


def events_of(log, users):
    """All events of some users of the log, in order of time."""
    events = []
    for user in users:
        rows = slice(log.offsets[user], log.offsets[user + 1])
        pairs = zip(log.items[rows].tolist(), log.timestamps[rows].tolist(), strict=True)
        events += [Event(log.user_ids[user], log.item_ids[item - 1], time) for item, time in pairs]
    return sorted(events, key=lambda event: event.timestamp)


def bits(table):
    table.flush()
    return [np.asarray(leaf[: len(table)]).tobytes() for leaf in jax.tree.leaves(table._table)]


def short_users(log, longest):
    lengths = np.diff(log.offsets)
    return [user for user in range(len(lengths)) if lengths[user] <= longest]


def test_answers_are_those_of_whole_histories(table, causal_recommender, log):
    """Histories within max_len, which the recommender reads whole."""
    users = short_users(log, causal_recommender.config.model.max_len)
    assert len(users) > 5
    events = events_of(log, users)
    for first in range(0, len(events), 37):
        table.add(events[first : first + 37])
        table.flush()
    names = [log.user_ids[user] for user in users]
    histories = [causal_recommender.history_of_user(name) for name in names]
    for exclude_seen in (False, True):
        expected = causal_recommender.top_k(histories, 4, exclude_seen=exclude_seen)
        found = table.top_k(names, 4, exclude_seen=exclude_seen)
        np.testing.assert_array_equal(found[0], expected[0])
        np.testing.assert_allclose(found[1], expected[1], rtol=1e-3)
    assert sorted(table.users) == sorted(names)
    assert [table.events_of(name) for name in names] == [len(history.items) for history in histories]


def test_events_of_one_user_in_one_call_keep_their_order(causal_recommender, monkeypatch):
    """Long pieces in several rounds, beside users with few events, give what single events give."""
    monkeypatch.setattr(user_table, "PIECE_LENGTHS", (1, 4))
    monkeypatch.setattr(user_table, "FIRST_CAPACITY", 2)
    counts = {"long": 11, "four": 4, "one": 1, "two": 2, "five": 5}
    events = [
        Event(user, f"i{(7 * i + len(user)) % 30 + 1}", START + 1000 * i * i)
        for user, count in counts.items()
        for i in range(count)
    ]
    at_once, one_by_one = UserTable(causal_recommender), UserTable(causal_recommender)
    at_once.add(events)
    assert at_once.pending == 23
    for event in events:
        one_by_one.add([event])
        one_by_one.flush()
    assert at_once.users == one_by_one.users
    at_once.flush()
    assert at_once.pending == 0
    for a, b in zip(jax.tree.leaves(at_once._table), jax.tree.leaves(one_by_one._table), strict=True):
        np.testing.assert_allclose(a[:5], b[:5], rtol=1e-4, atol=1e-5)
    assert at_once._table[0].events[:5].tolist() == list(counts.values())


def test_batches_are_powers_of_four():
    assert [user_table._batch_rows(n, 4096) for n in (1, 2, 3, 5, 7, 8, 31, 32, 2047, 2048, 9999)] == [
        1,
        4,
        4,
        4,
        4,
        16,
        16,
        64,
        1024,
        4096,
        4096,
    ]
    assert [user_table._batch_rows(n, 128) for n in (1, 40, 70, 500)] == [1, 64, 128, 128]


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (Event("a", "i31", START + 9), r"user 'a': unknown item 'i31'; nearest known: 'i3"),
        (
            Event("a", "i3", START + 4),
            rf"user 'a', item 'i3': timestamp {START + 4} goes backwards, the user's last event was at {START + 5}",
        ),
        (Event("b", "i3", 978_300_000_000), r"user 'b', item 'i3': timestamp 978300000000 must lie in .*milliseconds"),
        (Event("b", "i3", -1), r"timestamp -1 must lie in 0 to 2147483647"),
        (Event("b", "i3", 978_300_000.0), r"timestamp 978300000.0 must be a whole number of seconds"),
        (Event("b", "i3", True), r"timestamp True must be a whole number of seconds"),
        (Event("b", "i3", None), r"timestamp None must be a whole number of seconds"),
    ],
)
def test_a_refused_event_changes_nothing(table, event, message):
    table.add([Event("a", "i1", START), Event("a", "i2", START + 5)])
    before = bits(table)
    # The good event before it in the same call is not taken in either.
    with pytest.raises(ValueError, match=message):
        table.add([Event("c", "i1", START), Event("a", "i1", START + 5), event])
    assert (bits(table), table.users, table.events_of("a"), table.pending) == (before, ["a"], 2, 0)
    table.add([Event("a", "i3", START + 5)])
    assert table.events_of("a") == 3 and bits(table) != before


def test_times_are_compared_within_one_call(table):
    with pytest.raises(
        ValueError, match=rf"timestamp {START} goes backwards, the user's last event was at {START + 1}"
    ):
        table.add([Event("a", "i1", START + 1), Event("a", "i2", START)])
    assert len(table) == 0 and table.pending == 0


def test_whole_histories(table, causal_recommender):
    history = causal_recommender.history_of_user("u3")
    table.add_histories({"u3": history})
    events = [
        Event("u3", causal_recommender.item_ids[item - 1], time)
        for item, time in zip(history.items.tolist(), history.timestamps.tolist(), strict=True)
    ]
    other = UserTable(causal_recommender)
    other.add(events)
    assert bits(table) == bits(other)
    with pytest.raises(ValueError, match="user 'u3': timestamp .* goes backwards"):
        table.add_histories({"new": history, "u3": history})
    with pytest.raises(ValueError, match="user 'x' is empty; give at least 1 event"):
        table.add_histories({"x": History(np.zeros(0, np.int32), np.zeros(0, np.int64), "user 'x'")})
    assert table.users == ["u3"]


@pytest.mark.parametrize("keep_items", [True, False])
def test_a_saved_table_has_the_same_bits(causal_recommender, log, tmp_path, keep_items):
    events = events_of(log, range(12))
    table = UserTable(causal_recommender, keep_items=keep_items)
    table.add(events[:60])
    table.notes["lines"] = 60
    table.save(tmp_path / "users.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["users.npz"]
    loaded = UserTable.load(tmp_path / "users.npz", causal_recommender)
    assert (loaded.notes, loaded.users, loaded.keeps_items) == ({"lines": 60}, table.users, keep_items)
    assert bits(loaded) == bits(table)
    for one in (table, loaded):
        one.add(events[60:])
    assert bits(loaded) == bits(table)
    for found, expected in zip(loaded.top_k(table.users, 3), table.top_k(table.users, 3), strict=True):
        np.testing.assert_array_equal(found, expected)
    if keep_items:
        seen = loaded.top_k(table.users, 3, exclude_seen=True)[0]
        np.testing.assert_array_equal(seen, table.top_k(table.users, 3, exclude_seen=True)[0])
    else:
        with pytest.raises(ValueError, match="exclude_seen needs every user's items, which this table does not keep"):
            loaded.top_k(table.users, 3, exclude_seen=True)
    with pytest.raises(ValueError, match="goes backwards"):
        loaded.add([events[0]])


def test_an_empty_table(table, causal_recommender, tmp_path):
    table.save(tmp_path / "users.npz")
    loaded = UserTable.load(tmp_path / "users.npz", causal_recommender)
    assert len(loaded) == 0
    loaded.add([Event("a", "i1", START)])
    assert loaded.top_k(["a"], 2)[0].shape == (1, 2)
    with pytest.raises(ValueError, match="user 'b' has no events"):
        loaded.top_k(["a", "b"], 2)


def test_bfloat16_states_keep_their_bits(causal_recommender, tmp_path):
    config = dataclasses.replace(causal_recommender.config.model, dtype="bfloat16")
    model = type(causal_recommender.model)(config)
    narrow = Recommender(
        model,
        causal_recommender.params,
        causal_recommender.config,
        item_ids=causal_recommender.item_ids,
        titles=None,
        histories=causal_recommender._histories,
    )
    table = UserTable(narrow)
    table.add([Event("a", "i1", START), Event("b", "i2", START)])
    table.save(tmp_path / "users.npz")
    assert bits(UserTable.load(tmp_path / "users.npz", narrow)) == bits(table)
    with pytest.raises(ValueError, match="holds the states of another model or of other parameters"):
        UserTable.load(tmp_path / "users.npz", causal_recommender)


def test_other_formats_and_damage_are_refused(table, causal_recommender, tmp_path, monkeypatch):
    path = tmp_path / "users.npz"
    with pytest.raises(FileNotFoundError):
        UserTable.load(path, causal_recommender)
    table.add([Event("a", "i1", START)])
    table.save(path)
    content = path.read_bytes()
    assert content.count(b'["a"]') == 1
    for damaged in (content[:200], b"", b"no table", content.replace(b'["a"]', b'["b"]')):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="is no table of user states, or is damaged"):
            UserTable.load(path, causal_recommender)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="is no table of user states, or is damaged"):
        UserTable.load(tmp_path / "array.npy", causal_recommender)
    monkeypatch.setattr(user_table_file, "TABLE_FORMAT", 1)
    table.save(path)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format 1, this program reads 2; replay the events"):
        UserTable.load(path, causal_recommender)


def test_a_kill_while_saving_leaves_the_old_table(table, causal_recommender, tmp_path, monkeypatch):
    path = tmp_path / "users.npz"
    table.add([Event("a", "i1", START)])
    table.save(path)
    content = path.read_bytes()
    table.add([Event("a", "i2", START)])

    def broken(file, **arrays):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", broken)
    with pytest.raises(KeyboardInterrupt):
        table.save(path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["users.npz"]
    with np.load(path) as file:
        header = json.loads(file["header"].tobytes())
    assert header["format"] == 2 and len(header["fingerprint"]) == 64


def test_only_models_that_go_on(recommender):
    with pytest.raises(ValueError, match="cannot go on from a state"):
        UserTable(recommender)
