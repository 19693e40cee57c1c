"""Logs as people have them: separators, no header, JSON lines, parts, no times, lists, files already split, frames."""

import gzip
import io
import json
import pathlib
import zipfile

import hypothesis
import hypothesis.strategies as st
import numpy as np
import polars as pl
import pytest
from rich.console import Console

from tests.data.test_odd_input import loaded, refused
from tests.data.test_readers import RECBOLE, ROWS, read, with_frame
from tim4rec_jax.config import ExperimentConfig
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.log_files import LogColumns, find_log, part_of
from tim4rec_jax.data.readers import Rules, read_log
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.data_config import DataConfig
from tim4rec_jax.models import model_class

pytestmark = pytest.mark.quick

HEADER = "user,item,timestamp\n"


def read_as(path, log_format="auto", columns=None, **rules):
    sources, log_format = find_log(str(path), log_format, columns, presplit=rules.get("presplit", False))
    return with_frame(read_log(sources, log_format, columns, Rules(**rules)))


def lines(rows, separator=","):
    return "".join(separator.join(map(str, row)) + "\n" for row in rows)


def ordered(path, text, **settings):
    """Items of each user, by their ids, in the order of the log read."""
    path.write_text(text)
    log, _ = loaded(path, **settings)
    ids = log.item_ids.to_list()
    pieces = np.split(log.items, log.offsets[1:-1])
    return {user: [ids[item - 1] for item in one] for user, one in zip(log.user_ids, pieces, strict=True)}, log


@pytest.mark.parametrize(
    ("separator", "written"), [(";", ";"), ("^", "^"), ("::", "::"), ("tab", "\t"), ("space", "   "), ("space", " \t ")]
)
@pytest.mark.parametrize("header", [True, False])
def test_any_separator(tmp_path, separator, written, header):
    path, columns = tmp_path / "log.csv", None if header else LogColumns(order="user,item,timestamp")
    path.write_text(lines([*([("user", "item", "timestamp")] if header else []), *ROWS], written))
    assert read_as(path, "csv", columns, separator=separator).frame.rows() == ROWS


def test_a_separator_of_recbole_files_and_of_headers_with_blanks(tmp_path):
    path = tmp_path / "log.inter"
    path.write_text(RECBOLE.replace("\t", ","))
    assert "looks separated by ',': set data.separator" in refused(path)
    assert read_as(path, separator=",").frame.rows() == ROWS
    path = tmp_path / "log.csv"
    path.write_text(lines([("user", "item", "timestamp"), *ROWS], "   "))
    assert "log.csv:1: blanks separate the names of the header; set data.separator=space" in refused(path)
    path.write_text("user::item::timestamp\n7::b\t::100\n")
    with pytest.raises(ValueError, match=r"log\.csv:2: a tab inside the line; data\.separator=:: needs none"):
        read_as(path, "csv", separator="::")


def test_text_that_is_no_utf_8_is_named_by_its_line(tmp_path):
    path = tmp_path / "log.txt"
    path.write_bytes("1 2\n1 é\n".encode("latin-1"))
    for log_format in ("pairs", "lines"):
        with pytest.raises(ValueError, match=r"log\.txt:2: an id is no UTF-8 text; save the file as UTF-8"):
            read_as(path, log_format, file_order=True)


def test_what_separates_no_fields_is_refused():
    for separator in ("ab", "", '"', "\n"):
        with pytest.raises(ValueError, match=r"data\.separator="):
            DataConfig(separator=separator)


def test_fields_by_their_numbers(tmp_path):
    path = tmp_path / "log.csv"
    path.write_text("100,5,b,7\n50,3,a,7\n75,4,b,9\n")
    assert read_as(path, columns=LogColumns(order="4,3,1")).frame.rows() == ROWS
    assert read_as(path, "csv", LogColumns(order="4, 3"), file_order=True).frame["item"].to_list() == ["b", "a", "b"]
    assert "has not the 9 fields" in refused(path, columns=LogColumns(order="4,3,9"))
    dated = tmp_path / "dated.csv"
    dated.write_text("7,b,1970-01-01T00:01:40\n7,a,1970-01-01T00:00:50\n9,b,1970-01-01T00:01:15\n")
    assert read_as(dated, columns=LogColumns(order="1,2,3")).frame.rows() == ROWS
    for given in ("1,2", "1,1,2", "1,2,0", "1,2,3,4"):
        with pytest.raises(ValueError, match="must name user, item, timestamp once each.*2,1,4"):
            DataConfig(columns=given)


IDS = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1, max_size=8).filter(
    lambda text: text.strip() and text.strip()[0] not in "[{"
)


