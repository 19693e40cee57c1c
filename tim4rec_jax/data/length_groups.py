"""Static lengths for rows of many lengths, so that short histories are not computed at full length."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class LengthGroup:
    """Rows computed together: `rows` histories of at most `length` positions.

    Attributes:
      length: static length the rows are cut to.
      rows: rows of one microbatch.
    """

    length: int
    rows: int


def choose_lengths(lengths: np.ndarray, max_len: int, *, max_groups: int, penalty: float, step: int = 2) -> list[int]:
    """Picks the static lengths that compute the fewest positions.

    Minimises sum over rows of (smallest chosen length >= the row's) + penalty * (number of lengths), exactly, by
    dynamic programming over the lengths that occur.

    Args:
      lengths: int [n], 1 to max_len.
      max_len: longest length there is.
      max_groups: most lengths to pick.
      penalty: positions that a further length must save.
      step: static lengths are multiples of it, or max_len.

    Returns:
      Ascending lengths; the last one holds the longest row.
    """
    candidates, counts = np.unique(np.minimum(-(-lengths // step) * step, max_len), return_counts=True)
    before = np.concatenate([[0], np.cumsum(counts)])
    num = len(candidates)
    # best[j]: least cost of the rows of the first j candidates in g groups; the last group reaches from candidate
    # start[j] to j - 1.
    best = np.concatenate([[0.0], np.full(num, np.inf)])
    totals, starts = [], []
    for _ in range(min(max_groups, num)):
        costs = best[None, :num] + candidates[:, None] * (before[1:, None] - before[None, :num])
        costs[np.triu_indices(num, 1)] = np.inf
        start = np.argmin(costs, axis=1)
        best = np.concatenate([[np.inf], costs[np.arange(num), start]])
        starts.append(start)
        totals.append(best[num])
    groups = int(np.argmin(np.array(totals) + penalty * np.arange(1, len(totals) + 1)))
    chosen, j = [], num
    for start in reversed(starts[: groups + 1]):
        chosen.append(int(candidates[j - 1]))
        j = int(start[j - 1])
    return chosen[::-1]


# A microbatch of this many positions keeps its activations in a CPU's caches; accelerators want the whole batch.
_CPU_TOKENS = 2048
_CPU_SCORE_BYTES = 16 * 2**20
# A further static length must save this share of a batch's padded positions to be worth compiling for.
_WORTHWHILE_SHARE = 0.01


def plan_length_groups(
    lengths: np.ndarray,
    max_len: int,
    *,
    max_groups: int,
    batch_size: int,
    vocab_size: int,
    microbatch_tokens: int | None,
    platform: str,
) -> tuple[LengthGroup, ...]:
    """Plans how the rows of every training batch are grouped.

    Args:
      lengths: int [n], the lengths of all training examples, at most max_len.
      max_len: longest length.
      max_groups: most static lengths; 1 pads every row to max_len.
      batch_size: rows of a batch.
      vocab_size: v; bounds the rows whose scores [rows, v] are held at once on a CPU.
      microbatch_tokens: positions computed at once; None suits the platform.
      platform: "cpu", "gpu" or "tpu".

    Returns:
      Groups by descending length; the first holds max_len, so every row fits somewhere.
    """
    penalty = _WORTHWHILE_SHARE * len(lengths) * max_len
    chosen = choose_lengths(lengths, max_len, max_groups=max_groups, penalty=penalty)
    # Later examples (another split, say) may be longer than any seen here.
    chosen[-1] = max_len
    rows_limit = batch_size
    if platform == "cpu":
        microbatch_tokens = microbatch_tokens or _CPU_TOKENS
        rows_limit = min(batch_size, max(1, _CPU_SCORE_BYTES // (4 * vocab_size)))
    tokens = microbatch_tokens or batch_size * max_len
    return tuple(LengthGroup(c, int(np.clip(tokens // c, 1, rows_limit))) for c in reversed(chosen))


def plan_packed_rows(
    max_len: int, *, batch_size: int, microbatch_tokens: int | None, platform: str
) -> tuple[LengthGroup, ...]:
    """Plans how many rows of packed batches, all of `max_len` positions, are computed at once.

    Args:
      max_len: positions of a row.
      batch_size: rows of a batch.
      microbatch_tokens: positions computed at once; None suits the platform.
      platform: "cpu", "gpu" or "tpu".

    Returns:
      One group.
    """
    if microbatch_tokens is None:
        microbatch_tokens = _CPU_TOKENS if platform == "cpu" else batch_size * max_len
    return (LengthGroup(max_len, int(np.clip(microbatch_tokens // max_len, 1, batch_size))),)
