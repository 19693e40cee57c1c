"""Settings of a log: where it lies, how it is cleaned and split; a part of `config.ExperimentConfig`."""

import csv
import datetime
import math
import operator
import re
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from tim4rec_jax.checks import require, shown

LogFormat = Literal["auto", "recbole", "movielens", "amazon", "kuairand", "csv", "parquet", "jsonl", "pairs", "lines"]
TimeUnit = Literal["auto", "s", "ms", "us", "ns"]
EventOrder = Literal["time", "file"]
Duplicates = Literal["keep", "first", "last"]
BadRows = Literal["refuse", "skip"]
TimestampPrecision = Literal["int64", "float32"]
TimestampChoice = Literal[TimestampPrecision, "published"]
SplitName = Literal["leave_one_out", "temporal", "given", "none"]
TemporalTargets = Literal["last", "first", "all"]
# Earlier names of published logs, as run folders and commands have them.
DATA_ALIASES = {"ml1m": "ml-1m", "ml100k": "ml-100k", "amazon-beauty": "beauty", "amazon-video-games": "videogames"}


def parse_time(text: str, setting: str) -> int:
    """Returns the epoch seconds of an ISO 8601 date or moment, of UTC where it names no zone; fractions are rounded up.

    Raises:
      ValueError: for what is no such date.
    """
    return math.ceil(_moment(text, setting))


def _moment(text: str, setting: str) -> float:
    try:
        moment = datetime.datetime.fromisoformat(text)
    except ValueError as error:
        raise ValueError(f"{setting}={text} is no date ({error}); write 2000-12-01 or 2000-12-01T08:30:00") from None
    return (moment if moment.tzinfo else moment.replace(tzinfo=datetime.UTC)).timestamp()


_COMPARE = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}
_CLAUSE = re.compile(
    r"""\s*(?:"(?P<quoted>[^"]+)"|(?P<column>[^\s<>=!",]+))\s*(?P<operator><=|>=|!=|==|=|<|>|not\s+in\s|in\s)"""
    r"\s*(?P<value>.+?)\s*",
    re.DOTALL,
)
_AND = re.compile(r'\s+and\s+(?=(?:[^"]*"[^"]*")*[^"]*$)')
_LONGEST_WHERE = 1000


