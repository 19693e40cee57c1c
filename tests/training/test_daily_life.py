"""A model's daily life: trained on everything, begun with yesterday's parameters on a log that has grown."""

import dataclasses
import json
import pathlib
import re
import shlex
import shutil
import subprocess

import jax
import numpy as np
import polars as pl
import pytest

from experiments import compare, evaluate, recommend, stream, sweep, train
from tests.serving.tiny_run import make_config, make_log, make_run
from tim4rec_jax import fit, load_log
from tim4rec_jax.data.splits import everything, split_log
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import read_config, read_histories, read_results
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.setup import with_data
from tim4rec_jax.training.stored_run import load_log as stored_log
from tim4rec_jax.training.stored_run import load_model
from tim4rec_jax.training.warm_start import warm_params

ROOT = pathlib.Path(__file__).resolve().parents[2]
QUICK = ["--train.progress=false", "--train.tensorboard=false"]
SMALL = ["--model.d_model=8", "--model.d_state=4", "--model.head_dim=8", "--model.num_layers=1", "--model.max_len=12"]


def events(users, items, first=0, per_user=9, seed=0):
    """A log as a table: users and items are called u3 and i7."""
    rng = np.random.default_rng(seed)
    rows = [
        (f"u{user}", f"i{items[rng.integers(len(items))]}", 1_000_000 + 1000 * first + 10 * step + user)
        for user in users
        for step in range(per_user)
    ]
    return pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")


@pytest.fixture(scope="module")
def days(tmp_path_factory):
    """Day 1, and day 2 that has it, more events of its users, new users, and new items."""
    folder = tmp_path_factory.mktemp("days")
    first = events(range(30), range(1, 21))
    later = pl.concat([events(range(0, 30, 2), range(5, 26), 1, 3, 1), events(range(30, 40), range(5, 26), 1, 9, 2)])
    first.write_csv(folder / "day1.csv")
    pl.concat([first, later]).write_csv(folder / "day2.csv")
    return folder


def command(log, run, *more):
    data = ["--config=quickstart", "--data.name=custom", f"--data.path={log}", "--data.k_core=0"]
    return [*data, *QUICK, *SMALL, "--train.epochs=2", "--eval.baselines", "popularity", f"--run_dir={run}", *more]


@pytest.fixture(scope="module")
def yesterday(days):
    run = days / "yesterday"
    assert train.main(command(days / "day1.csv", run)) == 0
    return run


def host(params):
    return jax.tree.map(np.asarray, params)


def fresh_of(config, log, seed=1):
    model = build_model(with_data(config, log).model)
    return model, host(init_params(model, jax.random.key(seed)))


@pytest.mark.parametrize("name", ["tim4rec", "tim4rec_causal", "sasrec", "mamba4rec"])
def test_the_same_log_gives_the_same_parameters(name, tmp_path):
    config, log = make_config(name), make_log()
    make_run(tmp_path / "run", log, config)
    model, fresh = fresh_of(config, log)
    params, about = warm_params(tmp_path / "run", model, log, split_log(log, config.data), fresh)
    stored = {name: part for name, part in load_model(tmp_path / "run").params.items() if name in fresh}
    jax.tree.map(np.testing.assert_array_equal, params, host(stored))
    assert (about.known_items, about.new_items, about.gone_items, about.step) == (30, 0, 0, 7)
    assert about.valid_trained_on == about.test_trained_on == 0


