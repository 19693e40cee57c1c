"""experiments.evaluate --baselines: the numbers of an own count, recorded by data, other data left in place."""

import json
import math
from collections import Counter

import pytest

from experiments import evaluate

# Seconds, items: four users; "d" is nobody's but the last user's, "a" the most frequent.
ROWS = {"u": "abcab", "v": "bcaba", "w": "cabca", "x": "abdaa"}
K = 2


def _log(path):
    lines = [f"{u},{item},{t}" for u, items in ROWS.items() for t, item in enumerate(items)]
    path.write_text("user,item,timestamp\n" + "\n".join(lines) + "\n")
    return path


def _own_count():
    """Mean rank over the orders of equals, by pairwise comparison of scores."""
    training = {user: items[:-2] for user, items in ROWS.items()}
    counts = Counter("".join(training.values()))
    pairs = Counter(pair for items in training.values() for pair in zip(items, items[1:], strict=False))
    total = 1 + max(counts.values())
    holders = {item: {user for user, items in training.items() if item in items} for item in "abcd"}

    def cosine(i, j):
        norm = math.sqrt(len(holders[i]) * len(holders[j]))
        return len(holders[i] & holders[j]) / norm if norm and i != j else 0

    ranks = {"popularity": [], "Markov": [], "item-kNN": []}
    for items in ROWS.values():
        *_, before, target = items
        for name, score in {
            "popularity": lambda j: counts[j],
            "Markov": lambda j, before=before: pairs[before, j] * total + counts[j],
            "item-kNN": lambda j, had=items[:-1]: round(sum(cosine(i, j) for i in set(had)), 12),
        }.items():
            others = [score(j) for j in "abcd" if j != target]
            ranks[name].append(1 + sum((s > score(target)) + (s == score(target)) / 2 for s in others))
    return {name: sum(rank <= K for rank in values) / len(values) for name, values in ranks.items()}


def _main(tmp_path, *options):
    return evaluate.main(
        [
            "--baselines",
            "--config=quickstart",
            f"--data.path={_log(tmp_path / 'log.csv')}",
            "--data.format=csv",
            "--data.k_core=0",
            "--data.name=custom",
            f"--eval.top_k={K}",
            f"--eval.monitor=ndcg@{K}",
            *options,
        ]
    )


def test_own_count_and_record(tmp_path, capsys):
    output = tmp_path / "results" / "baselines.json"
    assert _main(tmp_path, f"--output={output}") == 0
    record = json.loads(output.read_text())["custom"]
    counted = {name: metrics[f"hit@{K}"] for name, metrics in record["metrics"].items()}
    assert counted == _own_count()
    grid, shown = record["item_knn"]["valid"], " ".join(capsys.readouterr().out.split())
    assert len(grid) == 12 and max(one["ndcg@2"] for one in grid) == grid[0]["ndcg@2"]  # Few items: k decides nothing.
    assert "item-kNN on the validation part" in shown and "chosen: k 10, shrinkage 0" in shown
    assert "seen_excluded" not in record  # Every target was seen.
    assert record["targets"] == 4 and record["log"] == {"users": 4, "items": 4, "rows": 20}
    assert record["environment"]["data_fingerprint"]
    assert str(tmp_path) not in output.read_text() and record["data"]["timestamp_precision"] == "int64"
    assert _main(tmp_path, f"--output={output}", "--data.name=ml-100k", "--eval.exclude_seen") == 2
    assert "all 4 targets were seen before" in capsys.readouterr().err
    assert _main(tmp_path, f"--output={output}", "--data.name=ml-100k") == 0
    both = json.loads(output.read_text())
    assert both["custom"] == record and both["ml-100k"]["metrics"] == record["metrics"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eval.top_k=5"], "k=5 is larger than the catalogue of 4 items"),
        (["--run=runs/a"], "unknown option --run; nearest: "),
        (["--baselines=false"], "--baselines=false measures nothing"),
        (["--baselines=maybe"], "--baselines=maybe: expected true or false"),
    ],
)
def test_refusals(tmp_path, capsys, options, message):
    assert _main(tmp_path, *options, *(["--eval.monitor=ndcg@5"] if "top_k" in options[0] else [])) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_another_file_is_not_written_over(tmp_path, capsys):
    for text in ('{"results": 1}', "[1]", "no json"):
        (tmp_path / "out.json").write_text(text)
        assert _main(tmp_path, f"--output={tmp_path / 'out.json'}") == 2
        assert "out.json holds something else than baselines" in capsys.readouterr().err
        assert (tmp_path / "out.json").read_text() == text
    assert evaluate.main(["--baselines"]) == 2
    assert "--config" in capsys.readouterr().err
