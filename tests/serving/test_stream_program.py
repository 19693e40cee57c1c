"""experiments.stream: answers line by line, what it says to bad lines, and going on where it was stopped."""

import io
import json
import os
import signal
import sys

import numpy as np
import pytest

from experiments import recommend, stream
from tim4rec_jax.serving.user_table import UserTable

START = 978_300_000


def _main(capsys, *argv):
    code = stream.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def _event(user, item, seconds):
    return {"user": user, "item": item, "timestamp": START + seconds}


def _write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# The first part ends inside one user's history; questions stand between events.
LOG = [
    _event("a", "i1", 0), _event("b", "i2", 5), _event("a", "i3", 90), {"user": "a", "recommend": 3},
    _event(7, "i4", 100), _event("b", "i2", 100), _event("a", "i3", 4000),
    {"user": "b", "recommend": 2, "exclude_seen": True}, _event("b", "i9", 4000), {"user": "a", "recommend": 3},
    {"user": "7", "recommend": 1},
]  # fmt: skip


@pytest.fixture
def expected(causal_recommender):
    """Answers by line number, from whole histories."""
    answers, items, times = {}, {}, {}
    for number, line in enumerate(LOG, start=1):
        user = str(line["user"])
        if "item" in line:
            items.setdefault(user, []).append(line["item"])
            times.setdefault(user, []).append(line["timestamp"])
            continue
        history = causal_recommender.history_from_ids(items[user], times[user])
        exclude = line.get("exclude_seen", False)
        [found] = causal_recommender.recommend([history], line["recommend"], exclude_seen=exclude)
        answers[number] = (user, found)
    return answers


def _assert_answers(found, expected):
    assert [answer["line"] for answer in found] == list(expected)
    for answer, (user, items) in zip(found, expected.values(), strict=True):
        assert answer["user"] == user
        assert [(i["item"], i["title"]) for i in answer["items"]] == [(r.item_id, r.title) for r in items]
        np.testing.assert_allclose([i["score"] for i in answer["items"]], [r.score for r in items], rtol=1e-3)


def test_answers_are_those_of_the_recommender(causal_run, expected, tmp_path, capsys):
    log = _write(tmp_path / "events.jsonl", LOG)
    code, answers, err = _main(capsys, f"--run={causal_run}", f"--events={log}", "--batch-events=2")
    assert code == 0
    _assert_answers(answers, expected)
    assert "11 lines: 7 events, 4 answers, 0 bad lines; 3 users of " in err


def test_stopped_and_started_again(causal_run, causal_recommender, expected, tmp_path, capsys):
    """A kill after a save: lines since then are read again and answered as before."""
    log, state, output = _write(tmp_path / "events.jsonl", LOG[:6]), tmp_path / "users.npz", tmp_path / "out.jsonl"
    options = (f"--run={causal_run}", f"--events={log}", f"--state={state}", f"--output={output}")
    code, _, err = _main(capsys, *options)
    assert code == 0 and f"{state} holds 6 lines" in err
    saved = state.read_bytes()
    _write(log, LOG)
    assert _main(capsys, *options)[0] == 0
    state.write_bytes(saved)
    _, _, err = _main(capsys, *options)
    assert "5 lines: 2 events, 3 answers" in err and f"{state} holds 11 lines" in err
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert [answer["line"] for answer in answers] == [4, 8, 10, 11, 8, 10, 11]
    assert answers[1:4] == answers[4:]
    _assert_answers(answers[:4], expected)
    assert UserTable.load(state, causal_recommender).notes["lines"] == 11


class _Input(io.BytesIO):
    """Standard input during whose k-th read a signal comes; None waits for it, as nobody types."""

    def __init__(self, lines, at, number):
        super().__init__("".join(json.dumps(line) + "\n" for line in lines).encode())
        self.at, self.number = at, number

    def readline(self, *_):
        self.at -= 1
        if self.at == 0:
            signal.raise_signal(self.number)
        return super().readline()


