"""Metrics beside hit, ndcg and mrr: against RecTools and ranx, by hand, in the evaluator, in parts, of one's own."""

import dataclasses
import itertools
import json
import pathlib

import jax
import numpy as np
import polars as pl
import pytest

from experiments import evaluate as evaluate_program
from experiments.benchmarks.metric_agreement import KINDS, LARGEST_DIFFERENCE, differences
from tests.evaluation.logs import random_log
from tim4rec_jax import (
    EvalConfig,
    ExperimentConfig,
    SyntheticConfig,
    build_model,
    fit,
    load_log,
    register_metric,
)
from tim4rec_jax import evaluate as measure_anew
from tim4rec_jax.config import DataConfig, ParallelConfig
from tim4rec_jax.data.splits import Examples, split_log
from tim4rec_jax.evaluation import measures, metrics
from tim4rec_jax.evaluation.baselines import popularity_metrics, users_of_items
from tim4rec_jax.evaluation.full_sort import FullSortEvaluator, evaluate
from tim4rec_jax.evaluation.measures import RankedLists, metrics_of_ranks, values_per_list
from tim4rec_jax.evaluation.seen_targets import measured
from tim4rec_jax.evaluation.slices import time_buckets, user_groups
from tim4rec_jax.models import SSD4RecConfig, init_params, last_hidden

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_ITEMS = 23
ALL = ("recall@5", "precision@5", "map@5", "coverage@5", "novelty@5", "diversity@5", "coverage@1")
SHAPE = SSD4RecConfig(vocab_size=NUM_ITEMS + 1, max_len=8, d_model=8, d_state=4, head_dim=8, num_layers=1)
EVAL = EvalConfig(top_k=(5,), metrics=ALL, monitor="ndcg@5")
CONFIG = ExperimentConfig("test", SHAPE, DataConfig(timestamp_precision="int64"), eval=EVAL)
TEMPORAL = dataclasses.replace(CONFIG.data, split="temporal", temporal_targets="all", test_share=0.3, valid_share=0.2)


def _config(**evaluation):
    return dataclasses.replace(CONFIG, eval=dataclasses.replace(EVAL, **evaluation))


@pytest.fixture(scope="module")
def log():
    return random_log(num_users=40, num_items=NUM_ITEMS, min_events=4, max_events=14, seed=2)


@pytest.fixture(scope="module")
def trained():
    model = build_model(SHAPE)
    return model, init_params(model, jax.random.key(1))


@pytest.fixture
def own_metric():
    """What tests register is taken back."""
    before = dict(measures.METRICS)
    yield
    measures.METRICS.clear()
    measures.METRICS.update(before)


@pytest.mark.quick
@pytest.mark.parametrize("case", ["one relevant item", "several relevant items"])
def test_rectools_and_ranx_agree(case):
    """What they gave is committed; ours is computed anew from the same lists."""
    record = json.loads((ROOT / "experiments" / "results" / "metric_agreement.json").read_text())["cases"][case]
    found = differences(record["input"], record["values"])
    assert set(found["RecTools"]) == {f"{kind}@{k}" for kind in KINDS for k in (1, 5, 20)}
    assert set(found["ranx"]) == {f"{kind}@{k}" for kind in KINDS[:6] for k in (1, 5, 20)}
    assert max(value for of in found.values() for value in of.values()) <= LARGEST_DIFFERENCE
    worse = json.loads(json.dumps(record["values"]))
    worse["RecTools"]["5"]["map"][3] += 1e-9
    assert differences(record["input"], worse)["RecTools"]["map@5"] > LARGEST_DIFFERENCE


