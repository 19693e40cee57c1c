"""Run folders of any settings side by side: their numbers, and what cannot be compared."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import compare
from experiments.comparison.plan import parse
from tests.edited_runs import reseal
from tests.experiments.test_compare import TINY, finish
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.evaluation.metrics import ndcg
from tim4rec_jax.run_dir import CONFIG, ENVIRONMENT

MEANS = {"wide": 1.3, "narrow": 6.0}


@pytest.fixture(scope="module")
def log():
    _, plan = parse(TINY)
    return load_log(next(iter(plan.configs.values())).data)


@pytest.fixture
def ranks(tmp_path, log):
    """Two seeds of ssd4rec at two widths, as finished runs in folders of their own; returns their ranks."""
    generator, found = np.random.default_rng(2), {}
    _, plan = parse([*TINY, "--seeds=3,4"])
    for name, width in (("wide", 32), ("narrow", 16)):
        config = plan.configs["ssd4rec"]
        own = dataclasses.replace(config, model=dataclasses.replace(config.model, d_model=width))
        own = dataclasses.replace(own, train=dataclasses.replace(own.train, learning_rate=width / 1000))
        at = dataclasses.replace(plan, configs={"ssd4rec": own}, runs=tmp_path / name)
        for seed in plan.seeds:
            found[name, seed] = np.minimum(generator.geometric(1 / MEANS[name], log.num_users), log.num_items)
            finish(at, "ssd4rec", seed, log, found[name, seed].astype(np.int32))
    return found


def arguments(tmp_path, *more):
    rows = [f"{name}={tmp_path / name}/ssd4rec/seed_*" for name in MEANS]
    return ["--rows", *rows, f"--output={tmp_path / 'out' / 'rows'}", *more]


def test_numbers_are_those_of_the_folders(tmp_path, ranks):
    assert compare.main(arguments(tmp_path, "--note=Two widths.")) == 0
    numbers = json.loads((tmp_path / "out" / "rows.json").read_text())
    rows = {row["name"]: row for row in numbers["rows"]}
    assert set(rows) == {*MEANS, "Markov", "item-kNN", "popularity"} and numbers["best"]["ndcg@10"] == "wide"
    for name in MEANS:
        assert rows[name]["seeds"] == [3, 4]
        expected = [float(ndcg(ranks[name, seed], 10).mean()) for seed in (3, 4)]
        assert rows[name]["metrics"]["ndcg@10"]["per_seed"] == pytest.approx(expected, abs=1e-12)
    assert rows["narrow"]["against_best"]["ndcg@10"]["p_holm"] < 0.01
    assert numbers["settings"]["differ_by_model"] == {
        "model.d_model": {"wide": 32, "narrow": 16},
        "train.learning_rate": {"wide": 0.032, "narrow": 0.016},
    }
    text = (tmp_path / "out" / "rows.md").read_text()
    assert "**Not the same for all models**: `train.learning_rate`: wide 0.032, narrow 0.016." in text
    assert "Two widths." in text and str(tmp_path) not in text


def test_rows_may_have_other_seeds(tmp_path, ranks):
    (tmp_path / "narrow" / "ssd4rec" / "seed_3").rename(tmp_path / "elsewhere")
    assert compare.main(arguments(tmp_path)) == 0
    numbers = json.loads((tmp_path / "out" / "rows.json").read_text())
    seeds = {row["name"]: row["seeds"] for row in numbers["rows"] if row["trained"]}
    assert seeds == {"wide": [3, 4], "narrow": [4]} and numbers["missing"] == []


def _change(file, change):
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))
    reseal(file.parent)


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        (CONFIG, lambda c: c["model"].update(d_conv=3), "differ in more than the seed: model.d_conv: 4 and 3"),
        (CONFIG, lambda c: c["train"].update(seed=3), "both have seed 3; give one of them"),
        (CONFIG, lambda c: c["eval"].update(exclude_seen=True), "eval.exclude_seen: False and True"),
        (ENVIRONMENT, lambda e: e.update(data_fingerprint="f00d"), "not tested alike: data fingerprint: "),
    ],
)
def test_what_does_not_belong_together_is_refused(tmp_path, ranks, capsys, file, change, message):
    _change(tmp_path / "narrow" / "ssd4rec" / "seed_4" / file, change)
    assert compare.main(arguments(tmp_path)) == 2
    assert message in capsys.readouterr().err


def test_another_protocol_is_refused(tmp_path, ranks, capsys):
    for seed in (3, 4):
        _change(
            tmp_path / "narrow" / "ssd4rec" / f"seed_{seed}" / CONFIG, lambda c: c["eval"].update(exclude_seen=True)
        )
    assert compare.main(arguments(tmp_path)) == 2
    assert "eval.exclude_seen: False in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--rows"], "--rows names no row"),
        (["--rows", "causal"], "expected a name and run folders"),
        (["--rows", "causal=nowhere/seed_*"], "nowhere/seed_* is no run folder"),
        (["--rows", "a=x", "--epochs=3"], "unknown option --epochs"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, given, message):
    assert compare.main(given) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_names_and_metric_are_checked(tmp_path, ranks, capsys):
    twice = arguments(tmp_path)
    assert compare.main([*twice[:2], twice[1], twice[3]]) == 2
    assert "wide is there twice" in capsys.readouterr().err
    assert compare.main(arguments(tmp_path, "--metric=ndgc@10")) == 2
    assert "metric 'ndgc@10' is unknown; nearest: ndcg@10" in capsys.readouterr().err
