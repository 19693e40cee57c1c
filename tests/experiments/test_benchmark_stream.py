"""experiments.benchmark memory and stream_kills: small runs with real processes, and what they count."""

import json
import pathlib
import types

import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import memory, stream_kills


@pytest.mark.exhaustive
def test_three_kills(tmp_path):
    output = tmp_path / "kills.json"
    argv = ["stream_kills", "--events=200", "--kills=3", "--pipe-kills=1", f"--output={output}"]
    assert benchmark.main(argv) == 0
    record = json.loads(output.read_text())
    assert record["failed"] is False and record["settings"]["events"] == 200
    for way, kills in (("file", 3), ("pipe", 1)):
        counts = record["results"][way]
        assert counts["kills"] == kills and counts["events"] == 200 and counts["answers"] == 10, way
        assert counts["table_equal"] is True and counts["table_bytes"] > 0, way
        for name in ("events_lost", "events_doubled", "answers_missing", "answers_doubled", "answers_different"):
            assert counts[name] == 0, (way, name)
    assert record["results"]["pipe"]["acknowledged_lost"] == 0


@pytest.mark.exhaustive
def test_memory_of_all_parts(tmp_path):
    output = tmp_path / "memory.json"
    counts = {"saves": 20, "questions": 20, "events": 40, "epochs": 20}
    argv = ["memory", *(f"--{name}={count}" for name, count in counts.items()), f"--output={output}"]
    assert benchmark.main(argv) == 0
    results = json.loads(output.read_text())["results"]
    assert list(results) == list(counts)
    for name, count in counts.items():
        readings = results[name]["readings"]
        most = count + (memory._SPARE_EPOCHS if name == "epochs" else 0)
        assert count <= readings[-1]["done"] <= most and readings[-1]["programs"] > 0, name
        assert all(20e6 < reading["resident_bytes"] < 20e9 for reading in readings), name
        assert results[name]["growth"]["to"] == readings[-1]["done"]


def test_growth_begins_at_a_tenth():
    readings = [{"done": 10 * i, "resident_bytes": i * 10**6, "programs": min(i, 4)} for i in range(1, 21)]
    assert memory.grown(readings) == {"from": 20, "to": 200, "mb": 18.0, "programs": 2}


def _left(folder: pathlib.Path, log: list[dict], users: dict[str, int], answers: list[dict], state: float):
    """What a run leaves: its log, its table and its answers."""
    folder.mkdir()
    files = types.SimpleNamespace(table=folder / "users.npz", answers=folder / "answers.jsonl")
    files.lines = [json.dumps(line).encode() for line in log]
    header = json.dumps({"notes": {"lines": {"lines": len(log)}}})
    ids = json.dumps(list(users))
    texts = {name: np.frombuffer(text.encode(), np.uint8) for name, text in {"header": header, "users": ids}.items()}
    np.savez(files.table, **texts, events=np.array(list(users.values())), hidden=np.array([state]))
    files.answers.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    return files


def test_what_is_counted(tmp_path):
    log = [{"user": user, "item": "1", "timestamp": 5} for user in "aabbbc"]
    answers = [{"line": line, "items": []} for line in (2, 4, 6)]
    whole = _left(tmp_path / "whole", log, {"a": 2, "b": 3, "c": 1}, answers, 0.5)
    same = stream_kills.compared(whole, _left(tmp_path / "same", log, {"a": 2, "b": 3, "c": 1}, answers, 0.5))
    assert same["table_equal"] and {n: c for n, c in same.items() if "_" in n and not n.startswith("table")} == {
        "events_lost": 0,
        "events_doubled": 0,
        "answers_missing": 0,
        "answers_doubled": 0,
        "answers_different": 0,
    }
    given = [answers[0], answers[0], {"line": 4, "items": ["7"]}]
    other = stream_kills.compared(whole, _left(tmp_path / "other", log, {"a": 4, "b": 2}, given, 0.25))
    assert (other["events_lost"], other["events_doubled"]) == (2, 2)
    assert (other["answers_missing"], other["answers_doubled"], other["answers_different"]) == (1, 1, 1)
    assert not other["table_equal"]
    read = {line: json.dumps({"line": line, "items": []}).encode() + b"\n" for line in (2, 4)}
    piped = stream_kills.compared(whole, _left(tmp_path / "piped", log, {"a": 2, "b": 3, "c": 1}, [], 0.5), read)
    assert piped["table_equal"] and piped["answers_missing"] == 1 and piped["answers_different"] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["memory", "--saves=19"], "--saves=19 must be at least 20"),
        (["stream_kills", "--events=99"], "--events=99 must be at least 100"),
        (["stream_kills", "--kills=0"], "--kills=0 must be at least 1"),
    ],
)
def test_bad_options(capsys, argv, message):
    assert benchmark.main(argv) == 2
    assert message in capsys.readouterr().err