@hypothesis.given(st.lists(st.tuples(IDS, IDS, st.integers(0, 10**10)), min_size=1, max_size=12))
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_json_lines_are_read_as_they_were_written(tmp_path, rows):
    path = tmp_path / "events.jsonl"
    records = [{"timestamp": t, "x": [1], "item": i, "user": u} for u, i, t in rows]
    path.write_text("".join(json.dumps(r, ensure_ascii=len(r["item"]) % 2 == 0) + "\n" for r in records), "utf-8")
    assert read_as(path, time_unit="s").frame.rows() == rows


@hypothesis.given(
    st.lists(st.tuples(IDS, IDS, st.integers(0, 10**10)), min_size=1, max_size=12), st.sampled_from(",;|\t")
)
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_csv_of_any_separator_is_read_as_a_program_writes_it(tmp_path, rows, separator):
    hypothesis.assume(separator != "\t" or not any('"' in field for row in rows for field in row[:2]))
    path = tmp_path / "log.csv"
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    frame.write_csv(path, separator=separator)
    assert read_as(path, "csv", time_unit="s").frame.rows() == rows


def test_json_lines_count_blank_ones_and_name_the_bad_one(tmp_path):
    path = tmp_path / "events.json.gz"
    text = '{"user": 7, "item": "b", "timestamp": 100}\n\n{"user": "7", "item": "a", "timestamp": "50"}\n'
    text += '{"user": 9.0, "item": "b", "timestamp": 75.0}'
    path.write_bytes(gzip.compress(text.encode()))
    assert read(path).frame.rows() == ROWS and read(path).blank_lines == 1
    path = tmp_path / "events.jsonl"
    for bad, complaint in (
        ('{"user": 7,', ":2: no JSON: "),
        ("[1, 2]", ":2: no JSON object: "),
        ('{"user": [7], "item": 1, "timestamp": 1}', ":2: user is '[7]' and not one value"),
        ('{"user": 7, "timestamp": 1}', ":2: no item id"),
        ('{"user": 7, "item": 1, "timestamp": "x"}', ":2: timestamp 'x' is not a number"),
        ('{"user": 7, "item": 1}', ":2: no timestamp"),
    ):
        path.write_text('{"user": 7, "item": "b", "timestamp": 100}\n' + bad + '\n{"user":1,"item":1,"timestamp":3}\n')
        assert f"events.jsonl{complaint}" in refused(path)
    path.write_text('{"who": 7, "item": "b", "timestamp": 100}\n')
    assert "no column user; its columns are who, item, timestamp" in refused(path)
    path.write_text('[{"user": 7, "item": "b", "timestamp": 100}]\n')
    assert "is a JSON array" in refused(path)
    assert "a JSON array is not read" in refused(path, "jsonl")


def test_parts_of_a_log_are_read_in_order_of_their_names(tmp_path):
    folder = tmp_path / "spark"
    (folder / "day=2").mkdir(parents=True)
    (folder / "_SUCCESS").write_text("")
    (folder / ".part-0.csv.crc").write_text("x")
    (folder / "part-0.csv").write_text(HEADER + lines(ROWS[1:2]))
    (folder / "day=2" / "part-1.csv").write_text(HEADER + lines(ROWS[:1]))
    (folder / "part-2.csv").write_text(HEADER + lines(ROWS[2:]))
    found = read(folder)
    assert found.frame.rows() == ROWS and found.taken["files"] == "3, by name"
    assert read(folder / "part-*.csv").frame.rows() == ROWS[1:]
    assert read(folder / "**" / "part-1.csv").frame.rows() == ROWS[:1]
    with pytest.raises(FileNotFoundError, match=r"no file is called as in .*none-\*\.csv; check data\.path"):
        read(folder / "none-*.csv")
    with zipfile.ZipFile(tmp_path / "parts.zip", "w") as archive:
        for name in ("part-2.csv", "part-0.csv"):
            archive.write(folder / name, name)
    assert read(tmp_path / "parts.zip").frame.rows() == ROWS[1:]


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_the_odd_file_of_a_folder_is_named(tmp_path, kind):
    frames = [pl.DataFrame(ROWS[i : i + 1], schema=["user", "item", "timestamp"], orient="row") for i in range(3)]
    frames[2] = frames[2].rename({"item": "product"}).with_columns(item=pl.col("product"))
    for number, frame in enumerate(frames):
        getattr(frame, f"write_{kind}")(tmp_path / f"part-{number}.{kind}")
    message = refused(tmp_path)
    assert f"part-2.{kind}: its columns (user" in message and f"are not those of part-0.{kind} (user" in message
    assert "name the files of the log in data.path" in message


