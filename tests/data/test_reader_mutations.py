"""Readers under damage: 17,600 files with random bytes changed are read, or refused with one clear line."""

import csv
import gzip
import io
import random
import zipfile

import polars as pl
import pytest

from tests.data.test_field_order import swapped
from tests.data.test_readers import (
    AMAZON,
    CSV,
    KUAIRAND,
    ML_1M,
    ML_100K,
    NAMED,
    ORDERED,
    RATINGS,
    RECBOLE,
    STEAM,
    with_frame,
)
from tim4rec_jax.data.interactions import clean
from tim4rec_jax.data.log_files import find_log
from tim4rec_jax.data.readers import read_log
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.titles import read_titles

EACH, CHUNKS = 800, 22
# What often tells one format from another, ends a field, or is a number that few expect.
TOKENS = [
    b"\n",
    b"\r\n",
    b"\r",
    b"\t",
    b",",
    b"::",
    b":",
    b'"',
    b'""',
    b"\0",
    b"\xff",
    b"\xef\xbb\xbf",
    b"-1",
    b"1e400",
    b"nan",
    b"inf",
    b"99999999999999999999",
    b"0x10",
    b"1_000",
    b" ",
    b"\xc3\x28",
    b"\xe2\x80\xa8",
    b"timestamp:float",
]


def packed(name, content):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def table(frame):
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    return buffer.getvalue()


ROWS = pl.DataFrame({"user": ["7", "7", "9"], "item": ["b", "a", "b"], "timestamp": [100, 50, 75]})
# Name of the file, its content, and the names of its columns where they are not the format's own.
LOGS = {
    "recbole": ("log.inter", RECBOLE.encode(), None),
    "recbole, steam": ("steam.inter", STEAM.encode(), None),
    "recbole, gzip": ("log.inter.gz", gzip.compress(RECBOLE.encode(), mtime=0), None),
    "ratings.dat": ("ratings.dat", ML_1M.encode(), None),
    "ratings.dat in a zip": ("ml-1m.zip", packed("ml-1m/ratings.dat", ML_1M), None),
    "u.data": ("u.data", ML_100K.encode(), None),
    "amazon": ("ratings_Beauty.csv", AMAZON.encode(), None),
    "amazon, item first": ("ratings_Beauty.csv", swapped(AMAZON).encode(), None),
    "fields in a named order": ("ratings_Beauty.csv", RATINGS.encode(), ORDERED),
    "kuairand": ("log_standard_pure.csv", KUAIRAND.encode(), None),
    "csv, quoted": ("any.csv", CSV.encode(), NAMED),
    "csv, semicolons": ("any.csv", CSV.replace('"1,5"', "1").replace(",", ";").encode(), NAMED),
    "csv, gzip": ("any.csv.gz", gzip.compress(CSV.replace('"1,5"', "1").encode(), mtime=0), NAMED),
    "tsv": ("any.tsv", b"who\twhat\twhen\n7\tb\t100\n7\ta\t50\n9\tb\t75\n", NAMED),
    "csv, dates": ("any.csv", b"user,item,timestamp\n7,b,2021-01-01T10:00:00.5\n7,a,2021-01-01\n", None),
    "json lines": (
        "any.jsonl",
        b'{"user": 7, "item": "b", "timestamp": 5}\n{"user": 9, "item": "a", "timestamp": 6}\n',
        None,
    ),
    "parquet": ("any.parquet", table(ROWS), None),
}
TITLES = {
    "titles, recbole": ("log.item", b"item_id:token\tmovie_title:token_seq\n1\tToy Story\n2\tHeat\n"),
    "titles, movies.dat": ("movies.dat", b"1::Toy Story (1995)::Animation\n2::Heat (1995)::Action\n"),
    "titles, csv": ("titles.csv", b'item_id,title\n1,"Toy, Story"\n2,Heat\n'),
    "titles, semicolons": ("titles.csv", b'price;item_name;asin\n1;"Toy; Story";a\n2;Heat;b\n'),
    "titles, parquet": ("titles.parquet", table(pl.DataFrame({"item_id": ["1"], "title": ["Heat"]}))),
}
KINDS = [*LOGS, *TITLES]


