"""Conditions keep exactly the rows that meet them, duplicates the first or last in time, and both are counted."""

import operator

import hypothesis
import hypothesis.strategies as st
import polars as pl
import pytest

from tests.data.test_odd_input import loaded
from tests.data.test_readers import with_frame
from tim4rec_jax.data.interactions import clean, load_log
from tim4rec_jax.data.log_files import LogColumns, find_log
from tim4rec_jax.data.readers import Rules, read_frame, read_log
from tim4rec_jax.data_config import DataConfig, parse_where

pytestmark = pytest.mark.quick

ROWS = ["u,a,100,4.0,view", "u,b,200,3,buy", "u,c,300,,buy", "u,d,400,5,", "u,e,500,4.5,add to cart"]
TEXT = "\n".join(["user,item,timestamp,rating,event", *ROWS, ""])


def kept(path, where, text=TEXT, columns=None, **rules):
    path.write_text(text)
    sources, log_format = find_log(str(path), "auto", columns)
    conditions = parse_where(where, "timestamp")
    log = with_frame(read_log(sources, log_format, columns, Rules(conditions=conditions, **rules)))
    return "".join(log.frame["item"]), log.dropped


@pytest.mark.parametrize(
    ("where", "items"),
    [
        ("rating>=4", "ade"),
        ("rating > 4", "de"),
        ("rating=4", "a"),
        ("rating==4.00", "a"),
        ("rating!=4", "bde"),
        ("rating in 3,5", "bd"),
        ("rating not in 3,5", "ae"),
        ("event=buy", "bc"),
        ("event in view,buy", "abc"),
        ("event not in buy", "ae"),
        ('event in "add to cart", view', "ae"),
        ('"event"="add to cart"', "e"),
        ("time>=200 and time<500", "bcd"),
        ("timestamp>1970-01-01T00:05:00", "de"),
        ("time<=1970-01-01T00:05:00+00:00 and event=buy and rating<4", "b"),
        ("time!=300", "abde"),
        ("item in a,e", "ae"),
        ("user=u", "abcde"),
    ],
)
def test_conditions(tmp_path, where, items):
    found, dropped = kept(tmp_path / "log.csv", where)
    assert found == items
    assert sum(dropped.values()) == 5 - len(items)
    assert all(reason.startswith("where ") for reason in dropped)


OPERATORS = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "=": operator.eq,
    "!=": operator.ne,
}


@hypothesis.settings(deadline=None)
@hypothesis.given(
    st.lists(st.one_of(st.none(), st.integers(-3, 3), st.floats(-3, 3, width=16)), min_size=1, max_size=20),
    st.sampled_from(list(OPERATORS)),
    st.one_of(st.integers(-3, 3), st.floats(-3, 3, width=16)),
    st.booleans(),
)
def test_a_comparison_is_that_of_numbers(ratings, sign, number, as_text):
    values = [None if r is None else str(r) if as_text else float(r) for r in ratings]
    dtype = pl.String if as_text else pl.Float64
    frame = pl.DataFrame({"user": "u", "item": [str(i) for i in range(len(values))], "timestamp": 1})
    frame = frame.with_columns(x=pl.Series(values, dtype=dtype))
    log = with_frame(read_frame(frame, rules=Rules(conditions=parse_where(f"x{sign}{number!r}"))))
    expected = [str(i) for i, r in enumerate(ratings) if r is not None and OPERATORS[sign](r, number)]
    assert log.frame["item"].to_list() == expected


def test_a_fraction_of_a_second_counts(tmp_path):
    text = "user,item,timestamp\nu,a,1600000000.25\nu,b,1600000000.5\nu,c,1600000000.75\n"
    assert kept(tmp_path / "log.csv", "time>1600000000.25 and time<=1600000000.5", text)[0] == "b"


def test_files_that_name_no_fields(tmp_path):
    text = "7::b::5::100\n7::a::3::50\n9::c::4::75\n"
    assert kept(tmp_path / "ratings.dat", "rating>=4", text)[0] == "bc"
    assert kept(tmp_path / "log.csv", "3>=4", text.replace("::", ","), LogColumns(order="1,2,4"))[0] == "bc"
    text = "user_id:token\titem_id:token\tevent:token\ttimestamp:float\n1\ta\tbuy\t5\n1\tb\tview\t6\n"
    assert kept(tmp_path / "log.inter", "event=buy", text)[0] == "a"
    text = '{"user": 1, "item": "a", "timestamp": 1, "rating": 5}\n{"user": 1, "item": "b", "timestamp": 2}\n'
    assert kept(tmp_path / "log.jsonl", "rating>=4", text)[0] == "a"


