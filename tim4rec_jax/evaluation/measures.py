"""The metrics by name, how others join them, and what they measure of the lists of an evaluation."""

import dataclasses
import difflib
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from tim4rec_jax.checks import require
from tim4rec_jax.evaluation import metrics
from tim4rec_jax.outside import import_outside, importable_name

# Lists whose metrics are computed at once: what they need beside one number per list stays small.
_LISTS_AT_ONCE = 2**14


@dataclasses.dataclass(frozen=True)
class RankedLists:
    """Recommendation lists, and where what is relevant to them stands.

    Attributes:
      ranks: [t] ranks of the relevant items, from 1.
      lists: [t] int, which list each rank is of, ascending; None: list i has rank i alone.
      items: int32 [n, k] the items at the top, best first, 0 where a list is shorter; None where no metric asks.
      information: float64 [v] self-information of the items, see `metrics.self_information`; None where none asks.
      directions: float64 [v, d] the items' embeddings at length 1, row 0 the padding; None where none asks.
      num_items: of the catalogue.
    """

    ranks: np.ndarray
    lists: np.ndarray | None = None
    items: np.ndarray | None = None
    information: np.ndarray | None = None
    directions: np.ndarray | None = None
    num_items: int = 0

    @property
    def starts(self) -> np.ndarray:
        """Where each list's ranks begin, int [n]."""
        if self.lists is None:
            return np.arange(len(self.ranks))
        return np.flatnonzero(np.diff(self.lists, prepend=self.lists[:1] - 1))

    def top(self, k: int) -> np.ndarray:
        """Returns the first k items of every list, int32 [n, k], 0 where a list is shorter."""
        assert self.items is not None, "register the metric with reads_items=True"
        return self.items[:, :k]