def test_rows_follow_their_raw_ids(days, yesterday):
    """Where numbers have shifted, an item keeps its row; new ones stand at the mean with their initial noise."""
    config = dataclasses.replace(read_config(yesterday).data, path=str(days / "day2.csv"))
    log, before = load_log(config), stored_log(yesterday)
    log = dataclasses.replace(log, item_ids=log.item_ids.replace({"i7": "i700"}))  # One is gone, one more is new.
    model, fresh = fresh_of(read_config(yesterday), log)
    params, about = warm_params(yesterday, model, log, split_log(log, config), fresh)
    old = np.asarray(load_model(yesterday).params["item_embedding"]["embedding"])
    new, noise = params["item_embedding"]["embedding"], fresh["item_embedding"]["embedding"]
    there = {item: number for number, item in enumerate(before.item_ids, 1)}
    assert list(there.values()) != [list(log.item_ids).index(item) + 1 for item in there if item in set(log.item_ids)]
    for number, item in enumerate(log.item_ids, 1):
        if item in there:
            np.testing.assert_array_equal(new[number], old[there[item]])
        else:
            np.testing.assert_allclose(new[number], old[1:].mean(0) + noise[number], atol=1e-6)
    np.testing.assert_array_equal(new[0], old[0])
    unknown = set(log.item_ids) - set(there)
    assert "i700" in unknown and len(unknown) > 1
    assert (about.known_items, about.new_items, about.gone_items) == (19, len(unknown), 1)


def test_rows_that_fill_a_table_up_are_no_items(tmp_path):
    """As of a run whose item table lay in shards: they count for nothing in the mean."""
    config, log = make_config("ssd4rec", vocab_multiple=64), make_log()
    stored = make_run(tmp_path / "run", log, config)["item_embedding"]["embedding"]
    renamed = dataclasses.replace(log, item_ids=log.item_ids.replace({log.item_ids[4]: "new"}))
    model, fresh = fresh_of(config, renamed)
    params, about = warm_params(tmp_path / "run", model, renamed, split_log(renamed, config.data), fresh)
    assert stored.shape[0] == 64 and (about.known_items, about.new_items, about.gone_items) == (29, 1, 1)
    noise = fresh["item_embedding"]["embedding"][5]
    wanted = np.asarray(stored[1:31]).mean(0) + noise
    np.testing.assert_allclose(params["item_embedding"]["embedding"][5], wanted, atol=1e-6)


def test_day_two(days, yesterday, tmp_path, capsys):
    """The update is said, written down, and knows new users and items; yesterday's run is as it was."""
    before = {file: file.read_bytes() for file in yesterday.rglob("*") if file.is_file()}
    assert train.main(command(days / "day2.csv", tmp_path / "today", f"--init_from={yesterday}")) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert f"begins with the parameters of {yesterday}" in shown and "5 new ones begin at the mean" in shown
    about = read_results(tmp_path / "today")["init_from"]
    assert about | {"run": "", "step": 0} == {
        "run": "",
        "step": 0,
        "known_items": 20,
        "new_items": 5,
        "gone_items": 0,
        "valid_trained_on": 0,
        "test_trained_on": 0,
    }
    assert read_config(tmp_path / "today").train.init_from == str(yesterday)
    today = Recommender.from_run(tmp_path / "today")
    assert {"u35", "u0"} <= set(read_histories(tmp_path / "today")["user_id"])
    assert {"i25", "i1"} <= set(today.index_of_item)
    assert {file: file.read_bytes() for file in yesterday.rglob("*") if file.is_file()} == before
    # Another start from initial values gives something else.
    assert train.main(command(days / "day2.csv", tmp_path / "cold")) == 0
    losses = [
        [line["train_loss"] for line in read_metrics(run) if line["kind"] == "valid"][0]
        for run in (tmp_path / "today", tmp_path / "cold")
    ]
    assert losses[0] != losses[1] and "init_from" not in read_results(tmp_path / "cold")


def test_a_resumed_update_equals_one_that_ran_through(days, yesterday, tmp_path):
    """Also where the run that it began with is gone by then."""
    source = shutil.copytree(yesterday, tmp_path / "source")
    options = [f"--init_from={source}", "--train.max_steps=4", "--train.log_every=1"]
    assert train.main(command(days / "day2.csv", tmp_path / "through", *options)) == 0
    short = [*options[:1], "--train.max_steps=2", options[2]]
    assert train.main(command(days / "day2.csv", tmp_path / "resumed", *short)) == 0
    shutil.rmtree(source)
    assert train.main(command(days / "day2.csv", tmp_path / "resumed", *options, "--resume")) == 0
    through, resumed = (load_model(tmp_path / name) for name in ("through", "resumed"))
    jax.tree.map(np.testing.assert_array_equal, host(through.params), host(resumed.params))
    assert read_results(tmp_path / "resumed")["init_from"] == read_results(tmp_path / "through")["init_from"]


