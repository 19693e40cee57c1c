"""Every format is read to the same rows, and every kind of bad file is named with its line."""

import datetime
import gzip
import types
import zipfile

import numpy as np
import polars as pl
import pytest

from tim4rec_jax.data.columns import IdCoder
from tim4rec_jax.data.log_files import LogColumns, find_log
from tim4rec_jax.data.readers import read_log
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.titles import find_titles, read_titles, titles_for

pytestmark = pytest.mark.quick

ROWS = [("7", "b", 100), ("7", "a", 50), ("9", "b", 75)]

RECBOLE = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n7\tb\t5\t100\n7\ta\t3.0\t50\n9\tb\t4\t75\n"
STEAM = (
    "user_id:token\tplay_hours:float\tproducts:token\tproduct_id:token\tpage_order:float\ttimestamp:float\n"
    "7\t10.2\t33\tb\t0\t100\n7\t\t33\ta\t1\t50\n9\t0.1\t2\tb\t0\t75\n"
)
ML_1M = "7::b::5::100\n7::a::3::50\n9::b::4::75\n"
ML_100K = "7\tb\t5\t100\n7\ta\t3\t50\n9\tb\t4\t75\n"
RATINGS = "7,b,5.0,100\n7,a,3.0,50\n9,b,4.0,75\n"
AMAZON = "A2SUAM1J3GNN3B,B00012345X,5.0,100\nA2SUAM1J3GNN3B,B00099999Q,3.0,50\nA1RSDE90N6RSZF,B00012345X,4.0,75\n"
KUAIRAND = (
    "user_id,video_id,date,hourmin,time_ms,is_click\n7,b,20220408,400,100999,1\n7,a,20220408,400,50000,0\n"
    "9,b,20220408,500,75001,1\n"
)
CSV = 'who,what,score,when\n7,b,"1,5",100\n7,a,2,50\n9,b,3,75\n'
NAMED = LogColumns("who", "what", "when")
ORDERED = LogColumns(order="user, item,rating,timestamp")


def read(path, log_format="auto", columns=None):
    """The log as read, with its columns as a data frame too."""
    sources, log_format = find_log(str(path), log_format, columns)
    return with_frame(read_log(sources, log_format, columns))


def with_frame(log):
    ids = {"user": log.user_ids.gather(log.users), "item": log.item_ids.gather(log.items)}
    return types.SimpleNamespace(**vars(log), frame=pl.DataFrame(ids | {"timestamp": log.timestamps}))