@pytest.mark.quick
def test_of_several_relevant_items_by_hand():
    ranks, lists = np.array([3, 1, 9, 4.5, 4.5, 7]), np.array([5, 5, 5, 8, 8, 9])
    np.testing.assert_allclose(metrics.recall(ranks, 4, lists), [2 / 3, 1 / 2, 0])  # Of two at 4.5, one comes 4th.
    np.testing.assert_allclose(metrics.precision(ranks, 4, lists), [2 / 4, 1 / 4, 0])
    np.testing.assert_allclose(
        metrics.mean_average_precision(ranks, 5, lists), [(1 + 2 / 3) / 3, (1 / 4 + 2 / 5) / 2, 0]
    )
    np.testing.assert_allclose(metrics.mrr(ranks, 7, lists), [1, 1 / 4, 1 / 7])
    np.testing.assert_array_equal(metrics.hit(ranks, 3, lists), [1, 0, 0])
    ideal = 1 + 1 / np.log2(3)
    np.testing.assert_allclose(metrics.ndcg(ranks, 2, lists)[:2], [1 / ideal, 0])


@pytest.mark.quick
def test_relevant_items_of_equal_rank():
    alone = metrics.mean_average_precision(np.array([1.5, 1.5]), 5, np.array([0, 0]))
    np.testing.assert_allclose(alone, [1])  # The two are all that tie: first and second.
    ranks, lists = np.array([50.5, 50.5, 50.5, 1, 50.5]), np.array([0, 0, 0, 1, 1])
    np.testing.assert_allclose(metrics.mrr(ranks, 100, lists), [1 / 49.5, 1])
    np.testing.assert_allclose(metrics.mrr(np.array([3, 2]), 5, np.array([0, 1])), [1 / 3, 1 / 2])
    np.testing.assert_array_equal(metrics.recall(ranks, 50, lists), [1 / 3, 1 / 2])


@pytest.mark.quick
def test_with_one_relevant_item_they_are_those_of_its_rank():
    ranks = np.array([1, 4, 2.5, 30])
    for lists in (None, np.arange(4)):
        found = metrics_of_ranks(ranks, ["hit@3", "recall@3", "precision@3", "map@3", "mrr@3", "ndcg@3"], lists)
        assert found["recall@3"] == found["hit@3"] == 0.5
        assert found["precision@3"] == pytest.approx(found["hit@3"] / 3) and found["map@3"] == found["mrr@3"]
        assert found["ndcg@3"] == pytest.approx(metrics.ndcg(ranks, 3).mean())


def _lists_row_by_row(trained, log, examples, k, exclude_seen):
    """The first k items of every example, by sorting all scores."""
    (model, params), found = trained, []
    for user, end in zip(examples.users, examples.ends, strict=True):
        history = log.items[log.offsets[user] : log.offsets[user] + end]
        row, length = np.zeros((1, SHAPE.max_len), np.int32), min(end, SHAPE.max_len)
        row[0, :length] = history[-length:]
        hidden = last_hidden(model, {"params": params}, row, np.array([length], np.int32), np.zeros_like(row))
        scores = np.array(model.apply({"params": params}, hidden, method="score"))[0]
        ranked = [i for i in np.argsort(-scores, kind="stable") if i and not (exclude_seen and i in history)]
        found.append((ranked[:k] + [0] * k)[:k])
    return np.array(found)


