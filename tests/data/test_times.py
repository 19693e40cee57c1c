"""Times of every form become the same seconds, to the last digit of a fraction; what could be two things is refused."""

import datetime

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest

from tests.data.test_odd_input import loaded, refused
from tests.data.test_readers import with_frame
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.log_files import find_log
from tim4rec_jax.data.readers import Rules, read_frame, read_log
from tim4rec_jax.data_config import DataConfig

pytestmark = pytest.mark.quick

MOMENTS = ["2021-03-04T05:06:07", "2021-03-04 05:06:07", "2021/03/04 05:06:07", "2021-03-04T05:06:07Z"]
SECONDS = int(datetime.datetime(2021, 3, 4, 5, 6, 7, tzinfo=datetime.UTC).timestamp())


def log(times, **rules):
    times = list(times)
    frame = pl.DataFrame({"user": ["u"] * len(times), "item": ["a"] * len(times), "timestamp": times}, strict=False)
    return with_frame(read_frame(frame, rules=Rules(**rules)))


def seconds_of(times, **rules):
    return log(times, **rules).frame["timestamp"].to_list()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        *((text, SECONDS) for text in MOMENTS),
        ("2021-03-04 05:06:07 UTC", SECONDS),
        ("2021-03-04T05:06:07+01:00", SECONDS - 3600),
        ("2021-03-04T05:06:07-0530", SECONDS + 5 * 3600 + 1800),
        ("2021-03-04T05:06:07+02", SECONDS - 7200),
        ("2021-03-04T05:06", SECONDS - 7),
        ("2021-03-04", SECONDS - 5 * 3600 - 6 * 60 - 7),
        (" 2021-03-04T05:06:07.9 ", SECONDS),
    ],
)
def test_iso_dates_are_utc_unless_a_zone_stands_there(text, seconds):
    assert seconds_of([text]) == [seconds]


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.datetimes(datetime.datetime(1970, 1, 2), datetime.datetime(9999, 12, 30)),
    st.integers(-14 * 60, 14 * 60),
    st.sampled_from("T "),
)
def test_any_moment_in_any_zone(moment, minutes, middle):
    aware = moment.replace(tzinfo=datetime.timezone(datetime.timedelta(minutes=minutes)))
    hypothesis.assume(aware.timestamp() >= 0)
    read = log([aware.isoformat(middle)])
    whole = aware.replace(microsecond=0)
    assert read.frame["timestamp"].to_list() == [int(whole.timestamp())]
    fraction = 0.0 if read.fractions is None else read.fractions[0]
    assert fraction == pytest.approx(moment.microsecond / 1e6, abs=1e-9)


@pytest.mark.parametrize(("unit", "ticks"), [("s", 1), ("ms", 10**3), ("us", 10**6), ("ns", 10**9)])
@pytest.mark.parametrize("as_text", [False, True])
def test_the_unit_is_told_by_size_and_said_or_given(unit, ticks, as_text):
    times = [1_600_000_000 * ticks + 5 % ticks, 1_600_000_001 * ticks, 0]
    times = list(map(str, times)) if as_text else times
    names = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
    told, given = log(times), log(times, time_unit=unit)
    assert told.frame["timestamp"].to_list() == given.frame["timestamp"].to_list() == [1_600_000_000, 1_600_000_001, 0]
    assert told.taken["times"] == names[unit] + (" (by their size)" if unit != "s" else "")
    assert given.taken["times"] == names[unit]
    assert told.rounded_timestamps == (unit != "s")
    # One nanosecond orders events as one second does.
    assert unit == "s" or told.fractions[0] == pytest.approx(5 / ticks, rel=1e-12)


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(st.integers(0, 253_402_300_798), min_size=1, max_size=20), st.sampled_from(["s", "ms", "us"])
)
def test_a_given_unit_reads_every_number_to_the_last_digit(seconds, unit):
    ticks = {"s": 1, "ms": 10**3, "us": 10**6}[unit]
    assert seconds_of([s * ticks + ticks - 1 for s in seconds], time_unit=unit) == seconds


def test_long_decimals_keep_their_whole_digits():
    read = log(["1600000000123456789.5", "1600000000123456790"], time_unit="ns")
    assert read.frame["timestamp"].to_list() == [1_600_000_000] * 2
    np.testing.assert_allclose(read.fractions, [0.1234567895, 0.12345679], rtol=1e-9)


