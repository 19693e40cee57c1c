"""A comparison's numbers as Markdown, as JSON and as a figure."""

import pathlib
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.cli import markdown_table, note, write_json
from experiments.comparison.labels import place_labels
from experiments.comparison.latex import latex
from experiments.comparison.numbers import both_protocols, protocols_told, significance_level
from experiments.comparison.plan import Plan
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, TITLES
from tim4rec_jax.figures import HINT, can_draw, new_figure
from tim4rec_jax.files import replacing, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MARKS = ("", " †", " ‡")
NOTHING = "–"
_BUDGET = ("epochs", "max_steps", "patience", "batch_size", "learning_rate", "schedule", "loss")


def _measured(numbers: Mapping[str, Any], k: str) -> list[str]:
    """Names of the metrics of lists of a length."""
    names = dict.fromkeys(name for row in numbers["rows"] for name in row["metrics"])
    return [name for name in names if name.split("@")[1] == k]


def _value(row: Mapping[str, Any], metric: str, best: str | None) -> str:
    """One cell: the mean, bold for the best, its deviation over seeds and the mark of its difference to the best."""
    if metric not in row["metrics"]:
        return NOTHING
    spread = row["metrics"][metric]
    mean = f"**{spread['mean']:.4f}**" if row["name"] == best else f"{spread['mean']:.4f}"
    deviation = "" if spread["deviation"] is None else f" ± {spread['deviation']:.4f}"
    return f"{mean}{deviation}{_MARKS[significance_level(row, metric)]}"


def _costs(row: Mapping[str, Any]) -> list[str]:
    """Parameters, seconds per epoch and in all, peak memory in MiB, best epochs; nothing for what is not trained."""
    runs = row["runs"]
    if not runs:
        return [NOTHING] * 5
    peak = max(run["peak_device_bytes"] or run["peak_resident_bytes"] for run in runs)
    seconds = statistics.median(run["seconds_per_epoch"] for run in runs)
    total = statistics.median(run["train_seconds"] for run in runs)
    best = ", ".join(f"{run['best_epoch']} of {run['epochs']}" for run in runs)
    return [f"{runs[0]['parameters']:,}", f"{seconds:.3g}", f"{total:,.0f}", f"{peak / 2**20:,.0f}", best]


def _budget(numbers: Mapping[str, Any]) -> list[str]:
    """Says what all models were given, and where they differ."""
    settings = numbers["settings"]
    own = settings["differ_by_model"]
    shared = next(iter(settings["by_model"].values()))["train"]
    shown = [name for name in _BUDGET if f"train.{name}" not in own and shared[name] is not None]
    budget = ", ".join(f"{name} {shared[name]}" for name in shown)
    given = ", ".join(f"`{path}={value}`" for path, value in settings["given"].items()) or "none"
    lines = [f"One budget for all: {budget}. Settings given for all models: {given}.", ""]
    for path, values in own.items():
        each = ", ".join(f"{model} {value}" for model, value in values.items())
        lines += [f"**Not the same for all models**: `{path}`: {each}.", ""]
    return lines


def _of_knn(numbers: Mapping[str, Any]) -> str:
    found = numbers.get("item_knn")  # Earlier comparisons have none.
    return f", k {found['k']} and shrinkage {found['shrinkage']:g} chosen on validation." if found else "."


