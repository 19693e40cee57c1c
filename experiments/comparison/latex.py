"""A comparison's table for LaTeX, in the form of the package booktabs."""

from collections.abc import Mapping
from typing import Any

from experiments.comparison.numbers import both_protocols, protocols_told, significance_level
from tim4rec_jax.evaluation.seen_targets import TITLES

# Marks of a difference to the best, by `significance_level`.
_MARKS = ("", r"$^{\dagger}$", r"$^{\ddagger}$")
_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}


def escaped(text: str) -> str:
    """Returns a text as LaTeX prints it."""
    return "".join(_SPECIAL.get(c, f"\\{c}" if c in "&%$#_{}" else c) for c in text)


def _cell(row: Mapping[str, Any], metric: str, best: str | None, second: str | None) -> str:
    spread = row["metrics"].get(metric)
    if spread is None:
        return "--"
    mean = f"{spread['mean']:.4f}"
    if row["name"] == best:
        mean = rf"\textbf{{{mean}}}"
    elif row["name"] == second:
        mean = rf"\underline{{{mean}}}"
    deviation = "" if spread["deviation"] is None else rf" $\pm$ {spread['deviation']:.4f}"
    return f"{mean}{deviation}{_MARKS[significance_level(row, metric)]}"


def _seconds(found: Mapping[str, Any]) -> dict[str, str | None]:
    """The second best row by each metric, under one protocol."""
    seconds = {}
    for metric, best in found["best"].items():
        others = [row for row in found["rows"] if row["name"] != best]
        ordered = sorted(others, key=lambda row, metric=metric: -row["metrics"][metric]["mean"])
        seconds[metric] = ordered[0]["name"] if ordered else None
    return seconds


def latex(numbers: Mapping[str, Any]) -> str:
    """Returns the comparison as a LaTeX table; needs the package booktabs.

    Args:
      numbers: from `numbers.collect`.
    """
    rows, data, both = numbers["rows"], numbers["data"], both_protocols(numbers)
    metrics = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    lines = [[escaped(row["name"])] for row in rows]
    for found in both.values():
        best, seconds = found["best"], _seconds(found)
        for line, row in zip(lines, found["rows"], strict=True):
            line += [_cell(row, metric, best.get(metric), seconds.get(metric)) for metric in metrics]
    heads = [rf"\multicolumn{{{len(metrics)}}}{{c}}{{{TITLES[name]}}}" for name in both]
    rules = [rf"\cmidrule(lr){{{2 + i * len(metrics)}-{1 + (i + 1) * len(metrics)}}}" for i in range(len(both))]
    trained = [" & ".join(line) + r" \\" for line, row in zip(lines, rows, strict=True) if row["trained"]]
    counted = [" & ".join(line) + r" \\" for line, row in zip(lines, rows, strict=True) if not row["trained"]]
    seeds = ", ".join(map(str, numbers["seeds"]))
    caption = (
        f"{escaped(data['name'])}: {data['users']:,} users, {data['items']:,} items, {data['rows']:,} interactions; "
        f"{escaped(protocols_told(numbers))}; mean and standard deviation over seeds {seeds}. "
        r"Bold is the best, underlined the second; $\dagger$ and $\ddagger$ lie behind the best with $p < 0.05$ and "
        "$p < 0.001$ (two-sided paired sign-flip test over users, Holm-corrected)."
    )
    return "\n".join(
        [
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{''.join(c if c.isalnum() else '-' for c in data['name'])}}}",
            rf"\begin{{tabular}}{{l{'r' * len(metrics) * len(both)}}}",
            r"\toprule",
            " & ".join(["", *heads]) + r" \\",
            " ".join(rules),
            " & ".join(["Model", *map(escaped, metrics * len(both))]) + r" \\",
            r"\midrule",
            *trained,
            *([r"\midrule"] if trained and counted else []),
            *counted,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
