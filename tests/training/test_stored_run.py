"""The model and the log read back from a run folder."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from tests.serving.tiny_run import make_config, make_run
from tim4rec_jax.run_dir import CHECKPOINTS
from tim4rec_jax.training.stored_run import load_log, load_model


@pytest.fixture(scope="module")
def run(tmp_path_factory, log):
    path = tmp_path_factory.mktemp("runs") / "tiny"
    make_run(path, log, make_config())
    return path


def test_log_comes_back_as_it_was(run, log):
    stored = load_log(run)
    for name in ("items", "timestamps", "offsets"):
        np.testing.assert_array_equal(getattr(stored, name), getattr(log, name))
        assert getattr(stored, name).dtype == getattr(log, name).dtype
    for name in ("user_ids", "item_ids", "titles"):
        assert getattr(stored, name).to_list() == getattr(log, name).to_list()
    assert stored.fingerprint == log.fingerprint
    # What was told from the file is not known of what is stored.
    assert stored.statistics == dataclasses.replace(log.statistics, taken={})


def test_best_parameters_come_back(tmp_path, log):
    params = make_run(tmp_path / "run", log, make_config())
    stored = load_model(tmp_path / "run")
    assert (stored.step, stored.config) == (7, make_config())
    jax.tree.map(np.testing.assert_array_equal, params, stored.params)


def test_run_of_another_version(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "old")
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"format_version": 0}))
    with pytest.raises(ValueError, match="is a run folder of format 0, this program reads format 1"):
        load_model(copy)


def test_run_without_a_best_checkpoint(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "young")
    shutil.rmtree(copy / CHECKPOINTS)
    with pytest.raises(FileNotFoundError, match="holds no best checkpoint: the run has not finished its first"):
        load_model(copy)


def test_no_run_at_all(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no run folder .*nowhere"):
        load_model(tmp_path / "nowhere")
