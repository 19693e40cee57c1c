"""Times of the training part, which the causal time branch is standardised with."""

from typing import Any

import numpy as np

from tim4rec_jax.data.interactions import InteractionLog
from tim4rec_jax.data.splits import Split

# A spread below this is rounding.
_SAME = 1e-6


def training_span(log: InteractionLog, split: Split) -> tuple[int, int]:
    """Returns the first and the last second of the training part; they differ by 1 at least.

    Args:
      log: cleaned log.
      split: its parts; what validates and tests is not looked at.
    """
    if len(split.train) == 0:
        return 0, 1
    ends = log.offsets[split.train.users] + split.train.ends
    first, last = int(log.timestamps[ends - 1].min()), int(log.timestamps[ends].max())
    return first, max(last, first + 1)


def gap_statistics(log: InteractionLog, split: Split) -> tuple[float, float]:
    """Returns mean and standard deviation of log1p(gap) over the positive gaps between a user's training events.

    Args:
      log: cleaned log.
      split: its parts; what validates and tests is not looked at.

    Returns:
      (mean, std) in log-seconds; (0, 1) without a positive gap, and a std of 1 where all are the same.
    """
    if len(split.train) == 0:
        return 0.0, 1.0
    ends = log.offsets[split.train.users] + split.train.ends
    gaps = log.timestamps[ends] - log.timestamps[ends - 1]
    logs = np.log1p(gaps[gaps > 0].astype(np.float64))
    if len(logs) == 0:
        return 0.0, 1.0
    std = float(logs.std())
    return float(logs.mean()), std if std > _SAME else 1.0


def training_times(log: InteractionLog, split: Split) -> dict[str, Any]:
    """Returns gap_mean, gap_std, first_second and last_second of the training part, as `data_statistics` takes them."""
    mean, std = gap_statistics(log, split)
    first, last = training_span(log, split)
    return {"gap_mean": mean, "gap_std": std, "first_second": first, "last_second": last}