def test_targets_that_were_trained_on_are_said(days, tmp_path, capsys):
    """A model that was trained on everything has seen what a test on the same log asks."""
    options = ["--data.split=none", "--train.epochs=1"]
    assert train.main(command(days / "day1.csv", tmp_path / "all", *options)) == 0
    assert train.main(command(days / "day1.csv", tmp_path / "again", f"--init_from={tmp_path / 'all'}")) == 0
    about = read_results(tmp_path / "again")["init_from"]
    assert about["valid_trained_on"] == about["test_trained_on"] == 30
    shown = " ".join(capsys.readouterr().out.split())
    assert f"30 of 30 test targets were trained on by {tmp_path / 'all'}: they flatter what is measured" in shown


def test_what_cannot_be_begun_with(days, yesterday, tmp_path, capsys):
    """One line, and no run folder."""
    (tmp_path / "empty").mkdir()
    trained = shutil.copytree(yesterday, tmp_path / "no_best")
    shutil.rmtree(trained / "checkpoints" / "best")
    ssd = ["--model.name=ssd4rec"]
    for source, more, said in (
        (tmp_path / "nothing", [], "there is no run folder"),
        (tmp_path / "empty", [], "is not a run folder: config.json is missing"),
        (trained, [], "holds no best checkpoint"),
        (yesterday, ssd, "is of model.name='tim4rec', here it is 'ssd4rec'; begin with a run of the same model"),
        (yesterday, ["--model.d_model=16"], "model.d_model: 8 there, 16 here; give those of that run"),
        (yesterday, ["--model.max_len=11"], "] there and [11"),
        (yesterday, ["--train.init_from=elsewhere"], "--train.init_from=elsewhere differ; give one of them"),
    ):
        code = train.main(command(days / "day2.csv", tmp_path / "run", f"--init_from={source}", *more))
        error = capsys.readouterr().err
        assert code == 2 and said in error and error.count("\n") == 1, error
        assert not (tmp_path / "run").exists()


def test_every_event_trains(days, tmp_path, capsys):
    options = ["--data.split=none", "--train.positions=all", "--model.name=tim4rec_causal"]
    run = tmp_path / "final"
    assert train.main(command(days / "day2.csv", run, *options)) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "every event trains, nothing validates or tests, and epoch 2 is kept" in shown
    log = stored_log(run)
    assert len(everything(log).train) == log.num_rows - log.num_users
    results = read_results(run)
    assert results["valid"] == results["test"] == {} and results["best_epoch"] == results["epochs"] == 2
    assert not (run / "test_ranks.parquet").exists() and (run / "curves.png").exists()

    # Longer, from where it stopped, and recommendations from what is there.
    step = load_model(run).step
    longer = command(days / "day2.csv", run, *options, "--resume")
    longer[longer.index("--train.epochs=2")] = "--train.epochs=3"
    assert train.main(longer) == 0
    assert read_results(run)["epochs"] == 3 and load_model(run).step > step
    assert recommend.main([f"--run={run}", "--user=u35", "--k=3"]) == 0
    capsys.readouterr()
    for program, arguments in (
        (evaluate, [f"--run={run}"]),
        (evaluate, ["--baselines", "--config=quickstart", "--data.split=none"]),
        (compare, ["--data=ml-100k", "--models=sasrec", "--data.split=none"]),
        (compare, ["--rows", f"final={run}"]),
        (sweep, ["--config=quickstart", "--grid", "model.dropout=0.1,0.2", "--data.split=none"]),
    ):
        assert program.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and "data.split=none trains on every event" in error, error
    for program, arguments in (
        (compare, ["--data=ml-100k", "--models=sasrec", f"--train.init_from={run}"]),
        (sweep, ["--config=quickstart", "--grid", "model.dropout=0.1,0.2", f"--train.init_from={run}"]),
    ):
        assert program.main(arguments) == 2
        assert "compares what becomes of initial values" in capsys.readouterr().err


