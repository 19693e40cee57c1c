"""A comparison from the command line: names, settings, refusals, the table of finished runs, and all of it for real."""

import dataclasses
import json
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest

from experiments import compare
from experiments.comparison.plan import parse
from experiments.comparison.published import PUBLISHED
from experiments.configs import DATA_NAMES, MODEL_NAMES, load_config
from experiments.family import file_name
from experiments.runs import is_finished, options, parse_seeds
from tests.edited_runs import reseal
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.splits import leave_one_out, split_log
from tim4rec_jax.evaluation.baselines import markov_ranks, popularity_counts, popularity_ranks, transition_counts
from tim4rec_jax.evaluation.measures import metrics_of_ranks, names
from tim4rec_jax.evaluation.metrics import hit, ndcg
from tim4rec_jax.evaluation.seen_targets import were_seen
from tim4rec_jax.evaluation.significance import by_user, compare_with_best
from tim4rec_jax.run_dir import create_run, read_config, read_results, read_test_ranks, write_results, write_test_ranks
from tim4rec_jax.training.logging import MetricLogger, read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
TINY = [
    "--data=quickstart",
    "--models=sasrec,ssd4rec",
    "--epochs=3",
    "--data.synthetic.num_users=60",
    "--data.synthetic.num_items=30",
    "--model.max_len=8",
    "--model.d_model=16",
    "--model.d_state=8",
    "--model.head_dim=16",
    "--train.batch_size=16",
    "--train.log_every=1",
    "--train.progress=false",
    "--train.tensorboard=false",
]


def _arguments(tmp_path: pathlib.Path, *more: str) -> list[str]:
    return [*TINY, "--seeds=2", f"--runs={tmp_path / 'runs'}", f"--output={tmp_path / 'out' / 'table'}", *more]


def finish(
    plan, model: str, seed: int, log, ranks: np.ndarray, user_ids: pl.Series | None = None, without_seen=None
) -> None:
    """Makes the folder of a finished run without training; `without_seen` are ranks, 0 for targets left out."""
    config, folder = plan.config(model, seed), plan.folder(model, seed)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=log.num_items + 1))
    create_run(folder, config, log, command=["/somewhere/python", "-m", "experiments.train", f"--run_dir={folder}"])
    test = metrics_of_ranks(ranks, config.eval.measures)
    with MetricLogger(folder, tensorboard=False) as logger:
        for epoch in (1, 2):
            logger.log("valid", step=epoch, epoch=epoch, train_seconds=3.0 * epoch, valid_seconds=1.0, **test)
        logger.log("test", step=2, **test)
    others = {} if without_seen is None else {"seen_excluded": without_seen}
    write_test_ranks(folder, log.user_ids if user_ids is None else user_ids, ranks, others)
    measures = config.eval.measures
    both = {f"test_{name}": metrics_of_ranks(of[of > 0], measures) for name, of in others.items()}
    results = {"seed": seed, "test": test, "valid": test, "best_epoch": 2, "epochs": 2, "steps": 2, "parameters": 1234}
    costs = {"seconds_per_epoch": 4.5, "peak_resident_bytes": 300 * 2**20, "peak_device_bytes": None}
    write_results(folder, both | results | costs)


@pytest.fixture(scope="module")
def log():
    _, plan = parse(TINY)
    return load_log(next(iter(plan.configs.values())).data)


@pytest.fixture
def finished(tmp_path, log):
    """Four finished runs: sasrec finds every item near the top, ssd4rec does not; returns their ranks."""
    generator = np.random.default_rng(1)
    _, plan = parse(_arguments(tmp_path))
    ranks = {}
    for model, seed in plan.runs_in_order():
        mean = {"sasrec": 1.2, "ssd4rec": 8.0}[model]
        ranks[model, seed] = np.minimum(generator.geometric(1 / mean, log.num_users), log.num_items).astype(np.int32)
        finish(plan, model, seed, log, ranks[model, seed])
    return ranks


