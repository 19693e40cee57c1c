"""Times of a log in whole seconds and what is left of them: numbers of four units, dates, text of either."""

from typing import NamedTuple

import numpy as np
import polars as pl

from tim4rec_jax.checks import shown
from tim4rec_jax.data_config import TimeUnit

LATEST_SECOND = 253_402_300_799  # of the year 9999
TICKS: dict[str, int] = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}
_NAMES = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_SECONDS_PER_DAY = 86_400
# Up to here (the year 5138) a number is of a unit, from `LATEST_SECOND` on of the next finer one. What lies between
# could be either: so many milliseconds end in 1973 to 1978.
_SURE = 10**11
_LARGEST = 2**63 - 1
# Days written as numbers, which as seconds would all lie in August 1970.
_EARLIEST_DAY, _LATEST_DAY = 19700101, 21001231
_DATE = (
    r"^(\d{4})[-/](\d{2})[-/](\d{2})"
    r"(?:[T ](\d{2}):(\d{2})(?::(\d{2})(?:[.,](\d+))?)?)?"
    r"\s*(Z|z|UTC|GMT|[+-]\d{2}(?::?\d{2})?)?$"
)
_PARTS = ("year", "month", "day", "hour", "minute", "second", "fraction", "zone")


class Seconds(NamedTuple):
    """Times of a piece.

    Attributes:
      whole: Int64, epoch seconds rounded down; null where a time is bad.
      fractions: Float64, what was left of each; None where all are whole.
      read: as numbers in the unit, Float64 or Int64; null where a time is none.
    """

    whole: pl.Series
    fractions: pl.Series | None
    read: pl.Series


