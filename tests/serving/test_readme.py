"""The Python of the READMEs runs as it stands there, on a small log."""

import dataclasses
import importlib
import pathlib
import re
import shlex

import numpy as np
import polars as pl

from tests.serving.tiny_run import make_causal_config, make_run

ROOT = pathlib.Path(__file__).resolve().parents[2]


def block(word: str, readme: str = "README.md") -> str:
    text = (ROOT / readme).read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    [code] = [code for code in blocks if word in code]
    return code


def test_from_a_log_to_recommendations(tmp_path, monkeypatch, capsys):
    """With fewer epochs, and on users 1 to 60 and items 1 to 40."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    user = np.repeat(np.arange(1, 61), 12)
    columns = {"user": user, "item": rng.integers(1, 41, user.size), "timestamp": 978_300_000 + np.arange(user.size)}
    pl.DataFrame(columns).write_csv("log.csv")
    code = block("fit")
    assert "epochs=20" in code
    names = {}
    exec(code.replace("epochs=20", "epochs=1"), names)
    run, shown = names["run"], capsys.readouterr().out
    assert run.run_dir.resolve() == tmp_path / "runs" / "tim4rec_causal-1"
    assert str(run.metrics["test"]["ndcg@10"]) in shown and "shape: (20, 5)" in shown
    assert len(names["items"]) == 10


def test_the_examples_of_rules(tmp_path, monkeypatch, capsys, log):
    """On a small run whose users and items are called as theirs are."""
    monkeypatch.chdir(tmp_path)
    names = {"i1": "1193", "i2": "661", "i3": "914", "i4": "3408", "i5": "2355"}
    renamed = dataclasses.replace(
        log,
        item_ids=log.item_ids.replace(names),
        user_ids=log.user_ids.replace({"u1": "42"}),
    )
    make_run(tmp_path / "runs" / "mine", renamed, make_causal_config())
    ids = renamed.item_ids.to_list()
    pathlib.Path("sold_out.txt").write_text("661\n")
    pathlib.Path("users.csv").write_text("user\n42\nnobody\n")
    pathlib.Path("pairs.csv").write_text("user,item\n42,914\n")
    movies = {"item_id": ids, "genre": ["Drama", "Comedy"] * 15, "price": range(30)}
    pl.DataFrame(movies).write_csv("movies.csv")
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    [examples] = re.findall(r"<!-- examples of rules -->\n```bash\n(.*?)```", text, re.DOTALL)
    for line in examples.splitlines():
        words = shlex.split(line)
        assert words[:2] == ["python", "-m"]
        program = importlib.import_module(words[2])
        assert program.main(words[3:]) == 0, capsys.readouterr().err
    assert not set(pl.read_csv("top.csv", schema_overrides={"item_id": pl.String})["item_id"]) & {"661"}
    assert set(pl.read_parquet("top.parquet")["source"]) == {"model", "popularity"}
    assert np.load("exported/allowed.npy")[1:].tolist() == [True, False] * 15


def test_a_model_alone():
    names = {}
    exec(block("build_model", "experiments/README.md"), names)
    assert names["hidden"].shape == (1, 1, 64) and names["scores"].shape == (1, 1, 3417)
