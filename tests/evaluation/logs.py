"""Small random logs for tests."""

import numpy as np
import polars as pl

from tim4rec_jax.data.interactions import InteractionLog, clean


def random_log(*, num_users: int, num_items: int, min_events: int, max_events: int, seed: int) -> InteractionLog:
    """Users "u0", "u1", ... and items "i1", "i2", ... drawn uniformly, with gaps of up to four days."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(min_events, max_events + 1, num_users)
    frame = pl.DataFrame(
        {
            "user": [f"u{user}" for user in np.repeat(np.arange(num_users), counts)],
            "item": [f"i{item}" for item in rng.integers(1, num_items + 1, counts.sum())],
            "timestamp": np.concatenate([978_300_000 + np.cumsum(rng.integers(0, 4 * 86_400, n)) for n in counts]),
        }
    )
    log = clean(frame, k_core=0, timestamp_precision="int64")
    assert (log.num_users, log.num_items) == (num_users, num_items), "draw more events: not every item occurs"
    return log
