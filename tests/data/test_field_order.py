"""Which field is the user, the item and the time: told by the file, its ids or the user, never by a guess."""

import dataclasses

import pytest

from tests.data.test_readers import AMAZON, ML_1M, ML_100K, ORDERED, RATINGS, ROWS, read
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.log_files import LogColumns
from tim4rec_jax.data_config import DataConfig

ITEM_FIRST = "item,user,rating,timestamp"


def swapped(text, delimiter=","):
    """The text with the first two fields of each line exchanged."""
    fields = [line.split(delimiter) for line in text.splitlines()]
    return "".join(delimiter.join([b, a, *rest]) + "\n" for a, b, *rest in fields)


def refused(path, log_format="auto", columns=None):
    with pytest.raises(ValueError) as error:
        read(path, log_format, columns)
    message = str(error.value)
    assert len(message.replace(str(path), "")) < 300 and "\n" not in message and path.name in message
    return message


@pytest.mark.parametrize("log_format", ["auto", "amazon"])
@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_ids_of_amazon_tell_users_from_items(tmp_path, log_format, delimiter):
    path = tmp_path / "beauty.csv"
    wanted = [tuple(line.split(",")[i] for i in (0, 1, 3)) for line in AMAZON.splitlines()]
    for text in (AMAZON, swapped(AMAZON)):
        path.write_text(text.replace(",", delimiter))
        rows = read(path, log_format).frame.rows()
        assert [(user, item, str(time)) for user, item, time in rows] == wanted


def test_one_kind_of_id_is_enough(tmp_path):
    path = tmp_path / "beauty.csv"
    for text in (AMAZON.replace("A2SUAM1J3GNN3B", "7"), AMAZON.replace("B00", "x")):
        text = text.replace("A1RSDE90N6RSZF", "A9" * 7) if "A2S" in text else text.replace("A1RSDE90N6RSZF", "9")
        for way in (text, swapped(text)):
            path.write_text(way)
            assert read(path).frame["user"][0] == text.split(",")[0]


