"""Events of a service: refused or kept, and there after a kill at any step."""

import errno
import json
import os
import random

import numpy as np
import pytest

from tests.serving.test_stream_kills import Killed, Killer
from tim4rec_jax.serving import user_table_file
from tim4rec_jax.serving.event_stream import journal_of
from tim4rec_jax.serving.user_histories import UserHistories, opened
from tim4rec_jax.serving.user_table import Event
from tim4rec_jax.serving.user_table_file import LAST_SECOND

LATE = 2_000_000_000


def drawn(item_ids, count, seed=0):
    rng = random.Random(seed)
    return [Event(f"u{rng.randrange(50)}", rng.choice(item_ids), LATE + i) for i in range(count)]


def take(durable, events):
    durable.histories.check(events, {})
    durable.append(events)


def of(histories, user):
    history = histories.history(user)
    return [histories.recommender.item_ids[i - 1] for i in history.items], history.timestamps.tolist()


def test_new_events_follow_the_log(recommender, tmp_path):
    histories, user = UserHistories(recommender), recommender.users[3]
    items, times = of(histories, user)
    first, second = recommender.item_ids[:2]
    with opened(recommender, tmp_path / "state") as durable:
        take(durable, [Event(user, first, LATE), Event("neü", second, 7), Event(user, second, LATE)])
        assert of(durable.histories, user) == ([*items, first, second], [*times, LATE, LATE])
        assert of(durable.histories, "neü") == ([second], [7]) and of(durable.histories, "nobody") == ([], [])
        assert len(durable.histories) == len(recommender.users) + 1
        assert durable.histories.users("ne") == ["neü"] and durable.histories.users(user, 1) == [user]
        assert durable.histories.users(most=99) == [*sorted(recommender.users), "neü"]
        assert durable.unsaved == 3 and journal_of(tmp_path / "state").read_bytes().count(b"\n") == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state"]
    with opened(recommender, tmp_path / "state") as durable:
        assert of(durable.histories, user) == ([*items, first, second], [*times, LATE, LATE])
        assert of(durable.histories, "neü") == ([second], [7]) and durable.lines.lines == 3


@pytest.mark.parametrize(
    ("event", "message"),
    [
        (("u0", "nothing", LATE), "user 'u0', item 'nothing': the run has no such item"),
        (("u0", "i1", 5), "goes backwards"),
        (("u0", "i1", -1), "must lie in 0"),
        (("u0", "i1", LAST_SECOND + 1), "must lie in 0"),
        (("u0", "i1", 1e9), "must be a whole number"),
        (("u0", "i1", float("nan")), "must be a whole number"),
        (("u0", "i1", 2_000_000_100), "is over latest_time=2000000000"),
        (("x" * 1001, "i1", LATE), "has 1001 characters, over 1000"),
    ],
)
def test_what_is_refused(recommender, event, message):
    histories = UserHistories(recommender)
    with pytest.raises(ValueError) as refused:
        histories.check([Event("new", "i1", 5), Event(*event)], {}, LATE)
    assert message in str(refused.value) and len(str(refused.value)) < 200
    assert "new" not in histories and histories.events == 0


def test_events_that_wait_count_in_the_order_of_a_user(recommender):
    histories = UserHistories(recommender)
    after = histories.check([Event("n", "i1", 10)], {})
    assert histories.check([Event("n", "i1", 10)], after) == {"n": 10}
    with pytest.raises(ValueError, match="goes backwards"):
        histories.check([Event("n", "i1", 9)], after)


def test_killed_at_any_step(recommender, tmp_path, monkeypatch):
    """Whatever is killed when: what was acknowledged is there, nothing twice, at most one batch more."""
    killer, rng = Killer(monkeypatch), random.Random(1)
    for first in range(1, 26):
        folder = tmp_path / str(first)
        folder.mkdir()
        events, acknowledged, done, attempt = drawn(recommender.item_ids, 60, first), 0, False, 0
        while not done:
            killer.left = first if attempt == 0 else rng.randrange(1, 40) if attempt < 30 else None
            attempt += 1
            try:
                with opened(recommender, folder / "state") as durable:
                    held = durable.lines.lines
                    assert acknowledged <= held <= acknowledged + 7
                    acknowledged = held
                    for at in range(held, len(events), 7):
                        take(durable, events[at : at + 7])
                        acknowledged = min(at + 7, len(events))
                        if rng.random() < 0.2:
                            durable.save()
                done = True
            except Killed:
                killer.bury()
            finally:
                killer.left = None
        assert attempt > 1
        with opened(recommender, folder / "state") as durable:
            expected = UserHistories(recommender)
            expected.add(events)
            assert durable.lines.lines == len(events) and durable.histories.events == len(events)
            for user in {event.user for event in events}:
                assert of(durable.histories, user) == of(expected, user)