def _footnotes(numbers: Mapping[str, Any]) -> list[str]:
    runs = [run for row in numbers["rows"] for run in row["runs"]]
    machines = sorted({f"{run['device_kind']}, {run['cpus_allowed']} of {run['cpu_count']} processors" for run in runs})
    on_device = any(run["peak_device_bytes"] for run in runs)
    dirty = " with local changes" if numbers["git_dirty"] else ""
    lines = [
        "Mean ± standard deviation over seeds. **Bold** is the best of a column; † and ‡ lie behind it with p < 0.05 "
        "and p < 0.001: two-sided paired sign-flip test over users, a user's metric averaged over seeds, "
        "Holm-corrected for the rows of the column; p alone is at least 1 / 10,000. The test speaks of other users, "
        "not of other seeds; the best is picked on the same users. Markov: what most often directly followed the last "
        "item, then popularity. Item-kNN: the sum of shrunk cosines to the items of the history" + _of_knn(numbers),
        "",
        "Seconds per epoch: median over epochs of training alone, without validation; in all: of a whole run, the "
        "median over seeds. Peak memory: of the "
        f"{'device' if on_device else 'process, compilation included'}. Trained on: {'; '.join(machines)}. "
        f"Code: {', '.join(commit[:12] for commit in numbers['commits'])}{dirty}.",
        "",
    ]
    if len(machines) > 1:
        lines += ["The runs are from different machines: their seconds and memory are not comparable.", ""]
    if len(numbers["commits"]) > 1:
        lines += ["The runs are from different commits.", ""]
    if numbers.get("measured_under_one_protocol"):
        names = ", ".join(numbers["measured_under_one_protocol"])
        lines += [f"Runs of an earlier version were measured under one protocol, so this is the only one: {names}.", ""]
    if numbers["missing"]:
        runs_missing = ", ".join(f"{run['model']} seed {run['seed']}" for run in numbers["missing"])
        lines += [f"**Not finished, and not in these numbers**: {runs_missing}.", ""]
    return lines


def _published(numbers: Mapping[str, Any]) -> list[str]:
    lines = ["## Published", ""]
    if not numbers["published"]:
        return [*lines, "No numbers are known at this setting.", ""]
    printed = [metric for metric in numbers["best"] if any(metric in row["metrics"] for row in numbers["published"])]
    rows = [
        [row["model"], row["source"]]
        + [f"{row['metrics'][metric]:.4f}" if metric in row["metrics"] else NOTHING for metric in printed]
        for row in numbers["published"]
    ]
    caveat = "Printed by others: their preparation of the data, their protocol and their training budget may differ."
    return [*lines, caveat, "", *markdown_table(["model", "source", *printed], rows, left=2)]


def markdown(numbers: Mapping[str, Any]) -> str:
    """Returns the comparison as Markdown.

    Args:
      numbers: from `numbers.collect`.
    """
    data, rows = numbers["data"], numbers["rows"]
    first_k = numbers["metric"].split("@")[1]
    measured = {name for row in rows for name in row["metrics"]}
    lists = sorted({name.split("@")[1] for name in measured}, key=lambda k: (k != first_k, int(k)))
    lines = [
        f"# Models on {data['name']}",
        "",
        f"{data['users']:,} users, {data['items']:,} items, {data['rows']:,} interactions; {protocols_told(numbers)}; "
        f"seeds {', '.join(map(str, numbers['seeds']))}. {numbers['note']}".rstrip(),
        "",
        *_budget(numbers),
    ]
    both = both_protocols(numbers)
    for k in lists:
        columns = _measured(numbers, k)
        heads = [column if name == ALL_ITEMS else f"{column}, {TITLES[name]}" for name in both for column in columns]
        costs = ["seeds", "parameters", "s per epoch", "s in all", "peak MiB", "best epoch"] if k == first_k else []
        cells = [
            [row["name"]]
            + [_value(of["rows"][i], column, of["best"].get(column)) for of in both.values() for column in columns]
            + ([str(len(row["seeds"])) if row["trained"] else NOTHING, *_costs(row)] if costs else [])
            for i, row in enumerate(rows)
        ]
        lines += markdown_table(["model", *heads, *costs], cells)
    lines += _footnotes(numbers)
    metric = numbers["metric"]
    for name, found in both.items():
        against = [(row["name"], row["against_best"][metric]) for row in found["rows"] if row["against_best"][metric]]
        if against:
            beside = "" if name == ALL_ITEMS else f", {TITLES[name]}"
            lines += [f"## Behind {found['best'][metric]} in {metric}{beside}", ""]
            cells = [
                [
                    row,
                    f"{a['behind_by']:.4f}",
                    "{:.4f} to {:.4f}".format(*a["interval_95"]),
                    f"{a['p']:.4f}",
                    f"{a['p_holm']:.4f}",
                ]
                for row, a in against
            ]
            lines += markdown_table(["model", "by", "95 % interval (bootstrap over users)", "p", "p, Holm"], cells)
    return "\n".join(lines + _published(numbers))


