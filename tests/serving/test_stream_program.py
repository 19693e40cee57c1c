"""experiments.stream: answers line by line, what it says to bad lines, and going on where it was stopped."""

import json
import os
import signal
import sys

import numpy as np
import pytest

from experiments import recommend, stream
from tests.serving.streams import event, main, write
from tim4rec_jax.files import locked
from tim4rec_jax.serving import event_stream
from tim4rec_jax.serving.durable_log import until_readable
from tim4rec_jax.serving.user_table import UserTable

# The first part ends inside one user's history; questions stand between events.
LOG = [
    event("a", "i1", 0),
    event("b", "i2", 5),
    event("a", "i3", 90),
    {"user": "a", "recommend": 3},
    event(7, "i4", 100),
    event("b", "i2", 100),
    event("a", "i3", 4000),
    {"user": "b", "recommend": 2, "exclude_seen": True},
    event("b", "i9", 4000),
    {"user": "a", "recommend": 3},
    {"user": "7", "recommend": 1},
]


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
    log = write(tmp_path / "events.jsonl", LOG)
    code, answers, err = main(capsys, f"--run={causal_run}", f"--events={log}", "--batch-events=2")
    assert code == 0
    _assert_answers(answers, expected)
    assert "11 lines: 7 events, 4 answers, 0 bad lines; 3 users of " in err


class _Input:
    """Standard input on which a step happens whenever the program waits: a line comes, or something is called."""

    opened = []

    def __init__(self, monkeypatch, steps):
        reader, self.writer = os.pipe()
        self.steps = iter(steps)
        self.file = os.fdopen(reader, "rb")
        self.opened.append(self.file)
        monkeypatch.setattr(sys, "stdin", self.file)
        monkeypatch.setattr(event_stream, "until_readable", self.wait)

    def wait(self, descriptor, seconds):
        if descriptor != self.file.fileno():
            return until_readable(descriptor, seconds)
        step = next(self.steps, None)
        if callable(step):
            return step()
        if step is None:
            os.close(self.writer)
            return True
        os.write(self.writer, step if isinstance(step, bytes) else json.dumps(step).encode() + b"\n")
        return True


@pytest.fixture(autouse=True)
def closed_inputs():
    yield
    while _Input.opened:
        _Input.opened.pop().close()


def _idle():
    return False


def test_stopped_and_started_again(causal_run, causal_recommender, expected, tmp_path, capsys):
    """A kill after a save: lines since then are read again, and every answer stands there once."""
    log, state, output = write(tmp_path / "events.jsonl", LOG[:6]), tmp_path / "users.npz", tmp_path / "out.jsonl"
    options = (f"--run={causal_run}", f"--events={log}", f"--state={state}", f"--output={output}")
    code, _, err = main(capsys, *options)
    assert code == 0 and f"{state} holds 6 lines" in err
    saved = state.read_bytes()
    write(log, LOG)
    assert main(capsys, *options)[0] == 0
    once = output.read_bytes()
    state.write_bytes(saved)
    output.write_bytes(once[:-9])
    _, _, err = main(capsys, *options)
    assert "5 lines: 2 events, 3 answers" in err and f"{state} holds 11 lines" in err
    assert output.read_bytes() == once
    _assert_answers([json.loads(line) for line in once.splitlines()], expected)
    assert UserTable.load(state, causal_recommender).notes["lines"]["lines"] == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.jsonl", "out.jsonl", "users.npz"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_what_was_read(causal_run, expected, tmp_path, capsys, monkeypatch, number):
    state = tmp_path / "users.npz"
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    _Input(monkeypatch, [*LOG[:6], lambda: signal.raise_signal(number), *LOG[6:]])
    code, before, err = main(capsys, f"--run={causal_run}", f"--state={state}")
    assert code == 128 + number and f"stopped by {number.name}" in err and f"{state} holds 6 lines" in err
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
    # Standard input goes on after the lines that the table holds.
    _Input(monkeypatch, LOG[6:])
    code, after, err = main(capsys, f"--run={causal_run}", f"--state={state}")
    assert code == 0 and "holds 6 lines; give those from line 7 on" in err and f"{state} holds 11 lines" in err
    _assert_answers(before + after, expected)
    assert [path.name for path in tmp_path.iterdir()] == ["users.npz"]