class TimeReader:
    """Reads the time column of a log piece by piece; what the first piece shows of unit and form holds for the rest.

    Args:
      unit: of numbers; "auto" tells it by the middle one of the first piece.
      form: of text, as in %d/%m/%Y; None reads numbers and ISO 8601.
      ticks_per_second: of the file's format; 0 where it says nothing.
    """

    def __init__(self, unit: TimeUnit = "auto", form: str | None = None, ticks_per_second: int = 0) -> None:
        self._form, self._fixed = form, ticks_per_second > 0
        self._guessed = unit == "auto" and not self._fixed
        self._unit: str | None = {1000: "ms"}.get(ticks_per_second) if self._fixed else None if self._guessed else unit
        self._dates: bool | None = None if form is None else True
        self._zones = False

    @property
    def taken(self) -> str | None:
        """What the times were taken for, in words; None before the first piece, and for columns that say it."""
        if self._dates:
            zone = "their own zones" if self._zones else "UTC"
            return f"dates ({self._form}, {zone})" if self._form else f"dates ({zone})"
        if self._unit is None:
            return None
        return _NAMES[self._unit] + (" (by their size)" if self._guessed and self._unit != "s" else "")

    @property
    def counts_fractions(self) -> bool:
        """Whether what is rounded down is worth counting: not in a format whose times are floored by definition."""
        return not self._fixed

    def read(self, times: pl.Series, name: str) -> Seconds:
        """Reads a piece.

        Args:
          times: of any type that a time column may have.
          name: of the file, for messages.

        Raises:
          ValueError: if the unit cannot be told.
        """
        dtype = times.dtype
        if dtype == pl.Date:
            days = times.to_physical().cast(pl.Int64)
            return _checked(days * _SECONDS_PER_DAY, None, None, 1)
        if isinstance(dtype, pl.Datetime):
            physical, per_second = times.to_physical(), TICKS[dtype.time_unit]
            return _checked(physical, None, None, per_second)
        if self._form is not None or not (dtype.is_numeric() or dtype == pl.Null):
            text = times.cast(pl.String, strict=False).str.strip_chars()
            if self._are_dates(text):
                return self._read_dates(text)
        ticks, exact, rest = _ticks(times)
        if self._unit is None:
            self._unit = _unit_of(ticks, name)
        return _checked(ticks, exact, rest, TICKS[self._unit or "s"])

    def of_another_unit(self, seconds: Seconds) -> pl.Series:
        """Tells which times would be of a coarser unit, by their size, where the unit was told by size."""
        unit = self._unit
        if not self._guessed or unit in (None, "s") or self._dates:
            return pl.repeat(False, len(seconds.whole), eager=True, dtype=pl.Boolean)
        coarser = list(TICKS.values())[list(TICKS).index(str(unit)) - 1]
        return ((seconds.read > 0) & (seconds.read <= LATEST_SECOND * coarser)).fill_null(False)

    def complaint(self, given: object, read: float | None) -> tuple[str, str]:
        """Says of a bad time what is wrong: in a few words, and in a sentence with the value and what to do."""
        unit = self._unit or "s"
        wanted = f"epoch {_NAMES[unit]}"
        if self._dates:
            wanted = f"dates as {self._form}" if self._form else "dates as 2020-12-31 or 2020-12-31T08:30:00.5+01:00"
        if given is None:
            return "no time", f"no timestamp; every interaction needs its time in {wanted}"
        if read is None and self._dates:
            hint = f"write {wanted}" + ("" if self._form else ", or set data.time_format, as in %d/%m/%Y")
            return "time is no date", f"timestamp {shown(given)} is no such date as the others; {hint}"
        if read is None:
            looks = isinstance(given, str) and len(given) > 5 and any(mark in given[1:] for mark in "-/:.")
            hint = ", or set data.time_format for such dates, as in %d/%m/%Y" if looks else ""
            return "time is no number", f"timestamp {shown(given)} is not a number; write {wanted}{hint}"
        if read < 0:
            return "negative time", f"timestamp {shown(given)} is negative; write {wanted}, 0 or later"
        if read > LATEST_SECOND * TICKS[unit]:
            hint = "; are these milliseconds? Set data.time_unit, or write" if unit == "s" else "; write"
            return "time past the year 9999", f"timestamp {shown(given)} lies past the year 9999{hint} {wanted}"
        return (
            "time of another unit",
            f"timestamp {shown(given)} is small for {_NAMES[unit]}, which the others are by their size; set "
            "data.time_unit if it is right",
        )

    def _are_dates(self, text: pl.Series) -> bool:
        if self._dates is None and text.null_count() < len(text):
            numbers = text.cast(pl.Float64, strict=False).is_not_null()
            self._dates = not numbers.all() and bool(text.filter(~numbers).str.contains(_DATE).sum() > numbers.sum())
        return bool(self._dates)

    def _read_dates(self, text: pl.Series) -> Seconds:
        if self._form is not None:
            moments = text.str.to_datetime(self._form, strict=False, time_unit="us")
            self._zones |= "%z" in self._form
            return _checked(moments.to_physical(), None, None, TICKS["us"])
        parts = text.str.extract_groups(_DATE).struct.unnest()
        parts.columns = list(_PARTS)
        zone = pl.col("zone")
        hours = zone.str.slice(0, 3).cast(pl.Int64, strict=False).fill_null(0).abs()
        minutes = zone.str.slice(3).str.replace(":", "", literal=True).cast(pl.Int64, strict=False).fill_null(0)
        sign = pl.when(zone.str.starts_with("-")).then(-1).otherwise(1)
        clock = [pl.col(part).fill_null("00") for part in ("hour", "minute", "second")]
        day = pl.concat_str("year", "month", "day", separator="-")
        moment = pl.concat_str(day, pl.lit("T"), pl.concat_str(*clock, separator=":"))
        read = parts.select(
            (
                moment.str.to_datetime("%Y-%m-%dT%H:%M:%S", strict=False, time_unit="us").dt.epoch("s")
                - sign * (hours * 3600 + minutes * 60)
            ).alias("whole"),
            (pl.lit("0.") + pl.col("fraction").fill_null("0")).cast(pl.Float64).alias("rest"),
            (zone.is_not_null() & ~zone.str.to_uppercase().is_in(["Z", "UTC", "GMT"])).alias("zoned"),
        )
        self._zones |= bool(read["zoned"].any())
        rest = read["rest"] if (read["rest"] > 0).any() else None
        return _checked(read["whole"], None, rest, 1)