def _report(tmp_path: pathlib.Path, *more: str) -> tuple[str, dict]:
    assert compare.main(_arguments(tmp_path, "--report-only", *more)) == 0
    folder = tmp_path / "out"
    assert (folder / "table.png").read_bytes().startswith(b"\x89PNG")
    return (folder / "table.md").read_text(), json.loads((folder / "table.json").read_text())


def test_numbers_are_those_of_the_runs(tmp_path, log, finished):
    _, numbers = _report(tmp_path, "--note=Made by hand.")
    rows = {row["name"]: row for row in numbers["rows"]}
    assert list(rows)[0] == "sasrec" and set(rows) == {"sasrec", "ssd4rec", "Markov", "item-kNN", "popularity"}
    assert numbers["best"]["ndcg@10"] == "sasrec" and numbers["missing"] == []
    for model in ("sasrec", "ssd4rec"):
        per_seed = [hit(finished[model, seed], 5).mean() for seed in (2020, 2021)]
        spread = rows[model]["metrics"]["hit@5"]
        assert spread["per_seed"] == pytest.approx(per_seed, abs=1e-12)
        assert spread["mean"] == pytest.approx(statistics.mean(per_seed), abs=1e-12)
        assert spread["deviation"] == pytest.approx(statistics.stdev(per_seed), abs=1e-12)
        assert [run["train_seconds"] for run in rows[model]["runs"]] == [9.0, 9.0]
    split = leave_one_out(log)
    counts, transitions = popularity_counts(log, split.valid), transition_counts(log, split.valid)
    of_pairs = markov_ranks(log, transitions, counts, split.test)
    expected = metrics_of_ranks(of_pairs["all_items"], names((1, 5, 10)))
    assert {m: spread["mean"] for m, spread in rows["Markov"]["metrics"].items()} == pytest.approx(expected)
    against = rows["ssd4rec"]["against_best"]["ndcg@10"]
    assert against["p_holm"] < 0.01 and 0 < against["interval_95"][0] < against["behind_by"] < against["interval_95"][1]
    assert rows["sasrec"]["against_best"]["ndcg@10"] is None
    assert numbers["data"]["fingerprint"] == log.fingerprint and numbers["wall_seconds"] == 4 * (9.0 + 2.0)
    assert numbers["note"] == "Made by hand." and numbers["settings"]["given"]["train.batch_size"] == 16


def test_runs_of_a_temporal_split_with_every_event_a_target(tmp_path, log):
    temporal = ["--data.split=temporal", "--data.temporal_targets=all"]
    _, plan = parse(_arguments(tmp_path, *temporal))
    split = split_log(log, next(iter(plan.configs.values())).data)
    users = split.test.users
    assert len(np.unique(users)) < len(users)
    generator = np.random.default_rng(2)
    for model, seed in plan.runs_in_order():
        ranks = np.minimum(generator.geometric({"sasrec": 0.8, "ssd4rec": 0.1}[model], len(users)), log.num_items)
        finish(plan, model, seed, log, ranks.astype(np.int32), log.user_ids[users])
    text, numbers = _report(tmp_path, *temporal)
    assert "temporal split (shares 0.1 and 0.1; every event of a user and period), seen items not excluded" in text
    rows = {row["name"]: row for row in numbers["rows"]}
    counts = popularity_counts(log, split.first_held_out)
    expected = metrics_of_ranks(popularity_ranks(log, counts, split.test)["all_items"], names((1, 5, 10)))
    assert {m: spread["mean"] for m, spread in rows["popularity"]["metrics"].items()} == pytest.approx(expected)
    behind = rows["ssd4rec"]["against_best"]["ndcg@10"]["behind_by"]
    means = [rows[model]["metrics"]["ndcg@10"]["mean"] for model in ("sasrec", "ssd4rec")]
    assert behind == pytest.approx(means[0] - means[1])