@pytest.mark.parametrize(
    ("name", "text", "log_format", "columns"),
    [
        ("log.inter", RECBOLE, "recbole", None),
        ("log.inter", RECBOLE.replace("\n", "\r\n"), "recbole", None),
        ("log.inter", "\ufeff" + RECBOLE, "recbole", None),
        ("atomic.txt", RECBOLE, "recbole", None),
        ("steam.inter", STEAM, "recbole", None),
        ("ratings.dat", ML_1M, "movielens", None),
        ("u.data", ML_100K, "movielens", None),
        ("ratings_Beauty.csv", RATINGS, "csv", ORDERED),
        ("log_standard_pure.csv", KUAIRAND, "kuairand", None),
        ("any.csv", CSV, "csv", NAMED),
        ("any.tsv", "who\twhat\twhen\n7\tb\t100\n7\ta\t50\n9\tb\t75\n", "csv", NAMED),
    ],
)
def test_every_text_format_gives_the_same_rows(tmp_path, name, text, log_format, columns):
    (tmp_path / name).write_bytes(text.encode())
    assert find_log(str(tmp_path / name), "auto", columns)[1] == log_format
    log = read(tmp_path / name, columns=columns)
    assert log.frame.rows() == ROWS
    assert log.frame.schema == {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    assert (log.blank_lines, log.rounded_timestamps) == (0, 0)


def test_gzip_folder_and_zip_are_read_in_place(tmp_path):
    (tmp_path / "log.inter.gz").write_bytes(gzip.compress(RECBOLE.encode()))
    assert read(tmp_path / "log.inter.gz").frame.rows() == ROWS
    assert read(tmp_path).frame.rows() == ROWS

    with zipfile.ZipFile(tmp_path / "ml-1m.zip", "w") as archive:
        archive.writestr("ml-1m/", "")
        archive.writestr("ml-1m/ratings.dat", ML_1M)
        archive.writestr("ml-1m/movies.dat", "b::Caf\u00e9::Drama\na::Alien (1979)::Horror\n".encode("latin-1"))
    before = sorted(tmp_path.rglob("*"))
    sources, log_format = find_log(str(tmp_path / "ml-1m.zip"))
    assert log_format == "movielens"
    assert with_frame(read_log(sources, log_format)).frame.rows() == ROWS
    assert read_titles(find_titles(sources[0])).rows() == [("b", "Caf\u00e9"), ("a", "Alien (1979)")]
    assert sorted(tmp_path.rglob("*")) == before


def test_parquet_with_named_columns_of_other_types(tmp_path):
    moments = [datetime.datetime.fromtimestamp(t, datetime.UTC) for t in (100, 50, 75)]
    frame = pl.DataFrame({"who": [7, 7, 9], "what": ["b", "a", "b"], "extra": [1, 2, 3], "when": moments})
    frame.write_parquet(tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet", columns=NAMED).frame.rows() == ROWS
    frame.with_columns(when=pl.Series([100, 50, 75], dtype=pl.UInt32)).write_parquet(tmp_path / "log.parquet")
    assert read(tmp_path / "log.parquet", columns=NAMED).frame.rows() == ROWS


def test_several_kuairand_logs_are_read_in_order_of_name(tmp_path):
    header, *rows = KUAIRAND.splitlines(keepends=True)
    (tmp_path / "log_standard_b.csv").write_text(header + rows[1] + rows[2])
    (tmp_path / "log_standard_a.csv").write_text(header + rows[0])
    (tmp_path / "user_features.csv").write_text("user_id,age\n7,3\n")
    assert read(tmp_path).frame.rows() == ROWS


def test_decimals_are_floored_and_counted_and_blank_lines_are_counted(tmp_path):
    text = "user_id:token\titem_id:token\ttimestamp:float\n1\ta\t881250949.0\n\n1\tb\t 12.75\n2\ta\t1.3e9\n\n"
    (tmp_path / "log.inter").write_text(text)
    log = read(tmp_path / "log.inter")
    assert log.frame["timestamp"].to_list() == [881250949, 12, 1300000000]
    assert (log.rounded_timestamps, log.blank_lines) == (1, 2)


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("soon", "timestamp 'soon' is not a number"),
        ("nan", "timestamp 'nan' is not a number"),
        ("-3", "timestamp '-3' is negative"),
        ("-0.5", "timestamp '-0.5' is negative"),
        ("inf", "timestamp 'inf' lies past the year 9999"),
        ("1650485801301", "timestamp '1650485801301' lies past the year 9999; are these milliseconds?"),
        ("", "no timestamp"),
    ],
)
def test_a_bad_timestamp_is_named_with_its_line(tmp_path, value, complaint):
    path = tmp_path / "log.inter"
    path.write_text(RECBOLE.replace("\t50\n", f"\t{value}\n").replace("7\tb", "\n7\tb"))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:4: {complaint}")


def test_a_nan_in_a_parquet_time_column_is_named_with_its_row(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": ["1", "1"], "item": ["a", "b"], "timestamp": [1.0, float("nan")]}).write_parquet(path)
    with pytest.raises(ValueError, match=r"log\.parquet, row 2: timestamp nan is not a number"):
        read(path)


@pytest.mark.parametrize(
    ("old", "new", "complaint"), [("9\tb", "\tb", "no user id (1 such rows)"), ("9\tb", "9\t", "no item id")]
)
def test_a_null_id_is_named_with_its_line(tmp_path, old, new, complaint):
    path = tmp_path / "log.inter"
    path.write_text(RECBOLE.replace(old, new))
    with pytest.raises(ValueError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:4: {complaint}")


@pytest.mark.parametrize(
    ("name", "text", "log_format", "complaint"),
    [
        ("log.inter", RECBOLE.replace("item_id", "thing"), "auto", "no column item_id or product_id; its columns are"),
        (
            "log.inter",
            "user_id\titem_id\ttimestamp\n1\t2\t3\n",
            "auto",
            "log.inter:1: wrong header ['user_id', 'item_id'",
        ),
        ("ratings.dat", "user,item,rating,time\n", "auto", "ratings.dat:1: wrong header 'user,item,rating,time'"),
        ("beauty.csv", "user,item,rating,timestamp\n1,2,3,4\n", "amazon", "beauty.csv:1: wrong header 'user,item"),
        ("any.csv", "who,what\n1,2\n", "auto", "no column user; its columns are who, what"),
        ("log_x.csv", KUAIRAND.replace("time_ms", "time"), "kuairand", "no column time_ms; its columns are user_id"),
        ("strange.txt", "hello world\n", "auto", "cannot be told from its name and first line 'hello world'"),
        ("log.parquet", "no parquet", "auto", "is not a readable Parquet file"),
    ],
)
def test_a_wrong_header_says_what_was_found(tmp_path, name, text, log_format, complaint):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, log_format)
    assert complaint in str(error.value)
    assert name in str(error.value)


def test_a_line_with_too_many_fields_is_named(tmp_path):
    path = tmp_path / "log.inter"
    path.write_text(RECBOLE.replace("3.0\t50", "3.0\t50\t1"))
    with pytest.raises(ValueError, match=r"log\.inter:3: 5 fields, the first line has 4"):
        read(path)
    path = tmp_path / "any.csv"
    path.write_text(CSV.replace("2,50", "2,50,1"))
    with pytest.raises(ValueError, match=r"any\.csv cannot be read as a table"):
        read(path, columns=NAMED)


@pytest.mark.parametrize("content", [b"", b"\n \n", gzip.compress(b"", mtime=0)], ids=["nothing", "blank", "gzip"])
def test_an_empty_file_is_refused(tmp_path, content):
    path = tmp_path / ("log.inter.gz" if content[:1] == b"\x1f" else "log.inter")
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is empty; a log needs at least one row"):
        read(path)


def test_a_header_without_rows_is_refused(tmp_path):
    (tmp_path / "log.inter").write_text(RECBOLE.split("\n")[0] + "\n")
    with pytest.raises(ValueError, match="holds no rows below its header"):
        read(tmp_path / "log.inter")


def test_a_truncated_or_false_gzip_is_refused(tmp_path):
    path = tmp_path / "log.inter.gz"
    whole = gzip.compress((RECBOLE * 50).encode())
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"log\.inter\.gz is damaged"):
        read(path)
    path.write_text(RECBOLE)
    with pytest.raises(ValueError, match=r"log\.inter\.gz is damaged"):
        read(path)


