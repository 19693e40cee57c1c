"""Item titles: found under many names, joined by the ids that fit, and never a reason for a run to stop."""

import gzip
import zipfile

import polars as pl
import pytest

from tests.data.test_odd_input import loaded
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.titles import read_titles

LOG = "user_id:token\titem_id:token\ttimestamp:float\nu\ta\t1\nu\tb\t2\nu\tc\t3\n"


@pytest.fixture
def log(tmp_path):
    (tmp_path / "log.inter").write_text(LOG)
    return tmp_path / "log.inter"


def titles_of(log, **settings):
    interactions, notes = loaded(log, **settings)
    assert interactions.num_rows == 3 and interactions.item_ids.to_list() == ["a", "b", "c"]
    return None if interactions.titles is None else interactions.titles.to_list(), notes


UNUSABLE = {
    "no title column": (b"item_id:token\tprice:float\na\t1\n", "one of titles (title, name, item_name ..)"),
    "no id column": (b"thing:token\ttitle:token_seq\na\tAlien\n", "needs a column of item ids"),
    "empty": (b"", "is empty"),
    "Latin-1": ("item_id:token\ttitle:token_seq\na\tCaf\xe9\n".encode("latin-1"), "cannot be read as a table"),
    "UTF-16": ("item_id:token\ttitle:token_seq\na\tAlien\n".encode("utf-16"), "is UTF-16 text"),
    "bytes": (bytes(range(256)), "log.item"),
    "wide": (b"\t".join(b"c%d:token" % i for i in range(10_000)) + b"\n", "c1, c2, c3"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_file_that_merely_lies_beside_the_log_stops_nothing(log, kind):
    content, cause = UNUSABLE[kind]
    item = log.with_name("log.item")
    item.write_bytes(content)
    titles, (note,) = titles_of(log)
    assert titles is None and "titles are left out" in note and cause in note
    assert len(note.replace(str(item), "")) < 300
    with pytest.raises(ValueError, match="log.item"):
        titles_of(log, item_path=str(item))


def test_a_damaged_packed_file_beside_the_log_stops_nothing(log):
    packed = gzip.compress(b"item_id:token\ttitle:token_seq\na\tAlien\n" * 9)
    for content, cause in ((packed[:-9], "ended before"), (packed[:-8] + bytes(8), "CRC"), (b"x", "Not a gzip")):
        log.with_name("log.item.gz").write_bytes(content)
        titles, (note,) = titles_of(log)
        assert titles is None and "is damaged" in note and cause in note


def test_a_file_that_cannot_be_opened_stops_nothing(log, monkeypatch):
    log.with_name("log.item").write_text("item_id:token\ttitle:token_seq\na\tAlien\n")
    read = Source.read

    def locked(source):
        if source.name == "log.item":
            raise PermissionError(13, "Permission denied", str(source))
        return read(source)

    monkeypatch.setattr(Source, "read", locked)
    titles, (note,) = titles_of(log)
    assert titles is None and "Permission denied" in note
    with pytest.raises(PermissionError):
        titles_of(log, item_path=str(log.with_name("log.item")))
    log.with_name("log.item").unlink()
    log.with_name("log.item").mkdir()
    assert titles_of(log) == (None, [])


def test_titles_of_no_item_are_said_to_be(log):
    item = log.with_name("log.item")
    item.write_text("item_id:token\ttitle:token_seq\nA\tAlien\n1\tHeat\n")
    titles, (note,) = titles_of(log)
    assert titles is None and "0 of the log's 3 items have a title there" in note
    titles, (note,) = titles_of(log, item_path=str(item))
    assert titles == [None] * 3 and "0 of the log's 3 items have a title there" in note


@pytest.mark.parametrize("delimiter", [",", "\t", ";", "|"])
@pytest.mark.parametrize("title", ["title", "item_name", "book_title", "product_title", "movie_title", "Track Name"])
@pytest.mark.parametrize("item", ["movieId", "asin", "itemId"])
def test_tables_are_told_apart_by_their_header(log, delimiter, title, item):
    path = log.with_name("things.txt")
    rows = [("price", title, item), (1, '"A; b, c | d"', "a"), (2, "Heat", "b")]
    path.write_text("".join(delimiter.join(map(str, row)) + "\n" for row in rows))
    assert titles_of(log, item_path=str(path)) == (["A; b, c | d", "Heat", None], [])


def test_of_two_columns_of_ids_the_one_that_fits_counts(log):
    path = log.with_name("meta.csv")
    path.write_text("parent_asin,asin,title\nx,a,Alien\nx,b,Brazil\n")
    assert titles_of(log, item_path=str(path)) == (["Alien", "Brazil", None], [])
    path.write_text("id,parent_asin,title\nx,b,Brazil\nx,a,Alien\n")
    assert titles_of(log, item_path=str(path)) == (["Alien", "Brazil", None], [])


def test_movies_beside_the_ratings_of_movielens(tmp_path):
    log = tmp_path / "ratings.csv"
    log.write_text("userId,movieId,rating,timestamp\nu,a,4.0,1\nu,b,3.0,2\nu,c,5.0,3\n")
    names = {"user_column": "userId", "item_column": "movieId"}
    assert titles_of(log, **names) == (None, [])
    (tmp_path / "movies.csv").write_text('movieId,title,genres\na,"Toy, Story",X|Y\nb,Heat,Z\n')
    assert titles_of(log, **names) == (["Toy, Story", "Heat", None], [])


def test_titles_of_movielens_in_either_encoding(tmp_path):
    text = "1::Caf\u00e9\x85 (1995)::Drama\r\n2::Heat::Crime\r\n"
    for encoding in ("latin-1", "utf-8"):
        (tmp_path / "movies.dat").write_bytes(text.encode(encoding))
        assert read_titles(Source(tmp_path / "movies.dat")).rows() == [("1", "Caf\u00e9\x85 (1995)"), ("2", "Heat")]
    (tmp_path / "u.item.gz").write_bytes(gzip.compress(b"1|Alien|x\n"))
    assert read_titles(Source(tmp_path / "u.item.gz")).rows() == [("1", "Alien")]


def test_ids_of_a_parquet_table_join_as_whole_numbers(tmp_path):
    log = tmp_path / "log.parquet"
    pl.DataFrame({"user": [1, 1, 1], "item": [1.0, 2.0, 3.0], "timestamp": [1, 2, 3]}).write_parquet(log)
    path = tmp_path / "items.parquet"
    pl.DataFrame({"item_id": [3, 1], "name": ["three", "one"], "tags": [["x"], []]}).write_parquet(path)
    assert loaded(log, item_path=str(path))[0].titles.to_list() == ["one", None, "three"]
    pl.DataFrame({"item_id": [[3], [1]], "name": ["three", "one"]}).write_parquet(path)
    with pytest.raises(ValueError, match="items.parquet"):
        loaded(log, item_path=str(path))


def test_a_damaged_table_in_the_archive_of_the_log_stops_nothing(tmp_path):
    path = tmp_path / "log.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("log.inter", LOG)
        archive.writestr("log.item", "item_id:token\ttitle:token_seq\na\tAlien\n")
    assert titles_of(path) == (["Alien", None, None], [])
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b"Alien", b"alien"))
    titles, (note,) = titles_of(path)
    assert titles is None and "is damaged" in note
