"""`fit`: a log in, a run folder, its metrics and recommendations out; bad input is one line."""

import dataclasses

import polars as pl
import pytest

import tim4rec_jax
from tests.evaluation.logs import random_log
from tim4rec_jax import DataConfig, EvalConfig, ExperimentConfig, SyntheticConfig, TrainConfig, fit, fitting, load_log
from tim4rec_jax.run_dir import read_config, read_results

SYNTHETIC = DataConfig(synthetic=SyntheticConfig(num_users=60, num_items=20, min_events=8, max_events=12, noise=0.02))
SMALL = {"epochs": 2, "d_model": 16, "num_layers": 1, "progress": False, "tensorboard": False}
TINY_SSD = {"d_state": 8, "head_dim": 16}


@pytest.fixture(scope="module")
def log():
    return load_log(SYNTHETIC)


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """Default run folders are made here."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_log_becomes_a_run_with_recommendations(log, in_folder, capsys):
    run = fit(log, seed=1, **SMALL, **TINY_SSD)
    assert run.run_dir.resolve() == in_folder / "runs" / "tim4rec_causal-1"
    assert run.metrics == {part: read_results(run.run_dir)[part] for part in ("valid", "test")}
    config = read_config(run.run_dir)
    assert (config.train.positions, config.train.seed, config.model.d_model) == ("all", 1, 16)
    assert config.model.max_len == 11 and config.train.schedule == "cosine"
    assert "epoch 2/2" in capsys.readouterr().out

    users = list(log.user_ids[[3, 0]])
    table = run.recommend(users=users, k=4)
    assert table.columns == ["user_id", "rank", "item_id", "score", "source"] and len(table) == 8
    assert table["user_id"].to_list() == [users[0]] * 4 + [users[1]] * 4
    assert table["rank"].to_list() == [1, 2, 3, 4] * 2
    for user in users:
        [listed] = run.recommender.recommend([run.recommender.history_of_user(user)], 4)
        own = table.filter(pl.col("user_id") == user)
        assert own["item_id"].to_list() == [item.item_id for item in listed]
        assert own["score"].to_list() == pytest.approx([item.score for item in listed])
    seen = set(log.items[log.offsets[3] : log.offsets[4]])
    unseen = run.recommend(users[:1], k=4, exclude_seen=True)["item_id"]
    assert not {log.item_ids[int(item) - 1] for item in seen} & set(unseen)
    assert len(run.recommend([])) == 0

    items = pl.DataFrame({"item_id": log.item_ids, "price": range(log.num_items)})
    rules = {"allow": log.item_ids[2:9], "deny": [log.item_ids[4]], "items": items, "where": ["price<7"]}
    table = run.recommend([users[0], "nobody"], k=5, **rules, unknown_users="popularity")
    left = [log.item_ids[i] for i in (2, 3, 5, 6)]
    for user in (users[0], "nobody"):
        assert sorted(table.filter(pl.col("user_id") == user)["item_id"]) == sorted(left)
    assert table["source"].to_list() == ["model"] * 4 + ["popularity"] * 4

    shown = repr(run)
    assert "tim4rec_causal" in shown and str(run.run_dir) in shown and f"{run.metrics['test']['hit@10']:.4f}" in shown


def test_runs_are_never_written_over_and_may_be_continued(log, in_folder):
    first = fit(log, "sasrec", inner_size=16, **SMALL)
    second = fit(log, "sasrec", inner_size=16, **SMALL)
    assert [run.run_dir.name for run in (first, second)] == ["sasrec-1", "sasrec-2"]
    assert first.metrics == second.metrics and first.config.train.positions == "all"
    with pytest.raises(FileExistsError, match="already holds this run"):
        fit(log, "sasrec", inner_size=16, run_dir=first.run_dir, **SMALL)
    longer = fit(log, "sasrec", inner_size=16, run_dir=first.run_dir, resume=True, **SMALL | {"epochs": 3})
    assert longer.results["epochs"] == 3


def test_settings_of_an_experiment(in_folder):
    """Its own log, or another's; a model that reads prefixes."""
    train = TrainConfig(epochs=1, batch_size=64, progress=False)
    base = ExperimentConfig("mine", data=SYNTHETIC, train=train, eval=EvalConfig(top_k=(10,)))
    model = dataclasses.replace(base.model, max_len=6, d_model=16, num_layers=1, d_state=8, head_dim=16)
    base = dataclasses.replace(base, model=model)
    run = fit(base, run_dir=in_folder / "own", epochs=2, tensorboard=False)
    assert run.config.train.epochs == 2 and run.results["epochs"] == 2
    other = random_log(num_users=20, num_items=12, min_events=4, max_events=9, seed=1)
    assert fit(other, base, run_dir=str(in_folder / "other"), top_k=(5,), monitor="ndcg@5").metrics["test"].keys() == {
        "hit@5",
        "ndcg@5",
        "mrr@5",
    }