def _checked(ticks: pl.Series, exact: pl.Series | None, rest: pl.Series | None, per_second: int) -> Seconds:
    """Divides ticks into whole seconds and a fraction; times out of range become null.

    `exact` are the ticks as Int64 where a Float64 may have lost digits.
    """
    good = (ticks >= 0) & (ticks <= min(LATEST_SECOND * per_second, _LARGEST))
    whole = ticks.set(~good.fill_null(False), None).cast(pl.Int64)
    if exact is not None:
        whole = exact.set(whole.is_null(), None).zip_with(exact.is_not_null(), whole)
    if per_second == 1:
        return Seconds(whole, rest, ticks)
    below = (whole % per_second).cast(pl.Float64)
    fractions = (below if rest is None else below + rest) / per_second
    return Seconds(whole // per_second, fractions, ticks)


def _ticks(times: pl.Series) -> tuple[pl.Series, pl.Series | None, pl.Series | None]:
    """Returns numbers rounded down, null where they are none; the same as Int64 if need be; what is left, or None."""
    dtype = times.dtype
    if dtype.is_decimal():
        whole = times.floor()
        return whole.cast(pl.Float64), whole.cast(pl.Int64, strict=False), (times - whole).cast(pl.Float64)
    if dtype.is_float():
        # In polars NaN is the largest number, so it would pass for a late time.
        numbers = times.cast(pl.Float64).fill_nan(None)
        return numbers.floor(), None, numbers - numbers.floor()
    times = times if dtype.is_integer() or dtype == pl.Null else times.cast(pl.String, strict=False)
    integers = times.cast(pl.Int64, strict=False)
    if integers.null_count() == times.null_count():
        return integers, None, None
    text = times.cast(pl.String, strict=False).str.strip_chars()
    numbers = text.cast(pl.Float64, strict=False).fill_nan(None)
    # A float has about 16 digits: a longer decimal is split where its point stands.
    digits = text.str.extract(r"^\+?(\d+)(?:\.\d*)?$")
    behind = text.str.extract(r"^\+?\d+(\.\d*)$")
    split = behind.is_not_null()
    fraction = ("0" + behind.str.replace(r"\.$", "")).cast(pl.Float64, strict=False)
    rest = fraction.zip_with(split, numbers - numbers.floor())
    return (
        digits.cast(pl.Float64, strict=False).zip_with(split, numbers.floor()),
        digits.cast(pl.Int64, strict=False),
        rest,
    )


def _are_days(numbers: pl.Series) -> bool:
    """Tells whether all numbers may be days of a calendar, as in 20210131."""
    days = pl.col("t").cast(pl.Int64)
    month, day = days // 100 % 100, days % 100
    in_calendar = days.is_between(_EARLIEST_DAY, _LATEST_DAY) & month.is_between(1, 12) & day.is_between(1, 31)
    return bool(numbers.alias("t").to_frame().select((in_calendar & (days == pl.col("t"))).all()).item())


def _unit_of(ticks: pl.Series, name: str) -> str | None:
    """Tells the unit by the middle one of the positive numbers; None without any."""
    positive = ticks.filter(ticks > 0)
    if not len(positive):
        return None if ticks.null_count() == len(ticks) else "s"
    place = (len(positive) - 1) // 2
    middle = float(np.partition(positive.to_numpy(), place)[place])
    if _EARLIEST_DAY <= middle <= _LATEST_DAY and _are_days(positive):
        raise ValueError(
            f"{name}: times such as {middle:.0f} may be seconds or days; set data.time_format=%Y%m%d or time_unit=s"
        )
    for unit, per_second in TICKS.items():
        if middle <= _SURE * per_second:
            return unit
        if middle <= LATEST_SECOND * per_second and unit != "ns":
            finer = list(TICKS)[list(TICKS).index(unit) + 1]
            raise ValueError(
                f"{name}: a time such as {middle:.0f} may be {_NAMES[unit]} or {_NAMES[finer]}; set "
                f"data.time_unit={unit} or {finer}"
            )
    return "s"
