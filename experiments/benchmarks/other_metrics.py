"""The metrics of RecTools and of ranx; run by `metric_agreement` with an interpreter that has both, not ours.

python other_metrics.py input.json output.json
"""

import json
import pathlib
import sys
from importlib.metadata import version
from typing import Any

import numpy as np


def of_rectools(given: dict[str, Any], k: int) -> dict[str, Any]:
    """Returns each metric of every list, and the coverage of all."""
    import pandas as pd
    from rectools.metrics import (
        MAP,
        MRR,
        NDCG,
        CatalogCoverage,
        HitRate,
        IntraListDiversity,
        MeanInvUserFreq,
        Precision,
        Recall,
    )
    from rectools.metrics.distances import PairwiseDistanceCalculator

    class Cosine(PairwiseDistanceCalculator):
        def _get_distances_for_item_pairs(self, items_0: Any, items_1: Any) -> Any:
            table = np.array(given["embeddings"])
            a, b = table[np.array(items_0, int)], table[np.array(items_1, int)]
            return 1 - (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))

    def frame(pairs: list[tuple[int, int]]) -> Any:
        return pd.DataFrame(pairs, columns=["user_id", "item_id"])

    reco = frame([(user, item) for user, ranked in enumerate(given["ranked"]) for item in ranked])
    reco["rank"] = np.concatenate([np.arange(1, len(ranked) + 1) for ranked in given["ranked"]])
    relevant = frame([(user, item) for user, items in enumerate(given["relevant"]) for item in items])
    before = frame([tuple(pair) for pair in given["training"]])
    catalog = np.arange(1, given["num_items"] + 1)
    found = {
        name: metric.calc_per_user(reco, relevant)
        for name, metric in {
            "hit": HitRate(k),
            "recall": Recall(k),
            "precision": Precision(k),
            "ndcg": NDCG(k, divide_by_achievable=True),
            "mrr": MRR(k),
            "map": MAP(k),
        }.items()
    }
    found["novelty"] = MeanInvUserFreq(k).calc_per_user(reco, before)
    found["diversity"] = IntraListDiversity(k, Cosine()).calc_per_user(reco)
    per_list = {name: values.sort_index().tolist() for name, values in found.items()}
    return per_list | {"coverage": float(CatalogCoverage(k, normalize=True).calc(reco, catalog))}


def of_ranx(given: dict[str, Any], k: int) -> dict[str, Any]:
    """Returns each metric of every list."""
    from ranx import Qrels, Run, evaluate

    names = {
        "hit": "hit_rate",
        "recall": "recall",
        "precision": "precision",
        "ndcg": "ndcg",
        "mrr": "mrr",
        "map": "map",
    }
    qrels = {f"{user:04}": {str(item): 1 for item in items} for user, items in enumerate(given["relevant"])}
    run = {f"{u:04}": {str(item): 1.0 / (1 + i) for i, item in enumerate(r)} for u, r in enumerate(given["ranked"])}
    wanted = {name: f"{theirs}@{k}" for name, theirs in names.items()}
    found = evaluate(Qrels(qrels), Run(run), list(wanted.values()), return_mean=False)
    return {name: np.asarray(found[theirs]).tolist() for name, theirs in wanted.items()}


def main(source: str, target: str) -> None:
    """Reads lists and what is relevant to them, writes what both libraries make of it."""
    given = json.loads(pathlib.Path(source).read_text())
    measured = {
        library: {str(k): of(given, k) for k in given["k"]}
        for library, of in (("RecTools", of_rectools), ("ranx", of_ranx))
    }
    versions = {name: version(name) for name in ("RecTools", "ranx", "numpy", "pandas")}
    pathlib.Path(target).write_text(json.dumps({"values": measured, "versions": versions}))


if __name__ == "__main__":
    main(*sys.argv[1:])
