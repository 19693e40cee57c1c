"""Writes the tables of the READMEs from the committed records, so that no number in them is typed by hand.

    python -m experiments.tables

A table stands between `<!-- table: NAME -->` and `<!-- end -->`, a function below says what it holds, a test compares.
"""

import functools
import json
import pathlib
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from experiments.comparison.numbers import both_protocols
from experiments.comparison.published import PUBLISHED
from kernels import causal_conv1d, selective_scan, softmax_cross_entropy, ssd
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, PROTOCOLS

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "experiments" / "results"
DOCUMENTS = (
    ROOT / "README.md",
    *(RESULTS / name for name in ("README.md", "quality_ml1m.md", "causal_time_branch.md")),
    ROOT / "kernels" / "README.md",
)
MEASURED = ROOT / "kernels" / "measured.py"
BACKENDS = {
    "ssd": ssd.IMPLEMENTATIONS,
    "causal_conv1d": causal_conv1d.IMPLEMENTATIONS,
    "selective_scan": selective_scan.IMPLEMENTATIONS,
    "softmax_cross_entropy": softmax_cross_entropy.IMPLEMENTATIONS,
}
MEASURED_MODULE = '''"""What operators took on a GPU, value and gradients; written by `python -m experiments.tables`."""

from typing import Any

# Fields of `kernels.dispatch.Measured`.
ROWS: tuple[tuple[Any, ...], ...] = (
ROWS_OF_RECORDS)
'''
AT_10 = ("hit@10", "ndcg@10", "mrr@10")


@functools.cache
def record(name: str) -> Any:
    """Returns a committed record."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def fraction(value: float | None, digits: int = 4) -> str:
    """Returns a share as tables print it, without the 0 in front; nothing for None."""
    return "" if value is None else f"{value:.{digits}f}".removeprefix("0")


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("|" + "|".join(f" {cell} " if cell != "---" else cell for cell in line) + "|" for line in lines)


def all_positions() -> str:
    """MovieLens-100K: every position against every prefix, means and deviations over the seeds."""
    names = {
        "causal time branch": "`ml100k_tim4rec_causal` without seen bias, 20 epochs of every position",
        "time off": "time off",
        "faithful, every prefix": "faithful TiM4Rec, 2 epochs of every prefix",
    }
    by_name = {row["name"]: row for row in record("ml100k_all_positions")["rows"]}
    rows = []
    for name, shown in names.items():
        metrics, runs = by_name[name]["metrics"], by_name[name]["runs"]
        values = [
            f"{fraction(metrics[m]['mean'])} ± {fraction(metrics[m]['deviation'])}" for m in ("hit@10", "ndcg@10")
        ]
        rows.append([shown, *values, f"{statistics.median(run['train_seconds'] for run in runs):.0f}"])
    return markdown(["", "hit@10", "ndcg@10", "seconds per run, one core"], rows)


# What the tables of models show of a row, per protocol of `PROTOCOLS`.
_QUALITIES = ("hit@10", "ndcg@10")
_BIASED = " with seen bias"


def _model_rows(name: str) -> dict[str, list[str]]:
    """Returns the rows of a comparison, best first: `_QUALITIES` under each protocol, with deviations over seeds."""
    both = both_protocols(record(name))
    found = {protocol: {row["name"]: row["metrics"] for row in both[protocol]["rows"]} for protocol in PROTOCOLS}
    rows = {}
    for row in both[ALL_ITEMS]["rows"]:
        spreads = [found[protocol][row["name"]][m] for protocol in PROTOCOLS for m in _QUALITIES]
        plain, biased, _ = row["name"].partition(_BIASED)
        shown = f"`{plain}`{' + seen bias' if biased else ''}" if row["trained"] else row["name"]
        rows[shown] = [
            fraction(one["mean"]) + (f" ± {fraction(one['deviation'])}" if one["deviation"] is not None else "")
            for one in spreads
        ]
    return rows


def _anchor_rows() -> dict[str, list[str]]:
    """Returns the rows of other libraries' models on MovieLens-100K."""
    names = {"rectools_sasrec": "SASRec of RecTools, one seed", "rectools_hstu": "HSTU of RecTools, one seed"}
    found = record("outside_anchors_ml100k")
    parts = ("test", "test_seen_excluded")
    return {
        shown: [fraction(found[name][part][m]) for part in parts for m in _QUALITIES] for name, shown in names.items()
    }


def _best_first(rows: dict[str, list[str]]) -> dict[str, list[str]]:
    """Returns the rows of several comparisons by ndcg@10 among all items."""
    return dict(sorted(rows.items(), key=lambda row: float(row[1][1].split()[0]), reverse=True))