@pytest.mark.parametrize(
    ("times", "rules", "complaint"),
    [
        (
            [150_000_000_000] * 3,
            {},
            "such as 150000000000 may be seconds or milliseconds; set data.time_unit=s or",
        ),
        ([150_000_000_000_000] * 3, {}, "may be milliseconds or microseconds; set data.time_unit=ms or us"),
        (
            [1_600_000_000_000, 1_600_000_000_000, 1_600_000_000],
            {},
            "timestamp 1600000000 is small for millisec",
        ),
        ([1_600_000_000, 1_600_000_000, 1_600_000_000_000], {}, "row 3: .* past the year 9999; are these milliseconds"),
        (["2021-03-04", "2021-13-04", "2021-01-01"], {}, "row 2: timestamp '2021-13-04' is no such date as the others"),
        (["2021-03-04", "1600000000", "2021-01-01"], {}, "row 2: timestamp '1600000000' is no such date as the others"),
        (["1600000000", "2021-03-04", "1600000000"], {}, "row 2: timestamp '2021-03-04' is not a number"),
        ([20210304, 20210305, 20211231], {}, "such as 20210305 may be seconds or days; set data.time_format=%Y%m%d or"),
        (["04/03/2021", "05/03/2021"], {}, r"not a number; .* set data\.time_format for such dates, as in %d/%m/%Y"),
        (["1960-01-01"], {}, "row 1: timestamp '1960-01-01' is negative"),
        (["04.03.2021", "x"], {"time_format": "%d.%m.%Y"}, "row 2: timestamp 'x' is no such date .* %d.%m.%Y"),
    ],
)
def test_what_could_be_two_things_or_is_none_is_refused(times, rules, complaint):
    with pytest.raises(ValueError, match=complaint) as error:
        log(times, **rules)
    assert len(str(error.value)) < 300


def test_a_named_form_reads_other_dates():
    read = log(["04/03/2021 05:06", "05/03/2021 00:00"], time_format="%d/%m/%Y %H:%M")
    assert read.frame["timestamp"].to_list() == [SECONDS - 7, SECONDS - 7 + 19 * 3600 - 6 * 60]
    assert read.taken["times"] == "dates (%d/%m/%Y %H:%M, UTC)"
    assert seconds_of(["Mar 04 2021 05:06 +0100"], time_format="%b %d %Y %H:%M %z") == [SECONDS - 7 - 3600]


def test_days_written_as_numbers_are_read_when_that_is_said():
    assert seconds_of([20210304, 20210305], time_format="%Y%m%d") == [SECONDS // 86400 * 86400 + d for d in (0, 86400)]
    assert seconds_of([20210304, 20210305], time_unit="s") == [20210304, 20210305]
    assert seconds_of([20210304, 20211304]) == [20210304, 20211304]  # There is no month 13.


def test_times_without_a_unit_at_first_take_it_from_a_later_piece(tmp_path):
    for name, times in (("part-0", [0, 0]), ("part-1", [1_600_000_000_000] * 2)):
        frame = pl.DataFrame({"user": ["u"] * 2, "item": ["a"] * 2, "timestamp": times})
        frame.write_parquet(tmp_path / f"{name}.parquet")
    with pytest.raises(ValueError, match=r"part-1\.parquet, row 1: .* past the year 9999; are these milliseconds"):
        read_log(*find_log(str(tmp_path)))
    read = with_frame(read_log(*find_log(str(tmp_path)), rules=Rules(time_unit="ms")))
    assert read.frame["timestamp"].to_list() == [0, 0, 1_600_000_000, 1_600_000_000]


def test_the_table_says_what_was_taken_and_the_fingerprint_knows_what_was_given(tmp_path):
    path = tmp_path / "log.csv"
    rows = "".join(f"u,i{n},{1_600_000_000_000 + n}\n" for n in range(5))
    path.write_text("user,item,timestamp\n" + rows)
    told, _ = loaded(path)
    given, _ = loaded(path, time_unit="ms")
    other, _ = loaded(path, time_unit="us")
    assert len({one.fingerprint for one in (told, given, other)}) == 3
    assert told.items.tolist() == given.items.tolist() == [1, 2, 3, 4, 5]
    assert other.timestamps.tolist() == [1_600_000] * 5
    cells = [cell for column in told.statistics.table().columns for cell in column.cells]
    assert "separator: ','; times: milliseconds (by their size)" in cells
    again = load_log(DataConfig(name="custom", path=str(path), k_core=0, cache_dir=f"{path}.cache"))
    assert again.statistics == told.statistics  # From the cache.


def test_a_unit_and_a_form_of_dates_do_not_go_together():
    with pytest.raises(ValueError, match=r"data\.time_format=%d must name the parts of a date"):
        DataConfig(time_format="%d", time_unit="ms")
    with pytest.raises(ValueError, match=r"data\.time_unit='h' must be one of"):
        DataConfig(time_unit="h")


def test_a_bad_date_in_a_file_is_named_by_its_line(tmp_path):
    (tmp_path / "log.csv").write_text("user,item,timestamp\nu,a,2021-01-01\nu,b,soon\nu,c,2021-01-02\n")
    assert "log.csv:3: timestamp 'soon' is no such date as the others" in refused(tmp_path / "log.csv")
