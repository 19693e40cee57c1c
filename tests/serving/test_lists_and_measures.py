"""Lists without seen items and the measures that leave seen items out agree, on a log full of repeats."""

import json
import math

import polars as pl
import pytest

from experiments import evaluate, recommend
from tests.evaluation.logs import random_log
from tests.serving.tiny_run import NUM_ITEMS, make_causal_config, make_config, make_run

K = 10


@pytest.fixture(scope="module")
def log():
    # A third of the histories is longer than max_len, and about half of the targets were there before.
    return random_log(num_users=60, num_items=NUM_ITEMS, min_events=3, max_events=30, seed=11)


def _cases(log):
    """History, times and target of every user's last event, by raw id."""
    for first, last in zip(log.offsets, log.offsets[1:] - 1, strict=False):
        names = [log.item_ids[int(item) - 1] for item in log.items[first : last + 1]]
        yield names[:-1], [int(t) for t in log.timestamps[first:last]], names[-1]


def _lists(log, run, folder, *options):
    """The program's list of every user, an empty one where it wrote none."""
    source, output = folder / "histories.jsonl", folder / "lists.parquet"
    lines = [json.dumps({"history": history, "times": times}) for history, times, _ in _cases(log)]
    source.write_text("\n".join(lines) + "\n")
    argv = [f"--run={run}", f"--input={source}", f"--output={output}", f"--k={K}", "--exclude-seen", *options]
    assert recommend.main(argv) == 0
    table = pl.read_parquet(output)
    return [table.filter(pl.col("line") == i + 1)["item_id"].to_list() for i in range(len(lines))]


def _measured(run, folder, *options):
    output = folder / "numbers.json"
    assert evaluate.main([f"--run={run}", "--eval.exclude_seen", f"--output={output}", *options]) == 0
    return json.loads(output.read_text())


@pytest.mark.parametrize(
    ("config", "of_lists", "of_measures"),
    [
        pytest.param(make_config(), (), (), marks=pytest.mark.exhaustive),
        (make_causal_config(), (), ()),
        pytest.param(
            make_causal_config(), ("--full_history=true",), ("--eval.max_len=64",), marks=pytest.mark.exhaustive
        ),
    ],
    ids=["faithful", "causal", "whole histories"],
)
def test_hits_and_gains_are_those_of_the_lists(log, tmp_path, capsys, config, of_lists, of_measures):
    run = tmp_path / "run"
    make_run(run, log, config)
    lists, cases = _lists(log, run, tmp_path, *of_lists), list(_cases(log))
    numbers = _measured(run, tmp_path, *of_measures)
    new = [row for row, (history, _, target) in enumerate(cases) if target not in history]
    assert numbers["seen_target_share"] == 1 - len(new) / len(cases) and numbers["users"] == len(new)
    assert 0.2 < numbers["seen_target_share"] < 0.8
    # Who has had a target before is never recommended it.
    assert not any(set(history) & set(listed) for (history, _, _), listed in zip(cases, lists, strict=True))
    places = [lists[row].index(cases[row][2]) + 1 if cases[row][2] in lists[row] else None for row in new]
    for k in (5, K):
        within = [place for place in places if place is not None and place <= k]
        assert numbers["metrics"][f"hit@{k}"] == pytest.approx(len(within) / len(new), abs=1e-12)
        gain = sum(1 / math.log2(place + 1) for place in within) / len(new)
        assert numbers["metrics"][f"ndcg@{k}"] == pytest.approx(gain, abs=1e-12)
        assert 0 < len(within) < len(new)
    shown = " ".join(capsys.readouterr().out.split())
    assert f"excluded; seen targets ({numbers['seen_target_share']:.1%} of all) left out" in shown


def test_ranking_seen_targets_measures_all_users(log, tmp_path):
    make_run(tmp_path / "run", log, make_config())
    left_out = _measured(tmp_path / "run", tmp_path)
    ranked = _measured(tmp_path / "run", tmp_path, "--eval.seen_targets=rank")
    assert ranked["users"] == log.num_users > left_out["users"]
    assert ranked["seen_target_share"] == left_out["seen_target_share"]
