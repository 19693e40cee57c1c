"""Killed at any moment and started again by the same command: every event once, every answer once, the same bits."""

import json
import os
import pathlib
import random
import sys

import numpy as np
import pytest

from experiments import stream
from tim4rec_jax.serving import event_stream
from tim4rec_jax.serving.recommender import Recommender

START = 978_300_000


class Killed(BaseException):
    """The process is gone."""


class Killer:
    """Kills at the k-th call that changes or syncs a file; a write is torn in its middle."""

    def __init__(self, monkeypatch):
        self.left, self.done, self.opened = None, 0, set()
        opening, closing = os.open, os.close

        def opened(*arguments, **named):
            descriptor = opening(*arguments, **named)
            self.opened.add(descriptor)
            return descriptor

        def closed(descriptor):
            self.opened.discard(descriptor)
            closing(descriptor)

        self.closing = closing
        monkeypatch.setattr(os, "open", opened)
        monkeypatch.setattr(os, "close", closed)
        for name in ("write", "fsync", "replace", "ftruncate", "unlink"):
            monkeypatch.setattr(os, name, self.wrap(name, getattr(os, name)))

    def bury(self):
        """Closes what a dead process had open, its locks with it."""
        for descriptor in self.opened:
            self.closing(descriptor)
        self.opened.clear()

    def wrap(self, name, call):
        def killing(*arguments, **named):
            self.done += 1
            if self.left is not None:
                if self.left == 0:
                    raise Killed  # nothing after the first happens any more: no tidying up of a dead process
                self.left -= 1
                if self.left == 0:
                    if name == "write":
                        call(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    raise Killed
            return call(*arguments, **named)

        return killing


def lines_of_a_log(item_ids, seed, count):
    rng = random.Random(seed)
    lines, now = [], START
    for i in range(count):
        now += rng.randrange(1000)
        user = f"u{rng.randrange(9)}"
        lines.append({"user": user, "item": rng.choice(item_ids), "timestamp": now})
        if i % 5 == 4:
            lines.append({"user": rng.choice([user, "nobody"]), "recommend": 3, "exclude_seen": bool(i % 2)})
    return [json.dumps(line).encode() + b"\n" for line in lines]


@pytest.fixture
def program(causal_run, causal_recommender, monkeypatch):
    """The program without reading the run anew; options that make saves and calls frequent."""
    monkeypatch.setattr(event_stream, "load_streamable", lambda run, report: causal_recommender)
    return [f"--run={causal_run}", "--save-every=7", "--batch-events=4"]


def held_lines(err):
    return int(err.rsplit("give those from line ", 1)[1].split()[0].replace(",", "")) - 1


def start(program, folder, log, from_file, capsys, monkeypatch, held=0):
    """One start; the producer of standard input goes on after the lines that are held."""
    options = [*program, f"--state={folder / 'users.npz'}", f"--output={folder / 'answers.jsonl'}"]
    if from_file:
        return stream.main([*options, f"--events={folder / 'events.jsonl'}"])
    reader, writer = os.pipe()
    told = []

    def wait(descriptor, seconds):
        if descriptor == reader and not told:
            told.append(held_lines(capsys.readouterr().err))
            rest = b"".join(log[told[0] :])
            assert len(rest) < 60_000
            pathlib.Path(f"/proc/self/fd/{writer}").write_bytes(rest)
            os.close(writer)
        return True

    with os.fdopen(reader, "rb") as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        patch.setattr(event_stream, "until_readable", wait)
        try:
            return stream.main(options)
        finally:
            if not told:
                os.close(writer)


def table_bits(path):
    with np.load(path) as file:
        return {name: file[name].tobytes() for name in file.files if name not in ("header", "hash")}


@pytest.mark.parametrize("from_file", [True, pytest.param(False, marks=pytest.mark.exhaustive)], ids=["file", "stdin"])
def test_killed_at_any_step(causal_recommender: Recommender, program, from_file, tmp_path, capsys, monkeypatch):
    log = lines_of_a_log(causal_recommender.item_ids, 3, 40)
    killer = Killer(monkeypatch)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "events.jsonl").write_bytes(b"".join(log))
    assert start(program, whole, log, from_file, capsys, monkeypatch) == 0
    steps = killer.done
    assert steps > 30
    expected, bits = (whole / "answers.jsonl").read_bytes(), table_bits(whole / "users.npz")
    assert expected.count(b"\n") == 8
    rng = random.Random(5)
    # Every start in turn is killed at another step, from the very first on, until one comes to the end.
    for first in range(1, steps, 4):
        folder = tmp_path / f"killed{first}"
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(b"".join(log))
        for attempt in range(40):
            killer.left = first if attempt == 0 else rng.randrange(1, steps)
            try:
                code = start(program, folder, log, from_file, capsys, monkeypatch)
            except Killed:
                killer.bury()
                continue
            finally:
                killer.left = None
            break
        assert code == 0
        assert (folder / "answers.jsonl").read_bytes() == expected
        assert table_bits(folder / "users.npz") == bits
        assert sorted(p.name for p in folder.iterdir()) == ["answers.jsonl", "events.jsonl", "users.npz"]


@pytest.mark.parametrize("from_file", [True, False], ids=["file", "stdin"])
def test_a_full_disk(causal_recommender, program, from_file, tmp_path, capsys, monkeypatch):
    """One line that names the file, and with room again the same command goes on."""
    log = lines_of_a_log(causal_recommender.item_ids, 3, 40)
    whole = tmp_path / "whole"
    whole.mkdir()
    (whole / "events.jsonl").write_bytes(b"".join(log))
    assert start(program, whole, log, from_file, capsys, monkeypatch) == 0
    written = os.write
    for room in range(0, 60, 7):
        folder = tmp_path / f"full{room}"
        folder.mkdir()
        (folder / "events.jsonl").write_bytes(b"".join(log))
        left = [room]

        def full(descriptor, content, left=left):
            left[0] -= 1
            if left[0] > 0:
                return written(descriptor, content)
            if left[0] == 0 and len(content) > 1:
                return written(descriptor, bytes(content)[: len(content) // 2])
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", full)
            capsys.readouterr()
            code = start(program, folder, log, from_file, capsys, monkeypatch)
            err = capsys.readouterr().err.splitlines()
        if code != 0:
            assert code == 2
            assert "No space left on device" in err[-1] and f"'{folder}" in err[-1] and len(err[-1]) < 400
            assert start(program, folder, log, from_file, capsys, monkeypatch) == 0
        assert (folder / "answers.jsonl").read_bytes() == (whole / "answers.jsonl").read_bytes()
        assert table_bits(folder / "users.npz") == table_bits(whole / "users.npz")