class Condition(NamedTuple):
    """One condition of `data.where`.

    Attributes:
      column: name of the column.
      operator: <, <=, >, >=, =, !=, in or not in.
      values: what stands behind it.
      number: the value as a number, or as epoch seconds for a time; None where texts are compared.
      of_time: the column is that of the times.
    """

    column: str
    operator: str
    values: tuple[str, ...]
    number: float | None
    of_time: bool

    @property
    def numbers(self) -> tuple[float, ...]:
        """The values that are numbers."""
        return tuple(number for number in map(_number, self.values) if number is not None)

    @property
    def negated(self) -> bool:
        """Whether rows with the values are left out."""
        return self.operator in ("!=", "not in")

    def compare(self, values: Any, number: float | None = None) -> Any:
        """Compares a column with the number, or with another one."""
        return _COMPARE[self.operator](values, self.number if number is None else number)

    def __str__(self) -> str:
        space = " " if self.operator.isalpha() or " " in self.operator else ""
        return f"{self.column}{space}{self.operator}{space}{','.join(self.values)}"


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def parse_where(text: str, time_column: str = "timestamp") -> tuple[Condition, ...]:
    """Reads conditions joined by "and", as in `rating>=4 and event in view,buy and time<2020-01-01`.

    A name or value with blanks, commas or signs in it stands in double quotes. The time, called `time` or by the
    name of its column, is compared with a date as of `parse_time` or with epoch seconds.

    Raises:
      ValueError: for what is no such condition.
    """
    form = "write conditions as in rating>=4 and event in view,buy and time>=2020-01-01"
    require(len(text) <= _LONGEST_WHERE, f"data.where has {len(text):,} characters, over {_LONGEST_WHERE:,}; {form}")
    found = []
    for clause in _AND.split(text):
        match = _CLAUSE.fullmatch(clause)
        if match is None:
            raise ValueError(f"data.where={shown(text)[1:-1]}: {shown(clause)} is no condition; {form}")
        column, sign = match["quoted"] or match["column"], " ".join(match["operator"].split())
        sign = "=" if sign == "==" else sign
        given = next(csv.reader([match["value"]], skipinitialspace=True)) if "in" in sign else [match["value"]]
        values = tuple(value.strip().strip('"') for value in given)
        require(all(values), f"data.where={shown(text)[1:-1]}: {shown(clause)} has an empty value; {form}")
        of_time, number = column in ("time", time_column), None
        if of_time:
            require(
                sign in _COMPARE,
                f"data.where={shown(text)[1:-1]}: a time is compared with <, <=, >, >=, = or !=, not {sign}; {form}",
            )
            number = _number(values[0])
            number = _moment(values[0], f"data.where={column}{sign}") if number is None else number
        elif sign in ("<", "<=", ">", ">="):
            number = _number(values[0])
            require(
                number is not None,
                f"data.where={shown(text)[1:-1]}: {shown(values[0])} is no number, and {sign} compares numbers; {form}",
            )
        found.append(Condition(column, sign, values, number, of_time))
    return tuple(found)


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
      columns: names of all fields in their order, for files without a header, as in item,user,rating,timestamp; or the
        numbers, from 1, of the fields of user, item and time, as in 2,1,4.
      separator: of fields of text, one character or ::; "tab"; "space" for any run of blanks; None tells it by the
        header.
      time_unit: of times that are whole or decimal numbers; "auto" tells it by their size and refuses what
        could be two.
      time_format: of times that are text, as in %d/%m/%Y %H:%M; None reads numbers and ISO 8601 (UTC, unless a zone
        stands there).
      order: "file" takes the events in the order of the file and reads no times, for models that read none.
      where: which rows are read, as in `rating>=4 and event in view,buy and time>=2020-01-01`; see `parse_where`.
      duplicates: of a user's events with the same item "keep" all, or the "first" or "last" in time alone.
      bad_rows: "refuse" the log for the first row that cannot be read, or "skip" such rows, count them by reason, and
        list them in the run folder.
      max_unpacked_gb: most that a packed file may unpack to; None: 8, and not more than 200 times its size.
      k_core: users and items with fewer interactions are removed, repeatedly, to a fixpoint; 0 keeps all.
      timestamp_precision: what orders a user's events, and what the model reads of their times: "int64" is exact
        seconds; "float32" rounds them first, to 64 or 128 s, as the original program does; "published" is "float32"
        where the log is the data set that `name` says, by its published counts after 5-core, and else "int64".
      split: "leave_one_out" gives every user's last event to the test and the one before to validation; "temporal"
        cuts all users at the same two moments; "given" reads the parts from files called train, valid and test; "none"
        trains on every event, without validation and test: the last epoch is what is kept.
      valid_share, test_share: of all events, the shares whose times a temporal split gives to validation and test.
      valid_from, test_from: the cuts of a temporal split instead of shares, as in 2000-12-01 or 2000-12-01T08:30:00.
      temporal_targets: which events of a user in either later period, or file, are predicted: the "last", the "first"
        or "all".
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
    separator: str | None = None
    time_unit: TimeUnit = "auto"
    time_format: str | None = None
    order: EventOrder = "time"
    where: str | None = None
    duplicates: Duplicates = "keep"
    bad_rows: BadRows = "refuse"
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
        self._check_reading()
        require(
            self.max_unpacked_gb is None or 0 < self.max_unpacked_gb < math.inf,
            f"data.max_unpacked_gb={self.max_unpacked_gb} must be positive",
        )
        choices = {
            "timestamp_precision": TimestampChoice,
            "split": SplitName,
            "temporal_targets": TemporalTargets,
            "format": LogFormat,
            "time_unit": TimeUnit,
            "order": EventOrder,
            "duplicates": Duplicates,
            "bad_rows": BadRows,
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
    def holds_out(self) -> bool:
        """Whether anything is kept from training, to validate and test."""
        return self.split != "none"

    @property
    def min_events(self) -> int:
        """Least events of a user: to leave one out, one each to train, validate and test; else any."""
        return 3 if self.split == "leave_one_out" else 1

    @property
    def conditions(self) -> tuple[Condition, ...]:
        """What `where` says."""
        return () if self.where is None else parse_where(self.where, self.time_column)

    def _check_reading(self) -> None:
        wanted = [self.user_column, self.item_column] + ([self.time_column] if self.order == "time" else [])
        if self.columns is not None:
            given = [name.strip() for name in self.columns.split(",")]
            numbers = all(re.fullmatch(r"[1-9]\d{0,3}", name) for name in given)
            require(
                (numbers and len(set(given)) == len(given) == len(wanted))
                or (not numbers and all(given.count(name) == 1 for name in wanted)),
                f"data.columns={shown(self.columns)[1:-1]} must name {', '.join(wanted)} once each, in the order of "
                "the file, as in item,user,rating,timestamp; or give the numbers of their fields, as in "
                f"{'2,1,4' if len(wanted) == 3 else '2,1'}",
            )
        require(
            self.separator is None or self.separator in ("::", "tab", "space") or len(self.separator.encode()) == 1,
            f"data.separator={shown(self.separator)[1:-1]} must be one character, ::, tab or space",
        )
        require(
            self.separator not in ('"', "\n", "\r"),
            f"data.separator={self.separator!r} separates no fields; give another",
        )
        require(
            self.time_format is None or ("%" in self.time_format and self.time_unit == "auto"),
            f"data.time_format={shown(self.time_format)[1:-1]} must name the parts of a date, as in %d/%m/%Y, and "
            "data.time_unit is of numbers",
        )
        of_time = [str(condition) for condition in self.conditions if condition.of_time]
        if self.order == "file":
            for name, given in (
                (f"data.where={self.where}", bool(of_time)),
                (f"data.time_unit={self.time_unit}", self.time_unit != "auto"),
                (f"data.time_format={self.time_format}", self.time_format is not None),
                ("data.split=temporal", self.split == "temporal"),
                ("data.timestamp_precision=float32", self.timestamp_precision == "float32"),
            ):
                require(not given, f"{name} reads times, and data.order=file reads none; leave one of them out")
        require(
            self.order == "file" or self.format not in ("pairs", "lines"),
            f"data.format={self.format} has no times; add data.order=file",
        )

    def _check_cuts(self) -> None:
        cuts = {"data.valid_from": self.valid_from, "data.test_from": self.test_from}
        given = [f"{name}={cut}" for name, cut in cuts.items() if cut is not None]
        if not given:
            return
        require(len(given) == 2, f"{given[0]} is given alone; data.valid_from and data.test_from belong together")
        require(self.split == "temporal", f"{given[0]} is for data.split=temporal, not {self.split}; leave it out")
        seconds = [parse_time(str(cut), name) for name, cut in cuts.items()]
        require(seconds[0] < seconds[1], f"{given[0]} must lie before {given[1]}")