@pytest.mark.quick
@pytest.mark.parametrize(
    ("model", "settings", "expected"),
    [
        ("tim4rec_causal", {}, True),
        ("sasrec", {"epochs": 3}, True),
        ("sasrec", {"seen_bias": False}, False),
        ("sasrec", {"loss": "ce"}, True),
        ("sasrec", {"loss": "bce", "num_negatives": 1}, False),
        ("gru4rec", {"loss": "sampled_ce", "num_negatives": 5}, False),
        ("gru4rec", {"positions": "last"}, False),
        ("tim4rec_causal", {"strategy": "sharded", "catalogue_shards": 2, "vocab_multiple": 2}, False),
        ("tim4rec", {}, False),
        ("bert4rec", {}, False),
    ],
)
def test_what_was_seen_is_scored_where_the_rest_goes_with_it(log, in_folder, monkeypatch, model, settings, expected):
    asked = []
    monkeypatch.setattr(fitting, "train", lambda config, *_, **__: asked.append(config))
    fit(log, model, **settings)
    assert [config.model.seen_bias for config in asked] == [expected]


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("tim4rec_casual", {}, "model.name='tim4rec_casual' is unknown; nearest: tim4rec_causal"),
        ("sasrec", {"epoch": 3}, "unknown setting 'epoch'; nearest: epochs"),
        ("sasrec", {"k_core": 3}, "setting 'k_core' is of reading the log; give it to load_log"),
        ("sasrec", {"epochs": 0}, "epochs=0 must be at least 1"),
        ("sasrec", {"resume": True}, "resume=True goes on with a run: give run_dir"),
    ],
)
def test_bad_input_is_one_line(log, in_folder, model, settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        fit(log, model, **settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300 and not list(in_folder.iterdir())


def test_what_is_no_log_or_has_nothing_to_train_on(log, in_folder):
    with pytest.raises(TypeError, match="fit takes a log from load_log, not DataFrame"):
        fit(pl.DataFrame())
    empty = dataclasses.replace(log, items=log.items[:0], timestamps=log.timestamps[:0], offsets=log.offsets[:1])
    with pytest.raises(ValueError, match="the log has 0 events"):
        fit(empty)
    short = random_log(num_users=8, num_items=4, min_events=3, max_events=3, seed=0)
    with pytest.raises(ValueError, match="the log has 0 training examples"):
        fit(short, "sasrec", progress=False)
    assert not list(in_folder.glob("runs/*-*"))


def test_users_are_named_by_lists_of_raw_ids(log, in_folder):
    run = fit(log, "sasrec", inner_size=16, **SMALL | {"epochs": 1})
    with pytest.raises(ValueError, match=r"users='42' must be a list of raw user ids; give \['42'\]"):
        run.recommend("42")
    with pytest.raises(ValueError, match="unknown user 'nobody'; nearest known"):
        run.recommend(["nobody"])


def test_it_is_public():
    assert "fit" in tim4rec_jax.__all__ and tim4rec_jax.fit is fit
