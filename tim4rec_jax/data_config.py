"""Settings of a log: where it lies, how it is cleaned and split; a part of `config.ExperimentConfig`."""

import datetime
import math
from dataclasses import dataclass, field
from typing import Literal, get_args

from tim4rec_jax.checks import require, shown

LogFormat = Literal["auto", "recbole", "movielens", "amazon", "kuairand", "csv", "parquet"]
TimestampPrecision = Literal["int64", "float32"]
TimestampChoice = Literal[TimestampPrecision, "published"]
SplitName = Literal["leave_one_out", "temporal"]
TemporalTargets = Literal["last", "first", "all"]
# Earlier names of published logs, as run folders and commands have them.
DATA_ALIASES = {"ml1m": "ml-1m", "ml100k": "ml-100k", "amazon-beauty": "beauty", "amazon-video-games": "videogames"}


def parse_time(text: str, setting: str) -> int:
    """Returns the epoch seconds of an ISO 8601 date or moment, of UTC where it names no zone; fractions are rounded up.

    Raises:
      ValueError: for what is no such date.
    """
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{setting}={text} is no date ({error}); write 2000-12-01 or 2000-12-01T08:30:00") from None
    return math.ceil((moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp())


@dataclass(frozen=True)
class SyntheticConfig:
    """A log made on the spot in which the next item depends on the last item and on the time since the one before it.

    Attributes:
      num_users: users.
      num_items: items.
      min_events, max_events: events per user, drawn uniformly.
      noise: share of events whose item is drawn from the popularity distribution instead of the rule.
      seed: of the generator.
    """

    num_users: int = 1000
    num_items: int = 100
    min_events: int = 21
    max_events: int = 30
    noise: float = 0.1
    seed: int = 7

    def __post_init__(self) -> None:
        require(self.num_users >= 1, f"num_users={self.num_users} must be at least 1")
        require(self.num_items >= 2, f"num_items={self.num_items} must be at least 2: one for each half")
        require(
            3 <= self.min_events <= self.max_events,
            f"min_events={self.min_events}, max_events={self.max_events} must satisfy 3 <= min <= max",
        )
        require(0.0 <= self.noise <= 1.0, f"noise={self.noise} must lie in [0, 1]")


@dataclass(frozen=True)
class DataConfig:
    """Which log to read and how to clean it.

    Attributes:
      name: a data set of the catalog, "synthetic", or "custom" for a file of your own (then `path` is needed).
      path: file or folder to read instead of the catalog's download.
      item_path: file with item titles; None looks beside `path` for a file of the same stem ending in `.item`.
      format: file format; "auto" decides by name and header.
      user_column, item_column, time_column: column names in CSV and Parquet logs.
      columns: names of all fields in their order, for files without a header, as in item,user,rating,timestamp.
      max_unpacked_gb: most that a packed file may unpack to; None: 8, and not more than 200 times its size.
      k_core: users and items with fewer interactions are removed, repeatedly, to a fixpoint; 0 keeps all.
      timestamp_precision: what orders a user's events, and what the model reads of their times: "int64" is exact
        seconds; "float32" rounds them first, to 64 or 128 s, as the original program does; "published" is "float32"
        where the log is the data set that `name` says, by its published counts after 5-core, and else "int64".
      split: "leave_one_out" gives every user's last event to the test and the one before to validation; "temporal"
        cuts all users at the same two moments.
      valid_share, test_share: of all events, the shares whose times a temporal split gives to validation and test.
      valid_from, test_from: the cuts of a temporal split instead of shares, as in 2000-12-01 or 2000-12-01T08:30:00.
      temporal_targets: which events of a user in either period are predicted: the "last", the "first" or "all".
      loader: "device" keeps the log on the device and gathers inside the step; "grain" gathers on the host.
      cache_dir: where downloads and cleaned logs are kept.
      synthetic: the generated log of `name="synthetic"`.
    """

    name: str = "synthetic"
    path: str | None = None
    item_path: str | None = None
    format: LogFormat = "auto"
    user_column: str = "user"
    item_column: str = "item"
    time_column: str = "timestamp"
    columns: str | None = None
    max_unpacked_gb: float | None = None
    k_core: int = 5
    timestamp_precision: TimestampChoice = "int64"
    split: SplitName = "leave_one_out"
    valid_share: float = 0.1
    test_share: float = 0.1
    valid_from: str | None = None
    test_from: str | None = None
    temporal_targets: TemporalTargets = "last"
    loader: Literal["device", "grain"] = "device"
    cache_dir: str = "~/.cache/tim4rec_jax"
    synthetic: SyntheticConfig = field(default_factory=SyntheticConfig)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", DATA_ALIASES.get(self.name, self.name))
        require(self.k_core >= 0, f"k_core={self.k_core} must be at least 0 (0 keeps every user and item)")
        if self.columns is not None:
            given, wanted = self.columns.split(","), (self.user_column, self.item_column, self.time_column)
            require(
                all([name.strip() for name in given].count(name) == 1 for name in wanted),
                f"data.columns={shown(self.columns)[1:-1]} must name {', '.join(wanted)} once each, in the order of "
                "the file, as in item,user,rating,timestamp",
            )
        require(
            self.max_unpacked_gb is None or 0 < self.max_unpacked_gb < math.inf,
            f"data.max_unpacked_gb={self.max_unpacked_gb} must be positive",
        )
        choices = {
            "timestamp_precision": TimestampChoice,
            "split": SplitName,
            "temporal_targets": TemporalTargets,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            require(value in get_args(known), f"data.{name}={value!r} must be one of {get_args(known)}")
        shares = f"data.valid_share={self.valid_share}, data.test_share={self.test_share}"
        require(
            self.valid_share > 0 and self.test_share > 0 and self.valid_share + self.test_share < 1,
            f"{shares} must be positive and sum to less than 1; the rest trains",
        )
        self._check_cuts()

    @property
    def min_events(self) -> int:
        """Least events of a user: to leave one out, one each to train, validate and test; any for a cut in time."""
        return 3 if self.split == "leave_one_out" else 1

    def _check_cuts(self) -> None:
        cuts = {"data.valid_from": self.valid_from, "data.test_from": self.test_from}
        given = [f"{name}={cut}" for name, cut in cuts.items() if cut is not None]
        if not given:
            return
        require(len(given) == 2, f"{given[0]} is given alone; data.valid_from and data.test_from belong together")
        require(self.split == "temporal", f"{given[0]} is for data.split=temporal, not {self.split}; leave it out")
        seconds = [parse_time(str(cut), name) for name, cut in cuts.items()]
        require(seconds[0] < seconds[1], f"{given[0]} must lie before {given[1]}")