def _model_table(rows: dict[str, list[str]]) -> str:
    head = [*_QUALITIES, *(f"{m}, seen excluded" for m in _QUALITIES)]
    return markdown(["", *head], [[shown, *cells] for shown, cells in rows.items()])


def models_ml100k() -> str:
    """MovieLens-100K: every model in its recipe, without and with a seen bias, baselines, models of other libraries."""
    rows = _model_rows("models_ml100k") | _model_rows("models_ml100k_seen_bias") | _anchor_rows()
    return _model_table(_best_first(rows))


def _beauty_rows() -> dict[str, list[str]]:
    """Returns the rows of Amazon Beauty, the best first; three models are of comparisons of their own."""
    names = ("models_beauty_first", "models_beauty_caser", "models_beauty")
    return _best_first({name: row for of in names for name, row in _model_rows(of).items()})


def models_beauty() -> str:
    """Amazon Beauty: every model in its recipe, and baselines."""
    return _model_table(_beauty_rows())


def models_ml1m() -> str:
    """MovieLens-1M with imputed timestamps: every model for few epochs, at one rate for nearly all, and baselines."""
    return _model_table(_best_first(_model_rows("models_ml1m_imputed_timestamps")))


def models() -> str:
    """Three logs: causal models with a seen bias, the causal TiM4Rec without, baselines, models of other libraries."""
    first = _model_rows("models_ml100k_seen_bias")
    plain = "`tim4rec_causal`"
    first |= {plain: _model_rows("models_ml100k")[plain]} | _anchor_rows()
    logs = {
        "MovieLens-100K": first,
        "Beauty": _beauty_rows(),
        "MovieLens-1M (imputed timestamps)": _model_rows("models_ml1m_imputed_timestamps"),
    }
    shown = [0, 1, 3]
    head = [f"{log} {part}" for log in logs for part in (*_QUALITIES, "ndcg@10, seen excluded")]
    rows = [[name, *(rows[name][i] if name in rows else "" for rows in logs.values() for i in shown)] for name in first]
    return markdown(["", *head], rows)


def time_branch() -> str:
    """Amazon Beauty: the causal TiM4Rec with time and without, by leaving one out and by a temporal split."""
    splits = {"leave one out": "time_branch_beauty", "temporal split": "time_branch_beauty_temporal"}
    names = ["`tim4rec_causal` + seen bias", "`ssd4rec` + seen bias", "item-kNN"]
    found = {split: _model_rows(name) for split, name in splits.items()}
    heads = ["with time", "time off (`ssd4rec`)", "item-kNN"]
    return markdown(["", *heads], [[split, *(rows[name][1] for name in names)] for split, rows in found.items()])


def _run_row(shown: str, name: str) -> list[str]:
    results = record(name)["results"]
    epochs = f"{results['best_epoch']} of {results['epochs']}"
    return [f"{shown} ([run]({name}.json))", *(fraction(results["test"][m]) for m in AT_10), epochs]


def beauty_runs() -> str:
    """Amazon Beauty to early stop, beside the original program."""
    original = {row.model: row for row in PUBLISHED["beauty"] if "original program" in row.source}
    rows = [_run_row("TiM4Rec, this library", "beauty_tim4rec")]
    rows.append(_original_row("TiM4Rec", original["TiM4Rec"]))
    rows.append(_run_row("time off, this library", "beauty_tim4rec_time_off"))
    rows.append(_original_row("time off", original["TiM4Rec, time off"]))
    rows.append(_popularity_row("beauty_tim4rec"))
    return markdown(["", *AT_10, "best epoch"], rows)


def _original_row(shown: str, row: Any) -> list[str]:
    epochs = row.source.rpartition(", ")[2]
    return [f"{shown}, the original PyTorch program", *(fraction(row.metrics[m]) for m in AT_10), epochs]


def _popularity_row(name: str) -> list[str]:
    return ["popularity", *(fraction(record(name)["results"]["baselines"]["popularity"][m]) for m in AT_10), ""]


def ml100k_runs() -> str:
    """MovieLens-100K to early stop."""
    rows = [_run_row("TiM4Rec", "ml100k_tim4rec"), _run_row("time off", "ml100k_tim4rec_time_off")]
    return markdown(["", *AT_10, "best epoch"], [*rows, _popularity_row("ml100k_tim4rec")])


