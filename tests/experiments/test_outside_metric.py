"""A metric from a file of the user: in training, in the run folder that names it, in measuring anew and comparing."""

import json
import pathlib
import sys

import pytest

from experiments import compare, evaluate, recommend, train
from tim4rec_jax.evaluation import measures
from tim4rec_jax.run_dir import read_config, read_items, read_results

FILE = '''"""A metric of the user's own."""

from tim4rec_jax import register_metric

register_metric("bright", lambda lists, k: (lists.top(k) % 2 == 0).mean(axis=1), reads_items=True)
'''
OPTIONS = [
    "--config=quickstart",
    "--model.name=ssd4rec",
    "--data.synthetic.num_users=60",
    "--data.synthetic.num_items=30",
    "--model.max_len=8",
    "--model.d_model=8",
    "--model.d_state=4",
    "--model.head_dim=8",
    "--train.batch_size=128",
    "--train.epochs=1",
    "--eval.baselines=popularity",
    "--eval.module=my_metrics",
    "--eval.metrics=recall@5,coverage@5,bright@5",
    "--train.progress=false",
    "--train.tensorboard=false",
    "--parallel.strategy=single",
]


def _forget() -> None:
    """As in another process."""
    sys.modules.pop("my_metrics", None)
    measures.METRICS.pop("bright", None)


@pytest.fixture(autouse=True)
def modules(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "my_metrics.py").write_text(FILE)
    monkeypatch.syspath_prepend(folder)
    _forget()
    yield folder
    _forget()


def test_every_program_knows_it(tmp_path, capsys, monkeypatch, modules):
    run = tmp_path / "run"
    users = tmp_path / "users.csv"
    users.write_text("user_id,kind\n" + "".join(f"{number},{'ab'[number % 2]}\n" for number in range(1, 61)))
    parts = [f"--eval.users={users}", "--eval.groups=kind", "--eval.time_buckets=month"]
    assert train.main([*OPTIONS, *parts, f"--run_dir={run}"]) == 0
    shown = capsys.readouterr().out
    assert "bright@5" in shown and "by kind" in shown and "by month" in shown
    results = read_results(run)
    assert set(results["test"]) >= {"recall@5", "coverage@5", "bright@5"} and "bright@5" in results["valid"]
    assert results["test"]["recall@5"] == results["test"]["hit@5"]
    assert set(results["test_parts"]["kind"]) == {"a", "b"}

    _forget()
    assert read_config(run).eval.module == "my_metrics" and "bright" in measures.METRICS
    _forget()
    output = tmp_path / "again.json"
    assert evaluate.main([f"--run={run}", f"--output={output}"]) == 0
    again = json.loads(output.read_text())
    assert again["metrics"] == results["test"] and again["parts"] == results["test_parts"]
    assert again["eval"]["users"] == "users.csv"  # No folder of a machine in a record.
    assert evaluate.main([f"--run={run}", "--eval.metrics=map@3,novelty@3", "--eval.lists=user"]) == 0
    assert "novelty@3" in capsys.readouterr().out
    _forget()
    item = read_items(run)["item_id"][0]
    assert recommend.main([f"--run={run}", f"--history={item}", "--k=3"]) == 0
    _forget()
    capsys.readouterr()
    table = tmp_path / "table"
    assert compare.main(["--rows", f"one={run}", f"--output={table}", "--metric=recall@5"]) == 0
    text = pathlib.Path(f"{table}.md").read_text()
    assert "| coverage@5 |" in text and "bright@5" in text and "recall@5" in text

    _forget()
    monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder != str(modules)])
    sys.path_importer_cache.clear()
    capsys.readouterr()
    assert evaluate.main([f"--run={run}"]) == 2
    error = capsys.readouterr().err
    assert "eval.module=my_metrics cannot be imported" in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--eval.metrics=brigt@5", "unknown; nearest: bright"),
        ("--eval.metrics=bright", "needs a length"),
        ("--eval.module=nothing_here", "eval.module=nothing_here cannot be imported"),
        ("--eval.metrics=coverage@500", "k=500 is larger than the catalogue of 29 items"),
        ("--eval.groups=age", "go together"),
        ("--eval.users=gone.csv --eval.groups=age", "gone.csv is not there"),
        ("--eval.time_buckets=year", "time_buckets='year' must be day, week, month"),
        ("--eval.lists=item", "lists=item: expected one of target, user"),
    ],
)
def test_bad_options_are_one_line_and_leave_nothing(tmp_path, capsys, option, message):
    options = [known for known in OPTIONS if known.split("=")[0] not in option.replace("=", " ").split()]
    assert train.main([*options, *option.split(), f"--run_dir={tmp_path / 'run'}"]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1 and not (tmp_path / "run").exists()
