"""Numbers that others printed, each with its source, and ours beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich import box
from rich.table import Table

from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.splits import describe
from tim4rec_jax.evaluation.seen_targets import ALL_ITEMS, SEEN_EXCLUDED, TITLES, Protocol, describe_seen


@dataclass(frozen=True)
class Published:
    """One row of somebody's table: full ranking, leave one out, seen items not excluded.

    Attributes:
      model: the model's name.
      metrics: values by name, as far as they were printed.
      source: who printed them.
    """

    model: str
    metrics: dict[str, float]
    source: str


def _row(
    model: str, source: str, hit: float, ndcg: float | None = None, mrr: float | None = None, **more: float
) -> Published:
    at_10 = {"hit@10": hit, "ndcg@10": ndcg, "mrr@10": mrr}
    named = {name.replace("_", "@"): value for name, value in more.items()}
    return Published(model, {name: value for name, value in (at_10 | named).items() if value is not None}, source)


_PAPER = "TiM4Rec paper, arXiv 2409.16182"

PUBLISHED: dict[str, list[Published]] = {
    "ml-1m": [
        _row("Mamba4Rec, 1 layer", "Mamba4Rec paper, arXiv 2403.03900", 0.3121, 0.1822, 0.1425),
        _row("Mamba4Rec, 2 layers", "rerun by the TiM4Rec authors", 0.3253),
        _row("SIGMA", "an independent rerun", 0.3083, 0.1814, 0.1424),
    ],
    "beauty": [
        _row("Mamba4Rec, 1 layer", "rerun by the TiM4Rec author", 0.0734, 0.0431, 0.0340),
        _row("TiM4Rec, time off", "the original program, seed 2020, 33 epochs", 0.0771, 0.0362, 0.0237),
        _row(
            "TiM4Rec",
            "the original program, seed 2020, best of 37 epochs",
            0.0779,
            0.0369,
            0.0243,
            hit_20=0.1154,
            hit_50=0.1781,
            ndcg_20=0.0463,
            ndcg_50=0.0587,
        ),
    ],
    "kuairand": [
        _row("SASRec", _PAPER, 0.1055, 0.0584, 0.0443),
        _row("TiSASRec", _PAPER, 0.1057, 0.0590, 0.0450),
        _row("SSD4Rec", _PAPER, 0.1055, 0.0588, 0.0449),
        _row("Mamba4Rec", _PAPER, 0.1094, 0.0608, 0.0461),
        _row("TiM4Rec", "an independent rerun, one seed", 0.1053, 0.0598),
        _row("TiM4Rec", _PAPER, 0.1109, 0.0611, 0.0463),
    ],
}


def final_tables(
    config: ExperimentConfig,
    rows: Sequence[tuple[str, Mapping[Protocol, Mapping[str, float]], str]],
    seen_target_share: float | None,
) -> list[Table]:
    """Returns our numbers and published ones, a row for each protocol, a table for each list length.

    Args:
      config: settings of the run.
      rows: name, metrics by protocol, and source of each.
      seen_target_share: of the targets that their user had had before.
    """
    if config.data.split == "leave_one_out":  # What is published here belongs to that protocol.
        published = PUBLISHED.get(config.data.name, [])
        rows = [*rows, *((row.model, {ALL_ITEMS: row.metrics}, row.source) for row in published)]
    seen = describe_seen(config.eval, SEEN_EXCLUDED, seen_target_share)
    protocols = {one for _, found, _ in rows for one in found}
    protocol = f"{describe(config.data)}, " if config.data.split != "leave_one_out" else ""
    tables = []
    for k in dict.fromkeys(name.partition("@")[2] for name in config.eval.measures):
        columns = [name for name in config.eval.measures if name.endswith(f"@{k}")]
        beside = f"; seen items {seen}" if SEEN_EXCLUDED in protocols else ""
        table = Table(title=f"{config.name}: test, {protocol}full ranking{beside}", box=box.SIMPLE_HEAD)
        table.add_column("model")
        table.add_column("ranked")
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("source")
        for name, found, source in rows:
            for one, metrics in found.items():
                if any(column in metrics for column in columns):
                    cells = (f"{metrics[c]:.4f}" if c in metrics else "–" for c in columns)
                    table.add_row(name, TITLES[one], *cells, source)
        tables.append(table)
    return tables
