"""The example runs as it stands; what its cells show, in a terminal and in a notebook; bad input of each door."""

import ast
import pathlib
import re
import runpy

import numpy as np
import polars as pl
import pytest

import tim4rec_jax
from tim4rec_jax import Recommender, Stream, compare, evaluate, fit, load_log
from tim4rec_jax.notebook import html_table
from tim4rec_jax.run_dir import read_test_ranks

FILE = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "examples" / "ten_lines.py"


@pytest.fixture(scope="module")
def cells(tmp_path_factory):
    """What the script leaves behind, and what the last expression of each cell is."""
    folder = tmp_path_factory.mktemp("notebook")
    patch = pytest.MonkeyPatch()
    patch.chdir(folder)
    names, shown = {"__name__": "notebook"}, []
    for cell in re.split(r"^# %%.*$", FILE.read_text(), flags=re.MULTILINE)[1:]:
        tree = ast.parse(cell)
        *body, last = tree.body
        exec(compile(ast.Module(body, []), "cell", "exec"), names)
        assert isinstance(last, ast.Expr)  # A cell ends with what it shows.
        shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
    yield names, shown
    patch.undo()


def test_every_cell_ends_with_something_to_see(cells):
    _, shown = cells
    kinds = [type(value).__name__ for value in shown]
    assert kinds == [
        "InteractionLog",
        "FittedRun",
        "EvaluationResult",
        "DataFrame",
        "Recommender",
        "DataFrame",
        "Comparison",
    ]
    for value in shown:
        page, text = value._repr_html_(), repr(value)
        assert "<table" in page and page.count("<tr") == page.count("</tr>") and page.count("<tr") > 1
        assert text and "array(" not in text and "0x" not in text


def test_what_is_shown_is_what_is_there(cells):
    names, (log, run, result, table, recommender, _, comparison) = cells[0], cells[1]
    assert "80 users, 24 items" in repr(log) and "2020-" in repr(log) and "<td" in log._repr_html_()
    assert f"{run.metrics['test']['ndcg@10']:.4f}" in run._repr_html_() and str(run.run_dir) in run._repr_html_()
    assert "coverage@10" in repr(result) and "by week" in result._repr_html_()
    assert result.metrics["hit@10"] == run.metrics["test"]["hit@10"] == result.metrics["recall@10"]
    assert table["user_id"].unique(maintain_order=True).to_list() == ["u4", "u7"] and len(table) == 10
    assert "tim4rec_causal, 80 users, 24 items" in repr(recommender)
    assert comparison.best in ("causal time", "no time") and comparison.best in repr(comparison)
    rows = {row["name"]: row for row in comparison.table.iter_rows(named=True)}
    assert rows["causal time"]["ndcg@10"] == pytest.approx(run.metrics["test"]["ndcg@10"])
    loser = next(row for name, row in rows.items() if name != comparison.best)
    assert 0 <= loser["p_holm"] <= 1 and loser["from"] <= loser["behind_by"] <= loser["to"]
    assert rows[comparison.best]["p_holm"] is None
    assert loser["behind_by"] == pytest.approx(rows[comparison.best]["ndcg@10"] - loser["ndcg@10"])
    assert "Stream: tim4rec_causal, 81 users with events" in repr(names["stream"])
    assert "bytes per user" in names["stream"]._repr_html_()


def test_a_stream_answers_as_the_table_does(cells):
    run = cells[0]["run"]
    stream = Stream(run.run_dir, warm=False)
    history = run.recommender.history_of_user("u4")
    ids = [run.recommender.item_ids[item - 1] for item in history.items]
    frame = pl.DataFrame({"user": ["u4"] * len(ids), "item": ids, "timestamp": history.timestamps})
    stream.add(frame)
    listed = stream.recommend(["u4"], k=4, exclude_seen=False, deny=["i1"])
    expected = run.recommend(["u4"], k=4, deny=["i1"])
    assert listed["item_id"].to_list() == expected["item_id"].to_list() and len(stream) == 1
    np.testing.assert_allclose(listed["score"], expected["score"], rtol=1e-4)