def test_numbers_alone_are_refused_until_the_order_is_named(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text(RATINGS)
    for log_format in ("auto", "amazon"):
        assert "do not tell users from items (first line '7,b,5.0,100'); set data.columns=" in refused(path, log_format)
    assert read(path, "auto", ORDERED).frame.rows() == ROWS
    path.write_text(swapped(RATINGS))
    for log_format in ("auto", "amazon", "csv"):
        assert read(path, log_format, LogColumns(order=ITEM_FIRST)).frame.rows() == ROWS


@pytest.mark.parametrize(("name", "text"), [("ratings.dat", ML_1M), ("u.data", ML_100K), ("any.dat", ML_1M)])
def test_the_order_holds_for_files_of_movielens_too(tmp_path, name, text):
    delimiter = "::" if "::" in text else "\t"
    (tmp_path / name).write_text(swapped(text, delimiter))
    assert read(tmp_path / name, columns=LogColumns(order=ITEM_FIRST)).frame.rows() == ROWS
    (tmp_path / name).write_text(swapped(AMAZON.replace(",", delimiter), delimiter))
    assert read(tmp_path / name).frame["user"][0] == "A2SUAM1J3GNN3B"


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|", " ", "::"])
def test_any_number_of_named_fields_in_any_order(tmp_path, delimiter):
    path = tmp_path / "events.txt"
    path.write_text("".join(delimiter.join([str(t), i, u]) + "\n" for u, i, t in ROWS))
    columns = LogColumns("who", "what", "when", "when,what,who")
    assert read(path, columns=columns).frame.rows() == ROWS
    assert "has not the 4 fields of data.columns=" in refused(path, columns=columns._replace(order="when,what,x,who"))


def test_a_quoted_field_counts_as_one(tmp_path):
    path = tmp_path / "events.csv"
    path.write_text('7,b,"one, two",100\n7,a,x,50\n9,b,y,75\n')
    assert read(path, columns=ORDERED).frame.rows() == ROWS


def test_ratings_in_place_of_times_are_refused(tmp_path):
    line, path = "7::b::978300760::5\n7::a::978302109::3\n9::b::978301968::4\n", tmp_path / "ratings.dat"
    path.write_text(line)
    assert "field 4, the time, holds 3 to 5, and field 3 978300760 and the like" in refused(path)
    named = LogColumns(order="user,item,timestamp,rating")
    assert read(path, columns=named).frame["timestamp"].to_list() == [978300760, 978302109, 978301968]
    # Places in time that are counted 1, 2, ... are times where no other field looks like one.
    path.write_text("7::b::5::1\n7::a::3::2\n9::b::4::3\n")
    assert read(path).frame["timestamp"].to_list() == [1, 2, 3]


@pytest.mark.parametrize(
    ("name", "log_format", "columns"),
    [("ratings.dat", "auto", None), ("ratings.csv", "csv", ORDERED), ("u.data", "auto", None)],
)
def test_a_header_where_none_belongs_is_no_row(tmp_path, name, log_format, columns):
    header, rows = "user,item,rating,timestamp\n", RATINGS
    delimiter = {"ratings.dat": "::", "u.data": "\t"}.get(name, ",")
    (tmp_path / name).write_text((header + rows).replace(",", delimiter))
    assert "looks like a header" in refused(tmp_path / name, log_format, columns)


def test_a_table_with_a_header_is_not_taken_for_movielens_or_amazon(tmp_path):
    path = tmp_path / "ratings.csv"
    path.write_text("userId,movieId,rating,timestamp\n" + RATINGS)
    for log_format in ("movielens", "amazon"):
        assert "data.format=csv for a file with a header" in refused(path, log_format)
    assert read(path, columns=LogColumns("userId", "movieId", "timestamp")).frame.rows() == ROWS


def test_a_first_line_of_data_is_not_lost_as_a_header(tmp_path):
    path = tmp_path / "log.tsv"
    path.write_text("7\tb\t100\n7\ta\t50\n9\tb\t75\n")
    assert "name its fields, as in data.columns=user,item" in refused(path)
    assert read(path, columns=LogColumns(order="user,item,timestamp")).frame.rows() == ROWS


@pytest.mark.parametrize(("name", "text"), [("a.inter", "user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n")])
def test_an_order_for_files_that_name_their_columns_is_refused(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert "recbole files name their columns; leave data.columns=user, item,rating,timestamp out" in refused(
        tmp_path / name, columns=ORDERED
    )


def test_spaces_and_blank_lines_around_a_header_are_named(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("user, item, timestamp\n1,2,3\n")
    assert "no column item; its columns are user,  item,  timestamp (the name has spaces around it" in refused(path)
    path.write_text("\nuser,item,timestamp\n1,2,3\n")
    assert "a.csv:1: the first line is blank; take it out" in refused(path)


def test_a_name_that_two_columns_have_is_refused(tmp_path):
    (tmp_path / "a.inter").write_text("user_id:token\tuser_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\t4\n")
    assert "2 columns are called user_id" in refused(tmp_path / "a.inter")
    (tmp_path / "a.csv").write_text("user,item,item,timestamp\n1,2,3,4\n")
    assert "2 columns are called item" in refused(tmp_path / "a.csv")


def test_a_comma_in_a_quoted_name_moves_no_column(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('"title, in full","user","item",score,"timestamp"\n"x, y",7,b,1,100\nz,7,a,2,50\nz,9,b,3,75\n')
    assert read(path).frame.rows() == ROWS


@pytest.mark.parametrize("columns", ["user,item", "user,user,item,timestamp", "", "item,user,rating,time"])
def test_an_order_must_name_the_three(columns):
    with pytest.raises(ValueError, match="must name user, item, timestamp once each"):
        DataConfig(columns=columns)


def test_the_order_belongs_to_the_fingerprint(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("7,7,1,1\n7,7,1,2\n7,7,1,3\n")
    config = DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path / "c"), k_core=0, columns=ORDERED.order)
    other = load_log(dataclasses.replace(config, columns=ITEM_FIRST))
    assert load_log(config).fingerprint != other.fingerprint
