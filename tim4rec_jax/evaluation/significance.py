"""Whether two recommenders measured on the same users differ by more than the choice of users explains.

What is tested is the mean over users; spread over training seeds is another matter and is reported beside it.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

SIGN_VECTORS = 9_999
BOOTSTRAP_DRAWS = 2_000
_BLOCK_BYTES = 2**26


class Comparison(NamedTuple):
    """Each model against the best one; row `best` itself holds difference 0, p 1 and the interval [0, 0].

    Attributes:
      best: row with the highest mean; of equals the first.
      difference: [models] float64, mean of the best minus mean of the model.
      p: [models] two-sided p-values of each comparison alone.
      p_holm: [models] the same, corrected for their number.
      interval: [models, 2] 95 % bootstrap interval of the difference.
    """

    best: int
    difference: np.ndarray
    p: np.ndarray
    p_holm: np.ndarray
    interval: np.ndarray


def _check(values: np.ndarray, shape: str) -> np.ndarray:
    values = np.asarray(values, np.float64)
    if values.ndim != 2 or values.shape[1] < 2:
        raise ValueError(f"values of shape {values.shape} must be {shape} with at least 2 users")
    if not np.isfinite(values).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(values))} of {values.size} values are not finite")
    return values


def _blocks(resamples: int, users: int) -> list[int]:
    """Sizes of the blocks in which weights [resamples, users] float64 are made."""
    size = max(1, _BLOCK_BYTES // (8 * users))
    return [min(size, resamples - first) for first in range(0, resamples, size)]


def _resampled_sums(differences: np.ndarray, resamples: int, draw: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """Sums over users under random weights, the same weights for every row: [resamples, rows]."""
    users = differences.shape[1]
    return np.concatenate([draw(size, users) @ differences.T for size in _blocks(resamples, users)])


def sign_flip_test(differences: np.ndarray, *, resamples: int = SIGN_VECTORS, seed: int = 0) -> np.ndarray:
    """Two-sided paired permutation test of mean difference 0, one test a row.

    With T = |sum_u d_u| and random signs s, p = (1 + #{resamples : |sum_u s_u d_u| >= T}) / (1 + resamples).

    If the two models are exchangeable for each user, every sign is as likely as the other, whatever the differences'
    distribution. That fits hit, ndcg and mrr at k: few distinct values, most differences exactly 0 and a long tail,
    where a t-test leans on a normal limit and a rank test on breaking ties.

    Args:
      differences: [rows, users], a user's metric under one model minus that under the other.
      resamples: random sign vectors; the smallest p is 1 / (1 + resamples).
      seed: of the signs, which are the same for every row.

    Returns:
      [rows] float64.

    Raises:
      ValueError: for another shape, fewer than 2 users, or values that are not finite.

    Source: Smucker, Allan, Carterette, "A comparison of statistical significance tests for information retrieval
    evaluation", CIKM 2007; the added ones: Phipson and Smyth 2010, arXiv 1603.05766.
    """
    differences = _check(differences, "[rows, users]")
    generator = np.random.default_rng(seed)
    # A user without any difference changes no sum.
    differences = differences[:, (differences != 0).any(axis=0)]
    if differences.shape[1] == 0:
        return np.ones(len(differences))

    def signs(size: int, users: int) -> np.ndarray:
        bits = np.unpackbits(generator.integers(0, 256, (size, -(-users // 8)), np.uint8), axis=1, count=users)
        return 1.0 - 2.0 * bits

    observed = np.abs(differences.sum(axis=1))
    # Sums that are equal in exact arithmetic differ in the last bits by the order of their terms.
    slack = 1e-12 * np.abs(differences).sum(axis=1)
    reached = np.abs(_resampled_sums(differences, resamples, signs)) >= observed - slack
    return (1 + reached.sum(axis=0)) / (1 + resamples)


def bootstrap_interval(
    differences: np.ndarray, *, level: float = 0.95, resamples: int = BOOTSTRAP_DRAWS, seed: int = 0
) -> np.ndarray:
    """Percentile interval of the mean difference when users are drawn anew with replacement, one per row.

    Args:
      differences: [rows, users].
      level: share of the resampled means inside.
      resamples: draws of all users.
      seed: of the draws, which are the same for every row.

    Returns:
      [rows, 2] float64, lower and upper end.

    Raises:
      ValueError: for another shape, fewer than 2 users, values that are not finite, or a level outside (0, 1).

    Source: Efron, "Bootstrap methods", Annals of Statistics 1979.
    """
    differences = _check(differences, "[rows, users]")
    if not 0 < level < 1:
        raise ValueError(f"level={level} must lie in (0, 1)")
    generator = np.random.default_rng(seed)

    def times_drawn(size: int, users: int) -> np.ndarray:
        drawn = generator.integers(0, users, (size, users)) + users * np.arange(size)[:, None]
        return np.bincount(drawn.ravel(), minlength=size * users).reshape(size, users).astype(np.float64)

    means = _resampled_sums(differences, resamples, times_drawn) / differences.shape[1]
    return np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0).T


def holm(p: np.ndarray) -> np.ndarray:
    """Corrects p-values for their number, so that one false finding among all has at most the stated chance.

    With p sorted upwards, p'_(i) = max over j <= i of min(1, (m - j + 1) p_(j)), i and j from 1 to m.

    Args:
      p: [m] p-values.

    Returns:
      [m] float64, in the order given.

    Raises:
      ValueError: for a value outside [0, 1].

    Source: Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 1979.
    """
    p = np.asarray(p, np.float64)
    if p.ndim != 1 or not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"p={p} must be a list of numbers in [0, 1]")
    order = np.argsort(p, kind="stable")
    corrected = np.empty_like(p)
    corrected[order] = np.maximum.accumulate(np.minimum(1.0, np.arange(len(p), 0, -1) * p[order]))
    return corrected


def by_user(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """Sums values [rows, targets] over each user's targets, scaled so that the mean over users is that over targets.

    A user's targets are not independent of each other; users are what a test may resample.

    Args:
      values: [rows, targets].
      users: int [targets], ascending.
    """
    starts = np.flatnonzero(np.diff(users, prepend=-1))
    return np.add.reduceat(values, starts, axis=1) * (len(starts) / len(users))


def compare_with_best(values: np.ndarray, *, best: int | None = None, seed: int = 0) -> Comparison:
    """Tests every model against the best one on the same users.

    The best is picked on these very users, so its lead is a little flattered and small p-values are a little too small.

    Args:
      values: [models, users], each user's metric; with several seeds the mean over them.
      best: row to compare with; None is the one with the highest mean.
      seed: of the resampling.

    Raises:
      ValueError: for another shape, fewer than 2 users, values that are not finite, or a row that is not there.
    """
    values = _check(values, "[models, users]")
    if best is None:
        best = int(values.mean(axis=1).argmax())
    if not 0 <= best < len(values):
        raise ValueError(f"best={best} is no row of the {len(values)} models")
    differences = values[best] - values
    others = np.arange(len(values)) != best
    p, corrected = np.ones(len(values)), np.ones(len(values))
    if others.any():
        p[others] = sign_flip_test(differences[others], seed=seed)
        corrected[others] = holm(p[others])
    return Comparison(best, differences.mean(axis=1), p, corrected, bootstrap_interval(differences, seed=seed))