@pytest.mark.parametrize("loader", ["device", "grain"])
def test_prefixes_of_everything(loader, tmp_path, days):
    """Users of two events are kept, and each event but the first is a target."""
    table = pl.DataFrame({"user": ["a", "a", "b", "b", "b", "c"], "item": list("xyxyzx"), "timestamp": range(6)})
    table.write_csv(tmp_path / "log.csv")
    options = ["--data.split=none", f"--data.loader={loader}", "--train.epochs=1"]
    assert train.main(command(tmp_path / "log.csv", tmp_path / "run", *options)) == 0
    assert len(read_histories(tmp_path / "run")) == 3
    log = stored_log(tmp_path / "run")
    split = split_log(log, read_config(tmp_path / "run").data)
    pairs = [(log.user_ids[int(u)], int(end)) for u, end in zip(split.train.users, split.train.ends, strict=True)]
    assert sorted(pairs) == [("a", 1), ("b", 1), ("b", 2)]
    pl.DataFrame({"user": ["a", "b"], "item": ["x", "y"], "timestamp": [0, 1]}).write_csv(tmp_path / "short.csv")
    assert train.main(command(tmp_path / "short.csv", tmp_path / "none", *options)) == 2


def test_the_walk_through(tmp_path, monkeypatch, capsys):
    """The commands of the README as they stand there, on small logs with users and items that come and go."""
    monkeypatch.chdir(tmp_path)
    first = events(range(30), range(1, 21), per_user=12).with_columns(pl.col("user").replace({"u0": "alice"}))
    later = events(range(20, 40), range(5, 26), first=9, per_user=12, seed=1)
    first.write_csv("day1.csv")
    pl.concat([first, later]).write_csv("day2.csv")
    pathlib.Path("questions.jsonl").write_text('{"user": "u35", "recommend": 3}\n')
    text = (ROOT / "experiments" / "README.md").read_text(encoding="utf-8")
    [commands] = re.findall(r"<!-- day by day -->\n```bash\n(.*?)```", text, re.DOTALL)
    lists = []
    for line in commands.splitlines():
        words = shlex.split(line)
        if words[0] == "ln":
            subprocess.run(words, check=True)
            continue
        name = words[2].removeprefix("experiments.")
        short = [*SMALL, *QUICK, "--train.epochs=1", "--eval.baselines", "popularity"] if name == "train" else []
        assert {"train": train, "recommend": recommend, "stream": stream}[name].main([*words[3:], *short]) == 0, words
        shown = capsys.readouterr().out
        lists += [shown] if name == "recommend" else []
        if name == "stream":
            assert [item["item"] for item in json.loads(shown.splitlines()[-1])["items"]]
    assert lists[0] == lists[1] and read_config(tmp_path / "runs" / "day2").train.init_from == "runs/day1"


def test_in_python(days, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = {"epochs": 1, "progress": False, "tensorboard": False}
    first = fit(load_log(days / "day1.csv", k_core=0), d_model=8, num_layers=1, d_state=4, head_dim=8, **options)
    log = load_log(days / "day2.csv", k_core=0)
    second = fit(log, init_from=first, split="none", **options)
    assert second.config.model.d_model == 8 and second.config.train.init_from == str(first.run_dir)
    assert second.results["init_from"]["new_items"] == 5 and second.metrics == {"valid": {}, "test": {}}
    assert "every event trained" in repr(second) and len(second.recommend(["u35"], k=3)) == 3
    with pytest.raises(ValueError, match="is of model.name='tim4rec_causal', here it is 'sasrec'"):
        fit(log, "sasrec", init_from=first, **options)
    json.dumps(second.results)
