"""How histories of many lengths become rows of few: several windows in one row, or rows grouped by length."""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# A microbatch of this many positions keeps its activations in a CPU's caches; accelerators want the whole batch.
_CPU_TOKENS = 2048
# Rows that are all of one length: a whole batch in one piece spares the loop over microbatches.
_CPU_PACKED_TOKENS = 4096
_CPU_SCORE_BYTES = 16 * 2**20
# A further static length must save this share of a batch's padded positions to be worth compiling for.
_WORTHWHILE_SHARE = 0.01


class HistoryWindows(NamedTuple):
    """Index ranges of users' training inputs that are read in one piece; nothing is copied.

    Window i reads the inputs `firsts[i] : ends[i]` of user `users[i]` and trains on those from `trained_from[i]` on;
    the ones before are its context.

    Attributes:
      users: int32 [w].
      firsts, ends, trained_from: int32 [w], positions in the user's history; firsts <= trained_from < ends.
    """

    users: np.ndarray
    firsts: np.ndarray
    ends: np.ndarray
    trained_from: np.ndarray


def window_histories(num_inputs: np.ndarray, max_len: int, context: int | None) -> HistoryWindows:
    """Cuts every history into windows so that each input is trained on in exactly one of them.

    A history of up to `max_len` inputs is one window. A longer one continues in windows that first re-read the
    `context` inputs before what they train on, so that every input has min(context, all there are) before it.

    Args:
      num_inputs: int [users], inputs with a target each; users with 0 have no window.
      max_len: most inputs of a window.
      context: inputs re-read by a later window, less than `max_len`; None is half of it.

    Returns:
      The windows by user and then by time.

    Raises:
      ValueError: if a later window would have no input left to train on.
    """
    if context is not None and context >= max_len:
        raise ValueError(
            f"train.window_context={context} must be less than model.max_len={max_len}, or a later window has no "
            f"position left to train on; give at most {max_len - 1}, or None for {max_len // 2}"
        )
    stride = max_len - (max_len // 2 if context is None else context)
    later = -(-np.maximum(num_inputs - max_len, 0) // stride)
    windows = np.where(num_inputs > 0, later + 1, 0)
    users = np.repeat(np.arange(len(num_inputs), dtype=np.int32), windows)
    number = np.arange(len(users)) - np.repeat(np.cumsum(windows) - windows, windows)
    firsts = number * stride
    ends = np.minimum(firsts + max_len, num_inputs[users])
    trained_from = np.where(number == 0, 0, firsts + (max_len - stride))
    return HistoryWindows(users, *(column.astype(np.int32) for column in (firsts, ends, trained_from)))


@dataclass(frozen=True, eq=False)
class RowPattern:
    """Which lengths lie where in rows of `max_len` positions; it depends on the lengths alone.

    Row r holds the slots `bounds[r] : bounds[r + 1]`, one after the other from its first position on.

    Attributes:
      max_len: positions of a row.
      bounds: int64 [rows + 1].
      offsets: int32 [slots], a slot's first position in its row.
      lengths: int32 [slots].
    """

    max_len: int
    bounds: np.ndarray
    offsets: np.ndarray
    lengths: np.ndarray

    @property
    def num_rows(self) -> int:
        """Rows that are filled."""
        return len(self.bounds) - 1

    @functools.cached_property
    def used(self) -> np.ndarray:
        """Positions of each row that are filled, int [rows]."""
        last = self.bounds[1:] - 1
        return self.offsets[last] + self.lengths[last]

    @property
    def fill_share(self) -> float:
        """Positions filled, by all positions of the rows."""
        return float(self.lengths.sum(dtype=np.int64)) / (self.num_rows * self.max_len)


def pack_lengths(lengths: np.ndarray, max_len: int) -> RowPattern:
    """Packs lengths into rows, the longest first, each into the fullest row that still has room (best fit decreasing).

    Equal lengths and equally full rows are handled together, so that the work grows with the number of different
    lengths, and with the number of windows in array operations only.

    Args:
      lengths: int [w], 1 to `max_len`, at least one.
      max_len: positions of a row.

    Raises:
      ValueError: for no lengths, or one out of range.
    """
    if not len(lengths) or lengths.min() < 1 or lengths.max() > max_len:
        found = f"{lengths.min()} to {lengths.max()}" if len(lengths) else "none"
        raise ValueError(f"lengths to pack are {found}; there must be some, all from 1 to max_len={max_len}")
    counts = np.bincount(lengths, minlength=max_len + 1)
    free: dict[int, list[np.ndarray]] = {}  # rows by the positions they have left
    placed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []  # rows, offsets, lengths
    num_rows = 0

    def place(rows: np.ndarray, room: int, length: int, count: int) -> None:
        """Fills rows of equal room one after the other with up to `count` slots; the last may get fewer than fit."""
        each = room // length
        offsets = max_len - room + length * np.arange(each, dtype=np.int32)
        slots = np.repeat(rows, each)[:count]
        placed.append((slots, np.tile(offsets, len(rows))[:count], np.full(count, length, np.int32)))
        last = count - (len(rows) - 1) * each
        for part, taken in ((rows[:-1], each), (rows[-1:], last)):
            if len(part) and room > taken * length:
                free.setdefault(room - taken * length, []).append(part)

    for length in np.flatnonzero(counts)[::-1].tolist():
        left = int(counts[length])
        for room in sorted(room for room in free if room >= length):
            rows, each = np.concatenate(free.pop(room)), room // length
            wanted = min(-(-left // each), len(rows))
            if wanted < len(rows):
                free[room] = [rows[wanted:]]
            count = min(left, wanted * each)
            place(rows[:wanted], room, length, count)
            left -= count
            if not left:
                break
        if left:
            opened = -(-left // (max_len // length))
            place(np.arange(num_rows, num_rows + opened, dtype=np.int32), max_len, length, left)
            num_rows += opened
    rows, offsets, sizes = (np.concatenate(parts) for parts in zip(*placed, strict=True))
    order = np.lexsort((offsets, rows))
    bounds = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
    return RowPattern(max_len, bounds, offsets[order], sizes[order])


class EpochRows(NamedTuple):
    """What the rows of one epoch hold.

    Attributes:
      order: int [rows], the pattern's rows in the order they are trained on.
      windows: int [slots], the window in each slot of the pattern.
      targets_before: int64 [rows + 1], targets in the rows before each of that order.
    """

    order: np.ndarray
    windows: np.ndarray
    targets_before: np.ndarray


class PackedPositions(NamedTuple):
    """Where each position of a batch's rows lies in the flat log.

    Attributes:
      rows: int32 [b, l] of the input; its target is the row after it. -1 marks padding.
      starts: bool [b, l], true where a window begins, and where the padding behind the last one does.
      trained: bool [b, l], true where the position's target is trained on here.
    """

    rows: np.ndarray
    starts: np.ndarray
    trained: np.ndarray


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Windows packed into rows: the same number of rows in every epoch, with other neighbours.

    Attributes:
      windows: from `window_histories`.
      first_rows: integers [w], row of the flat log of each window's first input.
      pattern: from `pack_lengths` of the windows' lengths.
      seed: of the epochs' orders.
    """

    windows: HistoryWindows
    first_rows: np.ndarray
    pattern: RowPattern
    seed: int

    def epoch(self, epoch: int) -> EpochRows:
        """Draws which window of each length fills which slot, and the order of the rows, from (seed, epoch) alone."""
        generator = np.random.Generator(np.random.Philox(key=[self.seed, epoch]))
        lengths = self.windows.ends - self.windows.firsts
        # Sorting 16-bit numbers stably takes NumPy linear time.
        narrow = np.uint16 if self.pattern.max_len < 2**16 else np.int32
        shuffled = generator.permutation(len(lengths)).astype(np.int32)
        by_length = shuffled[np.argsort(lengths[shuffled].astype(narrow), kind="stable")]
        windows = np.empty_like(by_length)
        windows[np.argsort(self.pattern.lengths.astype(narrow), kind="stable")] = by_length
        order = generator.permutation(self.pattern.num_rows)
        targets = (self.windows.ends - self.windows.trained_from)[windows]
        targets = np.add.reduceat(targets, self.pattern.bounds[:-1], dtype=np.int64)[order]
        return EpochRows(order, windows, np.concatenate([[0], np.cumsum(targets)]))

    def positions(self, epoch: EpochRows, first: int, num_rows: int, stop: int | None = None) -> PackedPositions:
        """Lays out `num_rows` rows from the `first` of an epoch on; rows from `stop` on are all padding."""
        pattern, windows = self.pattern, self.windows
        length = pattern.max_len
        chosen = epoch.order[first : first + num_rows if stop is None else min(first + num_rows, stop)]
        counts = pattern.bounds[chosen + 1] - pattern.bounds[chosen]
        slots = _ranges(pattern.bounds[chosen], counts)
        begins = np.repeat(np.arange(len(chosen)) * length, counts) + pattern.offsets[slots]
        held, sizes = epoch.windows[slots], pattern.lengths[slots]
        indices = _ranges(begins, sizes)
        context = np.repeat(begins + (windows.trained_from - windows.firsts)[held], sizes)

        rows = np.full(num_rows * length, -1, np.int32)
        rows[indices] = _ranges(self.first_rows[held], sizes)
        trained = np.zeros(num_rows * length, bool)
        trained[indices] = indices >= context
        # The column behind the last position takes the start of a padding that is not there.
        starts = np.zeros((num_rows, length + 1), bool)
        starts[begins // length, begins % length] = True
        starts[np.arange(num_rows), np.concatenate([pattern.used[chosen], np.zeros(num_rows - len(chosen), int)])] = (
            True
        )
        shape = (num_rows, length)
        return PackedPositions(rows.reshape(shape), starts[:, :length].copy(), trained.reshape(shape))


def _ranges(firsts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Returns firsts[0] .. firsts[0] + counts[0] - 1, firsts[1] .. and so on."""
    before = np.cumsum(counts) - counts
    return np.repeat(firsts - before, counts) + np.arange(counts.sum())


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
      One group. Its rows share the batch as evenly as they can: 32 with room for 20 at once are two of 16, for what is
      short of a whole group is computed as padding.
    """
    if microbatch_tokens is None:
        microbatch_tokens = _CPU_PACKED_TOKENS if platform == "cpu" else batch_size * max_len
    turns = -(-batch_size // int(np.clip(microbatch_tokens // max_len, 1, batch_size)))
    return (LengthGroup(max_len, -(-batch_size // turns)),)