def test_both_protocols_side_by_side(tmp_path, log):
    """Some targets were seen before: there are fewer ranks without the seen, and the other row is the best."""
    _, plan = parse(_arguments(tmp_path))
    seen = were_seen(log, leave_one_out(log).test)
    assert 0 < seen.sum() < len(seen)
    ranks, unseen = {}, {}
    for model, seed in plan.runs_in_order():
        chances = {"sasrec": (0.8, 0.1), "ssd4rec": (0.1, 0.99)}[model]
        draws = [np.random.default_rng(seed).geometric(chance, log.num_users) for chance in chances]
        ranks[model, seed], unseen[model, seed] = np.minimum(draws, log.num_items).astype(np.int32)
        finish(plan, model, seed, log, ranks[model, seed], without_seen=np.where(seen, 0, unseen[model, seed]))
    text, numbers = _report(tmp_path, f"--latex={tmp_path / 'table.tex'}")
    other = numbers["seen_excluded"]
    rows = {row["name"]: row for row in other["rows"]}
    assert numbers["best"]["ndcg@10"] == "sasrec" and other["best"]["ndcg@10"] == "ssd4rec"
    assert [row["name"] for row in other["rows"]] == [row["name"] for row in numbers["rows"]]
    for model in ("sasrec", "ssd4rec"):
        expected = [hit(unseen[model, seed][~seen], 10).mean() for seed in (2020, 2021)]
        assert rows[model]["metrics"]["hit@10"]["per_seed"] == pytest.approx(expected, abs=1e-12)
    values = [np.mean([ndcg(unseen[m, s][~seen], 10) for s in (2020, 2021)], axis=0) for m in ("ssd4rec", "sasrec")]
    against = rows["sasrec"]["against_best"]["ndcg@10"]
    assert against["behind_by"] == pytest.approx((values[0] - values[1]).mean())
    assert against["p"] == compare_with_best(np.stack(values)).p[1]
    counts = popularity_counts(log, leave_one_out(log).valid)
    counted = popularity_ranks(log, counts, leave_one_out(log).test)["seen_excluded"][~seen]
    assert rows["popularity"]["metrics"]["hit@5"]["mean"] == pytest.approx(hit(counted, 5).mean())
    head = "| model | hit@10 | ndcg@10 | mrr@10 | hit@10, seen excluded | ndcg@10, seen excluded |"
    assert head in text and f"seen targets ({seen.mean():.1%} of all) left out" in text
    assert "## Behind sasrec in ndcg@10\n" in text and "## Behind ssd4rec in ndcg@10, seen excluded" in text
    assert "seen excluded" in (tmp_path / "table.tex").read_text()


def test_runs_of_an_earlier_version_are_compared_under_the_one_protocol_they_have(tmp_path, finished):
    text, numbers = _report(tmp_path)
    assert "seen_excluded" not in numbers and numbers["measured_under_one_protocol"] == ["sasrec", "ssd4rec"]
    assert "under one protocol, so this is the only one: sasrec, ssd4rec" in text


def test_targets_of_a_user_are_one_value():
    values = by_user(np.array([[1.0, 0.0, 2.0, 3.0]]), np.array([4, 4, 6, 9]))
    np.testing.assert_allclose(values, np.array([[1.0, 2.0, 3.0]]) * 3 / 4)
    assert values.mean() == 1.5


def test_no_folder_of_the_machine_is_told(tmp_path, finished):
    text, numbers = _report(tmp_path)
    assert str(tmp_path) not in text + json.dumps(numbers)
    assert "seed_2020" in json.dumps(numbers["rows"][0]["runs"][0]["command"])


def test_the_table_says_what_it_rests_on(tmp_path, finished):
    text, _ = _report(tmp_path)
    line = next(line for line in text.splitlines() if line.startswith("| sasrec |"))
    assert "**" in line and " ± " in line and line.endswith("| 2 | 1,234 | 4.5 | 9 | 300 | 2 of 2, 2 of 2 |")
    assert "‡" in next(line for line in text.splitlines() if line.startswith("| ssd4rec |"))
    for words in (
        "One budget for all: epochs 3",
        "`train.batch_size=16`",
        "seeds 2020, 2021",
        "Holm",
        "not excluded",
        "## Behind sasrec in ndcg@10",
        "No numbers are known at this setting",
    ):
        assert words in text, words
    assert "Not finished" not in text