@pytest.mark.exhaustive
def test_it_runs_as_a_program(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tim4rec_jax, "fit", _quick(tim4rec_jax.fit))
    runpy.run_path(str(FILE), run_name="__main__")
    assert "Comparison: best by ndcg@10" in capsys.readouterr().out
    assert sorted(folder.name for folder in (tmp_path / "runs").iterdir() if folder.is_dir()) == [
        "ssd4rec-1",
        "tim4rec_causal-1",
    ]


def _quick(plain):
    return lambda log, model, **settings: plain(log, model, **settings | {"epochs": 1, "warmup_steps": 0})


def test_several_seeds_have_a_deviation(cells, tmp_path):
    names = cells[0]
    second = fit(names["log"], "ssd4rec", run_dir=tmp_path / "seed", seed=9, **names["settings"] | {"epochs": 1})
    found = compare({"ssd": [names["other"], second.run_dir], "causal": names["run"]}, metric="recall@5")
    rows = {row["name"]: row for row in found.table.iter_rows(named=True)}
    values = [float(np.mean(read_test_ranks(run.run_dir)["rank"].to_numpy() <= 5)) for run in (names["other"], second)]
    assert rows["ssd"]["recall@5"] == pytest.approx(np.mean(values)) and rows["ssd"]["runs"] == 2
    assert rows["ssd"]["recall@5 ±"] == pytest.approx(np.std(values, ddof=1)) and rows["causal"]["recall@5 ±"] is None


def test_bad_input_is_one_line(cells, tmp_path):
    names = cells[0]
    run, stream = names["run"], names["stream"]
    short = names["events"].filter(pl.col("user") != "u1")
    elsewhere = fit(
        load_log(short), "ssd4rec", run_dir=tmp_path / "less", **names["settings"] | {"epochs": 1, "d_state": 4}
    )
    listless = fit(names["log"], "sasrec", run_dir=tmp_path / "attention", epochs=1, progress=False, tensorboard=False)
    cases = {
        "unknown setting 'metric'; nearest: metrics": lambda: evaluate(run, metric="recall@10"),
        "split='train' must be 'test' or 'valid'": lambda: evaluate(run, "train"),
        "metric 'recal@10' is unknown": lambda: evaluate(run, metrics=("recal@10",)),
        "compare was given no run": lambda: compare({}),
        "compare: 'a' has no run": lambda: compare({"a": []}),
        "the runs were not tested alike: data": lambda: compare({"a": run, "b": elsewhere}),
        "metric='coverage@5' reads lists": lambda: compare({"a": run}, metric="coverage@5"),
        "metric 'ndgc@10' is unknown": lambda: compare({"a": run}, metric="ndgc@10"),
        "unknown item 'nothing'": lambda: stream.add([("u4", "nothing", 1_800_000_000)]),
        "user 'nobody' has no events": lambda: stream.recommend(["nobody"]),
        r"users='u4' must be a list of raw user ids; give \['u4'\]": lambda: stream.recommend("u4"),
        "events without the columns item": lambda: stream.add(pl.DataFrame({"user": [1], "timestamp": [2]})),
        "cannot go on from a state": lambda: Stream(listless),
    }
    for message, call in cases.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300, message
    with pytest.raises(FileNotFoundError):
        evaluate(tmp_path / "gone")
    with pytest.raises(FileNotFoundError):
        compare({"a": tmp_path / "gone"})


def test_names_are_escaped():
    page = html_table("<b>", ("a&b",), [("<script>",)])
    assert "<script>" not in page and "&lt;script&gt;" in page and "a&amp;b" in page


def test_they_are_public():
    for name in ("compare", "evaluate", "fit", "Recommender", "Stream", "Callback", "register_metric"):
        assert name in tim4rec_jax.__all__ and getattr(tim4rec_jax, name)
    assert tim4rec_jax.Recommender is Recommender