def baselines() -> str:
    """Counting baselines on two logs."""
    logs = {"ml-100k": "MovieLens-100K", "beauty": "Amazon Beauty"}
    models = {"Markov": "item-to-item Markov chain", "item-kNN": "item-kNN", "popularity": "popularity"}
    found = {log: [record("baselines")[log], record("baselines")[log]["seen_excluded"]] for log in logs}
    return markdown(
        ["", *AT_10, *(f"{m}, seen excluded" for m in AT_10)],
        [
            [f"{shown}, {model}", *(fraction(one["metrics"][name][m]) for one in found[log] for m in AT_10)]
            for log, shown in logs.items()
            for name, model in models.items()
        ],
    )


# Trainings of `ml1m_tim4rec_causal`, and the same measured with seen items excluded where the run does not say it.
_QUALITY = {
    "ml1m_imputed_timestamps_tim4rec_causal": None,
    "ml1m_imputed_timestamps_seen_bias": "ml1m_imputed_timestamps_seen_bias_excluded",
    "ml1m_imputed_timestamps_seen_bias_window_context_50": None,
    "ml1m_imputed_timestamps_seen_bias_rate_8e-3": None,
    "ml1m_imputed_timestamps_seen_bias_d128": "ml1m_imputed_timestamps_seen_bias_d128_excluded",
    "ml1m_imputed_timestamps_seen_bias_d128_4_layers": None,
    "ml1m_imputed_timestamps_seen_bias_d128_4_layers_dropout_3": None,
    "ml1m_imputed_timestamps_seen_bias_d128_4_layers_rate_2e-3": None,
}
_AFTER = (1, 2, 3, 5, 10)


def quality_ml1m() -> str:
    """Trainings of the causal model on MovieLens-1M with imputed timestamps: settings, validation, test."""
    rows = []
    for name, excluded in _QUALITY.items():
        run = record(name)
        model, train, epochs = run["config"]["model"], run["config"]["train"], run["epochs"]
        best = run["results"]["best_epoch"]
        other = record(excluded)["metrics"] if excluded else run["results"].get("test_seen_excluded", {})
        tests = [values.get(m) for values in (run["results"]["test"], other) for m in ("hit@10", "ndcg@10")]
        rows.append(
            [
                f"[run]({name}.json)",
                f"{model['d_model']}, {model['num_layers']}, {model['dropout']:g}",
                f"{train['batch_size']} at {train['learning_rate']:g}",
                "yes" if model.get("seen_bias") else "no",
                *(fraction(epochs[n - 1]["ndcg@10"]) for n in _AFTER),
                f"{fraction(epochs[best - 1]['ndcg@10'])} ({best} of {len(epochs)})",
                *map(fraction, tests),
            ]
        )
    validation = [f"valid ndcg@10 after {_AFTER[0]}", *map(str, _AFTER[1:]), "best (epoch)"]
    tests = ["test hit@10", "ndcg@10", "hit@10, seen excluded", "ndcg@10, seen excluded"]
    return markdown(["", "width, layers, dropout", "rows, rate", "seen bias", *validation, *tests], rows)


def quickstart() -> str:
    """The log that quickstart makes."""
    results, columns = record("quickstart")["results"], ("hit@1", "hit@5", "ndcg@10")
    off = next(name for name in results["baselines"] if "time off" in name)
    rows = {"TiM4Rec": results["test"], "the same with time off": results["baselines"][off]}
    rows["popularity"] = results["baselines"]["popularity"]
    return markdown(
        ["", *columns], [[name, *(fraction(values[m], 3) for m in columns)] for name, values in rows.items()]
    )


def _beside_pytorch(found: dict[str, Any], names: dict[str, str], head: str, seconds: str, digits: int) -> str:
    """A record of `benchmark train_step`: what is shown of each form, its seconds under a name, and PyTorch's ratio."""
    over = {"pytorch": 1.0} | found["pytorch_over"]
    rows = [[shown, f"{found[seconds][name]:.{digits}f}", f"{over[name]:.1f}"] for name, shown in names.items()]
    return markdown(["form", head, "PyTorch / this"], rows)


def step_forms() -> str:
    """A training step's forms against PyTorch."""
    found = record("benchmark_train_step_beauty")
    names = {
        "pytorch": "our PyTorch model, padded",
        "padded": "every layer at every position",
        "read_positions": "the last layer only where it is read",
        "grouped": "and rows of like length together (the default)",
    }
    return _beside_pytorch(found, names, "seconds per step", "median_seconds", 2)


