"""A log made on the spot in which the next item depends on the last item and on the time gap seen last.

The catalogue has two halves of m items, what is taken after a short gap and what is taken after a long one. With t_i
the time of a user's i-th event and g_i = t_i - t_{i-1} (g_1 = 0), the item after x_i is

    x_{i+1} = half(g_i) * m + follow[x_i]        with probability 1 - noise
    half(g) = 1 if g >= GAP_THRESHOLD else 0
    x_{i+1} ~ popularity, P(x of popularity rank r) proportional to 1 / r        with probability noise

where `follow` is a fixed random map into a half and half of all gaps are long. The gap that decides is one of the input
history, never the gap to the target. A predictor that reads it is right about 1 - noise of the time; one that does not
can only guess which of two items comes, so short lists (hit@1, and ndcg) tell the two apart.

Gaps are far from the 64 s by which float32 seconds step near 1e9: short ones are hours, long ones days.
"""

import numpy as np
import polars as pl

from tim4rec_jax.data_config import SyntheticConfig

FIRST_SECOND = 978_307_200  # 2001-01-01: seconds of this size step by 64 in float32
START_SPAN = 180 * 86_400  # users start within half a year of one another
SHORT_GAP = (3_600, 6 * 3_600)
LONG_GAP = (5 * 86_400, 10 * 86_400)
GAP_THRESHOLD = 86_400


def transition_rules(config: SyntheticConfig) -> tuple[np.ndarray, np.ndarray]:
    """The two maps that rule the log.

    Args:
      config: the generator's settings; only `num_items` and `seed` matter here.

    Returns:
      The item after each item when the gap was short and when it was long, each [num_items] int64, items from 0. With
      an odd number of items the last one comes by noise alone.
    """
    half = config.num_items // 2
    short = np.random.default_rng([config.seed, 0]).integers(0, half, config.num_items)
    return short, half + short


def popularity(config: SyntheticConfig) -> np.ndarray:
    """Probability of each item in the popularity draws, [num_items] float64: 1 / r over a random order of the items."""
    rank = 1 + np.random.default_rng([config.seed, 1]).permutation(config.num_items)
    weights = 1.0 / rank
    return weights / weights.sum()


def _gaps(rng: np.random.Generator, num_users: int) -> np.ndarray:
    is_long = rng.random(num_users) < 0.5
    short = rng.integers(*SHORT_GAP, num_users)
    long = rng.integers(*LONG_GAP, num_users)
    return np.where(is_long, long, short)


def generate(config: SyntheticConfig) -> pl.DataFrame:
    """Draws the log; the same settings give the same rows.

    Args:
      config: users, items, events per user, share of noise, seed.

    Returns:
      Columns user (String, "1", "2", ...), item (String, "1", "2", ...), timestamp (Int64 seconds since 1970), in the
      order of users and, within a user, of time.
    """
    short, long = transition_rules(config)
    weights = popularity(config)
    rng = np.random.default_rng([config.seed, 2])
    u, steps = config.num_users, config.max_events

    counts = rng.integers(config.min_events, steps + 1, u)
    items = np.zeros((u, steps), np.int64)
    times = np.zeros((u, steps), np.int64)
    items[:, 0] = rng.choice(config.num_items, u, p=weights)
    times[:, 0] = FIRST_SECOND + rng.integers(0, START_SPAN, u)
    gap = np.zeros(u, np.int64)
    for i in range(1, steps):
        ruled = np.where(gap < GAP_THRESHOLD, short[items[:, i - 1]], long[items[:, i - 1]])
        drawn = rng.choice(config.num_items, u, p=weights)
        items[:, i] = np.where(rng.random(u) < config.noise, drawn, ruled)
        gap = _gaps(rng, u)
        times[:, i] = times[:, i - 1] + gap

    kept = np.arange(steps) < counts[:, None]
    users = np.broadcast_to(np.arange(u)[:, None], (u, steps))
    return pl.DataFrame(
        {
            "user": pl.Series(users[kept] + 1).cast(pl.String),
            "item": pl.Series(items[kept] + 1).cast(pl.String),
            "timestamp": pl.Series(times[kept], dtype=pl.Int64),
        }
    )