def test_a_full_disk_takes_nothing_in(recommender, tmp_path, monkeypatch):
    events = drawn(recommender.item_ids, 30)
    with opened(recommender, tmp_path / "state") as durable:
        take(durable, events[:10])
        written = os.write

        def full(descriptor, content):
            if len(content) > 9:
                return written(descriptor, bytes(content)[:9])
            raise OSError(errno.ENOSPC, "No space left on device")

        for cut in (False, True):
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", full)
                if cut:  # and the torn line cannot be taken back
                    patch.setattr(os, "ftruncate", lambda *_: full(0, b""))
                for _ in range(2):
                    with pytest.raises(OSError, match="No space left"):
                        take(durable, events[10:20])
            assert durable.lines.lines == 10 and durable.histories.events == 10
        take(durable, events[10:20])
        content = journal_of(tmp_path / "state").read_bytes()
        assert [json.loads(line)["user"] for line in content.splitlines()[1:]] == [e.user for e in events[10:20]]
        # As after a kill: only the journal holds them.
        copy = tmp_path / "copy"
        copy.write_bytes((tmp_path / "state").read_bytes())
        journal_of(copy).write_bytes(content + b'{"user": "torn')
    with opened(recommender, copy) as durable:
        assert durable.lines.lines == 20 and durable.histories.events == 20


def test_one_process(recommender, tmp_path):
    taken = pytest.raises(ValueError, match=r"state is being written by another process \(\d+\)")
    with opened(recommender, tmp_path / "state"), taken, opened(recommender, tmp_path / "state"):
        pass
    nowhere = pytest.raises(FileNotFoundError, match="there is no folder")
    with nowhere, opened(recommender, tmp_path / "nowhere" / "state"):
        pass


def test_files_that_do_not_fit(recommender, causal_recommender, tmp_path):
    path = tmp_path / "state"
    with opened(recommender, path) as durable:
        take(durable, drawn(recommender.item_ids, 20))
    good = path.read_bytes()

    def refused(message):
        with pytest.raises(ValueError, match=message) as error, opened(recommender, path):
            pass
        assert len(str(error.value)) < 400 and "\n" not in str(error.value)
        path.write_bytes(good)

    # Another model of the same log may go on from it.
    with opened(causal_recommender, path) as durable:
        assert durable.histories.events == 20
    path.write_bytes(good[:-100])
    refused("is no table of user states, or is damaged")
    path.write_bytes(b"")
    refused("damaged")
    header, arrays = user_table_file.read(path)
    for name, change, message in (
        ("items", lambda a: np.full_like(a, 31), "items are not of the catalogue"),
        ("items", lambda a: a[:-1].copy(), "items has shape"),
        ("times", lambda a: a[::-1].copy(), "times go backwards"),
        ("times", lambda a: a - 2**40, "times are no seconds"),
        ("lengths", lambda a: 0 * a, "lengths are no lengths"),
        ("lengths", lambda a: a.astype(np.int32), "the arrays are"),
        ("users", lambda a: user_table_file.text('["a", "a"]'), "a user is there twice"),
    ):
        user_table_file.write(path, header, arrays | {name: change(arrays[name])})
        refused(message)
    user_table_file.write(path, header | {"log": "0"}, arrays)
    refused("goes on from another log")
    user_table_file.write(path, header | {"kind": "x"}, arrays)
    refused("is no state of experiments.serve")
    user_table_file.write(path, header | {"lines": {"lines": 3}}, arrays)
    refused("a position must have")
    journal_of(path).write_bytes(b"{}\n")
    refused("is no journal, or is damaged")
    path.unlink()
    refused("goes on from .* which is not there")
