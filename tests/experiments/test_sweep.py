"""experiments.sweep: grids and searches, mostly with a short program in the place of training."""

import json
import re
import signal
import sys

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from experiments import runs, sweep
from experiments.cli import read_value
from tim4rec_jax.run_dir import read_config, read_results

SMALL = [
    "--config=quickstart",
    "--data.synthetic.num_users=120",
    "--data.synthetic.num_items=30",
    "--model.max_len=10",
    "--model.d_model=16",
    "--model.d_state=8",
    "--model.head_dim=16",
    "--train.batch_size=128",
    "--train.epochs=1",
    "--train.progress=false",
    "--train.tensorboard=false",
]
# Validates best at learning rate 0.003 and a dropout of 0.1, and tests best where validation is worst; notes its turn.
PROGRAM = """
import json, math, pathlib, sys, time
*options, folder = sys.argv[1:]
given = dict(option.lstrip("-").split("=", 1) for option in options if "=" in option)
rate, dropout = float(given.get("train.learning_rate", 0.01)), float(given.get("model.dropout", 0.0))
seed = int(given.get("train.seed", 2020))
folder = pathlib.Path(folder); folder.mkdir(parents=True, exist_ok=True)
with open(ORDER, "a") as order: order.write(f"{folder.parent.name}/{folder.name}\\n")
if dropout == 0.5: print("error: the loss is nan at step 3"); raise SystemExit(2)
if STOP and STOP in str(folder):
    import os, signal
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    os.kill(os.getppid(), signal.SIGINT); signal.sigwait([signal.SIGINT]); raise SystemExit(130)
valid = 0.9 - 0.1 * abs(math.log10(rate / 0.003)) - abs(dropout - 0.1) + 0.001 * (seed - 2020)
(folder / "metrics.jsonl").write_text('{"kind": "test"}\\n')
(folder / "test_ranks.parquet").write_text("")
results = {"valid": {"ndcg@10": valid}, "test": {"hit@10": 1 - valid}, "best_epoch": 2, "epochs": 4}
(folder / "results.json").write_text(json.dumps(results | {"seconds_per_epoch": 0.5}))
"""


@pytest.fixture
def trained(monkeypatch, tmp_path):
    """Puts the program in the place of training; returns the runs trained so far, and a way to stop at one."""
    order, stop_at = tmp_path / "order.txt", {"at": ""}

    def command(job):
        text = f"ORDER, STOP = {str(order)!r}, {stop_at['at']!r}\n{PROGRAM}"
        return [sys.executable, "-c", text, *job.options, str(job.folder)]

    monkeypatch.setattr(runs, "command", command)
    monkeypatch.setattr(runs, "POLL_SECONDS", 0.01)
    return (lambda: order.read_text().split() if order.exists() else []), stop_at


