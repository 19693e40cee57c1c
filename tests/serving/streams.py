"""Logs of events, and the program that reads them."""

import json

from experiments import stream

START = 978_300_000


def main(capsys, *argv):
    code = stream.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, [json.loads(line) for line in captured.out.splitlines()], captured.err


def event(user, item, seconds):
    return {"user": user, "item": item, "timestamp": START + seconds}


def write(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path
