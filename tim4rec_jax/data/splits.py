"""Leave-one-out: the last item of a user tests, the one before validates, the rest trains (RecBole 1.2 protocol)."""

from dataclasses import dataclass

import numpy as np

from tim4rec_jax.data.examples import Examples
from tim4rec_jax.data.interactions import InteractionLog


@dataclass(frozen=True)
class Split:
    """The examples of each part, ordered by user and then by end.

    Attributes:
      train: every prefix of length >= 1 of a user's training part: n - 3 examples for n events.
      valid: one example a user, the last item but one.
      test: one example a user, the last item.
    """

    train: Examples
    valid: Examples
    test: Examples

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.train.nbytes + self.valid.nbytes + self.test.nbytes


def leave_one_out(log: InteractionLog) -> Split:
    """Splits a cleaned log.

    A user with n events e_0 .. e_{n-1} gives the targets e_1 .. e_{n-3} to training, e_{n-2} to validation and e_{n-1}
    to the test.

    Args:
      log: cleaned log.

    Raises:
      ValueError: if a user has fewer than 3 events.
    """
    counts = np.diff(log.offsets)
    short = np.flatnonzero(counts < 3)
    if short.size:
        user = int(short[0])
        raise ValueError(
            f"user {log.user_ids[user]!r} has {counts[user]} events; leave-one-out needs at least 3 of every user, "
            "clean the log with `tim4rec_jax.data.interactions.clean` first"
        )
    num_train = counts - 3
    users = np.arange(len(counts), dtype=np.int32)
    train_users = np.repeat(users, num_train)
    before = np.cumsum(num_train) - num_train
    train_ends = np.arange(len(train_users)) - np.repeat(before, num_train) + 1
    return Split(
        train=Examples(train_users, train_ends.astype(np.int32)),
        valid=Examples(users, (counts - 2).astype(np.int32)),
        test=Examples(users, (counts - 1).astype(np.int32)),
    )