def _stdin(monkeypatch, source):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO())))
    monkeypatch.setattr(sys, "stdin", type("Stdin", (), {"buffer": source})())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_was_read(causal_run, expected, tmp_path, capsys, monkeypatch, number):
    state = tmp_path / "users.npz"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    _stdin(monkeypatch, _Input(LOG, 7, number))
    code, before, err = _main(capsys, f"--run={causal_run}", f"--state={state}")
    assert code == 128 + number and f"stopped by {number.name}" in err and f"{state} holds 6 lines" in err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    # Standard input goes on after the lines that the table holds.
    _stdin(monkeypatch, _Input(LOG[6:], -1, number))
    code, after, err = _main(capsys, f"--run={causal_run}", f"--state={state}")
    assert code == 0 and f"{state} holds 11 lines" in err
    _assert_answers(before + after, expected)


def test_saves_on_the_way(causal_run, causal_recommender, tmp_path, capsys, monkeypatch):
    """Killed without warning, the table holds the lines of the last save."""
    state = tmp_path / "users.npz"

    class Killed(BaseException):
        pass

    def die(stream):
        raise Killed

    source = _Input(LOG[:8], -1, signal.SIGTERM)
    read, lines = source.readline, iter(range(7))
    source.readline = lambda: read() if next(lines, None) is not None else die(source)
    _stdin(monkeypatch, source)
    with pytest.raises(Killed):
        stream.main([f"--run={causal_run}", f"--state={state}", "--save-every=3"])
    table = UserTable.load(state, causal_recommender)
    assert table.notes["lines"] == 6 and table.events_of("b") == 2 and table.events_of("a") == 2


def test_another_log(causal_run, causal_recommender, tmp_path, capsys):
    state = tmp_path / "users.npz"
    options = (f"--run={causal_run}", f"--state={state}")
    assert _main(capsys, *options, f"--events={_write(tmp_path / 'one.jsonl', LOG[:3])}")[0] == 0
    other = _write(tmp_path / "two.jsonl", [_event("a", "i5", 5000), {"user": "a", "recommend": 1}])
    code, _, err = _main(capsys, *options, f"--events={other}")
    assert code == 2 and "does not begin with the 3 lines that" in err and "(2 lines were compared)" in err
    code, [answer], _ = _main(capsys, *options, f"--events={other}", "--new-log")
    assert code == 0 and answer["line"] == 2
    table = UserTable.load(state, causal_recommender)
    assert table.notes["lines"] == 2 and table.events_of("a") == 3


BAD = [
    ("{", "not JSON"),
    ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), "not JSON"),
    ("[]", 'must be an object with "user" and either'),
    ('{"user": "a"}', 'must be an object with "user" and either'),
    ('{"user": "a", "item": "i1", "recommend": 2}', 'must be an object with "user" and either'),
    ('{"user": "a", "item": "i1"}', '"timestamp" is missing: seconds since 1970'),
    ('{"user": "a", "item": "i1", "time": 3}', "unknown keys ['time']; known: ['item', 'timestamp', 'user']"),
    ('{"user": 1.5, "recommend": 2}', "id 1.5 must be a string or a whole number"),
    ('{"user": "a", "item": "i77", "timestamp": 978300100}', "user 'a': unknown item 'i77'; nearest known: 'i7'"),
    ('{"user": "a", "item": "i7", "timestamp": 978299999}', "user 'a', item 'i7': timestamp 978299999 goes backwards"),
    ('{"user": "a", "item": "i7", "timestamp": 978300100000}', "give seconds since 1970, not milliseconds"),
    ('{"user": "a", "item": "i7", "timestamp": "978300100"}', "must be a whole number of seconds"),
    ('{"user": "nobody", "recommend": 2}', "user 'nobody' has no events"),
    ('{"user": "a", "recommend": 31}', "k=31 is larger than the catalogue of 30 items"),
    ('{"user": "a", "recommend": "3"}', '"recommend" must be a whole number of items, not "3"'),
    ('{"user": "a", "recommend": 3, "exclude_seen": 1}', '"exclude_seen" must be true or false, not 1'),
]


