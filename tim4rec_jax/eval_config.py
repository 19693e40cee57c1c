"""Settings of measuring: full ranking over all items."""

import re
from dataclasses import dataclass
from typing import Literal

from tim4rec_jax.checks import require, shortened
from tim4rec_jax.evaluation.measures import import_metric_module, names, outside_module, parse_name
from tim4rec_jax.model_config import require_sizes

Baseline = Literal["popularity", "time_off"]
SeenTargets = Literal["leave_out", "rank"]
Lists = Literal["target", "user"]


@dataclass(frozen=True)
class EvalConfig:
    """How a model is measured: full ranking over all items (RecBole 1.2).

    Attributes:
      batch_size: users scored at once.
      max_len: positions of a history that are read; None is the model's max_len. Longer than that needs a causal
        state-space model.
      top_k: list lengths k of hit@k, ndcg@k and mrr@k.
      metrics: further ones, each with its own length, as in recall@10, precision@10, map@10, coverage@20, novelty@10,
        diversity@10, or of your own (`register_metric`).
      module: imported first, for it registers metrics of your own; known by itself once it is imported.
      monitor: the validation metric of early stopping, the greatest being the best.
      lists: "target", a list before each target, to which that alone is relevant (recall@k is then hit@k); or "user",
        one list per user, before the first of its targets in the part, all of which are relevant: of a temporal split
        with data.temporal_targets=all there are several.
      users: table with a column user_id and others, CSV, TSV or Parquet, for `groups`.
      groups: column of that table; the test part is then also measured by its values.
      time_buckets: "day", "week", "month" or "quantiles:4": the test part is then also measured by the time of its
        targets.
      exclude_seen: which of the two rankings, that of all items (the paper's) or that without those of the user's own
        history, validation stops and chooses by and "valid" and "test" name; the other is measured beside it.
      seen_targets: what becomes of targets that the user has had before, seen items excluded: "leave_out" of what is
        measured, as a recommender that leaves out what was seen can never name them; or "rank" among the unseen items.
      baselines: what is measured beside the model: "popularity" of the training part, and "time_off", the same model
        trained without its time branch.
    """

    batch_size: int = 4096
    max_len: int | None = None
    top_k: tuple[int, ...] = (10, 20, 50)
    metrics: tuple[str, ...] = ()
    module: str | None = None
    monitor: str = "ndcg@10"
    lists: Lists = "target"
    users: str | None = None
    groups: str | None = None
    time_buckets: str | None = None
    exclude_seen: bool = False
    seen_targets: SeenTargets = "leave_out"
    baselines: tuple[Baseline, ...] = ("popularity",)

    def __post_init__(self) -> None:
        require_sizes(self)
        require(self.batch_size >= 1, f"batch_size={self.batch_size} must be at least 1")
        require(self.max_len is None or self.max_len >= 1, f"max_len={self.max_len} must be at least 1, or None")
        require(len(self.top_k) > 0 and min(self.top_k) >= 1, f"top_k={self.top_k} needs list lengths of at least 1")
        if self.module is not None:
            import_metric_module(self.module)
        asked = tuple(name.strip() for text in self.metrics for name in text.split(","))
        for name in asked:
            parse_name(name)
            require(asked.count(name) == 1, f"metrics={','.join(asked)}: {name} is there {asked.count(name)} times")
        object.__setattr__(self, "metrics", asked)
        object.__setattr__(self, "module", outside_module(asked))
        require(self.monitor in self.measures, f"monitor={self.monitor!r} must be one of {list(self.measures)}")
        require(
            (self.users is None) == (self.groups is None),
            f"users={self.users} and groups={self.groups} go together: a table, and the column that holds the group",
        )
        if self.time_buckets is not None:
            parse_buckets(self.time_buckets)

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of all metrics that are measured."""
        return names(self.top_k, self.metrics)


BUCKETS = ("day", "week", "month")
MOST_BUCKETS = 200


def parse_buckets(text: str) -> int | None:
    """Reads "day", "week" or "month" (None), or "quantiles:4" (4).

    Raises:
      ValueError: it is something else.
    """
    if text in BUCKETS:
        return None
    found = re.fullmatch(r"quantiles[ :]([1-9]\d{0,2})", text)
    if found is None or not 2 <= int(found[1]) <= MOST_BUCKETS:
        raise ValueError(
            f"time_buckets={shortened(text, 60)!r} must be day, week, month, or quantiles and how many (2 to "
            f"{MOST_BUCKETS}), as in quantiles:4"
        )
    return int(found[1])