@pytest.mark.parametrize("exclude_seen", [False, True])
def test_the_evaluator_measures_lists(log, trained, exclude_seen, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.evaluation.measures._LISTS_AT_ONCE", 7)
    k, (model, params) = 20, trained
    asked = tuple(name.replace("@5", f"@{k}") for name in ALL)
    config = _config(metrics=asked, exclude_seen=exclude_seen, seen_targets="rank")
    split = split_log(log, config.data)
    result = evaluate(model, params, log, split.test, config)
    listed = _lists_row_by_row(trained, log, split.test, k, exclude_seen)
    assert exclude_seen == (listed == 0).any()  # Some lists are shorter than k then.
    counts = [
        len({u for u in range(log.num_users) if i in log.items[log.offsets[u] : log.offsets[u + 1] - 2]})
        for i in range(24)
    ]
    np.testing.assert_array_equal(users_of_items(log, split.first_held_out)[0], counts)
    bits = -np.log2(np.maximum(counts, 1) / log.num_users)
    expected = np.mean([np.mean([bits[item] for item in row if item]) for row in listed])
    assert result.metrics[f"novelty@{k}"] == pytest.approx(expected, rel=1e-12)
    table = np.array(model.apply({"params": params}, method="item_table"), np.float64)
    table /= np.maximum(np.linalg.norm(table, axis=1, keepdims=True), 1e-300)
    distances = [np.mean([1 - table[a] @ table[b] for a, b in itertools.combinations(r[r > 0], 2)]) for r in listed]
    assert result.metrics[f"diversity@{k}"] == pytest.approx(np.mean(distances), rel=1e-9)
    assert result.metrics[f"coverage@{k}"] == len(set(listed.ravel()) - {0}) / NUM_ITEMS
    assert result.metrics["coverage@1"] == len(set(listed[:, 0])) / NUM_ITEMS
    assert result.metrics[f"recall@{k}"] == np.mean(result.ranks <= k)
    assert "coverage@1" not in result.standard_errors and result.standard_errors[f"novelty@{k}"] > 0
    plain = evaluate(
        model, params, log, split.test, _config(metrics=(), exclude_seen=exclude_seen, seen_targets="rank")
    )
    np.testing.assert_array_equal(plain.ranks, result.ranks)


def test_several_devices_measure_the_same(log, trained):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("one device")
    model, params = trained
    mesh = jax.sharding.Mesh(np.array(devices).reshape(-1, 1), ("data", "model"))
    test = split_log(log, CONFIG.data).test
    together = FullSortEvaluator(model, log, test, CONFIG, mesh=mesh)(params)
    alone = evaluate(model, params, log, test, CONFIG)
    assert together.metrics == pytest.approx(alone.metrics, rel=1e-6) and together.metrics["coverage@5"] > 0


def test_a_run_with_the_table_in_parts_is_measured_whole(tmp_path):
    """It was trained without metrics of lists; measured anew it has them."""
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    synthetic = DataConfig(synthetic=SyntheticConfig(num_users=40, num_items=15, min_events=6, max_events=9))
    settings = {"epochs": 1, "d_model": 8, "num_layers": 1, "inner_size": 8, "progress": False, "tensorboard": False}
    run = fit(load_log(synthetic), "sasrec", run_dir=tmp_path / "run", catalogue_shards=2, **settings)
    found = measure_anew(run, metrics=("coverage@10", "novelty@10")).metrics
    assert 0 < found["coverage@10"] <= 1 and found["hit@10"] == run.metrics["test"]["hit@10"]
    assert evaluate_program.main([f"--run={run.run_dir}", "--eval.metrics=coverage@10"]) == 0


def test_one_list_per_user_for_all_its_targets(log, trained):
    model, params = trained
    config = dataclasses.replace(_config(lists="user"), data=TEMPORAL)
    split = split_log(log, TEMPORAL)
    users, counts = np.unique(split.test.users, return_counts=True)
    assert counts.max() > 2
    result = evaluate(model, params, log, split.test, config)
    firsts = Examples(users, np.array([split.test.ends[split.test.users == user].min() for user in users]))
    listed = _lists_row_by_row(trained, log, firsts, NUM_ITEMS, False)
    relevant = [set(split.test.targets(log)[split.test.users == user].tolist()) for user in users]
    assert any(len(items) < count for items, count in zip(relevant, counts, strict=True))  # Some had one item twice.
    found = [len(items & set(row[:5])) for items, row in zip(relevant, listed, strict=True)]
    shares = np.divide(found, [len(items) for items in relevant])
    assert result.metrics["recall@5"] == pytest.approx(shares.mean())
    assert result.metrics["precision@5"] == pytest.approx(np.mean(found) / 5)
    assert result.metrics["hit@5"] == np.mean(np.array(found) > 0)
    assert len(result.ranks) == sum(map(len, relevant)) and len(shares) == len(users)
    assert "one list per user" in result.measured.protocol(config)
    single = dataclasses.replace(CONFIG, data=TEMPORAL)
    each = evaluate(model, params, log, split.test, single)
    assert len(each.ranks) == counts.sum() and each.metrics["recall@5"] == each.metrics["hit@5"]
    of_users, of_targets = (popularity_metrics(log, one)["all_items"]["recall@5"] for one in (config, single))
    assert of_users != of_targets


def test_seen_targets_leave_what_is_relevant(log):
    split = split_log(log, TEMPORAL)
    part = measured(log, split.test, dataclasses.replace(EVAL, lists="user"))["seen_excluded"]
    assert 0 < part.seen < part.total and len(part.examples) == part.total - part.seen
    for user, end, item in zip(part.examples.users, part.examples.ends, part.examples.targets(log), strict=True):
        assert item not in log.items[log.offsets[user] : log.offsets[user] + end]


def test_parts_by_group_and_by_time(log, trained, tmp_path):
    model, params = trained
    table = tmp_path / "users.csv"
    groups = [["young", "old", ""][number % 3] for number in range(log.num_users - 1)]
    table.write_text("user_id,age\n" + "".join(f"{u},{g}\n" for u, g in zip(log.user_ids, groups, strict=False)))
    config = _config(users=str(table), groups="age", time_buckets="quantiles:3")
    test = split_log(log, config.data).test
    result = evaluate(model, params, log, test, config)
    ages, times = result.parts["age"], result.parts["quantiles:3"]
    assert (
        set(ages) == {"young", "old", "(no value)", "(not in the table)"} and ages["(not in the table)"]["lists"] == 1
    )
    young = np.array(groups + [""]) == "young"
    assert ages["young"]["hit@5"] == np.mean(result.ranks[young] <= 5) and ages["young"]["lists"] == young.sum()
    listed = _lists_row_by_row(trained, log, test, 5, False)
    assert ages["young"]["coverage@5"] == len(set(listed[young].ravel())) / NUM_ITEMS
    for parts in (ages, times):
        assert sum(part["lists"] for part in parts.values()) == log.num_users
        mean = sum(part["lists"] * part["ndcg@5"] for part in parts.values()) / log.num_users
        assert mean == pytest.approx(result.metrics["ndcg@5"])
    assert len(times) == 3 and list(times)[0].startswith("1: ")


@pytest.mark.quick
def test_time_buckets_by_hand():
    seconds = np.array([0, 86_399, 86_400, 2_678_400, 946_684_800])  # 1970-01-01 (twice), -02, -02-01; 2000-01-01
    assert time_buckets(seconds, "day").tolist() == ["1970-01-01"] * 2 + ["1970-01-02", "1970-02-01", "2000-01-01"]
    assert time_buckets(seconds, "week").tolist() == ["1970-W01"] * 3 + ["1970-W05", "1999-W52"]
    assert time_buckets(seconds, "month").tolist() == ["1970-01"] * 3 + ["1970-02", "2000-01"]
    assert time_buckets(seconds[[3, 0, 1, 2]], "quantiles:2").tolist() == [
        "2: 1970-01-02 to 1970-02-01",
        *["1: 1970-01-01 to 1970-01-01"] * 2,
        "2: 1970-01-02 to 1970-02-01",
    ]


@pytest.mark.quick
def test_groups_are_names_in_every_kind_of_table(tmp_path):
    frame = pl.DataFrame({"user_id": [1, 2], "zip": [7, None]})
    frame.write_parquet(tmp_path / "u.parquet")
    frame.write_csv(tmp_path / "u.tsv", separator="\t")
    for name in ("u.parquet", "u.tsv"):
        assert user_groups(tmp_path / name, "zip", ["2", "1", "3"]).tolist() == [
            "(no value)",
            "7",
            "(not in the table)",
        ]


@pytest.mark.parametrize(
    ("name", "text", "column", "message"),
    [
        ("gone.csv", None, "age", "gone.csv is not there"),
        ("users.xlsx", "", "age", "expected a table that ends in .csv, .tsv or .parquet"),
        ("users.csv", "user,age\n1,2\n", "age", "has no column 'user_id', only user; age"),
        ("users.csv", "user_id,age\n1,2\n", "sex", "has no column 'sex'"),
        ("users.csv", "user_id,age\n1,2\n1,3\n", "age", "has user '1' 2 times"),
        ("users.parquet", "no parquet", "age", "cannot be read"),
    ],
)
def test_bad_tables_of_users_are_one_line(tmp_path, name, text, column, message):
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        user_groups(tmp_path / name, column, ["1"])
    assert "\n" not in str(caught.value) and str(caught.value).startswith("eval.users=")


def test_too_many_groups_are_refused(log, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("tim4rec_jax.evaluation.slices.MOST_BUCKETS", 5)
    (tmp_path / "u.csv").write_text("user_id,name\n" + "".join(f"{u},{u}\n" for u in log.user_ids))
    config = _config(users=str(tmp_path / "u.csv"), groups="name")
    with pytest.raises(ValueError, match="name makes 40 parts of 40 targets, more than 5: give a coarser one"):
        evaluate(*trained, log, split_log(log, config.data).test, config)


def test_a_metric_of_ones_own(log, trained, own_metric):
    register_metric("median_rank", lambda lists, k: 1.0 / lists.ranks)
    register_metric("first", lambda lists, k: lists.top(k)[:, 0].astype(float), reads_items=True)
    config = _config(metrics=("median_rank@1", "first@2"))
    assert config.eval.module == __name__
    result = evaluate(*trained, log, split_log(log, config.data).test, config)
    assert result.metrics["median_rank@1"] == pytest.approx(np.mean(1 / result.ranks))
    assert 1 <= result.metrics["first@2"] <= NUM_ITEMS
    for found in popularity_metrics(log, config).values():
        assert "median_rank@1" in found and "first@2" not in found
    with pytest.raises(ValueError, match="metric 'hit' is registered already"):
        register_metric("hit", lambda lists, k: lists.ranks)
    with pytest.raises(ValueError, match="must be of letters, digits and _"):
        register_metric("a@b", lambda lists, k: lists.ranks)
    register_metric("broken", lambda lists, k: np.full(len(lists.ranks), np.nan))
    register_metric("short", lambda lists, k: np.zeros(1))
    for name, message in (
        ("broken@1", "2 numbers that are not finite for 2 lists"),
        ("short@1", r"shape \(1,\) for 2"),
    ):
        with pytest.raises(ValueError, match=message):
            values_per_list(RankedLists(np.array([1, 2])), [name])


@pytest.mark.quick
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ("recal@10",)}, "metric 'recal@10' is unknown; nearest: recall"),
        ({"metrics": ("recall",)}, "metric 'recall' needs a length, as in recall@10"),
        ({"metrics": ("recall@0",)}, "metric 'recall@0' needs a length"),
        ({"metrics": ("map@10,map@10",)}, "map@10 is there 2 times"),
        ({"monitor": "recall@10"}, "monitor='recall@10' must be one of"),
        ({"module": "no_such_module"}, "eval.module=no_such_module cannot be imported"),
        ({"module": "json"}, "eval.module=json registers no metric"),
        ({"groups": "age"}, "users=None and groups=age go together"),
        ({"time_buckets": "year"}, "time_buckets='year' must be day, week, month, or quantiles and how many"),
        ({"time_buckets": "quantiles:1"}, "time_buckets='quantiles:1' must be"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        EvalConfig(**settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


@pytest.mark.quick
def test_what_does_not_go_together():
    assert EvalConfig(metrics=("recall@10,map@5",)).metrics == ("recall@10", "map@5")
    with pytest.raises(ValueError, match="leave out coverage@5, novelty@5, diversity@5, coverage@1"):
        dataclasses.replace(CONFIG, parallel=ParallelConfig(catalogue_shards=2))
    with pytest.raises(ValueError, match="reads no times, which eval.time_buckets='day' needs"):
        dataclasses.replace(_config(time_buckets="day"), data=DataConfig(order="file"))


def test_a_length_over_the_catalogue(log, trained):
    config = _config(metrics=("coverage@24",))
    with pytest.raises(ValueError, match="k=24 is larger than the catalogue of 23 items"):
        evaluate(*trained, log, split_log(log, config.data).test, config)
