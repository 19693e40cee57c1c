"""experiments.benchmark train_step and models: tiny runs, and what their batches and memory are."""

import argparse
import functools
import json

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments import benchmark
from experiments.benchmarks import train_step
from experiments.configs import MODEL_NAMES
from tim4rec_jax.models import build_model, init_params, last_hidden


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Small tensors do not wait for other threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_savings_and_pytorch_on_real_batches(tmp_path, capsys):
    output = tmp_path / "step.json"
    argv = ["train_step", "--config=quickstart", "--data.synthetic.num_users=20", "--data.synthetic.num_items=12"]
    argv += ["--model.max_len=6", "--model.d_model=8", "--train.batch_size=8", "--train.length_groups=2"]
    assert benchmark.main([*argv, "--repeats=2", f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    assert (record["config"], record["batch_size"], record["max_len"]) == ("quickstart", 8, 6)
    assert list(record["median_seconds"]) == ["padded", "read_positions", "grouped", "pytorch"]
    for name, seconds in record["seconds"].items():
        assert len(seconds) == 2 and record["median_seconds"][name] == pytest.approx(sum(seconds) / 2)
    for name in ("padded", "read_positions", "grouped"):
        ratio = record["median_seconds"]["pytorch"] / record["median_seconds"][name]
        assert record["pytorch_over"][name] == pytest.approx(ratio) and record["compile_seconds"][name] > 0
    assert record["steps_an_epoch"] > 2 and record["groups"] and 1 < record["mean_length"] <= 6
    assert record["environment"]["data_fingerprint"] and "read_positions" in capsys.readouterr().out


def test_every_position_beside_pytorch(tmp_path):
    output = tmp_path / "step.json"
    argv = ["train_step", "--config=quickstart_tim4rec_causal", "--data.synthetic.num_users=40"]
    argv += ["--data.synthetic.num_items=24", "--model.max_len=6", "--model.d_model=8", "--model.head_dim=16"]
    assert benchmark.main([*argv, "--train.batch_size=8", "--repeats=2", f"--output={output}"]) == 0
    record = json.loads(output.read_text())
    # Test sessions have several devices.
    assert list(record["median_seconds"]) == ["one_device", "all_devices", "pytorch"]
    for name, median in record["median_seconds"].items():
        assert record["epoch_seconds"][name] == pytest.approx(median * record["steps_per_epoch"])
        assert record["pytorch_over"][name] == pytest.approx(record["median_seconds"]["pytorch"] / median)


@pytest.mark.exhaustive
def test_padded_rows_have_the_loss_of_grouped_ones():
    """All forms of the step compute the same."""
    shape = train_step.shapes(True)[0]
    batches = [train_step.draw_batch(shape, np.random.default_rng(0))]
    lengths, loader = batches[0].lengths, train_step.ResidentBatches(batches)
    model = build_model(shape.config.model)
    losses = [
        train_step.compile_step(shape.config, module, loader, groups)(batches[0])
        for module, groups in (
            (train_step.padded_model(shape.config.model), train_step.groups_of(shape.config, lengths, max_groups=1)),
            (model, train_step.groups_of(shape.config, lengths, max_groups=2, microbatch_tokens=8)),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_a_loss_that_is_no_number_stops_the_step():
    class Jitted:
        def lower(self, *_):
            return self

        def compile(self):
            return lambda state, _, batch: (state + 1, np.float32(batch))

    step = train_step.Step(Jitted(), 0, 1.0)
    assert step(2.0) == 2.0 and step.state == 1
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step(np.nan)


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
    config = train_step.shape_of(data, model, _options()).config
    assert (config.train.batch_size, config.model.max_len, config.model.vocab_size) == (rows, length, vocab)
    assert (config.model.d_model, config.model.num_layers) == (64, 1 if model in ("gru4rec", "caser") else 2)
    assert config.model.name == model


def test_full_and_real_rows():
    shape = train_step.shape_of("beauty", "sasrec", _options())
    full, real = (train_step.draw_batch(shape, np.random.default_rng(0), full=full) for full in (True, False))
    assert (full.lengths == 50).all() and (full.items > 0).all() and (np.diff(full.timestamps) >= 0).all()
    assert real.lengths.mean() == pytest.approx(8.4, abs=2)
    np.testing.assert_array_equal((real.items > 0).sum(axis=1), real.lengths)


def test_evaluation_computes_every_row_once():
    """The rows, cut to a few lengths, have the scores of the padded batch."""
    shape = train_step.shape_of("beauty", "sasrec", _options(tiny=True, tokens=200))
    config, batch = shape.config, train_step.draw_batch(shape, np.random.default_rng(1))
    model = build_model(config.model)
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    lengths = sorted(group.length for group in train_step.groups_of(config, batch.lengths))
    order = np.argsort(np.searchsorted(lengths, batch.lengths), kind="stable")
    assert len(lengths) > 1
    found = train_step.evaluation(config, params, batch).form.launch()

    def padded(params, items, lengths, timestamps):
        hidden = last_hidden(model, {"params": params}, items, lengths, timestamps)
        return model.apply({"params": params}, hidden, method="score")

    expected = jax.jit(padded)(params, batch.items, batch.lengths, batch.timestamps)
    np.testing.assert_allclose(found, expected[order], atol=1e-5)


@pytest.mark.parametrize(("mean", "longest"), [(118.0, 200), (8.4, 50)])
def test_lengths_have_the_mean_of_the_data(mean, longest):
    lengths = train_step.draw_lengths(np.random.default_rng(0), mean, longest, 200_000)
    assert lengths.min() == 1 and lengths.max() == longest
    assert lengths.mean() == pytest.approx(mean, rel=0.01)


def test_kernels_are_switched():
    config = train_step.shapes(True)[0].config
    on = train_step.with_kernels(config, "pallas_triton", loss=True)
    assert (on.model.kernels, on.train.loss_in_tiles) == ("pallas_triton", True)
    off = train_step.with_kernels(on, "xla", loss=False)
    assert (off.model.kernels, off.train.loss_in_tiles) == ("xla", False)


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
