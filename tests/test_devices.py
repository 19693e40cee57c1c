"""The device and the kernels in use: what is printed, what is refused before anything is read."""

import dataclasses
import sys

import jax
import pytest

from experiments import evaluate, train
from experiments.configs import load_config
from kernels import dispatch, softmax_cross_entropy, ssd
from tests.experiments.test_run_folder_fuzz import OPTIONS
from tim4rec_jax.devices import device_line, require_kernels, taken_by
from tim4rec_jax.models import build_model
from tim4rec_jax.run_dir import read_config
from tim4rec_jax.training.stored_run import load_model

ONE_LAYER = "--model.num_layers=1"


@pytest.fixture
def unavailable(monkeypatch):
    """A backend of the SSD and the loss that needs a package that nobody has."""
    for room in (ssd, softmax_cross_entropy):
        monkeypatch.setitem(room.IMPLEMENTATIONS, "absent", room.IMPLEMENTATIONS["xla"])
    monkeypatch.setitem(dispatch.NEEDS, "absent", dispatch.Needs((8, 0), packages=("no_such",)))


def test_a_backend_that_cannot_run_is_refused_before_the_log_is_read(tmp_path, capsys, unavailable):
    options = ["--config=ml1m_tim4rec", f"--data.path={tmp_path / 'nowhere.csv'}", f"--run_dir={tmp_path / 'run'}"]
    for more in ([], [ONE_LAYER]):
        assert train.main([*options, "--model.kernels=absent", *more]) == 2
        error = capsys.readouterr().err
        assert error.startswith(
            "error: model.kernels='absent': implementation='absent' of softmax_cross_entropy cannot run here: it needs"
        )
        assert "the package no-such, which is not installed" in error and len(error.splitlines()) == 1


def test_what_no_operator_offers_is_refused_with_what_there_is(capsys):
    assert train.main(["--config=ml1m_tim4rec", "--model.kernels=cuda"]) == 2
    error = capsys.readouterr().err
    assert "model.kernels='cuda' is not offered by any operator of the model: give one of reference, xla" in error


def test_operators_that_a_backend_does_not_have_take_what_suits_the_device(unavailable):
    model = dataclasses.replace(load_config("ml1m_tim4rec").model, kernels="absent")
    assert (model.backend("ssd"), model.backend("causal_conv1d")) == ("absent", None)
    with pytest.raises(ValueError, match="of softmax_cross_entropy cannot run here"):
        require_kernels(model)
    require_kernels(dataclasses.replace(model, kernels=None))


def test_training_and_evaluation_say_what_computes(tmp_path, capsys, monkeypatch, unavailable):
    run = tmp_path / "run"
    short = ["--train.max_steps=1", ONE_LAYER, "--model.max_len=4"]
    assert train.main([*OPTIONS, f"--run_dir={run}", *short]) == 0
    line = device_line({})
    assert line.endswith(f"{jax.devices()[0].device_kind}, kernels: none (plain JAX)")
    assert line in capsys.readouterr().out
    # Of a stored model it is said where there is a choice.
    assert evaluate.main([f"--run={run}"]) == 0
    assert "device:" not in capsys.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[load_model.__module__], "gpu_capability", lambda: (9, 0))
        assert evaluate.main([f"--run={run}"]) == 0
    assert line in capsys.readouterr().err
    # A run of a machine that had the backend is read where it is missing.
    config = read_config(run)
    there = dataclasses.replace(config, model=dataclasses.replace(config.model, kernels="absent"))
    monkeypatch.setattr(sys.modules[load_model.__module__], "read_config", lambda _: there)
    said = []
    assert load_model(run, report=said.append).config.model.kernels is None
    assert said[0].startswith(
        f"{run} was trained with model.kernels=absent; here plain JAX computes: it needs the pack"
    )


def test_on_a_gpu_the_kernels_of_each_operator_are_named(monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: (9, 0))
    monkeypatch.setattr("tim4rec_jax.devices.gpu_capability", lambda: (9, 0))
    config = dataclasses.replace(load_config("ml1m_tim4rec").model, vocab_size=9)
    names = taken_by(build_model(config), 2048)
    # The convolution of the time channel, of 4 channels, is far from what was measured.
    assert names == {"ssd": {"pallas_triton"}, "causal_conv1d": {"pallas_triton", "xla"}}
    assert device_line(names).endswith(", kernels: causal_conv1d pallas_triton or xla, ssd pallas_triton")
    assert taken_by(build_model(config), 2)["ssd"] == {"xla"}
