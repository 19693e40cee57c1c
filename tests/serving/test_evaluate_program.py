"""experiments.evaluate: the numbers of the library, from the run folder alone, beside those of training."""

import dataclasses
import json
import re
import shutil

import pytest

from experiments import evaluate as program
from tests.serving.tiny_run import make_config, make_run
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.evaluation.full_sort import evaluate
from tim4rec_jax.models import build_model
from tim4rec_jax.run_dir import write_results
from tim4rec_jax.training.stored_run import load_model

CONFIG = make_config()
EXCLUDING = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, exclude_seen=True))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, log):
    """A run with results.json, and what the library measures on its log."""
    path = tmp_path_factory.mktemp("finished") / "run"
    params = make_run(path, log, CONFIG)
    split, model = leave_one_out(log), build_model(CONFIG.model)
    test = evaluate(model, params, log, split.test, CONFIG).metrics
    write_results(path, {"test": test})
    expected = {
        "test": test,
        "valid": evaluate(model, params, log, split.valid, CONFIG).metrics,
        "excluding": evaluate(model, params, log, split.test, EXCLUDING).metrics,
    }
    return path, expected


def _rows(text):
    """metric -> value, error and recorded of all items, then of the unseen."""
    rows = [[cell.strip() for cell in re.split("[│┃]", line)[1:-1]] for line in text.splitlines()]
    rows = [row for row in rows if row and "@" in row[0]]
    assert [row[1] for row in rows] == ["all items", "seen excluded"] * (len(rows) // 2)
    return {row[0]: [*row[2:], *other[2:]] for row, other in zip(rows[::2], rows[1::2], strict=True)}


def _main(capsys, *argv):
    code = program.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_equals_the_library_and_stands_beside_results(finished, capsys):
    path, expected = finished
    code, out, err = _main(capsys, f"--run={path}")
    assert (code, err) == (0, "")
    rows = _rows(out)
    assert list(rows) == ["hit@5", "ndcg@5", "mrr@5", "hit@10", "ndcg@10", "mrr@10"]
    for name, (value, error, recorded, unseen, unseen_error, unseen_recorded) in rows.items():
        assert value == recorded == f"{expected['test'][name]:.4f}"
        assert unseen == f"{expected['excluding'][name]:.4f}" and unseen_recorded == "–", "an earlier run has one"
        assert float(error) > 0 and float(unseen_error) > 0
    shown = " ".join(out.split())
    assert "all items:" in shown and "seen excluded:" in shown


def test_validation_part_has_nothing_beside_it(finished, capsys):
    path, expected = finished
    _, out, _ = _main(capsys, f"--run={path}", "--split=valid")
    rows = _rows(out)
    assert {name: row[0] for name, row in rows.items()} == {k: f"{v:.4f}" for k, v in expected["valid"].items()}
    assert {row[2] for row in rows.values()} == {"–"}


@pytest.mark.parametrize("flag", ["--eval.exclude_seen", "--eval.exclude-seen"])
def test_either_protocol_stands_beside_what_was_recorded_of_it(finished, tmp_path, capsys, flag):
    path, expected = finished
    run = shutil.copytree(path, tmp_path / "run")
    write_results(run, {"test": expected["test"], "test_seen_excluded": expected["excluding"]})
    output = tmp_path / "out.json"
    _, out, _ = _main(capsys, f"--run={run}", flag, f"--output={output}")
    for name, (value, _, recorded, unseen, _, unseen_recorded) in _rows(out).items():
        assert value == recorded == f"{expected['test'][name]:.4f}"
        assert unseen == unseen_recorded == f"{expected['excluding'][name]:.4f}"
    assert expected["excluding"] != expected["test"]
    written = json.loads(output.read_text())
    assert written["metrics"] == expected["excluding"] and written["all_items"]["metrics"] == expected["test"]
    assert written["users"] < written["all_items"]["users"] and written["standard_errors"]


def test_other_list_lengths(finished, capsys):
    path, expected = finished
    code, out, _ = _main(capsys, f"--run={path}", "--eval.top_k", "3", "10")
    rows = _rows(out)
    assert code == 0 and list(rows)[0] == "hit@3" and rows["hit@3"][2] == "–"
    assert rows["hit@10"][2] == f"{expected['test']['hit@10']:.4f}"


def test_unfinished_run_is_measured_all_the_same(run, capsys):
    code, out, _ = _main(capsys, f"--run={run}")
    assert code == 0 and {row[2] for row in _rows(out).values()} == {"–"}


def test_fewer_events_are_read_and_remembered(finished, tmp_path, log, capsys):
    path, expected = finished
    config = dataclasses.replace(CONFIG, eval=dataclasses.replace(CONFIG.eval, max_len=3))
    stored = load_model(path)
    metrics = evaluate(stored.model, stored.params, log, leave_one_out(log).test, config).metrics
    output = tmp_path / "out" / "short.json"
    code, out, _ = _main(capsys, f"--run={path}", "--eval.max_len=3", f"--output={output}")
    rows, written = _rows(out), json.loads(output.read_text())
    assert code == 0 and {row[2] for row in rows.values()} == {"–"}
    assert written["metrics"] == metrics != expected["test"]
    assert written["eval"]["max_len"] == 3 and written["run"]["max_len"] == CONFIG.model.max_len
    assert written["environment"]["data_fingerprint"] == log.fingerprint and written["split"] == "test"
    assert {name: row[0] for name, row in rows.items()} == {k: f"{v:.4f}" for k, v in metrics.items()}


def test_refusals_are_one_line(finished, tmp_path, capsys):
    path, _ = finished
    for argv, message in [
        ([f"--run={path}", "--eval.top_k", "31"], "k=31 is larger than the catalogue of 30 items; set eval.top_k to"),
        ([f"--run={path}", "--eval.max_len=13"], "eval.max_len=13 is over the model's max_len=12"),
        ([f"--run={tmp_path / 'nowhere'}"], f"there is no run folder {tmp_path / 'nowhere'}"),
    ]:
        code, out, err = _main(capsys, *argv)
        assert code == 2 and out == ""
        assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_run_without_checkpoint(finished, tmp_path, capsys):
    copy = shutil.copytree(finished[0], tmp_path / "copy")
    shutil.rmtree(copy / "checkpoints")
    code, _, err = _main(capsys, f"--run={copy}")
    assert code == 2 and "holds no best checkpoint" in err
