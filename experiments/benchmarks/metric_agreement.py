"""Our metrics beside those of RecTools and ranx on the same lists, with one relevant item each and with several.

    python -m venv other && other/bin/pip install rectools==0.19.0 ranx==0.3.21
    python -m experiments.benchmarks.metric_agreement --python=other/bin/python \
        --output=experiments/results/metric_agreement.json

The record holds the lists, what the others gave for each of them, and the greatest difference to ours per metric.
RecTools divides ndcg by what a list can reach (divide_by_achievable=True), its IntraListDiversity is given the distance
1 - cosine, its MeanInvUserFreq is our novelty, its CatalogCoverage (normalised) our coverage.
"""

import json
import pathlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments import cli
from tim4rec_jax.checks import require
from tim4rec_jax.evaluation.measures import RankedLists, means, values_per_list
from tim4rec_jax.evaluation.metrics import self_information
from tim4rec_jax.run_environment import environment

KINDS = ("hit", "recall", "precision", "ndcg", "mrr", "map", "novelty", "diversity", "coverage")
LARGEST_DIFFERENCE = 1e-12


@dataclass(frozen=True)
class Arguments:
    """Compares our metrics with those of RecTools and ranx.

    Attributes:
      python: an interpreter that has both.
      output: JSON file of the record.
      seed: of the lists.
    """

    python: pathlib.Path
    output: pathlib.Path
    seed: int = 2020


def make_input(seed: int, *, lists: int = 24, num_items: int = 40, most_relevant: int = 6) -> dict[str, Any]:
    """Draws whole rankings of a catalogue, what is relevant to each, a training part and embeddings."""
    generator = np.random.default_rng(seed)
    sizes = generator.integers(1, most_relevant + 1, lists)
    relevant = [sorted(generator.choice(num_items, size, replace=False) + 1) for size in sizes]
    pairs = generator.integers((0, 1), (lists, num_items + 1), (200, 2))
    return {
        "k": [1, 5, 20],
        "num_items": num_items,
        "ranked": [(generator.permutation(num_items) + 1).tolist() for _ in range(lists)],
        "relevant": [[int(item) for item in items] for items in relevant],
        "training": pairs[pairs[:, 1] != num_items].tolist(),  # The last item is in no one's training part.
        "embeddings": np.round(generator.normal(size=(num_items + 1, 4)), 3).tolist(),
    }


def ours(given: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Returns our metrics of every list, by k and name; coverage is one number."""
    ranked = np.array(given["ranked"], np.int32)
    places = np.argsort(ranked, axis=1) + 1
    ranks = np.concatenate([places[row, np.array(items) - 1] for row, items in enumerate(given["relevant"])])
    training = np.unique(np.array(given["training"]), axis=0)
    information = self_information(
        np.bincount(training[:, 1], minlength=given["num_items"] + 1), len(np.unique(training[:, 0]))
    )
    table = np.array(given["embeddings"])
    lists = RankedLists(
        ranks,
        np.repeat(np.arange(len(ranked)), [len(items) for items in given["relevant"]]),
        ranked,
        information,
        table / np.linalg.norm(table, axis=1, keepdims=True),
        given["num_items"],
    )
    found = {}
    for k in given["k"]:
        names = {kind: f"{kind}@{k}" for kind in KINDS}
        values = values_per_list(lists, list(names.values()))
        coverage = means(lists, [names["coverage"]], values)[names["coverage"]]
        found[str(k)] = {kind: values[name] for kind, name in names.items() if name in values} | {"coverage": coverage}
    return found


def differences(given: dict[str, Any], others: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Returns the greatest difference of any list between ours and a library's, by library and metric at k."""
    mine = ours(given)
    return {
        library: {
            f"{kind}@{k}": float(np.abs(np.subtract(values, mine[k][kind])).max())
            for k, of_kind in of_k.items()
            for kind, values in of_kind.items()
        }
        for library, of_k in others.items()
    }


@cli.program
def main(argv: list[str]) -> int:
    """Asks the others and writes the record."""
    arguments = cli.parse_settings(Arguments, argv, prog="experiments.benchmarks.metric_agreement")
    cases, versions = {}, {}
    for name, most in (("one relevant item", 1), ("several relevant items", 6)):
        given = make_input(arguments.seed, most_relevant=most)
        with tempfile.TemporaryDirectory() as folder:
            source, target = pathlib.Path(folder) / "input.json", pathlib.Path(folder) / "output.json"
            source.write_text(json.dumps(given))
            program = pathlib.Path(__file__).with_name("other_metrics.py")
            done = subprocess.run(
                [arguments.python, program, source, target], capture_output=True, text=True, check=False
            )
            require(done.returncode == 0, f"{arguments.python}: {done.stderr.strip().splitlines()[-1:]}")
            answer = json.loads(target.read_text())
        versions = answer["versions"]
        cases[name] = {
            "input": given,
            "values": answer["values"],
            "differences": differences(given, answer["values"]),
        }
    worst = max(d for case in cases.values() for of in case["differences"].values() for d in of.values())
    about = environment("", command=cli.command_without_folders(sys.orig_argv))
    about.pop("data_fingerprint")
    record = {"environment": about, "seed": arguments.seed, "others": versions, "largest_difference": worst}
    cli.write_json(arguments.output, record | {"cases": cases})
    print(f"largest difference {worst:.1e}, written: {arguments.output}")
    return 0 if worst <= LARGEST_DIFFERENCE else 1


if __name__ == "__main__":
    raise SystemExit(main())
