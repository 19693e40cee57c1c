"""experiments.benchmark train_step: tiny runs, and what their batches are."""

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments import benchmark
from experiments.benchmarks import train_step
from tim4rec_jax.models import build_model


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
    assert list(record["median_seconds"]) == ["one_device", "all_devices", "without_seen_bias", "pytorch"]
    for name, median in record["median_seconds"].items():
        assert record["epoch_seconds"][name] == pytest.approx(median * record["steps_per_epoch"])
        assert record["pytorch_over"][name] == pytest.approx(record["median_seconds"]["pytorch"] / median)


def test_epochs_of_another_library_follow(tmp_path):
    """What the other library does is trained by hand; a script in its place says what it would."""
    python, output = tmp_path / "python", tmp_path / "step.json"
    about = '{"seconds": [9.0, 2.0, 4.0], "targets_per_epoch": 60, "threads": 2}'
    python.write_text(f"#!/bin/sh\ncp $2/settings.json {tmp_path}\necho '{about}' > $2/about.json\n")
    python.chmod(0o755)
    argv = ["train_step", "--config=quickstart_tim4rec_causal", "--data.synthetic.num_users=40", f"--output={output}"]
    argv += ["--data.synthetic.num_items=24", "--model.max_len=6", "--model.d_model=8", "--model.head_dim=16"]
    assert benchmark.main([*argv, "--train.batch_size=8", "--repeats=1", f"--rectools={python}"]) == 0
    asked = json.loads((tmp_path / "settings.json").read_text())
    assert (asked["anchor"], asked["d_model"], asked["max_len"], asked["timed_epochs"]) == ("rectools_sasrec", 8, 6, 3)
    found = json.loads(output.read_text())["rectools_sasrec"]
    assert found["epoch_seconds"] == 3.0 and found["microseconds_per_target"] == pytest.approx(5e4)


def test_another_library_is_beside_training_on_every_position_alone(capsys):
    assert benchmark.main(["train_step", "--config=quickstart", "--rectools=python"]) == 2
    assert "--rectools=python is measured with train.positions=all alone; leave it out" in capsys.readouterr().err


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

        def compile(self, **_):
            return lambda state, _, batch: (state + 1, np.float32(batch))

    step = train_step.Step(Jitted(), 0, 1.0)
    assert step(2.0) == 2.0 and step.state == 1
    with pytest.raises(FloatingPointError, match="the loss is nan"):
        step(np.nan)


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
