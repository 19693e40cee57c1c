"""The service as a process: stopped under load, killed again and again, and alone with its state."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict

import pytest

pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
httpx = pytest.importorskip("httpx", reason="requests to the service need httpx")

from experiments.benchmarks.small_run import ROOT

LATE = 2_000_000_000
SECONDS = 120


class Process:
    """A service in a process of its own, at a free port."""

    def __init__(self, run, state, *options, errors, environment=None):
        self.errors = errors
        command = [sys.executable, "-m", "experiments.serve", f"--run={run}", f"--state={state}", "--port=0", *options]
        # As few programs as there can be: starts are what takes time here.
        command += ["--max_batch=1", "--limits.k=5"]
        with errors.open("wb") as stream:
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stream
            )
        self.client = None

    def said(self):
        return self.errors.read_text(errors="replace")

    def url(self):
        until = time.monotonic() + SECONDS
        while time.monotonic() < until and self.process.poll() is None:
            if found := re.search(r"listening at (http://\S+);", self.said()):
                return found[1]
            time.sleep(0.02)
        raise AssertionError(self.said())

    def wait_until_ready(self):
        self.client = httpx.Client(base_url=self.url(), timeout=SECONDS)
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                if self.client.get("/ready").status_code == 200:
                    return self
            assert self.process.poll() is None, self.said()
            time.sleep(0.02)
        raise AssertionError(self.said())

    def end(self, number):
        self.process.send_signal(number)
        code = self.process.wait(SECONDS)
        if self.client is not None:
            self.client.close()
        return code


@pytest.fixture
def start(tmp_path):
    """Starts services, and ends those that a failing test leaves behind."""
    started = []

    def starting(run, state, *options, environment=None):
        errors = tmp_path / f"errors{len(started)}"
        started.append(Process(run, state, *options, errors=errors, environment=environment))
        return started[-1]

    yield starting
    for one in started:
        if one.process.poll() is None:
            one.process.kill()
            one.process.wait()


def count_of(client, user):
    answer = client.get("/v1/history", params={"user": user, "limit": 1})
    return answer.json()["count"] if answer.status_code == 200 else 0


def test_stopped_under_load(causal_run, tmp_path, start):
    """Everything that was taken in is answered, what is new gets 503, events are saved, and the exit code is 0."""
    state = tmp_path / "state"
    service = start(causal_run, state, "--drain_seconds=0.3").wait_until_ready()
    again = start(causal_run, state)
    assert again.process.wait(SECONDS) == 2
    assert (
        re.search(r"state is being written by another process \(\d+\)", again.said()) and again.said().count("\n") == 1
    )
    accepted, statuses, other, going = defaultdict(int), defaultdict(int), [], threading.Event()

    def load(number):
        with httpx.Client(base_url=service.client.base_url, timeout=SECONDS) as client:
            for i in range(10_000):
                user = f"user {number}"
                event = {"user": user, "item": "i1", "timestamp": LATE + i}
                try:
                    answer = client.post("/v1/events", json={"events": [event]})
                    asked = client.post("/v1/recommend", json={"users": [user], "k": 3})
                except httpx.TransportError:
                    return  # The service is gone.
                statuses[answer.status_code] += 1
                statuses[asked.status_code] += 1
                if answer.status_code == 200:
                    accepted[user] += 1
                elif answer.status_code != 503 or "stopping" not in answer.json()["error"]:
                    other.append(answer.text)
                if i == 20:
                    going.set()

    threads = [threading.Thread(target=load, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    assert going.wait(SECONDS)
    assert service.end(signal.SIGTERM) == 0, service.said()
    for thread in threads:
        thread.join()
    assert set(statuses) == {200, 503} and not other and sum(accepted.values()) > 20
    assert "stopped by SIGTERM" in service.said() and "Traceback" not in service.said()
    assert sorted(path.name for path in tmp_path.iterdir() if "state" in path.name) == ["state"]
    service = start(causal_run, state).wait_until_ready()
    # The answer to an event may have been cut off after it was taken in.
    for user, count in accepted.items():
        assert 0 <= count_of(service.client, user) - count <= 1
    assert service.end(signal.SIGINT) == 0


@pytest.mark.exhaustive
@pytest.mark.parametrize("seconds", [0.0, 0.5, 2.0])
def test_stopped_while_it_warms_up(causal_run, tmp_path, start, seconds):
    """Nothing kept of what was compiled before: it ends between two programs."""
    compiled = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
    service = start(causal_run, tmp_path / "state", environment=compiled)
    service.url()
    time.sleep(seconds)
    assert service.end(signal.SIGTERM) == 0, service.said()
    assert "Traceback" not in service.said() and "stopped by SIGTERM" in service.said()


@pytest.mark.exhaustive
def test_fifty_kills(causal_run, tmp_path, start):
    """10,000 events through 50 kills: every acknowledged one is there, in its order, and none twice."""
    rng, state, users, acknowledged = random.Random(7), tmp_path / "state", 40, 0
    part = []
    events = [(f"user {rng.randrange(users)}", f"i{rng.randrange(1, 31)}", LATE + i) for i in range(10_000)]
    for kill_at in [*sorted(rng.sample(range(9_800), 50)), None]:
        service = start(causal_run, state, "--save_every=300").wait_until_ready()
        held = sum(count_of(service.client, f"user {user}") for user in range(users))
        # The request that the kill cut off may have been taken in without an answer, whole.
        assert held in (acknowledged, acknowledged + len(part))
        acknowledged, killer = held, None
        try:
            while acknowledged < len(events):
                if killer is None and kill_at is not None and acknowledged >= kill_at:
                    killer = threading.Timer(rng.uniform(0, 0.02), service.process.kill)
                    killer.start()
                part = events[acknowledged : acknowledged + rng.randrange(1, 12)]
                body = {"events": [dict(zip(("user", "item", "timestamp"), event, strict=True)) for event in part]}
                assert service.client.post("/v1/events", json=body).status_code == 200
                acknowledged += len(part)
        except httpx.TransportError:
            assert service.process.wait(SECONDS) == -signal.SIGKILL
            service.client.close()
        assert (killer is None) == (kill_at is None)
    expected = defaultdict(list)
    for user, item, at in events:
        expected[user].append((item, at))
    for user, wanted in expected.items():
        found = service.client.get("/v1/history", params={"user": user, "limit": 200}).json()
        assert found["count"] == len(wanted)
        assert [(event["item"], event["timestamp"]) for event in found["events"]] == wanted[-200:]
    assert service.end(signal.SIGTERM) == 0