def test_a_zip_with_an_entry_that_climbs_out_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr("ml-1m/ratings.dat", ML_1M)
        archive.writestr("../outside.txt", "x")
    with pytest.raises(ValueError, match=r"bad\.zip: entry '\.\./outside\.txt' would leave the folder"):
        read(tmp_path / "bad.zip")
    (tmp_path / "half.zip").write_bytes((tmp_path / "bad.zip").read_bytes()[:60])
    with pytest.raises(ValueError, match=r"half\.zip is not a complete zip archive"):
        read(tmp_path / "half.zip")


def test_missing_and_ambiguous_logs_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder at .*nowhere"):
        find_log(str(tmp_path / "nowhere"))
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(FileNotFoundError, match="holds no interaction log; looked for"):
        find_log(str(tmp_path))
    for name in ("a.inter", "b.inter"):
        (tmp_path / name).write_text(RECBOLE)
    assert [source.name for source in find_log(str(tmp_path))[0]] == ["a.inter", "b.inter"]


def test_titles_beside_a_log_and_by_path(tmp_path):
    log = Source(tmp_path / "log.inter.gz")
    assert find_titles(log) is None
    (tmp_path / "log.item").write_text('item_id:token\tmovie_title:token_seq\na\t"Alien\nb\tBrazil\na\tAgain\n')
    assert read_titles(find_titles(log)).rows() == [("a", '"Alien'), ("b", "Brazil")]
    (tmp_path / "games.item").write_text("app_name:token\tid:token\nHalf-Life\tb\n")
    ids, notes = pl.Series(["b"]), []
    assert titles_for(log, str(tmp_path / "games.item"), ids, notes.append).rows() == [("b", "Half-Life")]
    (tmp_path / "u.item").write_bytes("b|Caf\u00e9|1995\n".encode("latin-1"))
    assert read_titles(find_titles(Source(tmp_path / "u.data"))).rows() == [("b", "Caf\u00e9")]
    with pytest.raises(FileNotFoundError, match="no item file at .*gone"):
        titles_for(log, str(tmp_path / "gone"), ids, notes.append)
    (tmp_path / "bad.item").write_text("item_id:token\tprice:float\na\t1\n")
    with pytest.raises(ValueError, match="one of titles .*; its columns are item_id, price"):
        read_titles(Source(tmp_path / "bad.item"))
    assert notes == []


def pieces(rng, sizes, most):
    return [[f"id {number}" for number in rng.integers(0, most, size)] for size in sizes]


@pytest.mark.parametrize("sizes", [[], [0], [0, 5, 0, 7], [1, 1, 1], [2000, 1, 3000]])
def test_numbers_go_by_first_appearance_over_all_pieces(sizes):
    given = pieces(np.random.default_rng(3), sizes, 900)
    numbers, coder = {}, IdCoder()
    for piece in given:
        expected = [numbers.setdefault(one, len(numbers)) for one in piece]
        codes = coder.codes(pl.Series(piece, dtype=pl.String))
        assert codes.dtype == np.int32
        assert codes.tolist() == expected
    assert coder.ids.dtype == pl.String
    assert coder.ids.to_list() == list(numbers)


def test_coders_know_nothing_of_each_other():
    first, second = IdCoder(), IdCoder()
    assert first.codes(pl.Series(["a", "b"])).tolist() == [0, 1]
    assert second.codes(pl.Series(["b", "c", "a"])).tolist() == [0, 1, 2]
    assert first.codes(pl.Series(["c", "a"])).tolist() == [2, 0]
    assert second.ids.to_list() == ["b", "c", "a"]
