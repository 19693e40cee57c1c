"""Odd and hostile files: read with every row accounted for, or refused in one line that names the cause."""

import datetime
import decimal
import io
import os
import pathlib
import pwd
import stat
import threading

import polars as pl
import pytest
from rich.console import Console

from tests.data.test_readers import ROWS, read
from tim4rec_jax.checks import shown
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.sources import expanded
from tim4rec_jax.data_config import DataConfig

LOG = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\tb\t2\nu\tc\t3\n"


def refused(path, log_format="auto", columns=None):
    with pytest.raises((ValueError, OSError)) as error:
        read(path, log_format, columns)
    message = str(error.value)
    assert len(message.replace(str(path), "")) < 300 and "\n" not in message
    return message


def loaded(path, **settings):
    """A log and what was noted while it was read."""
    console = Console(file=io.StringIO(), width=10_000)
    settings = {"cache_dir": f"{path}.cache", "k_core": 0} | settings
    log = load_log(DataConfig(name="custom", path=str(path), **settings), console)
    return log, [line for line in console.file.getvalue().splitlines() if not line.startswith("reading ")]


def parquet(path, **columns):
    frame = {"user": ["u", "u", "u"], "item": ["a", "b", "c"], "timestamp": [1, 2, 3]} | columns
    pl.DataFrame(frame, strict=False).write_parquet(path)
    return path


def test_values_are_quoted_short():
    assert shown("a") == "'a'" and shown(12) == "12" and shown(None) == "None"
    for value in ("x" * 10**6, b"x" * 10**6, ["x" * 1000] * 1000, {i: "y" * 99 for i in range(99)}):
        assert 70 < len(shown(value)) <= 80 and ".." in shown(value)
    assert shown(10**3000) == "<a whole number of 9966 bits>"
    assert len(shown("x" * 100, 20)) <= 20


@pytest.mark.parametrize(
    ("types", "cause"),
    [
        ({"timestamp": [True, False, True]}, "column timestamp is Boolean, which are no times"),
        ({"timestamp": [datetime.timedelta(1)] * 3}, "column timestamp is Duration"),
        ({"timestamp": [datetime.time(1)] * 3}, "column timestamp is Time"),
        ({"timestamp": [[1]] * 3}, "column timestamp holds lists or structs (List(Int64))"),
        ({"timestamp": [{"s": 1}] * 3}, "column timestamp holds lists or structs (Struct"),
        ({"timestamp": [datetime.date(1960, 1, 1)] * 3}, "is negative"),
        (
            {"timestamp": pl.Series([1, 2, 2**64 - 1], dtype=pl.UInt64)},
            "row 3: timestamp 18446744073709551615 lies past",
        ),
        ({"timestamp": [1.0, float("inf"), 2.0]}, "row 2: timestamp inf lies past"),
        ({"timestamp": [decimal.Decimal("-0.5")] * 3}, "is negative"),
        ({"timestamp": [None] * 3}, "row 1: no timestamp"),
        ({"timestamp": [b"1", b"x", b"3"]}, "row 2: timestamp b'x' is not a number"),
        ({"user": [True] * 3}, "column user is Boolean, which are no ids"),
        ({"user": [["u"]] * 3}, "column user holds lists or structs (List(String))"),
        ({"item": [{"a": 1}] * 3}, "column item holds lists or structs (Struct"),
        ({"item": [datetime.date(2020, 1, 1)] * 3}, "column item is Date, which are no ids"),
        ({"item": [decimal.Decimal("1.5")] * 3}, "column item is Decimal"),
        ({"item": [1.0, 2.0, 0.3]}, "row 3: item id 0.3 is a float that is no whole number"),
        ({"item": [1.0, float("nan"), 2.0]}, "row 2: item id nan is a float"),
        ({"item": [1.0, 2.0**60, 2.0]}, "row 2: item id 1.152921504606847e+18 is a float"),
        ({"user": [b"\xff"] * 3}, "a user id is no UTF-8 text"),
        ({"user": [None] * 3}, "row 1: no user id (3 such rows)"),
    ],
)
def test_columns_of_other_types_are_refused_by_name(tmp_path, types, cause):
    assert cause in refused(parquet(tmp_path / "log.parquet", **types))