def test_a_row_that_is_left_out_need_not_be_a_good_one(tmp_path):
    text = "user,item,timestamp,event\nu,a,1,buy\n,,never,ping\nu,b,2,buy\n"
    assert kept(tmp_path / "log.csv", "event=buy", text) == ("ab", {"where event=buy": 1})


@pytest.mark.parametrize(
    ("where", "complaint"),
    [
        ("rating", "'rating' is no condition; write conditions as in rating>=4 and"),
        ("", "'' is no condition"),
        ("rating>=4 and", "is no number"),
        ("rating>=4 or x=1", "'4 or x=1' is no number, and >= compares numbers"),
        ("rating>=four", "'four' is no number"),
        ("rating>=nan", "'nan' is no number"),
        ("event in view,,buy", "has an empty value"),
        ("time in 1,2", "a time is compared with <, <=, >, >=, = or !=, not in"),
        ("time>=yesterday", "data.where=time>==yesterday is no date"),
        ("x=1 and " * 200 + "x=1", "has 1,603 characters, over 1,000"),
        ("__import__('os').system('x')", "is no condition"),
    ],
)
def test_what_is_no_condition_is_refused_before_anything_is_read(where, complaint):
    with pytest.raises(ValueError) as error:
        DataConfig(where=where)
    assert complaint in str(error.value)


def test_what_is_no_number_is_named_by_its_line_and_a_missing_column_by_its_name(tmp_path):
    with pytest.raises(ValueError, match=r"log\.csv:3: rating 'good' is no number, and data\.where compares it to 4"):
        kept(tmp_path / "log.csv", "rating>=4", TEXT.replace(",3,buy", ",good,buy"))
    with pytest.raises(ValueError, match=r"no column price; its columns are user, .* \(data\.where names it\)"):
        kept(tmp_path / "log.csv", "price>=4")
    found, dropped = kept(tmp_path / "log.csv", "rating>=4", TEXT.replace(",3,buy", ",good,buy"), skip_bad=True)
    assert found == "ade" and dropped == {"bad: rating is no number": 1, "where rating>=4": 1}


def test_conditions_that_leave_nothing_say_so(tmp_path):
    (tmp_path / "log.csv").write_text(TEXT)
    with pytest.raises(ValueError, match=r"no row of the log is left \(left out: 5 by where rating>=6\)"):
        loaded(tmp_path / "log.csv", where="rating>=6")


def test_settings_of_reading_are_in_the_fingerprint(tmp_path):
    (tmp_path / "log.csv").write_text(TEXT)
    settings = [{}, {"where": "rating>=4"}, {"where": "rating>=3"}, {"duplicates": "last"}, {"bad_rows": "skip"}]
    assert len({loaded(tmp_path / "log.csv", **one)[0].fingerprint for one in settings}) == len(settings)
    assert loaded(tmp_path / "log.csv", time_unit="auto")[0].fingerprint == loaded(tmp_path / "log.csv")[0].fingerprint


EVENTS = st.lists(st.tuples(st.sampled_from("uv"), st.sampled_from("abc"), st.integers(0, 5)), min_size=1, max_size=30)


@hypothesis.settings(deadline=None)
@hypothesis.given(EVENTS, st.sampled_from(["keep", "first", "last"]))
def test_duplicates(rows, which):
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row").cast({"timestamp": pl.Int64})
    log = clean(frame, k_core=0, timestamp_precision="int64", min_events=1, duplicates=which)
    best = {}
    for place, (user, item, time) in enumerate(rows):
        key = (user, item) if which != "keep" else place
        before = best.get(key)
        if before is None or (time < before[2] if which == "first" else time >= before[2]):
            best[key] = (user, item, time, place)
    expected = sorted(best.values(), key=lambda row: (row[2], row[3]))
    for user in {row[0] for row in rows}:
        at = log.user_ids.to_list().index(user)
        items = [log.item_ids[int(i) - 1] for i in log.items[log.offsets[at] : log.offsets[at + 1]]]
        assert items == [row[1] for row in expected if row[0] == user]
    if which != "keep":
        assert log.statistics.dropped[f"repeated (user, item) rows, the {which} kept"] == len(rows) - len(best)
        assert log.statistics.duplicates == 0


@pytest.mark.parametrize(
    "setting", [{"where": "time<5"}, {"order": "file"}, {"time_unit": "ms"}, {"columns": "2,1,3"}, {"format": "csv"}]
)
def test_a_generated_log_is_not_read(setting):
    [(name, value)] = setting.items()
    with pytest.raises(ValueError, match=f"data.{name}={value} is of reading files, and data.name=synthetic"):
        load_log(DataConfig(**setting))