def _main(capsys, folder, *argv):
    code = sweep.main([*SMALL, f"--folder={folder}", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


GRID = ["--grid", "train.learning_rate=1e-3,3e-3", "model.dropout=0.1,0.2"]


def test_a_real_training(tmp_path, capsys):
    argv = ["--config=quickstart_ssd4rec", "--grid", "train.learning_rate=3e-2", "--train.length_groups=1"]
    code, _, err = _main(capsys, tmp_path / "lr", *argv)
    assert code == 0, err
    record = json.loads((tmp_path / "lr" / "sweep.json").read_text())
    [trial] = record["trials"]
    run = tmp_path / "lr" / "trial_0000" / "seed_2020"
    results, config = read_results(run), read_config(run)
    assert trial["valid"] == results["valid"]["ndcg@10"] and trial["error"] is None and trial["seconds"] > 0
    assert (config.model.name, config.train.learning_rate, config.train.epochs) == ("ssd4rec", 0.03, 1)
    assert record["best"]["test"] == results["test"] and record["environment"]["data_fingerprint"]
    assert not (run / "time_off").exists()
    assert "cache_dir" not in record["settings"]["data"]


def test_a_grid_takes_every_combination_and_shows_the_test_of_the_best_alone(tmp_path, capsys, trained):
    order, _ = trained
    code, out, err = _main(capsys, tmp_path / "g", *GRID, "--seeds=2")
    assert code == 0, err
    assert "4 trials of 2 trainings each" in out
    assert order() == [f"trial_{n:04d}/seed_{seed}" for n in range(4) for seed in (2020, 2021)]
    text = (tmp_path / "g" / "sweep.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert rows[0] == ["trial", "train.learning_rate", "model.dropout", "valid ndcg@10", "best epoch", "seconds"]
    # Means of two seeds, best first.
    assert rows[2] == ["3", "0.003", "0.1", "0.9005 ± 0.0007", "2, 2", "4"]
    assert [row[0] for row in rows[2:]] == ["3", "1", "4", "2"]
    # The mean of the best's two test numbers is there, and that of no other trial, nor in what was printed.
    assert (
        "Test: hit@10 0.0995." in text and text.count("hit@10") == 1 and "choosing among trials by their test" in text
    )
    assert out.count("hit@10") == 1 and "Best: trial 3, train.learning_rate=0.003, model.dropout=0.1" in out
    assert json.loads((tmp_path / "g" / "sweep.json").read_text())["best"]["number"] == 2
    code, again, _ = _main(capsys, tmp_path / "g", *GRID, "--seeds=2")
    assert code == 0 and len(order()) == 8 and "Best: trial 3" in again


def test_a_trial_that_fails_is_kept_and_the_others_go_on(tmp_path, capsys, trained):
    order, _ = trained
    # 1.5 is refused by the settings, 0.5 fails in training.
    code, out, err = _main(capsys, tmp_path / "g", "--grid", "model.dropout=1.5,0.5,0.1", "--seeds=2")
    assert code == 0, err
    assert order() == ["trial_0001/seed_2020", "trial_0002/seed_2020", "trial_0002/seed_2021"]
    text = (tmp_path / "g" / "sweep.md").read_text()
    assert "3 of 3 trials, 2 failed" in text
    assert "- trial 1 failed: the settings are refused: dropout=1.5 must lie in [0, 1)" in text
    assert "- trial 2 failed: the loss is nan at step 3" in text
    assert "trial 2 of 3: model.dropout=0.5: failed: the loss is nan at step 3" in out
    _main(capsys, tmp_path / "g", "--grid", "model.dropout=1.5,0.5,0.1", "--seeds=2")
    assert len(order()) == 3, "what failed is not tried again by itself"
    (tmp_path / "g" / "trial_0001" / "error.txt").unlink()
    _main(capsys, tmp_path / "g", "--grid", "model.dropout=1.5,0.5,0.1", "--seeds=2")
    assert order()[3:] == ["trial_0001/seed_2020"]


def test_nothing_worked(tmp_path, capsys, trained):
    code, _, err = _main(capsys, tmp_path / "g", "--grid", "model.dropout=0.5,1.5")
    assert code == 2 and "every trial failed: trial 1: the loss is nan at step 3; trial 2: the settings" in err


SPACE = ["--space", "train.learning_rate=log:1e-4:1e-2", "model.dropout=0.0:0.3", "train.loss=ce|bpr"]


def _values(folder):
    record = json.loads((folder / "sweep.json").read_text())
    return [trial["values"] for trial in sorted(record["trials"], key=lambda trial: trial["number"])]


def test_a_search_goes_on_and_draws_what_it_would_have(tmp_path, capsys, trained):
    order, stop_at = trained
    assert _main(capsys, tmp_path / "whole", *SPACE, "--trials=13")[0] == 0
    values = _values(tmp_path / "whole")
    assert len(order()) == 13 and len({str(value) for value in values}) == 13
    for value in values:
        assert 1e-4 <= value["train.learning_rate"] <= 1e-2 and 0 <= value["model.dropout"] <= 0.3
    assert {value["train.loss"] for value in values} == {"ce", "bpr"}

    stop_at["at"] = "trial_0011"
    code, out, _ = _main(capsys, tmp_path / "parts", *SPACE, "--trials=13")
    assert code == 130 and "stopped; the same command goes on" in out
    assert "hit@10" not in out and "hit@10" not in (tmp_path / "parts" / "sweep.json").read_text()
    stop_at["at"] = ""
    assert _main(capsys, tmp_path / "parts", *SPACE, "--trials=12")[0] == 0
    assert _main(capsys, tmp_path / "parts", *SPACE, "--trials=13")[0] == 0
    assert _values(tmp_path / "parts") == values
    assert [run.split("/")[0] for run in order()[13:]].count("trial_0011") == 2
    assert _main(capsys, tmp_path / "other", *SPACE, "--trials=2", "--sampler_seed=1")[0] == 0
    assert _values(tmp_path / "other") != values[:2]


def test_a_search_bears_failures(tmp_path, capsys, trained):
    code, out, err = _main(capsys, tmp_path / "s", "--space", "model.dropout=0.5|0.1|1.5", "--trials=8")
    assert code == 0, err
    record = json.loads((tmp_path / "s" / "sweep.json").read_text())
    errors = {trial["values"]["model.dropout"]: trial["error"] for trial in record["trials"]}
    assert errors[0.1] is None and "loss is nan" in errors[0.5] and "refused" in errors[1.5]
    assert record["trials"][0]["values"] == {"model.dropout": 0.1}


def test_an_interrupted_grid_goes_on(tmp_path, capsys, trained):
    order, stop_at = trained
    handler = signal.getsignal(signal.SIGINT)
    stop_at["at"] = "trial_0001"
    code, out, _ = _main(capsys, tmp_path / "g", *GRID)
    assert code == 130 and order() == ["trial_0000/seed_2020", "trial_0001/seed_2020"]
    assert json.loads((tmp_path / "g" / "sweep.json").read_text())["best"] is None and "hit@10" not in out
    stop_at["at"] = ""
    assert _main(capsys, tmp_path / "g", *GRID)[0] == 0
    assert order()[2:] == [f"trial_000{n}/seed_2020" for n in (1, 2, 3)]
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        ([*GRID, "--model.max_len=9"], ["settings.model.max_len: 10 there, 9 asked for"]),
        ([*GRID, "--train.epochs=2"], ["settings.train.epochs: 1 there, 2 asked for"]),
        ([*GRID, "--seeds=7,"], ["seeds: (2020,) there, (7,) asked for"]),
        (["--grid", "train.learning_rate=1e-3,3e-3"], ["space.model.dropout: ", "there, 'absent' asked for"]),
        ([*GRID, "--data.synthetic.seed=8"], ["data_fingerprint: ", "and 1 more; choose another --folder"]),
        ([*SPACE, "--trials=3"], ["sampler: None there, 'tpe' asked for", " more; choose another --folder"]),
    ],
)
def test_a_folder_of_another_sweep_is_refused(tmp_path, capsys, trained, argv, lines):
    assert _main(capsys, tmp_path / "g", *GRID)[0] == 0
    code, _, err = _main(capsys, tmp_path / "g", *argv)
    assert code == 2 and "holds another sweep:" in err and "choose another --folder" in err
    for line in lines:
        assert line in err
    assert _main(capsys, tmp_path / "g", *GRID, "--train.log_every=7")[0] == 0


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give --grid, as in --grid train.learning_rate=1e-3,3e-3, or --space and --trials"),
        ([*GRID, *SPACE], "or --space and --trials; one of them"),
        (["--grid"], "give --grid, as in"),
        (SPACE, "--space and --trials belong together"),
        ([*GRID, "--trials=3"], "--space and --trials belong together"),
        ([*SPACE, "--trials=0"], "--trials=0 must be at least 1"),
        (["--grid", "train.lerning_rate=1"], "--grid train.lerning_rate is no setting .* nearest: train.learning_rate"),
        (["--grid", "data.k_core=1,2"], "--grid data.k_core is no setting that can be varied"),
        (["--grid", "eval.exclude_seen=true"], "--grid eval.exclude_seen is no setting that can be varied"),
        (["--grid", "train.seed=1,2"], "seeds are given by --seeds"),
        (["--grid", "model.vocab_size=1,2"], "the data decide it"),
        (["--grid", "train.epochs=many,2"], "train.epochs=many: expected a whole number"),
        (["--grid", "train.epochs=2.5"], "train.epochs=2.5: expected a whole number"),
        (["--grid", "train.clip_norm=None,inf"], "train.clip_norm=inf: expected a number or None"),
        (["--grid", "model.log_time=maybe"], "model.log_time=maybe: expected true or false"),
        (["--grid", "train.loss=ce,hinge"], "train.loss=hinge: expected one of ce, bpr"),
        (["--grid", "model.dropout="], "--grid model.dropout=: give at least 1"),
        (["--grid", "model.dropout"], "--grid model.dropout: expected a setting, = and its values"),
        (["--grid", "model.dropout=0.1,0.10"], "0.1 is there 2 times"),
        (["--grid", "model.dropout=0.1", "model.dropout=0.2"], "--grid model.dropout is there twice"),
        (["--grid", "model.max_len=5,10"], "--model.max_len is given and varied"),
        (["--space", "model.dropout=0.3:0.1", "--trials=2"], "--space model.dropout=0.3:0.1: .low <= high. must hold"),
        (["--space", "train.weight_decay=log:0:1", "--trials=2"], ".low > 0. must hold"),
        (["--space", "model.dropout=int:0:1", "--trials=2"], "expected low:high, or log:low:high"),
        (["--space", "train.loss=a:b", "--trials=2"], "train.loss=a: expected one of ce, bpr"),
        (["--space", "model.num_layers=1.5:3", "--trials=2"], "model.num_layers=1.5: expected a whole number"),
        (["--space", "train.loss=ce", "--trials=2"], "--space train.loss=ce: give at least 2"),
        ([*GRID, "--seeds=3,3"], "3 is there 2 times"),
        ([*GRID, "--eval.baselines", "time_off"], "--eval.baselines is not for sweeps"),
        ([*GRID, "--config=quickstar"], "--config=quickstar is unknown; nearest: quickstart"),
        ([*GRID, "--data.name=ml-2m"], "ml-1m"),
    ],
)
def test_bad_input_is_one_clear_error(tmp_path, capsys, trained, argv, message):

    code, _, err = _main(capsys, tmp_path / "g", *argv)
    assert code == 2 and re.search(message, err), err
    assert "Traceback" not in err and trained[0]() == [] and not (tmp_path / "g").exists()