def test_a_log_without_times_keeps_the_order_of_its_file(tmp_path):
    text = "user,item\n" + lines([("u", n) for n in (5, 3, 9, 1)])
    path = tmp_path / "log.csv"
    path.write_text(text)
    assert "no column timestamp" in refused(path) and "data.order=file for a log without times" in refused(path)
    items, log = ordered(path, text, order="file")
    assert items == {"u": ["5", "3", "9", "1"]}
    assert log.statistics.taken["order"] == "the file, without times"
    cells = [cell for column in log.statistics.table().columns for cell in column.cells]
    assert "the file, without times" in cells and "first event" not in cells
    timed, _ = ordered(path, HEADER + lines([("u", n, n) for n in (5, 3, 9, 1)]), order="file")
    assert timed == items  # A column of times that is there is not read.


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"where": "time>=2020-01-01"}, "data.where=time>=2020-01-01 reads times, and data.order=file reads none"),
        ({"time_unit": "ms"}, "data.time_unit=ms reads times"),
        ({"split": "temporal"}, "data.split=temporal reads times"),
        ({"timestamp_precision": "float32"}, "data.timestamp_precision=float32 reads times"),
    ],
)
def test_what_reads_times_does_not_go_with_the_order_of_the_file(settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        DataConfig(order="file", **settings)


def test_models_that_read_times_refuse_a_log_without(tmp_path):
    data = DataConfig(name="custom", path="log.csv", order="file")
    for name in ("tim4rec", "tim4rec_causal", "tisasrec"):
        with pytest.raises(
            ValueError, match=f"data.order='file' reads no times, and model.name='{name}' does: take one"
        ):
            ExperimentConfig("x", model_class(name).Config(name=name), data)
    for name in ("ssd4rec", "sasrec"):
        assert ExperimentConfig("x", model_class(name).Config(name=name), data).data.order == "file"


@pytest.mark.parametrize("separator", [" ", "\t", ",", "  "])
def test_pairs_and_lines_of_users(tmp_path, separator):
    pairs = lines([("1", "9"), ("1", "6"), ("2", "9"), ("1", "2")], separator) + "\n"
    path = tmp_path / "log.txt"
    path.write_text(pairs)
    assert "pairs: a user and an item a line" in refused(path)
    settings = {"order": "file", "split": "leave_one_out", "k_core": 0}
    read_pairs = read_as(path, "pairs", file_order=True)
    assert read_pairs.frame.select("user", "item").rows() == [("1", "9"), ("1", "6"), ("2", "9"), ("1", "2")]
    assert read_pairs.blank_lines == 1
    items, _ = ordered(path, lines([("1", "9", "6", "2"), ("2", "9", "9", "1")], separator), format="lines", **settings)
    assert items == {"1": ["9", "6", "2"], "2": ["9", "9", "1"]}
    with pytest.raises(ValueError, match=r"data\.format=lines has no times; add data\.order=file"):
        DataConfig(format="lines")


@pytest.mark.parametrize(
    ("log_format", "text", "complaint"),
    [
        ("pairs", "1 9\n1 6 3\n", "log.txt:2: '1 6 3' has 3 fields; a line of pairs is a user and an item"),
        ("pairs", "1 9\n1\n", "log.txt:2: '1' has 1 fields"),
        ("lines", "1 9 6\n2\n", "log.txt:2: user '2' has no items"),
        ("lines", "1 9 6\n2 9\n1 3\n", "log.txt:3: user '1' stands in line 1 already"),
    ],
)
def test_bad_lines_of_text_are_named(tmp_path, log_format, text, complaint):
    path = tmp_path / "log.txt"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_as(path, log_format, file_order=True)
    assert complaint in str(error.value)
    assert read_as(path, log_format, file_order=True, skip_bad=True).bad_rows[0].line == int(complaint.split(":")[1])


@hypothesis.given(
    st.lists(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 99)), max_size=4), min_size=1, max_size=6)
)
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_lists_of_a_parquet_file_are_events(tmp_path, users):
    hypothesis.assume(any(users))
    path = tmp_path / "log.parquet"
    columns = {
        "user": list(range(len(users))),
        "item": pl.Series([[item for item, _ in events] for events in users], dtype=pl.List(pl.Int64)),
        "timestamp": pl.Series([[time for _, time in events] for events in users], dtype=pl.List(pl.Int64)),
        "age": ["30"] * len(users),
    }
    pl.DataFrame(columns).write_parquet(path)
    expected = [(str(user), str(item), time) for user, events in enumerate(users) for item, time in events]
    found = read(path)
    assert found.frame.rows() == expected and found.taken["rows"] == "one per user, with lists"
    without = read_as(path, file_order=True).frame
    assert without.select("user", "item").rows() == [row[:2] for row in expected]


def test_lists_that_do_not_fit_each_other_are_named_by_their_row(tmp_path):
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": ["u", "v"], "item": [["a"], ["b", "c"]], "timestamp": [[1], [1]]}).write_parquet(path)
    assert "row 2: 2 items and 1 times; write one time for each item" in refused(path)
    pl.DataFrame({"user": ["u"], "item": [["a", "b"]], "timestamp": [1]}).write_parquet(path)
    assert "column item holds lists, and column timestamp does not" in refused(path)
    pl.DataFrame({"user": ["u", "v"], "item": [["a"], ["b", None]], "timestamp": [[1], [1, 2]]}).write_parquet(path)
    assert "row 2: no item id" in refused(path)