ListMetric = Callable[[RankedLists, int], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Metric:
    """One kind of metric.

    Attributes:
      values: of lists and k, one float64 per list, whose mean is the metric; None for coverage, which is of all lists.
      reads: "items" at the top of lists, and beside them "information" or "directions", as `RankedLists` has them.
      module: whose import registers it; None for the library's own.
    """

    values: ListMetric | None
    reads: tuple[str, ...] = ()
    module: str | None = None


def _of_ranks(of: Callable[..., np.ndarray]) -> Metric:
    return Metric(lambda lists, k: of(lists.ranks, k, lists.lists))


def _novelty(lists: RankedLists, k: int) -> np.ndarray:
    assert lists.information is not None
    return metrics.novelty(lists.top(k), lists.information)


def _diversity(lists: RankedLists, k: int) -> np.ndarray:
    assert lists.directions is not None
    return metrics.diversity(lists.top(k), lists.directions)


METRICS: dict[str, Metric] = {
    "hit": _of_ranks(metrics.hit),
    "ndcg": _of_ranks(metrics.ndcg),
    "mrr": _of_ranks(metrics.mrr),
    "recall": _of_ranks(metrics.recall),
    "precision": _of_ranks(metrics.precision),
    "map": _of_ranks(metrics.mean_average_precision),
    "coverage": Metric(None, ("items",)),
    "novelty": Metric(_novelty, ("items", "information")),
    "diversity": Metric(_diversity, ("items", "directions")),
}


def register_metric(name: str, values: ListMetric, *, reads_items: bool = False) -> None:
    """Adds a metric: `eval.metrics` then names it with a length, as in `my_metric@10`, in every program.

    A run folder names the module that calls this, and every program imports it first: register on import.

    Args:
      name: letters, digits and underscores.
      values: function of `RankedLists` and k, of some of the lists at a time; returns one finite number per list, whose
        mean over all is the metric. More is better, where it is `eval.monitor`.
      reads_items: it reads `RankedLists.items`; else only ranks are there.

    Raises:
      ValueError: the name is taken, or is none.
    """
    require(re.fullmatch(r"[A-Za-z]\w*", name) is not None, f"metric {name!r} must be of letters, digits and _")
    require(callable(values), f"metric {name!r}: give a function of RankedLists and k")
    known = METRICS.get(name)
    # A module that is imported again registers again.
    module = importable_name(sys._getframe(1).f_globals)
    require(known is None or known.module == module, f"metric {name!r} is registered already")
    METRICS[name] = Metric(values, ("items",) if reads_items else (), module)


def import_metric_module(module: str) -> None:
    """Imports a module that registers metrics.

    Raises:
      ValueError: it cannot be imported, or registers none.
    """
    import_outside("eval.module", module)
    registers = any(metric.module == module for metric in METRICS.values())
    require(registers, f"eval.module={module} registers no metric; call register_metric there")


def parse_name(name: str) -> tuple[str, int]:
    """Reads "recall@10".

    Raises:
      ValueError: it names no known metric (the nearest are shown) or no length of at least 1.
    """
    kind, _, length = name.partition("@")
    if kind not in METRICS:
        near = ", ".join(difflib.get_close_matches(kind, METRICS, n=3, cutoff=0.4) or METRICS)
        raise ValueError(f"metric {name!r} is unknown; nearest: {near}; of your own: give --eval.module")
    require(re.fullmatch(r"[1-9]\d{0,8}", length) is not None, f"metric {name!r} needs a length, as in {kind}@10")
    return kind, int(length)


def names(top_k: Sequence[int], more: Iterable[str] = ()) -> tuple[str, ...]:
    """Returns the names of hit, ndcg and mrr at every k, and of further metrics."""
    return tuple(dict.fromkeys([f"{name}@{k}" for k in top_k for name in ("hit", "ndcg", "mrr")] + list(more)))


def needs(asked: Iterable[str]) -> set[str]:
    """Returns what metrics read beside ranks: "items", "information", "directions"."""
    return {read for name in asked for read in METRICS[parse_name(name)[0]].reads}


def list_length(asked: Iterable[str]) -> int:
    """Returns how many items at the top of each list metrics read; 0 for those of ranks alone."""
    parsed = [parse_name(name) for name in asked]
    return max((k for kind, k in parsed if METRICS[kind].reads), default=0)


def outside_module(asked: Iterable[str]) -> str | None:
    """Returns the module that registered metrics among those asked for.

    Raises:
      ValueError: there are several.
    """
    modules = sorted({module for name in asked if (module := METRICS[parse_name(name)[0]].module)})
    require(len(modules) <= 1, f"metrics are registered by {' and '.join(modules)}; import them all from one module")
    return modules[0] if modules else None


def values_per_list(lists: RankedLists, asked: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns each metric of every list, float64 [n], those of all lists together left out; a few lists at a time.

    Raises:
      ValueError: without ranks, for a rank under 1, or a metric from outside that gives something else.
    """
    ranks = metrics.checked_ranks(lists.ranks)
    starts = lists.starts
    parsed = {name: parse_name(name) for name in asked}
    wanted = {name: (METRICS[kind].values, k) for name, (kind, k) in parsed.items()}
    found = {name: np.empty(len(starts)) for name, (values, _) in wanted.items() if values is not None}
    for first in range(0, len(starts), _LISTS_AT_ONCE):
        some = slice(first, first + _LISTS_AT_ONCE)
        rows = slice(starts[first], starts[some.stop] if some.stop < len(starts) else len(ranks))
        part = dataclasses.replace(
            lists,
            ranks=ranks[rows],
            lists=None if lists.lists is None else lists.lists[rows],
            items=None if lists.items is None else lists.items[some],
        )
        for name, of_all in found.items():
            values, k = wanted[name]
            of_part = np.asarray(values(part, k), np.float64) if values is not None else np.zeros(0)
            expected = len(part.starts)
            if of_part.shape != (expected,) or not np.isfinite(of_part).all():
                raise ValueError(
                    f"metric {name} gave {_described(of_part)} for {expected} lists: one finite number each"
                )
            of_all[some] = of_part
    return found


def _described(values: np.ndarray) -> str:
    bad = np.count_nonzero(~np.isfinite(values))
    return f"{bad} numbers that are not finite" if bad else f"an array of shape {values.shape}"


def means(
    lists: RankedLists, asked: Sequence[str], found: dict[str, np.ndarray], chosen: Any = slice(None)
) -> dict[str, float]:
    """Returns the metrics of some of the lists.

    coverage@k is the share of the catalogue that stands among the first k of any of them.

    Args:
      lists: all.
      asked: names.
      found: from `values_per_list`.
      chosen: index of lists.
    """
    result = {}
    for name in asked:
        if name in found:
            result[name] = float(found[name][chosen].mean())
        else:
            assert lists.items is not None
            listed = np.unique(lists.top(parse_name(name)[1])[chosen])
            result[name] = float(np.count_nonzero(listed) / lists.num_items)
    return result


def errors(found: dict[str, np.ndarray]) -> dict[str, float]:
    """Standard error of each mean over lists: s / sqrt(n), s^2 the unbiased variance; nothing for a single list."""
    return {name: float(v.std(ddof=1) / np.sqrt(v.size)) for name, v in found.items() if v.size > 1}


def metrics_of_ranks(ranks: np.ndarray, asked: Sequence[str], lists: np.ndarray | None = None) -> dict[str, float]:
    """Returns those metrics that follow from ranks alone.

    Args:
      ranks: [t] ranks from 1, whole or in halves.
      asked: names.
      lists: as in `RankedLists`.
    """
    ranked = RankedLists(ranks, lists)
    of_ranks = [name for name in asked if not METRICS[parse_name(name)[0]].reads]
    return means(ranked, of_ranks, values_per_list(ranked, of_ranks))
