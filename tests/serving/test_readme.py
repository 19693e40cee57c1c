"""The Python of the READMEs runs as it stands there, on a small log."""

import pathlib
import re

import numpy as np
import polars as pl

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


def test_a_model_alone():
    names = {}
    exec(block("build_model", "experiments/README.md"), names)
    assert names["hidden"].shape == (1, 1, 64) and names["scores"].shape == (1, 1, 3417)