def test_what_is_missing_is_said(tmp_path, finished):
    (tmp_path / "runs" / "ssd4rec" / "seed_2021" / "results.json").unlink()
    text, numbers = _report(tmp_path)
    assert numbers["missing"] == [{"model": "ssd4rec", "seed": 2021}]
    assert "**Not finished, and not in these numbers**: ssd4rec seed 2021." in text
    line = next(line for line in text.splitlines() if line.startswith("| ssd4rec |"))
    assert " ± " not in line and "| 1 | 1,234 |" in line


def test_published_numbers_stand_apart(tmp_path, finished, monkeypatch):
    monkeypatch.setitem(PUBLISHED, "synthetic", PUBLISHED["beauty"][:2])
    text, numbers = _report(tmp_path)
    assert [row["source"] for row in numbers["published"]] == [row.source for row in PUBLISHED["beauty"][:2]]
    below = text.partition("## Published")[2]
    assert "may differ" in below and "| Mamba4Rec, 1 layer | rerun by the TiM4Rec author | 0.0734 | 0.0431 |" in below


def test_the_metric_decides(tmp_path, finished):
    text, numbers = _report(tmp_path, "--metric=hit@1")
    assert numbers["metric"] == "hit@1" and "## Behind sasrec in hit@1" in text
    assert text.index("| model | hit@1 |") < text.index("| model | hit@5 |") < text.index("| model | hit@10 |")


def test_nothing_finished_is_an_error(tmp_path, capsys):
    assert compare.main(_arguments(tmp_path, "--report-only")) == 2
    assert "no run of this comparison is finished" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_ranks_of_another_training_are_refused(tmp_path, log, finished, capsys):
    write_test_ranks(tmp_path / "runs" / "sasrec" / "seed_2021", log.user_ids, finished["ssd4rec", 2021])
    assert compare.main(_arguments(tmp_path, "--report-only")) == 2
    error = capsys.readouterr().err
    assert "seed_2021: the test ranks give" in error and "results.json says" in error


def test_other_settings_are_refused_with_the_difference(tmp_path, finished, capsys):
    changed = ["--train.learning_rate=0.02", "--model.d_conv=3", "--train.log_every=7", "--eval.batch_size=16"]
    assert compare.main(_arguments(tmp_path, *changed)) == 2
    error = capsys.readouterr().err
    assert "train.learning_rate: 0.01 there, 0.02 asked for" in error and error.count("\n") == 1
    assert "model.d_conv: 4 there, 3 asked for" in error and "--runs" in error
    assert "log_every" not in error and "batch_size" not in error and "fingerprint" not in error


def test_other_data_are_refused(tmp_path, finished, capsys):
    assert compare.main(_arguments(tmp_path, "--data.synthetic.seed=8")) == 2
    error = capsys.readouterr().err
    assert "data.synthetic.seed: 7 there, 8 asked for" in error and "data fingerprint: " in error
    environment = tmp_path / "runs" / "ssd4rec" / "seed_2021" / "environment.json"
    environment.write_text(json.dumps(json.loads(environment.read_text()) | {"data_fingerprint": "f00d"}))
    reseal(environment.parent)
    assert compare.main(_arguments(tmp_path, "--report-only")) == 2
    assert "data fingerprint: 'f00d…' there" in capsys.readouterr().err


