"""The order of events through the programs: what is tested, stored, recommended from and streamed."""

import dataclasses
import json

import numpy as np
import pytest

from experiments import recommend, stream, sweep, train
from experiments.comparison.plan import parse as parse_comparison
from experiments.runs import options
from tests.data.test_event_order import newest_first, write_csv
from tim4rec_jax.data import catalog
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.run_dir import read_config, read_histories, read_items, read_test_ranks
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.training import stored_run

TINY = [
    "--model.num_layers=1",
    "--model.d_model=16",
    "--model.max_len=10",
    "--train.batch_size=64",
    "--train.epochs=1",
    "--train.length_groups=1",
    "--train.progress=false",
    "--train.tensorboard=false",
    "--eval.top_k",
    "3",
    "--eval.monitor=ndcg@3",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Options for a log of 30 users written newest first, 10 seconds apart, whose item is its true place."""
    folder = tmp_path_factory.mktemp("data")
    path = write_csv(folder / "log.csv", newest_first())
    return ["--data.name=custom", f"--data.path={path}", f"--data.cache_dir={folder / 'cache'}"]


# Of models of mixers, and of attention.
NARROW = {
    True: ["--model.d_state=8", "--model.head_dim=8"],
    False: ["--model.inner_size=16"],
}


def trained(folder, name, *more):
    narrow = NARROW["sasrec" not in name]
    assert train.main([f"--config={name}", f"--run_dir={folder}", *TINY, *narrow, *more]) == 0
    return folder


@pytest.fixture(scope="module")
def streamable(tmp_path_factory, data):
    """A run whose model goes on from a state, by exact seconds, and one by float32 seconds."""
    folder = tmp_path_factory.mktemp("runs")
    by_hand = trained(folder / "float32", "ml100k_ssd4rec", *data, "--data.timestamp_precision=float32")
    return {"int64": trained(folder / "int64", "ml100k_ssd4rec", *data), "float32": by_hand}


def test_every_user_is_tested_on_the_true_last_item(tmp_path, data, capsys):
    run = trained(tmp_path / "run", "ml100k_sasrec", *data)
    shown = capsys.readouterr()
    assert "exact seconds" in shown.out and "float32" not in shown.out + shown.err
    config, log = read_config(run), stored_run.load_log(run)
    assert config.data.timestamp_precision == log.statistics.timestamp_precision == "int64"
    test = split_log(log, config.data).test
    targets = log.item_ids.gather(log.items[log.offsets[test.users] + test.ends] - 1)
    assert targets.to_list() == ["8"] * 30 == ["8"] * len(read_test_ranks(run))
    ids = read_items(run)["item_id"].to_list()
    for items, times in read_histories(run).select("items", "timestamps").iter_rows():
        assert [ids[i - 1] for i in items] == [str(place) for place in range(1, 9)]
        assert times == sorted(times)


def answer_of(run, *argv, capsys):
    capsys.readouterr()
    assert recommend.main([f"--run={run}", "--k=3", *argv]) == 0
    # The table, without the lines that name where the history is from.
    return [line for line in capsys.readouterr().out.splitlines() if line.strip("│ ")[:1].isdigit()]


@pytest.mark.exhaustive
@pytest.mark.parametrize("precision", ["int64", "float32"])
def test_stored_histories_are_accepted_wherever_histories_are_given(streamable, tmp_path, capsys, precision):
    run = streamable[precision]
    ids = read_items(run)["item_id"].to_list()
    recommender = Recommender.from_run(run)
    by_user, given = [], []
    for user, items, times in read_histories(run).iter_rows():
        assert times == sorted(times)
        by_user.append(recommender.history_of_user(user))
        given.append(recommender.history_from_ids([ids[i - 1] for i in items], times))
    expected = recommender.recommend(by_user, 3)
    assert recommender.recommend(given, 3) == expected
    user, items, times = next(read_histories(run).iter_rows())
    words = ",".join(ids[i - 1] for i in items), ",".join(map(str, times))
    by_hand = answer_of(run, f"--history={words[0]}", f"--times={words[1]}", capsys=capsys)
    assert by_hand == answer_of(run, f"--user={user}", capsys=capsys) and len(by_hand) == 3
    # A stream goes on from them, the next event a second after the user's true last.
    users = read_histories(run)["user_id"].to_list()
    lines = [{"user": user, "recommend": 3} for user in users]
    lines += [{"user": user, "item": "1", "timestamp": 1_600_000_000 + 100_000 * int(user) + 81} for user in users]
    events = tmp_path / "events.jsonl"
    events.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert stream.main([f"--run={run}", f"--events={events}", "--warm"]) == 0
    answers = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [[item["item"] for item in answer["items"]] for answer in answers] == [
        [item.item_id for item in items] for items in expected
    ]


def test_float32_seconds_by_hand_are_obeyed_and_said(streamable, data, tmp_path, capsys):
    run = streamable["float32"]
    log = stored_run.load_log(run)
    assert read_config(run).data.timestamp_precision == log.statistics.timestamp_precision == "float32"
    # The folder holds times in order, so it cannot tell what exact seconds would change, and does not say 0.
    assert log.statistics.reordered_users is log.statistics.changed_test_targets is None
    exact = stored_run.load_log(streamable["int64"])
    last = [one.item_ids.gather(one.items[one.offsets[1:] - 1] - 1).to_list() for one in (log, exact)]
    assert last[0] != last[1] == ["8"] * 30
    assert np.array_equal(log.timestamps, exact.timestamps)
    capsys.readouterr()
    trained(tmp_path / "papers", "beauty_tim4rec", *data, "--data.timestamp_precision=float32", "--train.max_steps=1")
    shown = " ".join(capsys.readouterr().out.split())
    assert "test targets float32 changes, leave one out │ 30" in shown
    assert read_config(tmp_path / "papers").data.timestamp_precision == "float32"


@pytest.mark.exhaustive
def test_a_papers_experiment_on_another_log_orders_by_exact_seconds(tmp_path, data, capsys):
    run = trained(tmp_path / "run", "beauty_tim4rec", *data, "--train.max_steps=1")
    shown = capsys.readouterr()
    assert "events are ordered by exact seconds (--data.timestamp_precision=float32 gives" in shown.err
    assert "data.name=custom is no published data set" in shown.err
    assert read_config(run).data.timestamp_precision == "int64"
    again = ["--config=beauty_tim4rec", f"--run_dir={run}", *TINY, *NARROW[True], *data, "--resume"]
    assert train.main([*again, "--train.max_steps=2"]) == 0
    assert train.main([*again, "--data.timestamp_precision=float32"]) == 2
    assert "data.timestamp_precision: 'int64' → 'float32'" in capsys.readouterr().err


@pytest.mark.exhaustive
def test_a_papers_experiment_on_its_own_log_orders_by_float32(tmp_path, data, monkeypatch):
    entry = dataclasses.replace(catalog.CATALOG["beauty"], expected=(30, 8, 240))
    monkeypatch.setitem(catalog.CATALOG, "beauty", entry)
    argv = [*data[1:], "--train.max_steps=1"]
    run = trained(tmp_path / "run", "beauty_tim4rec", *argv)
    assert read_config(run).data.timestamp_precision == "float32"
    again = [
        "--config=beauty_tim4rec",
        f"--run_dir={run}",
        *TINY,
        *NARROW[True],
        *data[1:],
        "--resume",
        "--train.max_steps=2",
    ]
    assert train.main(again) == 0
    # Another model on the same log has the exact order.
    other = trained(tmp_path / "other", "beauty_sasrec", *argv)
    assert read_config(other).data.timestamp_precision == "int64"


def test_a_comparison_has_one_order_for_all_models(data, tmp_path):
    argv = ["--data=beauty", "--models=tim4rec,sasrec", "--own-settings", f"--runs={tmp_path}", *data]
    plan = parse_comparison(argv)[1]
    assert {config.data.timestamp_precision for config in plan.configs.values()} == {"int64"}
    words = options(plan.config("tim4rec", 2020), "beauty_tim4rec")
    assert "--data.timestamp_precision=int64" in words and train.parse(words)[0] == plan.config("tim4rec", 2020)
    plan = parse_comparison([*argv, "--data.timestamp_precision=float32"])[1]
    assert {config.data.timestamp_precision for config in plan.configs.values()} == {"float32"}
    with pytest.raises(ValueError, match="published is no order to compare by: give int64 or float32"):
        parse_comparison([*argv, "--data.timestamp_precision=published"])


def test_a_sweep_records_the_order_it_came_to(data, tmp_path, monkeypatch):
    seen = []

    def trials(plan, study, console):
        seen.append(plan.options({"train.learning_rate": 0.1}, 2020))
        yield sweep.Trial(0, {"train.learning_rate": 0.1}, error="not trained here")

    monkeypatch.setattr(sweep, "run_trials", trials)
    argv = ["--config=beauty_tim4rec", "--grid", "train.learning_rate=0.1", f"--folder={tmp_path}", *data]
    with pytest.raises(ValueError, match="every trial failed"):
        sweep.run(sweep.parse(argv), sweep.Console(quiet=True))
    recorded = json.loads((tmp_path / sweep.RECORD).read_text())["settings"]["data"]
    assert recorded["timestamp_precision"] == "int64"
    assert "--data.timestamp_precision=int64" in seen[0]
