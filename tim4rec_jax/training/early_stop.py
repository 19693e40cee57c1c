"""When to stop: RecBole's rule on a validation metric."""

import dataclasses
from dataclasses import dataclass

DECIMALS = 4


@dataclass(frozen=True)
class EarlyStop:
    """Where early stopping stands; larger metrics are better.

    A value counts as an improvement if, rounded to four decimals, it is equal to the best or better (so a tie moves the
    best epoch), and training stops when more than `patience` validations in a row were none (RecBole 1.2).

    Attributes:
      patience: validations in a row without improvement that are borne.
      best: best rounded value so far, or None.
      best_epoch: its epoch, from 1; 0 before any.
      failures: validations since the last improvement.
    """

    patience: int
    best: float | None = None
    best_epoch: int = 0
    failures: int = 0

    def after(self, value: float, epoch: int) -> "EarlyStop":
        """Returns where it stands after a validation."""
        value = round(value, DECIMALS)
        if self.best is None or value >= self.best:
            return dataclasses.replace(self, best=value, best_epoch=epoch, failures=0)
        return dataclasses.replace(self, failures=self.failures + 1)

    @property
    def improved(self) -> bool:
        """The last validation was an improvement."""
        return self.best is not None and self.failures == 0

    @property
    def should_stop(self) -> bool:
        """More validations failed in a row than patience bears."""
        return self.failures > self.patience
