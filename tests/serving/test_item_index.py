"""The index of the items finds what exact search finds, and says how much; its export runs without this library."""

import json
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest

from experiments import export as program
from experiments.benchmarks.nearest_items import draw
from tests.serving.tiny_run import make_causal_config, make_config, make_run
from tim4rec_jax.models.recommender import SEEN_BIAS_SCALE
from tim4rec_jax.serving import item_index
from tim4rec_jax.serving.export import export_model
from tim4rec_jax.serving.item_index import write_index
from tim4rec_jax.serving.recommender import Recommender

pytest.importorskip("usearch", reason="the index is built by usearch, which is not installed")

CONSUMER = """
import json, pathlib, sys
for name in ("tim4rec_jax", "kernels", "experiments", "flax"):
    sys.modules[name] = None
import jax, jax.export, numpy, usearch.index

folder, given = pathlib.Path(sys.argv[1]), dict(numpy.load(sys.argv[2]))
description = json.loads((folder / "export.json").read_text())
encode = jax.export.deserialize((folder / "encode.jax_export").read_bytes())
parameters = dict(numpy.load(folder / "parameters.npz"))
index = usearch.index.Index.restore(str(folder / "items.usearch"))
index.expansion_search = description["ann"]["expansion_search"]
hidden = numpy.asarray(encode.call(parameters, given["items"], given["lengths"], given["timestamps"]))
found = [index.search(one, 10) for one in hidden]
numpy.savez(sys.argv[3], hidden=hidden, keys=[one.keys for one in found], scores=[1 - one.distances for one in found])
"""


def exact(table, queries, k):
    return np.argsort(-(queries @ table[1:].T), axis=1, kind="stable")[:, :k] + 1


def test_the_best_of_many_items(tmp_path):
    """3,000 items of unequal lengths; what the file holds is what was measured."""
    rng = np.random.default_rng(0)
    table = rng.normal(size=(3001, 16)).astype(np.float32) * rng.uniform(0.5, 2, (3001, 1)).astype(np.float32)
    queries = rng.normal(size=(50, 16)).astype(np.float32)
    report = write_index(tmp_path / "index", table, queries, lambda q, k: exact(table, q, k))
    assert report.recall >= 0.99 and report.queries == 50
    index = item_index.require_usearch().Index.restore(str(tmp_path / "index"))
    index.expansion_search = report.expansion_search
    found = [set(index.search(query, 10).keys.tolist()) for query in queries]
    hits = [len(one & set(other)) for one, other in zip(found, exact(table, queries, 10).tolist(), strict=True)]
    assert np.sum(hits) / 500 == pytest.approx(report.recall)


def test_the_same_table_gives_the_same_index_and_no_item_is_lost(tmp_path):
    table, queries = draw(2_000, 16, 20, 0)
    for number in range(8):
        report = write_index(tmp_path / f"{number}", table, queries, lambda q, k: exact(table, q, k))
        assert report.recall >= 0.99
    assert len({(tmp_path / f"{number}").read_bytes() for number in range(8)}) == 1


def test_an_index_that_finds_too_little_is_refused(tmp_path):
    """As where a model's scores are no inner products with its table."""
    rng = np.random.default_rng(0)
    table, queries = rng.normal(size=(101, 8)).astype(np.float32), rng.normal(size=(5, 8)).astype(np.float32)
    with pytest.raises(
        ValueError, match=r"of the 10 best items 0\.\d+ are found, under 0.99: either scores are no inner"
    ):
        write_index(tmp_path / "index", table, queries, lambda q, k: exact(-table, q, k))
    assert not (tmp_path / "index").exists()