@pytest.mark.parametrize(
    ("types", "ids"),
    [
        ({"item": pl.Series(["a", "b", "c"], dtype=pl.Categorical)}, ["a", "b", "c"]),
        ({"item": pl.Series(["a", "b", "c"], dtype=pl.Enum(["c", "b", "a"]))}, ["a", "b", "c"]),
        ({"item": [b"a", b"b", b"c"]}, ["a", "b", "c"]),
        ({"item": [1.0, -0.0, 0.0]}, ["1", "0", "0"]),
        ({"item": [1, 2, 3]}, ["1", "2", "3"]),
        ({"item": pl.Series([1, 2, 2**64 - 1], dtype=pl.UInt64)}, ["1", "2", "18446744073709551615"]),
        ({"item": [decimal.Decimal(7)] * 3}, ["7"] * 3),
        ({"item": ["01", "1.0", " 1"]}, ["01", "1.0", " 1"]),
    ],
)
def test_ids_of_other_types_are_read_as_they_are(tmp_path, types, ids):
    assert read(parquet(tmp_path / "log.parquet", **types)).frame["item"].to_list() == ids


MOMENTS = [datetime.datetime(2020, 1, 1), datetime.datetime(2020, 1, 1, microsecond=1), datetime.datetime(2020, 1, 2)]
SECONDS = [1577836800, 1577836800, 1577923200]


@pytest.mark.parametrize(
    ("times", "seconds", "rounded"),
    [
        ([decimal.Decimal("1.5"), decimal.Decimal("2.9"), decimal.Decimal("3")], [1, 2, 3], 2),
        ([1.5, 2.9, 3.0], [1, 2, 3], 2),
        (["1.5", "2.9", "3"], [1, 2, 3], 2),
        (["1600000000.99999999999", "3.", "1e3"], [1600000000, 3, 1000], 1),
        (["15e-1", "2.000", "+3.0"], [1, 2, 3], 1),
        ([b"1.5", b"2", b"3"], [1, 2, 3], 1),
        (pl.Series(["1.5", "2", "3"], dtype=pl.Categorical), [1, 2, 3], 1),
        (MOMENTS, SECONDS, 1),
        (pl.Series(MOMENTS).cast(pl.Datetime("ms")), SECONDS, 0),
        (pl.Series([10**9, 10**9 + 5, 3 * 10**9]).cast(pl.Datetime("ns")), [1, 1, 3], 1),
        ([m.date() for m in MOMENTS], SECONDS, 0),
        (pl.Series([1, 2, 3], dtype=pl.UInt64), [1, 2, 3], 0),
    ],
)
def test_every_fraction_of_a_second_is_counted(tmp_path, times, seconds, rounded):
    log = read(parquet(tmp_path / "log.parquet", timestamp=times))
    assert (log.frame["timestamp"].to_list(), log.rounded_timestamps) == (seconds, rounded)


def test_parquet_files_that_hold_no_log(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame().write_parquet(path)
    assert "no column user; its columns are none" in refused(path)
    parquet(path, user=[], item=[], timestamp=[])
    assert "holds no rows" in refused(path)
    whole = parquet(path).read_bytes()
    for data in (whole[:-8], b"PARE" + whole[4:-4] + b"PARE", whole[:4], b"PAR1PAR1"):
        path.write_bytes(data)
        assert "is not a readable Parquet file" in refused(path)
    strange = tmp_path / "a[1]*?.parquet"
    strange.write_bytes(whole)
    assert read(strange).frame.height == 3


def test_a_million_equal_rows_in_a_few_bytes_have_a_limit(tmp_path):
    path = tmp_path / "log.parquet"
    rows = 2**20
    pl.select(user=pl.repeat("u", rows), item=pl.repeat("i", rows), timestamp=pl.repeat(1, rows)).write_parquet(path)
    with pytest.raises(ValueError, match="unpack to more than 0.001 GB; if that is right, set data.max_unpacked_gb"):
        list(load_log(DataConfig(name="custom", path=str(path), max_unpacked_gb=0.001, cache_dir=str(tmp_path))))


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (LOG.replace("u\ta", "u\ta\r"), 2),
        (LOG.replace("u\tb", "u\r\tb"), 3),
        (LOG.replace("\n", "\r\n").replace("3\r\n", "3\r\r\n"), 4),
        (LOG.replace("\n", "\r"), 1),
    ],
)
def test_a_carriage_return_inside_a_line_is_named(tmp_path, text, line):
    (tmp_path / "log.inter").write_bytes(text.encode())
    assert f"log.inter:{line}: a carriage return inside the line" in refused(tmp_path / "log.inter")


