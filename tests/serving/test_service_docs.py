"""What is written about the service: the README's walk-through answers as it stands there, the image fits the tree."""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import tomllib

import polars as pl
import pytest

pytest.importorskip("fastapi", reason="the service needs the extra [serve]")
pytest.importorskip("httpx", reason="requests within a process need httpx")

from experiments.cli import parse_settings
from experiments.serve import __main__ as serve
from experiments.serve.app import make_app
from tests.serving.in_process import at_a_port
from tests.serving.tiny_run import make_causal_config, make_run

ROOT = pathlib.Path(__file__).resolve().parents[2]


def test_the_walk_through(tmp_path, log):
    if shutil.which("curl") is None:
        pytest.skip("the walk-through needs curl")
    names = {"i1": "1193", "i2": "661", "i3": "914", "i4": "3408"}
    renamed = dataclasses.replace(
        log, item_ids=log.item_ids.replace(names), user_ids=log.user_ids.replace({"u1": "42"})
    )
    make_run(tmp_path / "mine", renamed, make_causal_config())
    ids = renamed.item_ids.to_list()
    pl.DataFrame({"item_id": ids, "genre": ["Drama", "Comedy"] * 15}).write_csv(tmp_path / "movies.csv")
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    [lines] = re.findall(r"<!-- walk through the service -->\n```bash\n(.*?)```", text, re.DOTALL)
    answers = []
    chosen = serve.ServeOptions(
        run=tmp_path / "mine", state=tmp_path / "state", items=tmp_path / "movies.csv", max_batch=2
    )
    with serve.service_of(chosen) as service:
        service.start()
        assert service.wait_until_ready(300)
        with at_a_port(make_app(service)) as url:
            for line in lines.splitlines():
                words = shlex.split(line.replace("localhost:8000", url), comments=True)
                assert words[:2] == ["curl", "-sf"]
                done = subprocess.run(words, capture_output=True, text=True, timeout=60)
                assert done.returncode == 0, line
                answers.append(done.stdout)
    assert "tim4rec_compilations_after_ready 0.0" in answers.pop()
    ready, new, given, dramas, taken, after, history, scores, similar = map(json.loads, answers)
    assert ready == {"status": "ready"} and taken == {"accepted": 1, "skipped": 0}
    assert new["results"][0]["user"] == "42" and len(new["results"][0]["items"]) == 5
    assert "914" not in {item["item"] for item in given["results"][0]["items"]}
    assert [one["source"] for one in dramas["results"]] == ["model", "popularity"]
    comedies = set(ids[1::2])
    assert not comedies & {item["item"] for one in dramas["results"] for item in one["items"]}
    assert after["results"][0]["events"] == 1 and history["count"] == 1 and history["events"][0]["item"] == "914"
    assert len(scores["scores"]) == 1 and len(similar["results"][0]["items"]) == 5


def test_the_image_fits_the_tree():
    """It cannot be built here; what it names is there, and its command is read as the program reads it."""
    text = (ROOT / "experiments" / "serve" / "Dockerfile").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.startswith("#")]
    steps = [line.split(None, 1) for line in lines]
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "VOLUME", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK"}
    assert {name for name, _ in steps} <= known | {"ENTRYPOINT", "CMD"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {word for name, rest in steps if name == "COPY" for word in rest.split()[:-1]}
    assert all((ROOT / name).exists() for name in copied)
    packages = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert {name.rstrip("*") for name in packages} <= copied and {"pyproject.toml", "README.md", "LICENSE"} <= copied
    [install] = [rest for name, rest in steps if name == "RUN"]
    assert '".[serve]"' in install and "serve" in project["project"]["optional-dependencies"]
    # The browser's files travel with the package.
    for name in project["tool"]["setuptools"]["package-data"]["experiments.serve"]:
        assert (ROOT / "experiments" / "serve" / name).is_file()
    [base] = [rest for name, rest in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.\d+-slim", base) and int(base[9:11]) >= 11
    given = dict(step for step in steps if step[0] in ("ENTRYPOINT", "CMD"))
    command = json.loads(given["ENTRYPOINT"]) + json.loads(given["CMD"])
    assert command[:3] == ["python", "-m", "experiments.serve"]
    options = serve.check(parse_settings(serve.ServeOptions, command[3:]))
    assert options.host == "0.0.0.0" and options.port == 8000 and str(options.run) == "/model"
    exposed = dict(steps)["EXPOSE"]
    health = next(rest for name, rest in steps if name == "HEALTHCHECK")
    assert exposed == "8000" and f"127.0.0.1:{exposed}/ready" in health
    compile(json.loads(health[health.index("[") :])[2], "health", "exec")
    assert str(options.state).startswith(dict(steps)["VOLUME"] + "/")