def test_values_and_ranges_have_the_settings_type():
    assert read_value("x", float | None, "None") is None and read_value("x", float | None, "1") == 1.0
    assert read_value("x", bool, "False") is False and read_value("x", str, "sasrec") == "sasrec"
    terms = ["model.num_layers=int:1:3", "model.d_state=log:4:64", "model.dropout=0.1:0.2", "train.clip_norm=None|1"]
    space = sweep.parse(["--config=quickstart", "--trials=2", "--space", *terms]).space
    assert space == {
        "model.num_layers": IntDistribution(1, 3),
        "model.d_state": IntDistribution(4, 64, log=True),
        "model.dropout": FloatDistribution(0.1, 0.2),
        "train.clip_norm": CategoricalDistribution((None, 1.0)),
    }


def test_without_optuna(tmp_path, capsys, monkeypatch, trained):
    monkeypatch.setitem(sys.modules, "optuna", None)
    for argv in ([*SPACE, "--trials=2"], GRID):
        code, _, err = _main(capsys, tmp_path / "s", *argv)
        assert code == 2 and "pip install optuna" in err and err.count("\n") == 1 and not (tmp_path / "s").exists()


def test_a_kill_while_the_journal_was_written_loses_at_most_that_trial(tmp_path, capsys, trained):
    assert _main(capsys, tmp_path / "s", *SPACE, "--trials=3")[0] == 0
    values = _values(tmp_path / "s")
    journal = tmp_path / "s" / sweep.JOURNAL
    lines = journal.read_bytes().splitlines(keepends=True)
    asked = [i for i, line in enumerate(lines) if b"distribution" in line and b'"trial_id":2,' in line]
    journal.write_bytes(b"".join(lines[: asked[1]]) + lines[asked[1]][:9])
    code, out, err = _main(capsys, tmp_path / "s", *SPACE, "--trials=4")
    assert code == 0, err
    again = json.loads((tmp_path / "s" / "sweep.json").read_text())["trials"]
    errors = {trial["number"]: trial["error"] for trial in again if trial["error"]}
    assert errors == {2: "interrupted before its values were drawn"} and len(again) == 4
    assert _values(tmp_path / "s")[:2] == values[:2]


def test_a_random_search_and_trials_without_a_journal(tmp_path, capsys, trained):
    assert _main(capsys, tmp_path / "r", *SPACE, "--trials=3", "--sampler=random")[0] == 0
    values = _values(tmp_path / "r")
    assert _main(capsys, tmp_path / "again", *SPACE, "--trials=3", "--sampler=random")[0] == 0
    assert _values(tmp_path / "again") == values and len({str(value) for value in values}) == 3
    (tmp_path / "r" / sweep.JOURNAL).unlink()
    code, _, err = _main(capsys, tmp_path / "r", *SPACE, "--trials=3", "--sampler=random")
    assert code == 2 and "has trials and no optuna.journal of them; choose another --folder" in err