class _Killed(BaseException):
    pass


def _die():
    raise _Killed


@pytest.mark.parametrize(
    ("steps", "options"),
    [
        (LOG[:7], ["--save-every=3"]),
        ([*LOG[:6], _idle, LOG[6]], ["--save-seconds=1e-9"]),
    ],
    ids=["lines", "seconds"],
)
def test_saves_on_the_way(causal_run, causal_recommender, tmp_path, monkeypatch, steps, options):
    """Killed without warning, the table holds the lines of the last save; without input too, it is made."""
    state = tmp_path / "users.npz"
    monkeypatch.setattr(event_stream, "SAVE_SHARE", 0)
    _Input(monkeypatch, [*steps, _die])
    with pytest.raises(_Killed):
        stream.main([f"--run={causal_run}", f"--state={state}", *options])
    table = UserTable.load(state, causal_recommender)
    assert table.notes["lines"]["lines"] == (6 if options == ["--save-every=3"] else 7)
    assert table.events_of("b") == 2 and table.events_of("a") >= 2


def test_lines_of_standard_input_outlive_a_kill(causal_run, expected, tmp_path, capsys, monkeypatch):
    """What an answer rests on is in the journal, although no table was saved since the start."""
    state = tmp_path / "users.npz"
    _Input(monkeypatch, [*LOG[:4], _die])
    with pytest.raises(_Killed):
        stream.main([f"--run={causal_run}", f"--state={state}"])
    first = json.loads(capsys.readouterr().out)
    # A line that was torn by the kill is none.
    with (tmp_path / "users.npz.journal").open("ab") as file:
        file.write(b'{"user": "z", "it')
    _Input(monkeypatch, LOG[4:])
    code, [again, *answers], err = main(capsys, f"--run={causal_run}", f"--state={state}")
    assert code == 0 and f"{state} holds 4 lines; give those from line 5 on" in err
    # Nobody may have read the last answer.
    assert again == first
    _assert_answers([first, *answers], expected)
    # In the table alone, or with a journal of another one, lines would be missing.
    journal = tmp_path / "users.npz.journal"
    for content, message in (
        (b'{"lines": 99, "bytes": 3, "digest": ""}\n', "does not go on from the 11 lines that its table holds"),
        (b"[" * 3000, "is no journal, or is damaged"),
        (b"", "is no journal, or is damaged"),
    ):
        journal.write_bytes(content)
        _Input(monkeypatch, [])
        code, answers, err = main(capsys, f"--run={causal_run}", f"--state={state}")
        assert (code, answers) == (2, []) and message in err and err.count("\n") == 1
    state.unlink()
    code, _, err = main(capsys, f"--run={causal_run}", f"--state={state}")
    assert code == 2 and "remove the journal as well to begin anew" in err


def test_a_journal_is_taken_in_before_a_file(causal_run, expected, tmp_path, capsys, monkeypatch):
    state, log = tmp_path / "users.npz", write(tmp_path / "events.jsonl", LOG)
    _Input(monkeypatch, [*LOG[:4], _die])
    with pytest.raises(_Killed):
        stream.main([f"--run={causal_run}", f"--state={state}"])
    capsys.readouterr()
    code, answers, _ = main(capsys, f"--run={causal_run}", f"--state={state}", f"--events={log}")
    assert code == 0 and not (tmp_path / "users.npz.journal").exists()
    _assert_answers(answers, expected)


