"""A comparison refuses what cannot be trained or measured before it trains anything; all registered models may join."""

import numpy as np
import pytest

from experiments import compare
from experiments.comparison.plan import parse
from tests.experiments.test_compare import TINY, finish
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.models import MODELS

RECIPE = ["--own-settings", "--train.warmup_steps=0"]


@pytest.fixture
def nothing_trains(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a training was started")

    monkeypatch.setattr("experiments.runs._Training", refuse)


def _arguments(tmp_path, models, *more):
    unread = (
        () if {"ssd4rec", "tim4rec_causal", "tim4rec"} & set(models.split(",")) else ("--model.d_state", "--model.head")
    )
    kept = [argument for argument in TINY if not argument.startswith(("--models", *unread))]
    where = ["--seeds=2", f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'table'}"]
    return [*kept, f"--models={models}", *where, *more]


@pytest.mark.parametrize(
    ("models", "more", "message"),
    [
        ("sasrec,ssd4rec", ["--eval.top_k=10,500"], "error: k=500 is larger than the catalogue of 29 items"),
        ("sasrec,ssd4rec", ["--eval.metrics=coverage@400"], "k=400 is larger than the catalogue of 29 items"),
        (
            "sasrec,ssd4rec",
            ["--train.loss=gbce", "--train.num_negatives=64"],
            "train.num_negatives=64 must be at most 28",
        ),
        ("sasrec,ssd4rec", ["--eval.users=gone.csv", "--eval.groups=age"], "eval.users=gone.csv is not there"),
        (
            "sasrec,ssd4rec",
            ["--data.split=temporal", "--data.valid_from=1990-01-01", "--data.test_from=1990-02-01"],
            "must lie in this order within the log's span",
        ),
        (
            "tim4rec_causal,sasrec",
            [*RECIPE, "--train.window_context=8"],
            "tim4rec_causal: train.window_context=8 must be less than model.max_len=8",
        ),
        ("sasrec,tim4rec", ["--train.positions=all"], "train.positions='all' needs a causal model"),
        ("sasrec,tim4rec", ["--data.order=file"], "data.order='file' reads no times, and model.name='tim4rec' does"),
        ("sasrec,ssd4rec", ["--parallel.catalogue_shards=2", "--train.loss=bpr"], "not 'bpr'"),
        ("tim4rec_causl,sasrec", [], "model 'tim4rec_causl' is unknown; nearest: tim4rec_causal"),
        ("sasrec,ssd4rec", ["--latex=table.txt"], "--latex=table.txt: give a file that ends in .tex"),
        ("sasrec,ssd4rec", ["--metric=coverage@5", "--eval.metrics=coverage@5"], "metric 'coverage@5' is unknown"),
    ],
)
def test_conflicts_are_known_before_anything_trains(tmp_path, capsys, nothing_trains, models, more, message):
    assert compare.main(_arguments(tmp_path, models, *more)) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_missing_tracker_is_known_too(tmp_path, capsys, nothing_trains, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    assert compare.main(_arguments(tmp_path, "sasrec,ssd4rec", "--train.trackers=wandb")) == 2
    assert "train.trackers=wandb needs the package wandb" in capsys.readouterr().err


def test_all_registered_models_stand_in_the_table(tmp_path):
    """With other metrics, and a table for LaTeX."""
    latex, every = tmp_path / "tables" / "table.tex", ",".join(MODELS)
    more = [*RECIPE, "--eval.metrics=recall@10", f"--latex={latex}", "--report-only"]
    _, plan = parse(_arguments(tmp_path, every, *more))
    assert "tim4rec_causal" in plan.configs and plan.configs["tim4rec_causal"].train.positions == "all"
    log = load_log(next(iter(plan.configs.values())).data)
    generator = np.random.default_rng(0)
    for model, seed in plan.runs_in_order():
        ranks = generator.geometric(0.2, log.num_users).clip(1, log.num_items).astype(np.int32)
        finish(plan, model, seed, log, ranks)
    assert compare.main(_arguments(tmp_path, every, *more)) == 0
    text, table = (tmp_path / "table.md").read_text(), latex.read_text()
    for model in MODELS:
        assert f"| {model} |" in text and model.replace("_", r"\_") + " & " in table
    assert "| recall@10 |" in text and r"\toprule" in table and table.count(r"\textbf") == 10