def packed_step() -> str:
    """An epoch at every position: as trained, a device per core, without the seen bias, PyTorch."""
    found = record("benchmark_packed_step_ml1m_imputed_timestamps")
    names = {
        "pytorch": "our PyTorch model without time and seen bias",
        "without_seen_bias": "without seen bias",
        "one_device": "as the experiment trains",
        "all_devices": "a device per core",
    }
    other, seconds = found["rectools_sasrec"], found["epoch_seconds"]
    share = other["targets_per_epoch"] / found["targets_per_epoch"]
    names |= {"rectools": f"SASRec of RecTools, for {share:.0%} of the targets"}
    over = found["pytorch_over"] | {"rectools": seconds["pytorch"] / other["epoch_seconds"]}
    found = found | {"epoch_seconds": seconds | {"rectools": other["epoch_seconds"]}, "pytorch_over": over}
    return _beside_pytorch(found, names, "seconds per epoch", "epoch_seconds", 1)


def operators_on_cpu() -> str:
    """The plain-JAX operators against others."""
    others = {"PyTorch, chunked": "chunked PyTorch", "PyTorch, loop": "PyTorch loop", "lax.scan": "`lax.scan`"}
    rows = []
    for found in record("benchmark_ops")["comparisons"]:
        best: dict[str, float] = {}
        for name, seconds in found["median_seconds"].items():
            short = name.partition(" / ")[0]
            best[short] = min(best.get(short, seconds), seconds)
        mine = best.pop(f"kernels.{found['op']}")
        ratios = ", ".join(f"{others.get(name, name)} {seconds / mine:.1f}x" for name, seconds in best.items())
        rows.append([f"`{found['op']}`, {found['batch']} rows of {found['length']}", f"{1000 * mine:.0f} ms", ratios])
    return markdown(["operator", "this", "time of others / this"], rows)


def forward_and_backward(comparison: dict[str, Any]) -> dict[str, Any]:
    """Returns what a comparison on a GPU says of value and gradients together, by whose it is."""
    return {name.partition(":")[0]: form for name, form in comparison["forms"].items() if "forward_backward" in name}


def speed() -> str:
    """Training on a CPU and the SSD on a GPU, each with what it is measured beside."""
    step = record("benchmark_train_step_beauty")
    epoch = record("benchmark_packed_step_ml1m_imputed_timestamps")
    per_target = 1e6 * epoch["epoch_seconds"]["one_device"] / epoch["targets_per_epoch"]
    rectools = epoch["rectools_sasrec"]["microseconds_per_target"] / per_target
    rows = [
        [
            f"epoch of `{epoch['config']}`, MovieLens-1M with imputed timestamps, two CPU cores "
            "([run](experiments/results/benchmark_packed_step_ml1m_imputed_timestamps.json))",
            f"{epoch['epoch_seconds']['one_device']:.1f} s",
            f"our PyTorch model without time and seen bias: {epoch['pytorch_over']['one_device']:.1f}x; "
            f"SASRec of RecTools, per target: {rectools:.1f}x",
        ],
        [
            f"training step of `beauty_tim4rec`, batch {step['batch_size']}, two CPU cores "
            "([run](experiments/results/benchmark_train_step_beauty.json))",
            f"{step['median_seconds']['grouped']:.2f} s",
            f"our PyTorch model, padded as the original program is: {step['pytorch_over']['grouped']:.1f}x",
        ],
    ]
    for one in record("gpu_h100_ops")["ops"]["comparisons"]:
        forms, sizes = forward_and_backward(one), one["sizes"]
        if (one["op"], one["precision"], sizes.get("l"), sizes.get("p")) != ("ssd", "tfloat32", 200, 32):
            continue  # The other shapes stand in kernels/README.md.
        mine = forms["pallas_triton"]["median_seconds"]
        rows.append(
            [
                f"SSD forward and backward, TF32, {sizes['b']:,} rows of {sizes['l']}, "
                f"{sizes['h']} heads of {sizes['p']}, state {sizes['n']}, one H100 "
                "([run](experiments/results/gpu_h100_ops.json))",
                f"{1e3 * mine:.2f} ms",
                f"plain JAX: {forms['xla']['median_seconds'] / mine:.1f}x",
            ]
        )
    return markdown(["", "this", "time of others / this"], rows)