@pytest.mark.parametrize("whole", [True, False])
def test_a_last_line_without_a_line_break(causal_run, tmp_path, capsys, monkeypatch, whole):
    """In a file it is still being written; from a pipe that ended it is taken if it is whole."""
    state, lines = tmp_path / "users.npz", [json.dumps(line) for line in (LOG[0], {"user": "a", "recommend": 1})]
    last = lines[1] if whole else lines[1][:20]
    log = tmp_path / "events.jsonl"
    log.write_text(f"{lines[0]}\n{last}")
    options = (f"--run={causal_run}", f"--events={log}", f"--state={state}")
    code, answers, err = main(capsys, *options)
    assert (code, answers) == (0, []) and "no line break yet and was not taken" in err and "holds 1 lines" in err
    log.write_text(f"{lines[0]}\n{lines[1]}\n")
    code, [answer], err = main(capsys, *options)
    assert code == 0 and answer["line"] == 2
    _Input(monkeypatch, [f"{lines[0]}\n{last}".encode()])
    code, answers, err = main(capsys, f"--run={causal_run}")
    assert code == 0 and len(answers) == whole and ("was not taken" in err) != whole


def test_another_log(causal_run, causal_recommender, tmp_path, capsys):
    state = tmp_path / "users.npz"
    options = (f"--run={causal_run}", f"--state={state}")
    assert main(capsys, *options, f"--events={write(tmp_path / 'one.jsonl', LOG[:3])}")[0] == 0
    other = write(tmp_path / "two.jsonl", [event("a", "i5", 5000), {"user": "a", "recommend": 1}])
    code, _, err = main(capsys, *options, f"--events={other}")
    assert code == 2 and "does not begin with the 3 lines that" in err and "(2 lines were compared)" in err
    code, [answer], _ = main(capsys, *options, f"--events={other}", "--new-log")
    assert code == 0 and answer["line"] == 2
    # The same command again goes on: nothing is taken twice.
    code, answers, _ = main(capsys, *options, f"--events={other}", "--new-log")
    assert (code, answers) == (0, [])
    table = UserTable.load(state, causal_recommender)
    assert table.notes["lines"]["lines"] == 2 and table.events_of("a") == 3
    code, _, err = main(capsys, *options, "--new-log")
    assert code == 2 and "--new_log needs --events=FILE" in err


def test_files_of_answers(causal_run, tmp_path, capsys):
    """Only answers that the table knows of are gone on with."""
    log, state = write(tmp_path / "events.jsonl", LOG), tmp_path / "users.npz"
    foreign, ours = tmp_path / "foreign.jsonl", tmp_path / "ours.jsonl"
    options = (f"--run={causal_run}", f"--events={log}")
    foreign.write_text('{"line": 4, "user": "a", "items": []}\n')
    for more in ([], [f"--state={state}"]):
        code, _, err = main(capsys, *options, f"--output={foreign}", *more)
        assert code == 2 and f"{foreign} exists already" in err and err.count("\n") == 1
    assert foreign.read_text().count("\n") == 1
    options += (f"--state={state}",)
    assert main(capsys, *options, f"--output={ours}")[0] == 0
    content = ours.read_bytes()
    for changed in (content.replace(b'"line": 8', b'"line": 7'), content[:-1], content[:50], content + b"notes\n"):
        ours.write_bytes(changed)
        code, _, err = main(capsys, *options, f"--output={ours}")
        assert code == 2 and "does not begin with the 4 answers that were given" in err
        assert ours.read_bytes() == changed
    # What was moved away begins anew, and the old file is gone on with afterwards as before.
    ours.write_bytes(content)
    assert main(capsys, *options, f"--output={tmp_path / 'more.jsonl'}")[0] == 0
    assert main(capsys, *options, f"--output={ours}")[0] == 0
    assert ours.read_bytes() == content
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    code, _, err = main(capsys, *options, f"--output={pipe}")
    assert code == 2 and "is no regular file" in err


def test_one_process_at_a_time(causal_run, tmp_path, capsys):
    log, state, output = write(tmp_path / "events.jsonl", LOG), tmp_path / "users.npz", tmp_path / "out.jsonl"
    (tmp_path / "link.npz").symlink_to(state)
    for path in (state, output):
        with locked(path):
            code, _, err = main(
                capsys,
                f"--run={causal_run}",
                f"--events={log}",
                f"--state={tmp_path / 'link.npz'}",
                f"--output={output}",
            )
            assert code == 2 and f"{path} is being written by another process" in err and err.count("\n") == 1
    assert not state.exists() and not output.exists()