def test_a_carriage_return_inside_quotes_stays(tmp_path):
    (tmp_path / "log.csv").write_bytes(b'user,item,timestamp\r\n"u\r",a,1\r\nu,"b\r\nc",2\r\n"u\r",d,3\r')
    assert read(tmp_path / "log.csv").frame.rows() == [("u\r", "a", 1), ("u", "b\r\nc", 2), ("u\r", "d", 3)]
    (tmp_path / "log.csv").write_bytes(b'user,item,timestamp\n"u",a\r,1\n')
    assert "log.csv:2: a carriage return" in refused(tmp_path / "log.csv")


@pytest.mark.parametrize(
    ("separator", "read_as"), [(";", True), ("|", True), ("\t", True), ("::", False), ("^", False)]
)
def test_the_separator_is_told_or_named_as_the_cause(tmp_path, separator, read_as):
    path = tmp_path / "log.csv"
    path.write_text("".join(separator.join(map(str, row)) + "\n" for row in [("user", "item", "timestamp"), *ROWS]))
    if read_as:
        assert read(path).frame.rows() == ROWS
    else:
        message = refused(path, "csv")
        assert f"its header is the one field 'user{separator}item{separator}timestamp'" in message
        assert "separated by commas or tabs" in message


def test_the_separator_of_a_recbole_file_is_named(tmp_path):
    (tmp_path / "log.inter").write_text(LOG.replace("\t", ","))
    assert "this one looks separated by ','" in refused(tmp_path / "log.inter")


@pytest.mark.parametrize("rows", ['7,12" disc,b,100', '7,"12"" disc",b,100', '7,12" and 3" x,b,100', '7,a "b" c,b,100'])
def test_quotes_inside_fields_are_characters_or_doubled(tmp_path, rows):
    path = tmp_path / "log.csv"
    path.write_text(f"user,title,item,timestamp\n{rows}\n7,x,a,50\n{rows.replace('7', '9').replace('100', '75')}\n")
    assert read(path).frame.rows() == ROWS


@pytest.mark.parametrize("field", ['12" disc', 'disc 12"', '"best" of', 'a""b'])
def test_a_stray_quote_among_quoted_fields_is_named(tmp_path, field):
    path = tmp_path / "log.csv"
    path.write_text(f'user,title,item,timestamp\n7,"a, b",b,100\n7,{field},a,50\n9,"x",b,75\n')
    assert ":3: a quote inside a field" in refused(path)


def test_a_quote_that_none_closes_is_named(tmp_path):
    (tmp_path / "log.csv").write_text('user,item,timestamp\n"u",a,1\nu,b,2\n"u,c,3\n')
    assert ":4: a quote opens a field and none closes it" in refused(tmp_path / "log.csv")


def test_messages_stay_short_whatever_a_file_holds(tmp_path):
    long = "x" * 400_000
    texts = {
        "array.json": "[" + ", ".join(f'{{"user": "{i}", "item": "{i}", "timestamp": {i}}}' for i in range(9000)) + "]",
        "wide.csv": ",".join(f"column{i}" for i in range(50_000)) + "\n",
        "name.csv": f"{long},item\n1,2\n",
        "log.inter": f"{long}\t{long}\n1\t2\n",
        "a.inter": f"user_id:token\t{long}:token\n1\t2\n",
        "time.inter": LOG.replace("\t2\n", f"\t{long}\n"),
        "u.data": f"{long}\n",
        "beauty.csv": f"1,{long},5.0,100\n",
        "strange.txt": long,
    }
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
        for log_format in ("auto", "csv", "amazon", "movielens", "recbole", "kuairand", "parquet"):
            assert refused(tmp_path / name, log_format)


