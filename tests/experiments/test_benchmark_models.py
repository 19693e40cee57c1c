"""experiments.benchmark models: tiny runs, and what their batches and memory are."""

import argparse
import functools
import json

import jax
import numpy as np
import pytest

from experiments import benchmark
from experiments.benchmarks import models
from experiments.benchmarks.train_step import draw_batch, groups_of
from experiments.configs import MODEL_NAMES
from tim4rec_jax.models import build_model, init_params, last_hidden


@pytest.mark.exhaustive
def test_models_side_by_side(tmp_path, capsys):
    output, figure = tmp_path / "models.json", tmp_path / "models.png"
    argv = ["models", f"--output={output}", f"--figure={figure}", "--repeats=2", "--tiny", "--data=beauty"]
    assert benchmark.main([*argv, "--models=sasrec,mamba4rec", "--tokens=200", "--rows=full"]) == 0
    record = json.loads(output.read_text())
    assert record["benchmark"] == "models" and record["environment"]["backend"] == "cpu"
    assert record["settings"] == {"tokens": 200, "seed": 0, "repeats": 2, "tiny": True}
    assert "temporaries, arguments" in record["memory"]
    found = {(one["model"], one["work"]): one for one in record["results"]}
    assert set(found) == {(m, w) for m in ("sasrec", "mamba4rec") for w in ("training", "evaluation")}
    for (model, work), one in found.items():
        assert len(one["seconds"]) == 2 and one["median_seconds"] > 0 and one["batch_size"] == 25
        base = found["sasrec", work]["median_seconds"]
        assert one["over_sasrec"] == pytest.approx(one["median_seconds"] / base)
        # Training also holds Adam's two moments.
        copies = 3 if work == "training" else 1
        assert one["memory"]["argument_bytes"] >= 4 * copies * one["parameters"], model
        assert one["mean_length"] == 8 and one["groups"] == [{"length": 8, "rows": 25}]
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("mamba4rec", "beauty, full", "25 x 8", "1.00", "evaluation"))
    assert figure.read_bytes().startswith(b"\x89PNG")


def _options(**changes):
    return argparse.Namespace(**{"tokens": 12_800, "tiny": False, "seed": 0, **changes})


@pytest.mark.parametrize(("data", "rows", "length", "vocab"), [("ml-1m", 64, 200, 3417), ("beauty", 256, 50, 12_102)])
@pytest.mark.parametrize("model", MODEL_NAMES)
def test_the_papers_shapes(data, rows, length, vocab, model):
    config = models.shape_of(data, model, _options()).config
    assert (config.train.batch_size, config.model.max_len, config.model.vocab_size) == (rows, length, vocab)
    assert (config.model.d_model, config.model.num_layers) == (64, 1 if model in ("gru4rec", "caser") else 2)
    assert config.model.name == model


def test_full_and_real_rows():
    shape = models.shape_of("beauty", "sasrec", _options())
    full, real = (draw_batch(shape, np.random.default_rng(0), full=full) for full in (True, False))
    assert (full.lengths == 50).all() and (full.items > 0).all() and (np.diff(full.timestamps) >= 0).all()
    assert real.lengths.mean() == pytest.approx(8.4, abs=2)
    np.testing.assert_array_equal((real.items > 0).sum(axis=1), real.lengths)


def test_evaluation_computes_every_row_once():
    """The rows, cut to a few lengths, have the scores of the padded batch."""
    shape = models.shape_of("beauty", "sasrec", _options(tiny=True, tokens=200))
    config, batch = shape.config, draw_batch(shape, np.random.default_rng(1))
    model = build_model(config.model)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    lengths = sorted(group.length for group in groups_of(config, batch.lengths))
    order = np.argsort(np.searchsorted(lengths, batch.lengths), kind="stable")
    assert len(lengths) > 1
    found = models.evaluation(config, params, batch).form.launch()

    def padded(params, items, lengths, timestamps):
        hidden = last_hidden(model, {"params": params}, items, lengths, timestamps)
        return model.apply({"params": params}, hidden, method="score")

    expected = jax.jit(padded)(params, batch.items, batch.lengths, batch.timestamps)
    np.testing.assert_allclose(found, expected[order], atol=1e-5)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--models=sasrec,rnn4rec"], "--models=rnn4rec: expected some of tim4rec,tim4rec_causal"),
        (["--data=steam"], "--data=steam: expected some of ml-1m,beauty"),
        (["--rows=short"], "--rows=short: expected some of full,real"),
        (["--tokens=100"], "--tokens=100 must be at least 200"),
    ],
)
def test_bad_options(capsys, argv, message):
    assert benchmark.main(["models", *argv]) == 2
    assert message in capsys.readouterr().err