def mutated(rng, content):
    """Changes one to four places: bits, bytes, pieces, tokens, the end."""
    data = bytearray(content)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        end = min(len(data), at + rng.randint(1, 8))
        way = rng.randrange(7)
        if way == 0 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif way == 1 and at < len(data):
            data[at] = rng.randrange(256)
        elif way == 2:
            del data[at:end]
        elif way == 3:
            data[at:at] = rng.choice(TOKENS)
        elif way == 4:
            data[at:end] = rng.choice(TOKENS)
        elif way == 5:
            data[at:at] = data[at:end] * rng.randint(1, 3)
        elif rng.random() < 0.3:
            del data[at:]
    return bytes(data)


def cut(rng, content):
    """Loses the end; over some changed bytes of a Parquet file Polars itself ends the process."""
    return content[: rng.randrange(len(content))]


def rows_of(name, data):
    """Lines that a text log without quotes holds below its header; None where they are not counted so simply."""
    if name.endswith(".gz"):
        data = gzip.decompress(data)
    if b'"' in data or name.endswith((".zip", ".parquet")):
        return None
    lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    has_header = not (name.endswith((".dat", ".data", ".jsonl")) or "Beauty" in name)
    return len(lines) - (lines[-1] == b"") - has_header


def same_as_csv(data, frame):
    """Python's reader of CSV finds the same ids, blank lines left out."""
    rows = csv.reader(
        io.StringIO(data.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace"), newline=""), strict=False
    )
    header = next(rows)
    places = [header.index(name) for name in NAMED.names[:2]]
    found = [tuple(row[place] for place in places) for row in rows if any(row)]
    assert frame.select("user", "item").rows() == found


def read_one(kind, path, data):
    """Reads a file by what follows its name; returns the rows or None where it was refused."""
    path.write_bytes(data)
    try:
        if kind in TITLES:
            titles = read_titles(Source(path))
            assert titles.schema == {"item": pl.String, "title": pl.String} and titles["item"].is_unique().all()
            return titles.height
        sources, log_format = find_log(str(path), "auto", LOGS[kind][2])
        log = with_frame(read_log(sources, log_format, LOGS[kind][2]))
    except (ValueError, FileNotFoundError) as error:
        assert path.name in str(error), f"the file is not named: {error}"
        assert len(str(error).replace(str(path), "")) < 300 and "\n" not in str(error), f"not one short line: {error}"
        return None
    frame = log.frame
    assert frame.schema == {"user": pl.String, "item": pl.String, "timestamp": pl.Int64}
    assert not sum(frame.null_count().row(0)) and frame["timestamp"].min() >= 0
    if (rows := rows_of(path.name, data)) is not None:
        assert frame.height + log.blank_lines == rows
    if kind == "csv, quoted":
        same_as_csv(data, frame)
    cleaned = clean(frame.extend(frame).extend(frame), k_core=0, timestamp_precision="int64")
    assert cleaned.num_rows == cleaned.statistics.rows_read == 3 * log.frame.height // 3
    return log.frame.height


def read_damaged(tmp_path, kind, seed, each):
    """Damages a file so many times; returns the rows read each time, None where it was refused."""
    name, content = (LOGS.get(kind) or TITLES[kind])[:2]
    path, rng = tmp_path / name, random.Random(seed)
    assert read_one(kind, path, content)
    found = []
    for trial in range(each):
        data = (cut if name.endswith(".parquet") else mutated)(rng, content)
        try:
            found.append(read_one(kind, path, data))
        except BaseException as error:
            error.add_note(f"{kind}, trial {trial}: {data!r}")
            raise
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_few_damaged_files_of_each_kind(tmp_path, kind):
    assert len(read_damaged(tmp_path, kind, kind, 25)) == 25


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", range(CHUNKS))
def test_damaged_files_are_read_or_refused(tmp_path, number):
    kind = KINDS[number]
    name = (LOGS.get(kind) or TITLES[kind])[0]
    found = read_damaged(tmp_path, kind, number, EACH)
    assert len(found) == EACH
    # Some changes do no harm and some do; a Parquet file without its end never passes.
    refused = sum(rows is None for rows in found)
    assert refused == EACH if name.endswith(".parquet") else 0 < refused < EACH


def test_every_kind_is_covered():
    assert len(KINDS) == CHUNKS and EACH * CHUNKS == 17_600