def operators_on_h100() -> str:
    """The kernels on one H100, forward and backward."""
    wanted = [
        ("ssd", "tfloat32", (50, 32)),
        ("ssd", "tfloat32", (200, 32)),
        ("ssd", "tfloat32", (200, 128)),
        ("causal_conv1d", "float32", (50, None)),
        ("causal_conv1d", "float32", (200, None)),
        ("selective_scan", "float32", (200, None)),
        ("softmax_cross_entropy", "tfloat32", (None, None)),
    ]
    found = {
        (one["op"], one["precision"], (one["sizes"].get("l"), one["sizes"].get("p"))): one
        for one in record("gpu_h100_ops")["ops"]["comparisons"]
    }
    rows = []
    for key in wanted:
        one = found[key]
        forms = forward_and_backward(one)
        mine = forms["pallas_triton"]
        others = [forms.get("xla"), forms.get("PyTorch, graph") or forms.get("PyTorch")]
        ratios = [f"{other['median_seconds'] / mine['median_seconds']:.1f}x" if other else "" for other in others]
        shape = " ".join(f"{axis}{size:,}" for axis, size in one["sizes"].items())
        microseconds, share = f"{1e6 * mine['median_seconds']:,.0f}", f"{100 * mine['fraction_of_floor']:.0f} %"
        rows.append([f"`{one['op']}`", shape, microseconds, *ratios, share])
    return markdown(
        ["operator", "shape", "kernels, us", "plain JAX takes", "PyTorch takes", "share of the floor"], rows
    )


def kernel_model() -> str:
    """What a model says of the compiled kernels, beside times on one H100."""
    found = record("kernel_model")
    rows = []
    for one in found["rows"]:
        if not one["default"]:
            continue
        shape = " ".join(f"{axis}{size:,}" for axis, size in one["sizes"].items())
        gluon = " in Gluon" if one["backend"] == "gluon" else ""
        name = f"`{one['op']}`{gluon} {shape}, {one['pass'].replace('_', ' and ')}"
        measured, predicted = one["measured_seconds"], one["predicted_seconds"]
        kernels = one["kernels"]
        rows.append(
            [
                name,
                one["unit"],
                *(
                    ", ".join(f"{kernel[key]:.{digits}f}" for kernel in kernels)
                    for key, digits in [
                        ("instructions_per_unit", 0),
                        ("memory_cycles_per_unit", 0),
                        ("registers", 0),
                        ("stack_bytes", 0),
                    ]
                ),
                f"{1e6 * predicted:,.0f}",
                f"{1e6 * measured:,.0f}" if measured else "",
                f"{100 * one['predicted_share_of_floor']:.0f} %",
                f"{100 * one['floor_seconds'] / measured:.0f} %" if measured else "",
            ]
        )
    return markdown(
        ["kernels", "per", "instructions", "memory-pipe cycles", "registers", "stack, B"]
        + ["predicted us", "measured us", "predicted share of the floor", "measured"],
        rows,
    )


TABLES: dict[str, Callable[[], str]] = {
    function.__name__: function
    for function in (
        models,
        models_ml100k,
        models_beauty,
        models_ml1m,
        time_branch,
        all_positions,
        beauty_runs,
        ml100k_runs,
        baselines,
        quality_ml1m,
        quickstart,
        step_forms,
        packed_step,
        operators_on_cpu,
        operators_on_h100,
        kernel_model,
        speed,
    )
}
_REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """Returns a document with its tables as the records have them.

    Raises:
      KeyError: a table that nobody makes.
    """
    return _REGION.sub(lambda found: f"{found[1]}{TABLES[found[2]]()}\n{found[3]}", text)


def measured() -> str:
    """Returns the module from which operators take their default on a GPU: times of the kernels in the records."""
    rows = []
    for name in sorted(path.stem for path in RESULTS.glob("gpu_*_ops.json")):
        for one in record(name)["ops"]["comparisons"]:
            forms = {whose: f"{1e6 * form['median_seconds']:.0f}" for whose, form in forward_and_backward(one).items()}
            times = ", ".join(
                f'"{whose}": {forms[whose]}' for whose in sorted(forms) if whose in BACKENDS.get(one["op"], ())
            )
            sizes = ", ".join(f'"{axis}": {size}' for axis, size in one["sizes"].items())
            if one["op"] in BACKENDS:
                fields = [f'"{one["op"]}"', f'"{one["precision"]}"', f"{{{sizes}}}", f"{{{times}}}", f'"{name}"']
                rows.append("".join(["    (\n", *(f"        {field},\n" for field in fields), "    ),\n"]))
    return MEASURED_MODULE.replace("ROWS_OF_RECORDS", "".join(rows))


def main() -> None:
    """Rewrites the documents, and the module of measured times."""
    for document in DOCUMENTS:
        document.write_text(filled(document.read_text()))
    MEASURED.write_text(measured())


if __name__ == "__main__":
    main()