PARTS = {"train": [("u", n, n) for n in range(5)] + [("v", n, n) for n in range(3)]}
PARTS |= {"valid": [("u", 1, 10), ("u", 2, 11), ("v", 1, 3)], "test": [("u", 3, 20), ("v", 0, 21), ("v", 4, 22)]}


def write_parts(folder, parts, name="log.{}.csv"):
    for part, rows in parts.items():
        path = folder / name.format(part)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(HEADER + lines(rows))
    return folder


@pytest.mark.parametrize("name", ["log.{}.csv", "{}.csv", "{}/part-0.csv"])
def test_files_already_split_keep_their_parts(tmp_path, name):
    log, _ = loaded(write_parts(tmp_path / "log", PARTS, name), split="given", temporal_targets="all")
    split = split_log(log, DataConfig(split="given", temporal_targets="all"))
    ids = log.item_ids.to_list()

    def targets(examples):
        rows = log.offsets[examples.users] + examples.ends
        return [(log.user_ids[int(u)], int(ids[log.items[r] - 1])) for u, r in zip(examples.users, rows, strict=True)]

    assert targets(split.valid) == [row[:2] for row in PARTS["valid"]]
    assert targets(split.test) == [row[:2] for row in PARTS["test"]]
    assert targets(split.train) == [row[:2] for row in PARTS["train"] if row[1]]  # A first event has no history.
    # No target has an event of a later file before it, and training ends where validation begins.
    sizes = np.diff(log.offsets)
    part = [np.repeat([0, 1, 2], np.diff([0, *ends, n])) for ends, n in zip(log.parts, sizes, strict=True)]
    for number, examples in enumerate((split.train, split.valid, split.test)):
        for user, end in zip(examples.users, examples.ends, strict=True):
            assert part[user][: end + 1].max() == part[user][end] == number
    assert split.first_held_out.ends.tolist() == log.parts[:, 0].tolist() == [5, 3]
    last = split_log(log, DataConfig(split="given"))
    assert targets(last.valid) == [("u", 2), ("v", 1)] and last.report.valid_not_targets == 1
    assert loaded(tmp_path / "log", split="given", temporal_targets="all")[0].parts.tolist() == log.parts.tolist()


def test_a_training_event_after_a_validation_event_is_refused(tmp_path):
    parts = PARTS | {"train": [*PARTS["train"], ("v", 9, 4)]}
    with pytest.raises(ValueError, match="user 'v' has a training event after a validation event \\(1 such users\\)"):
        loaded(write_parts(tmp_path / "log", parts), split="given")


@pytest.mark.parametrize(
    ("parts", "settings", "complaint"),
    [
        (PARTS, {}, "set data.split=given to keep that split"),
        (
            {"train": PARTS["train"], "test": PARTS["test"]},
            {"split": "given"},
            "has no valid file; it needs",
        ),
        (PARTS | {"extra": PARTS["test"]}, {"split": "given"}, "log.extra.csv says neither in its name"),
    ],
)
def test_parts_that_are_not_those_asked_for(tmp_path, parts, settings, complaint):
    with pytest.raises(ValueError, match=complaint):
        loaded(write_parts(tmp_path / "log", parts), **settings)


def test_names_tell_parts():
    names = {"x.train.inter": 0, "valid.csv": 1, "test-00.parquet": 2, "dev.txt": 1, "latest.csv": None, "a.csv": None}
    assert {name: part_of(Source(pathlib.Path("/d") / name)) for name in names} == names


def test_a_data_frame_has_the_same_settings():
    frame = pl.DataFrame(
        {"user": ["u"] * 7, "item": list("abcabca"), "timestamp": [f"2021-01-0{n}" for n in range(1, 8)]}
    ).with_columns(stars=pl.Series([5, 5, 5, 5, 1, 5, 5]))
    console = Console(file=io.StringIO())
    log = load_log(frame, console, k_core=0, where="stars>=4 and time<2021-01-07", duplicates="last")
    assert [log.item_ids[int(item) - 1] for item in log.items] == ["b", "a", "c"]
    assert log.statistics.dropped["where stars>=4"] == log.statistics.dropped["where time<2021-01-07"] == 1
    lists = pl.DataFrame({"user": ["u"], "item": [["a", "b", "c"]]})
    assert load_log(lists, console, k_core=0, order="file").item_ids.to_list() == ["a", "b", "c"]
    for name, value in (("separator", ";"), ("split", "given")):
        with pytest.raises(ValueError, match=f"data.{name}.* is of files, and a data frame is given"):
            load_log(frame, console, **{name: value})