def test_a_failed_training_is_told_beside_the_others(tmp_path, monkeypatch, finished, capsys):
    (tmp_path / "runs" / "ssd4rec" / "seed_2020" / "results.json").unlink()
    failing = [sys.executable, "-c", "print('error: the loss is nan'); raise SystemExit(2)"]
    monkeypatch.setattr("experiments.runs.command", lambda job: failing)
    assert compare.main(_arguments(tmp_path)) == 2
    shown = capsys.readouterr()
    assert "3 of 4 runs are finished, 1 to train" in shown.out
    assert "error: trainings failed: ssd4rec, seed 2020 (2 of 4): the loss is nan" in shown.err
    assert "ssd4rec seed 2020" in (tmp_path / "out" / "table.md").read_text().partition("**Not finished")[2]


def test_models_with_settings_of_their_own(tmp_path, capsys):
    arguments = ["--data=ml1m", "--models=sasrec,tisasrec", "--report-only"]
    assert compare.main(arguments) == 2
    error = capsys.readouterr().err
    assert "train.batch_size: sasrec 2048, tisasrec 256" in error
    assert "--train.batch_size=2048" in error and "--own-settings" in error
    _, plan = parse([*arguments, "--train.batch_size=512"])
    assert {config.train.batch_size for config in plan.configs.values()} == {512} and plan.own == {}
    _, plan = parse([*arguments, "--own-settings"])
    assert plan.own == {"train.batch_size": {"sasrec": 2048, "tisasrec": 256}}


def test_own_settings_are_shown(tmp_path, log):
    unread = ("--models=sasrec,", "--model.d_state", "--model.head_dim")
    arguments = [a for a in _arguments(tmp_path, "--own-settings", "--models=sasrec") if not a.startswith(unread)]
    _, plan = parse(arguments)
    plan = dataclasses.replace(plan, own={"train.batch_size": {"sasrec": 64, "tisasrec": 32}})
    finish(plan, "sasrec", 2020, log, np.ones(log.num_users, np.int32))
    written = compare.write_report(plan, compare.collect(plan, ""))
    assert "**Not the same for all models**: `train.batch_size`: sasrec 64, tisasrec 32." in written[0].read_text()


def test_an_earlier_name_of_a_data_set_is_the_same_comparison():
    (_, plan), (_, earlier) = (parse([f"--data={name}", "--models=sasrec"]) for name in ("ml-100k", "ml100k"))
    assert plan == earlier and plan.data_set == "ml-100k"
    assert (str(plan.runs), plan.output.name) == ("runs/compare/ml100k", "compare_ml100k")


def test_runs_go_seed_by_seed():
    _, plan = parse([*TINY, "--seeds=5,3"])
    assert list(plan.runs_in_order()) == [("sasrec", 5), ("ssd4rec", 5), ("sasrec", 3), ("ssd4rec", 3)]
    assert parse_seeds("3") == (2020, 2021, 2022) and parse_seeds("7,") == (7,)
    assert str(plan.folder("sasrec", 5)) == "runs/compare/quickstart/sasrec/seed_5"


def test_an_option_is_for_the_models_that_read_it():
    layers = ["--data=ml-100k", "--own-settings", "--model.num_layers=3"]
    _, plan = parse([*layers, "--models=sasrec,caser,gru4rec"])
    assert {name: config.model.num_layers for name, config in plan.configs.items()} == {
        "sasrec": 3,
        "caser": 1,
        "gru4rec": 3,
    }
    with pytest.raises(ValueError, match="unknown option --model.num_layers"):
        parse([*layers, "--models=caser"])