def test_the_exported_index_answers_as_the_model_does(tmp_path, recommender):
    folder = tmp_path / "exported"
    written = export_model(recommender, folder, k=5, platforms=("cpu",), ann=True)
    assert written["ann"]["recall_at_10"] >= 0.99 and written["ann"]["queries"] == len(recommender.users)
    histories = [recommender.history_of_user(user) for user in recommender.users[:6]]
    lengths = np.array([min(len(one.items), recommender.max_len) for one in histories], np.int32)
    items, lengths, timestamps = recommender.inputs(histories, lengths, recommender.max_len)
    np.savez(tmp_path / "in.npz", items=items, lengths=lengths, timestamps=timestamps)
    command = [sys.executable, "-c", CONSUMER, str(folder), str(tmp_path / "in.npz"), str(tmp_path / "out.npz")]
    subprocess.run(command, check=True)
    found = np.load(tmp_path / "out.npz")
    np.testing.assert_allclose(found["hidden"][:6], recommender.hidden(histories), rtol=1e-4, atol=1e-5)
    best, scores = recommender.top_k(histories, 10)
    np.testing.assert_array_equal(found["keys"][:6], best)
    np.testing.assert_allclose(found["scores"][:6], scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bias", [-3.0, 3.0])
def test_the_seen_bias_is_added_to_what_the_index_finds(tmp_path, log, bias):
    """The index measures inner products; the description says what items of the history have beside theirs."""
    make_run(tmp_path / "run", log, make_causal_config(seen_bias=True))
    recommender = Recommender.from_run(tmp_path / "run")
    recommender.params["seen_bias"] = jnp.full_like(recommender.params["seen_bias"], bias / SEEN_BIAS_SCALE)
    ann = export_model(recommender, tmp_path / "out", k=5, platforms=("cpu",), ann=True)["ann"]
    assert ann["recall_at_10"] == 1.0 and ann["seen_bias"] == pytest.approx(bias)
    index = item_index.require_usearch().Index.restore(str(tmp_path / "out" / "items.usearch"))
    index.expansion_search = ann["expansion_search"]
    table = np.stack(pl.read_parquet(tmp_path / "out" / "items.parquet")["embedding"].to_numpy())
    histories = [recommender.history_of_user(user) for user in recommender.users[:6]]
    best, scores = recommender.top_k(histories, 5)
    for place, (history, hidden) in enumerate(zip(histories, recommender.hidden(histories), strict=True)):
        seen = np.unique(history.items)
        found = np.union1d(index.search(hidden, min(5 + len(seen), len(index))).keys.astype(np.int64), seen)
        of_found = table[found - 1] @ hidden + ann["seen_bias"] * np.isin(found, seen)
        order = np.argsort(-of_found)[:5]
        np.testing.assert_array_equal(found[order], best[place])
        np.testing.assert_allclose(of_found[order], scores[place], rtol=1e-4, atol=1e-4)


def test_the_program(tmp_path, run, capsys, monkeypatch):
    command = [f"--run={run}", f"--output={tmp_path / 'out'}", "--platforms", "cpu"]
    assert program.main([*command, "--ann=usearch"]) == 0
    assert "items.usearch: recall@10" in " ".join(capsys.readouterr().out.split())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["ann"]["library"] == "usearch"
    monkeypatch.setitem(sys.modules, "usearch", None)
    command[1] = f"--output={tmp_path / 'none'}"
    for option, said in (("--ann=usearch", "pip install 'tim4rec_jax[ann]'"), ("--ann=faiss", "one of usearch")):
        assert program.main([*command, option]) == 2
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1
    assert not (tmp_path / "none").exists()


def test_fewer_items_than_a_list(tmp_path, log):
    """Sharded tables have rows behind the last item; they are no items."""
    config = make_causal_config(vocab_multiple=64)
    make_run(tmp_path / "run", log, config)
    recommender = Recommender.from_run(tmp_path / "run")
    written = export_model(recommender, tmp_path / "out", k=5, platforms=("cpu",), ann=True)
    index = item_index.require_usearch().Index.restore(str(tmp_path / "out" / "items.usearch"))
    assert len(index) == recommender.num_items == 30 and written["ann"]["recall_at_10"] == 1.0
    assert make_config().model.vocab_size == 31
