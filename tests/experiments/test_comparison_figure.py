"""A comparison's figure without names over each other, and its table for LaTeX."""

import itertools
import re

import numpy as np
import pytest
from matplotlib.text import Annotation
from matplotlib.transforms import Bbox

from experiments.comparison.latex import escaped, latex
from experiments.comparison.report import make_figure

NAMES = ("tim4rec", "tim4rec_causal", "ssd4rec", "mamba4rec", "echomamba4rec", "sasrec", "tisasrec", "gru4rec")


def _numbers(means, seconds, names=NAMES, metrics=("hit@10", "ndcg@10", "mrr@10")):
    """Rows best first, the last of all untrained."""

    def spread(value):
        return {"mean": value, "deviation": 0.001, "per_seed": [value - 0.0005, value + 0.0005]}

    rows = [
        {
            "name": name,
            "trained": True,
            "seeds": [1, 2],
            "metrics": {metric: spread(mean) for metric in metrics},
            "against_best": {metric: {"p_holm": 0.0005 if i > 4 else 0.01 if i > 2 else 0.5} for metric in metrics},
            "runs": [{"seconds_per_epoch": of_one}],
        }
        for i, (name, mean, of_one) in enumerate(zip(names, means, seconds, strict=True))
    ]
    rows[0]["against_best"] = dict.fromkeys(metrics)
    counted = rows[-1] | {"name": "popularity", "trained": False, "seeds": [], "runs": []}
    counted["metrics"] = {metric: {"mean": 0.01, "deviation": None, "per_seed": [0.01]} for metric in metrics}
    return {
        "rows": [*rows, counted],
        "metric": "ndcg@10",
        "best": dict.fromkeys(metrics, names[0]),
        "seeds": [1, 2],
        "data": {"name": "ml-100k", "users": 943, "items": 1349, "rows": 99_287},
        "protocol": "full ranking, 100% of items",
    }


def _boxes(panel):
    labels = [child for child in panel.get_children() if isinstance(child, Annotation) and child.get_text()]
    return {label.get_text(): label.get_window_extent() for label in labels}


@pytest.mark.parametrize("spacing", [0.0, 1e-6, 1e-4, 2e-3])
@pytest.mark.parametrize("copies", [1, 3])
def test_no_name_is_printed_over_another(spacing, copies):
    """Eight and twenty-four models whose points lie on each other, or nearly."""
    names = tuple(f"{name}{'' if copy == 0 else copy}" for copy in range(copies) for name in NAMES)
    means = 0.06 - spacing * np.arange(len(names))
    figure = make_figure(_numbers(means, 3.0 + 100 * spacing * np.arange(len(names)), names))
    figure.canvas.draw()
    panel = figure.axes[3]
    boxes, inside = _boxes(panel), panel.get_window_extent()
    assert set(boxes) == set(names)
    for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not box.overlaps(second), f"{one} over {other}"
    for name, box in boxes.items():
        assert inside.x0 <= box.x0 and box.x1 <= inside.x1 and inside.y0 <= box.y0 and box.y1 <= inside.y1, name
    points = panel.transData.transform([(3.0 + 100 * spacing * i, mean) for i, mean in enumerate(means)])
    for x, y in points:
        assert not any(box.overlaps(Bbox.from_bounds(x - 2, y - 2, 4, 4)) for box in boxes.values())
    for rows in (figure.axes[0].get_yticklabels(), [axes.title for axes in figure.axes] + [figure._suptitle]):
        drawn = [text.get_window_extent() for text in rows if text.get_text()]
        assert drawn and not any(a.overlaps(b) for a, b in itertools.combinations(drawn, 2))


def test_the_check_sees_names_over_each_other():
    figure = make_figure(_numbers([0.06] * 8, [3.0] * 8))
    for label in figure.axes[3].texts:
        label.set_position((4, 4))
    figure.canvas.draw()
    assert any(a.overlaps(b) for a, b in itertools.combinations(_boxes(figure.axes[3]).values(), 2))


def test_latex_by_hand():
    numbers = _numbers([0.0614, 0.0601, 0.06, 0.0599, 0.0598, 0.05], [1.0] * 6, NAMES[:6])
    numbers["rows"][0]["metrics"]["coverage@10"] = {"mean": 0.5, "deviation": None, "per_seed": [0.5]}
    table = latex(numbers)
    lines = {line.split(" & ")[0]: line for line in table.splitlines() if " & " in line}
    assert lines["Model"] == r"Model & hit@10 & ndcg@10 & mrr@10 & coverage@10 \\"
    assert lines["tim4rec"].startswith(r"tim4rec & \textbf{0.0614} $\pm$ 0.0010 &") and lines["tim4rec"].endswith(
        r"0.5000 \\"
    )
    assert r"\underline{0.0601} $\pm$ 0.0010 &" in lines[r"tim4rec\_causal"]
    assert (
        r"0.0599 $\pm$ 0.0010$^{\dagger}$" in lines["mamba4rec"]
        and r"0.0500 $\pm$ 0.0010$^{\ddagger}$" in lines["sasrec"]
    )
    assert table.count(r"\textbf") == table.count(r"\underline") == 3
    assert lines["popularity"].endswith(r"& -- \\")
    lines.pop("")
    assert all(len(line.split(" & ")) == 5 for line in lines.values()) and r"\begin{tabular}{lrrrr}" in table
    assert [rule for rule in re.findall(r"\\(\w+)rule", table)] == ["top", "cmid", "mid", "mid", "bottom"]


def test_latex_shows_both_protocols():
    numbers = _numbers([0.0614, 0.0601], [1.0] * 2, NAMES[:2])
    other = _numbers([0.09, 0.1], [1.0] * 2, NAMES[:2])
    numbers |= {"main_protocol": "all_items"}
    best = dict.fromkeys(numbers["best"], NAMES[1])
    numbers |= {"seen_excluded": {"protocol": "seen items excluded", "best": best, "rows": other["rows"]}}
    table = latex(numbers)
    assert r" & \multicolumn{3}{c}{all items} & \multicolumn{3}{c}{seen excluded} \\" in table
    assert r"\cmidrule(lr){2-4} \cmidrule(lr){5-7}" in table and r"\begin{tabular}{lrrrrrr}" in table
    line = next(line for line in table.splitlines() if line.startswith("tim4rec &"))
    cells = line.split(" & ")
    assert cells[1].startswith(r"\textbf{0.0614}") and cells[4].startswith(r"\underline{0.0900}")
    opened, closed = (re.findall(rf"\\{word}{{(\w+)}}", table) for word in ("begin", "end"))
    assert opened == closed[::-1] and table.count("{") - table.count(r"\{") == table.count("}") - table.count(r"\}")
    assert r"100\% of items" in table


def test_what_latex_reads_as_a_command_is_escaped():
    assert escaped(r"a_b & 50% #1 {x} ~ ^ \ $") == (
        r"a\_b \& 50\% \#1 \{x\} \textasciitilde{} \textasciicircum{} \textbackslash{} \$"
    )