@pytest.mark.parametrize("data", [LOG.encode("utf-16"), LOG.encode("utf-16-be"), LOG.encode("utf-32")])
def test_other_encodings_are_refused(tmp_path, data):
    (tmp_path / "log.inter").write_bytes(data)
    assert "log.inter" in refused(tmp_path / "log.inter")


def test_what_is_no_file_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe.csv")
    assert "is a pipe or a device" in refused(tmp_path / "pipe.csv")
    assert "is a pipe or a device" in refused("/dev/null")
    (tmp_path / "loop.csv").symlink_to("loop.csv")
    (tmp_path / "broken.csv").symlink_to("gone.csv")
    for name in ("loop.csv", "broken.csv", "a\0b", "\udcff.csv", "~nobody-of-this-name/log.csv"):
        assert "no file or folder at" in refused(str(tmp_path / name) if name[0] != "~" else name)
    assert "no file has so long a name" in refused(tmp_path / ("x" * 5000))
    (tmp_path / "two\nlines.inter").write_text(LOG.replace("\t2\n", "\tx\n"))
    assert r"two\nlines.inter:3: timestamp 'x'" in refused(tmp_path / "two\nlines.inter")
    for content, cause in (
        (b"", "is empty"),
        (b" \n\n\r\n", "is empty"),
        (LOG.partition("\n")[0].encode(), "holds no rows"),
    ):
        (tmp_path / "log.inter").write_bytes(content)
        assert cause in refused(tmp_path / "log.inter")
    assert read(tmp_path / "\udcff.inter" if (tmp_path / "\udcff.inter").write_text(LOG) else "").frame.height == 3


def test_without_a_home_folder_a_log_is_read_and_not_kept(tmp_path, monkeypatch):
    def unknown(*_):
        raise KeyError("uid not found")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    assert expanded("~/x") == pathlib.Path("~/x")
    (tmp_path / "log.inter").write_text(LOG)
    log, notes = loaded(tmp_path / "log.inter", cache_dir="~/.cache/x")
    assert log.num_rows == 3 and len(notes) == 1 and "no home folder is known" in notes[0]
    with pytest.raises(ValueError, match="no home folder is known .HOME is not set.; set data.cache_dir"):
        load_log(DataConfig(name="ml-1m"))
    with pytest.raises(FileNotFoundError, match="no file or folder at ~/gone"):
        loaded("~/gone", cache_dir=str(tmp_path))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.inter"]


def test_cleaned_logs_follow_the_umask(tmp_path):
    (tmp_path / "log.inter").write_text(LOG)
    old = os.umask(0o027)
    try:
        loaded(tmp_path / "log.inter", cache_dir=str(tmp_path / "c"))
    finally:
        os.umask(old)
    (entry,) = (tmp_path / "c" / "cleaned").iterdir()
    assert {stat.S_IMODE(file.stat().st_mode) for file in entry.iterdir()} == {0o640}


@pytest.mark.parametrize("cache", ["a\0b", "x" * 300, "file/below", "\udcff", "[a]*", "loop"])
def test_a_cache_in_an_odd_place_costs_a_note_at_most(tmp_path, cache):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "log.inter").write_text(LOG)
    log, notes = loaded(tmp_path / "log.inter", cache_dir=f"{tmp_path}/{cache}")
    assert log.num_rows == 3 and all("cache" in note for note in notes)
    assert bool(notes) == (cache not in ("\udcff", "[a]*"))


def test_logs_cleaned_at_once_are_whole(tmp_path):
    (tmp_path / "log.inter").write_text(LOG)
    notes, logs = [], []

    def load():
        log, said = loaded(tmp_path / "log.inter", cache_dir=str(tmp_path / "c"))
        notes.extend(said)
        logs.append(log.items.tolist())

    threads = [threading.Thread(target=load) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert logs == [[1, 2, 3]] * 8 and notes == []
    assert len(list((tmp_path / "c" / "cleaned").iterdir())) == 1