def test_warm_users(causal_run, causal_recommender, log, tmp_path, capsys):
    lengths = np.diff(log.offsets)
    user = log.user_ids[int(np.flatnonzero(lengths <= causal_recommender.config.model.max_len)[0])]
    events = write(tmp_path / "events.jsonl", [{"user": user, "recommend": 4}])
    state = tmp_path / "users.npz"
    options = (f"--run={causal_run}", f"--events={events}", f"--state={state}")
    code, [answer], _ = main(capsys, *options, "--warm")
    [expected] = causal_recommender.recommend([causal_recommender.history_of_user(user)], 4)
    assert code == 0 and [i["item"] for i in answer["items"]] == [r.item_id for r in expected]
    assert len(UserTable.load(state, causal_recommender)) == 40
    code, _, err = main(capsys, *options)
    assert code == 2 and f"{state} was made with warm=True, not False" in err
    code, _, err = main(capsys, *options, "--warm", "--no-keep-items")
    assert code == 2 and "was made with keep_items=True, not False" in err


def test_only_causal_runs(run, tmp_path, capsys):
    code, _, err = main(capsys, f"--run={run}")
    assert code == 2 and err.count("\n") == 1
    assert "the model 'tim4rec' cannot go on from a state" in err and "ssd4rec, mamba4rec" in err


def test_refusals(causal_run, tmp_path, capsys):
    log = write(tmp_path / "events.jsonl", LOG[:1])
    os.mkfifo(tmp_path / "pipe")
    for argv, message in (
        ([f"--state={tmp_path / 'pipe'}"], "pipe is no file"),
        ([f"--state={tmp_path / 's'}", f"--output={tmp_path / 's.journal'}"], "none the table's .journal"),
        ([f"--state={tmp_path / 's'}", f"--events={tmp_path / 's.journal'}"], "none the table's .journal"),
        ([f"--events={tmp_path / 'none.jsonl'}"], "none.jsonl"),
        ([f"--events={log}", f"--output={log}"], "must be different files"),
        ([f"--state={log}", f"--output={log}"], "must be different files"),
        ([f"--state={tmp_path / 'no' / 'users.npz'}"], f"there is no folder {tmp_path / 'no'}"),
        ([f"--output={tmp_path / 'no' / 'out.jsonl'}"], f"there is no folder {tmp_path / 'no'}"),
        (["--save-every=0"], "--save_every=0 must be at least 1"),
        (["--save-seconds=nan"], "--save-seconds=nan: expected a number"),
        (["--latest-time=2147483648"], "--latest_time=2147483648 must be 2147483647 at most"),
    ):
        code, answers, err = main(capsys, f"--run={causal_run}", *argv)
        assert (code, answers) == (2, []) and message in err and err.count("\n") == 1
    assert log.read_text().count("\n") == 1


def test_a_journal_that_is_no_file(causal_run, tmp_path, capsys):
    log, state = write(tmp_path / "events.jsonl", LOG[:1]), tmp_path / "users.npz"
    options = (f"--run={causal_run}", f"--events={log}", f"--state={state}")
    assert main(capsys, *options)[0] == 0
    os.mkfifo(tmp_path / "users.npz.journal")
    code, _, err = main(capsys, *options)
    assert code == 2 and "users.npz.journal is no journal, for it is no file" in err and err.count("\n") == 1


def test_nobody_reads_the_answers(causal_run, causal_recommender, tmp_path, capsys, monkeypatch):
    log = write(tmp_path / "events.jsonl", LOG[:4])
    state = tmp_path / "users.npz"
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as closed_pipe:
        monkeypatch.setattr(sys, "stdout", closed_pipe)
        code = stream.main([f"--run={causal_run}", f"--events={log}", f"--state={state}"])
    assert code == 1 and "nobody reads the answers any more, at line 4" in capsys.readouterr().err
    assert UserTable.load(state, causal_recommender).notes["lines"]["lines"] == 0


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