@pytest.mark.parametrize("data", DATA_NAMES)
def test_a_training_gets_exactly_these_settings(data):
    """`options` reads its own result back and raises if a setting is lost."""
    given = ["--own-settings", "--epochs=7", "--eval.top_k", "5", "10", "--data.path=/a b/log.csv", "--seeds=2"]
    _, plan = parse([f"--data={data}", *given])
    assert tuple(plan.configs) == MODEL_NAMES
    for model, seed in plan.runs_in_order():
        name = f"{file_name(data)}_{model}"
        words = options(plan.config(model, seed), name)
        assert words[0] == f"--config={name}" and "--train.epochs=7" in words
        assert ("--train.seed=2021" in words) == (seed == 2021)
        assert words[words.index("--eval.top_k") :][1:3] == ("5", "10")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data=ml10k"], "data 'ml10k' is unknown; nearest: ml-100k"),
        (["--models=sasrec,tim4rek"], "model 'tim4rek' is unknown; nearest: tim4rec"),
        (["--models=sasrec,ssd4rec,sasrec"], "sasrec is there 2 times"),
        (["--models=,"], "names no model"),
        (["--seeds=2020,7,2020"], "2020 is there 2 times; the same seed gives the same run again"),
        (["--seeds=0"], "a count must be at least 1"),
        (["--seeds=two"], "expected a count as in 3, or seeds as in 2020,7,11"),
        (["--seeds=1,-2"], "seed -2 must be at least 0"),
        (["--metric=ndgc@10"], "metric 'ndgc@10' is unknown; nearest: ndcg@10"),
        (["--train.seed=4"], "--train.seed=4: give the seeds by --seeds"),
        (["--model.name=sasrec"], "--model.name=sasrec: give the models by --models"),
        (["--epochs=2", "--train.epochs=3"], "--epochs=2 and --train.epochs=3 differ"),
        (["--eval.baselines", "popularity"], "--eval.baselines is not for comparisons"),
        (["--train.lerning_rate=1"], "unknown option --train.lerning_rate; nearest: --train.learning_rate"),
        (["--jobs=1000"], "jobs=1000 is more than the"),
        (["--model.head_dim=48"], "head_dim=48 must divide"),
    ],
)
def test_bad_input_is_one_clear_line(capsys, arguments, message):
    assert compare.main(["--data=quickstart", "--report-only", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def _start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.compare", *arguments],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.exhaustive
def test_a_comparison_for_real(tmp_path, monkeypatch, capfd, log):
    """Interrupted within the first run, gone on with, reported; trained again is nothing."""
    # The trainings compile the same programs over and over.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    arguments = _arguments(tmp_path)
    first = tmp_path / "runs" / "sasrec" / "seed_2020"
    process = _start(arguments)
    deadline = time.monotonic() + 240
    while process.poll() is None and time.monotonic() < deadline:
        if (first / "metrics.jsonl").exists() and '"train"' in (first / "metrics.jsonl").read_text():
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "stopped; the same command goes on" in output, output
    assert "the state is saved" in first.with_name("seed_2020.log").read_text()
    assert not is_finished(first)

    assert compare.main(arguments) == 0
    assert "resuming at step" in first.with_name("seed_2020.log").read_text()
    numbers = json.loads((tmp_path / "out" / "table.json").read_text())
    trained = [row for row in numbers["rows"] if row["trained"]]
    assert {row["name"]: row["seeds"] for row in trained} == {"sasrec": [2020, 2021], "ssd4rec": [2020, 2021]}
    ranks, results = read_test_ranks(first), read_results(first)
    assert ranks.schema == {"user_id": pl.String, "rank": pl.Float32} and ranks["user_id"].equals(log.user_ids)
    assert metrics_of_ranks(ranks["rank"].to_numpy(), names((1, 5, 10))) == results["test"]
    epochs = [line for line in read_metrics(first) if line["kind"] == "valid"]
    assert results["seconds_per_epoch"] == statistics.median(line["train_seconds"] for line in epochs)
    assert 50 * 2**20 < results["peak_resident_bytes"] < 2**34 and results["peak_device_bytes"] is None
    assert read_config(first).train.seed == 2020 and read_config(first).name == load_config("quickstart_sasrec").name

    changed = {folder: folder.stat().st_mtime_ns for folder in tmp_path.rglob("results.json")}
    capfd.readouterr()
    assert compare.main(arguments) == 0
    assert "4 of 4 runs are finished, 0 to train" in capfd.readouterr().out
    assert changed == {folder: folder.stat().st_mtime_ns for folder in tmp_path.rglob("results.json")}
