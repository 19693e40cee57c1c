"""Where a run stands between two steps, and when it stops: RecBole's rule on a validation metric."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

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


@dataclass
class Progress:
    """Where a run stands between two steps; all of it is saved with the training state.

    Attributes:
      epoch: running epoch, from 1.
      batch: batches of it that are done.
      step: optimiser steps done.
      stop: early stopping.
      epoch_losses: sum of the epoch's step losses and their number, as far as they were fetched.
      pending: step losses since the last log line.
      seconds: training time of the epoch before this process took it up.
      finished: the last epoch is done.
    """

    epoch: int = 1
    batch: int = 0
    step: int = 0
    stop: EarlyStop = field(default_factory=lambda: EarlyStop(0))
    epoch_losses: tuple[float, int] = (0.0, 0)
    pending: list[float] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False

    @property
    def validated(self) -> int:
        """The last epoch whose validation is behind."""
        return self.epoch if self.finished else self.epoch - 1

    def count_losses(self, losses: list[float]) -> None:
        """Takes up the losses of further steps."""
        total, count = self.epoch_losses
        for loss in losses:
            total += loss
        self.epoch_losses = (total, count + len(losses))
        self.pending += losses

    def next_epoch(self) -> "Progress":
        """Returns where the run stands before the first step of the next epoch."""
        return Progress(epoch=self.epoch + 1, step=self.step, stop=self.stop)

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values."""
        return dataclasses.asdict(self) | {"epoch_losses": list(self.epoch_losses)}

    @classmethod
    def from_dict(cls, values: dict[str, Any], *, step: int, patience: int) -> "Progress":
        """Returns what `to_dict` gave, of the checkpoint of a step; the patience may be another now."""
        stop = EarlyStop(**(values["stop"] | {"patience": patience}))
        return cls(**(values | {"stop": stop, "step": step, "epoch_losses": tuple(values["epoch_losses"])}))
