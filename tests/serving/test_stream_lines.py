"""Any line of input is answered by one short JSON line, and none ends the program."""

import json

import numpy as np

from tests.serving.streams import START, event, main, write
from tim4rec_jax.serving.user_table import UserTable


def _bad(**changes):
    return json.dumps({"user": "a", "item": "i1", "timestamp": START + 100} | changes)


BAD = [
    ("{", "not JSON"),
    (b"\xed\xa0\x80", "not JSON in UTF-8 (byte 1: "),
    (b"\xff\xfe{\x00}\x00", "not JSON in UTF-8"),
    (b"\xef\xbb\xbf" + _bad().encode(), "not JSON (Unexpected UTF-8 BOM"),
    (b"\x00" * 40, "not JSON"),
    ("[" * 5000, "nested too deep"),
    ('{"a":' * 5000, "nested too deep"),
    ('{"user": "a", "recommend": ' + "9" * 6000 + "}", "not JSON"),
    ('{"user": "a", "recommend": 1e999}', "must be a whole number of items"),
    ('{"user": "a", "recommend": NaN}', "NaN is no JSON number"),
    ('{"user": "a", "user": "b", "recommend": 1}', '"user" stands there twice'),
    ("{" + ", ".join(f'"k{i}": {i}' for i in [*range(3000), 2999]) + "}", '"k2999" stands there twice'),
    ("[]", 'must be an object with "user" and either'),
    ("7", 'must be an object with "user" and either'),
    ('{"user": "a"}', 'must be an object with "user" and either'),
    ('{"user": "a", "item": "i1", "recommend": 2}', 'must be an object with "user" and either'),
    ('{"user": "a", "item": "i1"}', '"timestamp" is missing: seconds since 1970'),
    ('{"user": "a", "item": "i1", "time": 3}', "unknown keys ['time']; known: ['item', 'timestamp', 'user']"),
    ('{"user": "a", "recommend": 2, "\\ud800": 3}', "unknown keys"),
    *(
        (f'{{"user": {value}, "recommend": 2}}', "must be a string or a whole number")
        for value in ("1.5", "null", "[]", "{}", "true", "1e999", json.dumps(["x" * 9999]))
    ),
    *((_bad(item=value), "must be a string or a whole number") for value in (None, [], {}, False, 2.0)),
    (_bad(user="\ud83d"), "half of a surrogate pair"),
    (_bad(item="\udc00x"), "half of a surrogate pair"),
    ('{"user": "\\ud83d", "recommend": 2}', "half of a surrogate pair"),
    (_bad(user="u" * 1001), "has 1001 characters, over 1000"),
    (_bad(item="i" * 50_000), "unknown item"),
    (_bad(item="i77"), "user 'a': unknown item 'i77'; nearest known: 'i7'"),
    (_bad(timestamp=START - 1), "978299999 goes backwards, the user's last event was at 978300000 (2000-12-31)"),
    (_bad(timestamp=START * 1000), "give seconds since 1970, not milliseconds"),
    (_bad(timestamp=2_000_000_001), "is over --latest_time=2000000000"),
    (_bad(timestamp=-1), "must lie in 0 to"),
    (_bad(timestamp=10**400), "must lie in 0 to"),
    *(
        (_bad(timestamp=value), "must be a whole number of seconds")
        for value in (str(START), None, True, START + 0.5, [START], float(START), "9" * 5000)
    ),
    ('{"user": "nobody", "recommend": 2}', "user 'nobody' has no events; give at least one, start with --warm"),
    *(
        (json.dumps({"user": "a", "recommend": k}), message)
        for k, message in (
            (31, "k=31 is larger than the catalogue of 30 items"),
            (10**300, "must be a whole number of items"),
            (0, "must be at least 1"),
            (-1, "must be at least 1"),
            (2.0, "must be a whole number of items"),
            (True, "must be a whole number of items, not true"),
            ("3", 'whole number of items, not "3"'),
            (None, "must be a whole number of items"),
            ([1], "must be a whole number of items"),
        )
    ),
    *(
        (json.dumps({"user": "a", "recommend": 3, "exclude_seen": value}), '"exclude_seen" must be true or false')
        for value in (1, "true", None, [])
    ),
    (_bad(user="v" * 70_000), "the line has 70"),
    ("[" * 70_000, "over --longest_line=65536; passed over"),
    (b"\r" * 200_000 + b"x", "the line has 200002 bytes"),
]


def test_bad_lines_are_answered_and_skipped(causal_run, tmp_path, capsys):
    """No line ends the program, and every answer is a short JSON line."""
    ask = {"user": "a", "recommend": 2}
    lines = [event("a", "i1", 0), "", ask, *(line for line, _ in BAD), "  \r", event("a", "i2", 200), ask]
    log = tmp_path / "events.jsonl"
    log.write_bytes(
        b"\r\n".join(
            line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines
        )
        + b"\n"
    )
    options = (f"--run={causal_run}", f"--events={log}", "--longest-line=65536", "--latest-time=2000000000")
    state = tmp_path / "users.npz"
    code, answers, err = main(capsys, *options, f"--state={state}")
    assert code == 0 and f"2 events, 2 answers, {len(BAD)} bad lines; 1 users" in err
    assert [answer["line"] for answer in answers] == [*range(3, len(BAD) + 4), len(lines)]
    assert answers[0]["items"] != answers[-1]["items"]
    for answer, (line, message) in zip(answers[1:-1], BAD, strict=True):
        assert set(answer) == {"line", "error"} and message in answer["error"], line
        assert len(answer["error"]) < 300, line
        json.dumps(answer, ensure_ascii=False).encode()
    # They count and are told apart as others are.
    code, answers, _ = main(capsys, *options, f"--state={state}")
    assert (code, answers) == (0, [])
    log.write_bytes(log.read_bytes().replace(b"\rx", b"\ry"))
    code, _, err = main(capsys, *options, f"--state={state}")
    assert code == 2 and "does not begin with" in err


def test_scores_that_are_not_finite_are_one_users_alone(causal_run, tmp_path, capsys, monkeypatch):
    broken = UserTable.top_k

    def top_k(self, users, k, **rules):
        self.flush()
        hidden = self._table[1].at[self._rows["b"]].set(np.nan)
        self._table = (self._table[0], hidden)
        return broken(self, users, k, **rules)

    monkeypatch.setattr(UserTable, "top_k", top_k)
    lines = [event("a", "i1", 0), event("b", "i1", 0), *({"user": user, "recommend": 1} for user in "bab")]
    log, state = write(tmp_path / "events.jsonl", lines), tmp_path / "users.npz"
    code, answers, _ = main(capsys, f"--run={causal_run}", f"--events={log}", f"--state={state}")
    assert code == 0 and ["error" in answer for answer in answers] == [True, False, True]
    assert "the scores of user 'b' are not finite" in answers[0]["error"]
    write(log, [*lines, {"user": "a", "recommend": 1}])
    code, [answer], _ = main(capsys, f"--run={causal_run}", f"--events={log}", f"--state={state}")
    assert code == 0 and answer["items"] == answers[1]["items"]