def _quality_panel(panel: "Axes", rows: Sequence[Mapping[str, Any]], metric: str) -> None:
    for y, row in enumerate(rows):
        spread = row["metrics"][metric]
        if row["trained"]:
            panel.plot(spread["per_seed"], [y] * len(row["seeds"]), ".", color="tab:blue", alpha=0.5)
            panel.errorbar(spread["mean"], y, xerr=spread["deviation"] or 0.0, fmt="o", color="tab:blue", capsize=3)
        else:
            panel.plot(spread["mean"], y, "D", color="grey")
    panel.set(title=metric, yticks=range(len(rows)), yticklabels=[row["name"] for row in rows])
    panel.grid(alpha=0.3)


def _cost_panel(panel: "Axes", rows: Sequence[Mapping[str, Any]], metric: str) -> dict[str, tuple[float, float, float]]:
    """Draws the panel and returns where each row's point lies, and its deviation."""
    points = {}
    for row in (row for row in rows if row["trained"]):
        seconds = statistics.median(run["seconds_per_epoch"] for run in row["runs"])
        spread = row["metrics"][metric]
        panel.errorbar(seconds, spread["mean"], yerr=spread["deviation"] or 0.0, fmt="o", color="tab:blue", capsize=3)
        points[row["name"]] = seconds, spread["mean"], spread["deviation"] or 0.0
    panel.set(title="quality and time", xlabel="seconds per epoch", ylabel=metric)
    panel.margins(x=0.3, y=0.1)
    panel.grid(alpha=0.3)
    return points


def make_figure(numbers: Mapping[str, Any]) -> "Figure":
    """Draws hit, ndcg and mrr of every row with its seeds and their deviation, and quality beside training time.

    Args:
      numbers: from `numbers.collect`.
    """
    rows = numbers["rows"]
    k = numbers["metric"].split("@")[1]
    figure = new_figure(18, 1.5 + 0.45 * max(len(rows), 4), layout="constrained")
    panels = figure.subplots(1, 4)
    shown = [name for name in _measured(numbers, k) if name in numbers["best"]]
    shown = list(dict.fromkeys([*shown[:2], numbers["metric"], *shown[2:]]))[:3]
    for panel in panels[len(shown) : 3]:
        panel.set_visible(False)
    for panel, metric in zip(panels, shown, strict=False):
        _quality_panel(panel, rows, metric)
        panel.invert_yaxis()  # the best row on top
    for panel in panels[1:3]:
        panel.set_yticklabels([])
    points = _cost_panel(panels[3], rows, numbers["metric"])
    seeds = len(numbers["seeds"])
    figure.suptitle(f"{numbers['data']['name']}: {seeds} seeds, mean and standard deviation; grey: nothing trained")
    place_labels(panels[3], points)
    return figure


def write_report(plan: Plan, numbers: Mapping[str, Any]) -> list[pathlib.Path]:
    """Writes <output>.md, <output>.json, <output>.png and the table for LaTeX, if asked; returns their paths.

    Without matplotlib there is no figure.
    """
    text, data, figure = (plan.output.with_name(plan.output.name + suffix) for suffix in (".md", ".json", ".png"))
    written = [text, data]
    write_json(data, numbers)
    if can_draw():
        with replacing(figure) as temporary:
            make_figure(numbers).savefig(temporary, format="png", dpi=100)
        written.append(figure)
    else:
        note(f"{figure.name} is not drawn: {HINT}")
    write_atomically(text, markdown(numbers).encode())
    if plan.latex is not None:
        plan.latex.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(plan.latex, latex(numbers).encode())
        written.append(plan.latex)
    return written