def test_bad_lines_are_answered_and_skipped(causal_run, tmp_path, capsys):
    ask = {"user": "a", "recommend": 2}
    lines = [_event("a", "i1", 0), "", ask, *(line for line, _ in BAD), ask]
    log = _write(tmp_path / "events.jsonl", lines)
    code, answers, err = _main(capsys, f"--run={causal_run}", f"--events={log}")
    assert code == 0 and f"1 events, 2 answers, {len(BAD)} bad lines" in err
    assert [answer["line"] for answer in answers] == list(range(3, len(lines) + 1))
    assert answers[0]["items"] == answers[-1]["items"]
    for answer, (line, message) in zip(answers[1:-1], BAD, strict=True):
        assert set(answer) == {"line", "error"} and message in answer["error"], line


def test_warm_users(causal_run, causal_recommender, log, tmp_path, capsys):
    lengths = np.diff(log.offsets)
    user = log.user_ids[int(np.flatnonzero(lengths <= causal_recommender.config.model.max_len)[0])]
    events = _write(tmp_path / "events.jsonl", [{"user": user, "recommend": 4}])
    state = tmp_path / "users.npz"
    options = (f"--run={causal_run}", f"--events={events}", f"--state={state}")
    code, [answer], _ = _main(capsys, *options, "--warm")
    [expected] = causal_recommender.recommend([causal_recommender.history_of_user(user)], 4)
    assert code == 0 and [i["item"] for i in answer["items"]] == [r.item_id for r in expected]
    assert len(UserTable.load(state, causal_recommender)) == 40
    code, _, err = _main(capsys, *options)
    assert code == 2 and f"{state} was made with warm=True, not False" in err
    code, _, err = _main(capsys, *options, "--warm", "--no-keep-items")
    assert code == 2 and "was made with keep_items=True, not False" in err


def test_only_causal_runs(run, tmp_path, capsys):
    code, _, err = _main(capsys, f"--run={run}", "--events=-")
    assert code == 2 and err.count("\n") == 1
    assert "time_mode='faithful' cannot go on from a state" in err and "ml1m_ssd4rec" in err


def test_refusals(causal_run, tmp_path, capsys):
    log = _write(tmp_path / "events.jsonl", LOG[:1])
    for argv, message in (
        ([f"--events={tmp_path / 'none.jsonl'}"], "none.jsonl"),
        ([f"--events={log}", f"--output={log}"], "events.jsonl"),
        ([f"--state={tmp_path / 'no' / 'users.npz'}"], f"there is no folder {tmp_path / 'no'}"),
    ):
        code, answers, err = _main(capsys, f"--run={causal_run}", *argv)
        assert (code, answers) == (2, []) and message in err
    assert log.read_text().count("\n") == 1
    with pytest.raises(ValueError, match="--save_every=0 must be at least 1"):
        stream.Arguments(run=causal_run, save_every=0)


def test_nobody_reads_the_answers(causal_run, tmp_path, capsys, monkeypatch):
    log = _write(tmp_path / "events.jsonl", LOG[:4])
    state = tmp_path / "users.npz"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        code = stream.main([f"--run={causal_run}", f"--events={log}", f"--state={state}"])
    assert code == 1 and "nobody reads the answers any more, at line 4" in capsys.readouterr().err
    assert not state.exists()


def test_whole_histories_of_the_recommend_program(causal_run, causal_recommender, run, log, capsys):
    """They are what the states of all events say, also beyond max_len."""
    lengths = np.diff(log.offsets)
    user = log.user_ids[int(lengths.argmax())]
    assert lengths.max() > causal_recommender.config.model.max_len
    assert recommend.main([f"--run={causal_run}", f"--user={user}", "--k=3", "--full-history"]) == 0
    shown = capsys.readouterr().out
    table = UserTable(causal_recommender)
    table.add_histories({user: causal_recommender.history_of_user(user)})
    [expected] = causal_recommender.named(*table.top_k([user], 3))
    for item in expected:
        assert f" {item.item_id} " in shown and f"{item.score:.4f}" in shown
    [short] = causal_recommender.recommend([causal_recommender.history_of_user(user)], 3)
    assert [r.score for r in short] != [r.score for r in expected]
    assert recommend.main([f"--run={run}", f"--user={user}", "--full-history"]) == 2
    assert "cannot go on from a state" in capsys.readouterr().err
