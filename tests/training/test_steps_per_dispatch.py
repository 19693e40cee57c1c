"""Several steps in one call to the device are the same steps: losses, log lines, tests, and where a run goes on."""

import jax
import pytest

from experiments import train
from tests.experiments.test_run_folder_fuzz import OPTIONS
from tim4rec_jax.config import TrainConfig
from tim4rec_jax.run_dir import read_results
from tim4rec_jax.training import loop, setup
from tim4rec_jax.training.logging import read_metrics

# 3 does not divide the steps of an epoch, nor those between log lines.
SEVERAL = "--train.steps_per_dispatch=3"
SMALL = [*OPTIONS, "--train.batch_size=16", "--train.epochs=2", "--train.log_every=4", "--eval.baselines=popularity"]
CAUSAL = [
    *(option for option in SMALL if "inner_size" not in option),
    "--model.name=tim4rec_causal",
    "--model.d_state=8",
    "--model.head_dim=16",
    "--data.timestamp_precision=int64",
    "--train.positions=all",
    "--train.batch_size=4",
]
WAYS = {
    "prefixes on one device": [*SMALL, "--parallel.strategy=single"],
    "rows over devices": SMALL,
    "pmap": [*SMALL, "--parallel.strategy=pmap"],
    "every position": [*CAUSAL, "--parallel.strategy=single"],
    "loader on the host": [*SMALL, "--parallel.strategy=single", "--data.loader=grain"],
    "lazy adam": [
        *CAUSAL,
        "--parallel.strategy=single",
        "--train.loss=sampled_ce",
        "--train.num_negatives=8",
        "--train.table_optimizer=lazy_adam",
    ],
    "catalogue in shards": [*CAUSAL, "--parallel.catalogue_shards=2"],
}


def _trained(run, *options):
    assert train.main([*options, f"--run_dir={run}"]) == 0
    lines = [(line["step"], line["loss"]) for line in read_metrics(run) if line["kind"] == "train"]
    return lines, read_results(run)["test"]


def _alike(ours, theirs):
    (lines, test), (expected, expected_test) = ours, theirs
    assert [step for step, _ in lines] == [step for step, _ in expected]
    # Inside a loop XLA may fuse a step in another way.
    assert [loss for _, loss in lines] == pytest.approx([loss for _, loss in expected], rel=2e-6)
    assert test == pytest.approx(expected_test, abs=1e-4)


@pytest.mark.parametrize(
    "way", [way if way == "every position" else pytest.param(way, marks=pytest.mark.exhaustive) for way in WAYS]
)
def test_they_are_the_same_steps(tmp_path, way, capsys):
    alone = _trained(tmp_path / "alone", *WAYS[way])
    capsys.readouterr()
    together = _trained(tmp_path / "together", *WAYS[way], SEVERAL)
    assert "compiling 3 steps for rows of" in capsys.readouterr().out and len(alone[0]) > 1
    _alike(together, alone)


@pytest.mark.exhaustive
def test_a_run_goes_on_inside_an_epoch_and_with_another_number(tmp_path):
    way = [*WAYS["prefixes on one device"], "--train.checkpoint_every=5"]
    whole = _trained(tmp_path / "whole", *way)
    run = tmp_path / "run"
    assert train.main([*way, f"--run_dir={run}", SEVERAL, "--train.max_steps=8"]) == 0
    _alike(_trained(run, *way, "--train.steps_per_dispatch=2", "--resume"), whole)


def test_none_at_a_time_is_refused():
    with pytest.raises(ValueError, match="steps_per_dispatch=0 must be at least 1"):
        TrainConfig(steps_per_dispatch=0)


def test_captured_steps(monkeypatch, tmp_path, capsys):
    """Refused without a GPU; with one, XLA is told what to record, which it takes on any device."""

    def trained(folder):
        options = [*WAYS["prefixes on one device"], "--train.epochs=1", "--train.capture"]
        return train.main([*options, f"--run_dir={tmp_path / folder}"])

    assert trained("run") == 2
    error = capsys.readouterr().err
    assert "train.capture=True needs an NVIDIA GPU, and JAX computes on cpu" in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(loop, "require_capture", lambda _: None)
    monkeypatch.setattr(train, "require_capture", lambda _: None)
    told, compile_it = [], jax.stages.Lowered.compile

    def compiled(self, compiler_options=None):
        told.append(compiler_options)
        return compile_it(self, compiler_options)

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)
    assert trained("run") == 0
    assert "CUSTOM_CALL" in told[0]["xla_gpu_enable_command_buffer"]
    monkeypatch.setattr(setup, "_CAPTURED", "NOTHING_OF_THE_KIND")
    assert trained("other") == 2
    assert "this JAX has no command buffers of that kind" in capsys.readouterr().err
