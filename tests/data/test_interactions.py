"""Cleaning against logs worked by hand and against known counts of real ones; the cache of cleaned logs."""

import dataclasses
import io
import time
import types

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from tim4rec_jax.data import interactions
from tim4rec_jax.data.interactions import clean, load_log
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.data_config import DataConfig, SyntheticConfig

pytestmark = pytest.mark.quick


def frame(*rows):
    return pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row")


def write_inter(path, rows):
    lines = ["user_id:token\titem_id:token\ttimestamp:float"] + ["\t".join(map(str, row)) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def notes():
    return Console(file=io.StringIO(), width=1000)


BY_HAND = [
    ("u", "x", 30),
    ("v", "q", 5),
    ("u", "a", 10),
    ("v", "a", 40),
    ("u", "b", 20),
    ("v", "b", 10),
    ("v", "x", 10),
    ("v", "a", 50),
    ("w", "a", 1),
]


def test_a_log_worked_by_hand():
    log = clean(frame(*BY_HAND), k_core=2, timestamp_precision="int64")
    # q (1 row) and w (1 row) go; u, v and x, a, b stay, numbered as they first appear.
    assert log.user_ids.to_list() == ["u", "v"]
    assert log.item_ids.to_list() == ["x", "a", "b"]
    assert log.offsets.tolist() == [0, 3, 7]
    assert log.items.tolist() == [2, 3, 1, 3, 1, 2, 2]
    assert log.timestamps.tolist() == [10, 20, 30, 10, 10, 40, 50]
    assert (log.items.dtype, log.timestamps.dtype, log.offsets.dtype) == (np.int32, np.int64, np.int64)
    assert (log.num_users, log.num_items, log.num_rows) == (2, 3, 7)
    statistics = log.statistics
    assert (statistics.rows_read, statistics.dropped) == (9, {"2-core": 2})
    assert (statistics.users, statistics.items, statistics.rows, statistics.training_examples) == (2, 3, 7, 1)
    assert (statistics.duplicates, statistics.mean_length) == (1, 3.5)
    assert (statistics.first_time, statistics.last_time, statistics.span_days) == (10, 50, 40 / 86400)
    assert statistics.tied_share == pytest.approx(1 / 7)


def test_numbers_follow_the_first_appearance_among_the_rows_that_remain():
    # b's first row belongs to a user that goes, so a comes first.
    rows = [("gone", "b", 1)] + [(user, item, 1) for user in "uvw" for item in "abc"]
    log = clean(frame(*rows), k_core=3, timestamp_precision="int64")
    assert log.item_ids.to_list() == ["a", "b", "c"]
    assert log.user_ids.to_list() == ["u", "v", "w"]


def test_the_core_is_taken_to_a_fixpoint():
    # Without d, w has 2 rows; without w, c has 2; without c, v has 2; ... one pass would keep some of them.
    rows = [("u", "a"), ("u", "b"), ("u", "c"), ("v", "a"), ("v", "b"), ("v", "c"), ("w", "a"), ("w", "b"), ("w", "d")]
    block = [(user, item) for user in ("1", "2", "3") for item in ("x", "y", "z")]
    log = clean(frame(*((u, i, t) for t, (u, i) in enumerate(rows + block))), k_core=3, timestamp_precision="int64")
    assert log.user_ids.to_list() == ["1", "2", "3"]
    assert log.statistics.dropped == {"3-core": 9}


def test_ties_keep_file_order_and_float32_ties_within_64_seconds():
    start = 1_318_896_000  # float32 seconds step by 128 here
    rows = [("u", "late", start + 40), ("u", "early", start), ("u", "last", start + 1000), ("u", "tie", start)]
    exact = clean(frame(*rows), k_core=0, timestamp_precision="int64")
    assert exact.item_ids.gather(exact.items - 1).to_list() == ["early", "tie", "late", "last"]
    assert exact.statistics.tied_share == 1 / 4
    rounded = clean(frame(*rows), k_core=0, timestamp_precision="float32")
    assert rounded.item_ids.gather(rounded.items - 1).to_list() == ["late", "early", "tie", "last"]
    # The three that tie have their times in order, so that no history runs backwards.
    assert rounded.timestamps.tolist() == [start, start, start + 40, start + 1000]
    assert rounded.statistics.tied_share == 2 / 4
    assert exact.fingerprint != rounded.fingerprint
    assert (rounded.statistics.reordered_users, rounded.statistics.changed_test_targets) == (1, 0)
    # early, tie, late, last: the last but one is another.
    assert rounded.statistics.changed_valid_targets == 1
    counts = exact.statistics.reordered_users, exact.statistics.changed_valid_targets
    assert (*counts, exact.statistics.changed_test_targets) == (0, 0, 0)


def test_users_with_fewer_than_3_events_are_counted_under_their_own_reason():
    rows = [("u", item, t) for t, item in enumerate("abc")] + [("v", "a", 1), ("v", "d", 2), ("w", "a", 1)]
    log = clean(frame(*rows), k_core=0, timestamp_precision="int64")
    assert log.user_ids.to_list() == ["u"]
    assert log.item_ids.to_list() == ["a", "b", "c"]
    assert log.statistics.dropped == {"users with fewer than 3 events": 3}


def test_leaving_out_short_users_does_not_break_the_core():
    # Leaving v out (2 rows) leaves d with 1 row, under the 2-core, and that leaves u with 3.
    rows = [("u", i) for i in "abcd"] + [("v", "d"), ("v", "a")] + [("w", i) for i in "abc"]
    log = clean(frame(*((u, i, 0) for u, i in rows)), k_core=2, timestamp_precision="int64")
    assert log.item_ids.to_list() == ["a", "b", "c"]
    assert log.statistics.dropped == {"2-core": 1, "users with fewer than 3 events": 2}


def test_an_emptied_log_names_the_filter():
    rows = frame(*((user, item, 0) for user in "uv" for item in "abc"))
    with pytest.raises(ValueError) as error:
        clean(rows, k_core=5, timestamp_precision="int64")
    assert str(error.value) == (
        "the 5-core filter (users and items with fewer than 5 interactions, removed repeatedly) left none of the log's "
        "6 rows (2 users, 3 items; dropped 6 by 5-core); lower data.k_core"
    )
    with pytest.raises(ValueError, match="leaving out users with fewer than 3 events left none of the log's 2 rows"):
        clean(frame(("u", "a", 1), ("v", "b", 2)), k_core=0, timestamp_precision="int64")


ROWS = [(user, item, 10 * user + item) for user in range(5) for item in range(6)]


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        (frame(("u", "a", 1), (None, "a", 1)), "data frame, row 2: no user id"),
        (frame(("u", "a", 1), ("u", "", 1), ("u", "", 1)), r"data frame, row 2: no item id \(2 such rows\)"),
        (frame(("u", "a", 1), ("u", "a", None)), "data frame, row 2: no timestamp"),
        (frame(("u", "a", 1), ("u", "a", -5)), "data frame, row 2: timestamp -5 is negative"),
        (frame(("u", "a", 1), ("u", "a", 10**13)), "data frame, row 2: .* past the year 9999; are these milliseconds"),
        (frame(), "data frame: the log has no rows"),
        (frame(("u", "a", 1)).drop("item"), "data frame: no column item; its columns are user, timestamp"),
        (frame(("u", "a", 1)).with_columns(timestamp=True), "data frame: column timestamp is Boolean"),
        (frame(("u", "a", 1)).with_columns(user=1.5), "data frame, row 1: user id 1.5 is a float"),
    ],
)
def test_bad_data_frames_are_refused_by_row(bad, complaint):
    for read in (lambda: clean(bad, k_core=0, timestamp_precision="int64"), lambda: load_log(bad, k_core=0)):
        with pytest.raises(ValueError, match=complaint):
            read()


def same(log, expected):
    for name in ("items", "timestamps", "offsets"):
        np.testing.assert_array_equal(getattr(log, name), getattr(expected, name))
    assert log.user_ids.equals(expected.user_ids) and log.item_ids.equals(expected.item_ids)
    assert log.statistics == expected.statistics
    return True


@pytest.mark.parametrize("library", ["polars", "lazy", "arrow stream", "pandas", "pyarrow"])
def test_data_frames_of_every_library_give_the_log_of_their_file(tmp_path, library):
    if library in ("pandas", "pyarrow"):
        pytest.importorskip(library, reason=f"the project does not need {library}, which is not installed")
        pytest.importorskip("pyarrow", reason="pandas hands its columns on through pyarrow, which is not installed")
    moments = pl.from_epoch(pl.Series([user + 10 * item for user, item, _ in ROWS], dtype=pl.Int64))
    columns = {"user_id": [user for user, _, _ in ROWS], "product_id": [str(item) for _, item, _ in ROWS]}
    data = pl.DataFrame({"rating": [5] * len(ROWS), **columns, "timestamp": moments})
    data.write_parquet(tmp_path / "log.parquet")
    names = ("user_id", "product_id", "timestamp")
    expected = load_log(tmp_path / "log.parquet", columns=names, k_core=2, cache_dir=str(tmp_path))
    given = {
        "polars": lambda: data,
        "lazy": data.lazy,
        "arrow stream": lambda: types.SimpleNamespace(__arrow_c_stream__=data.__arrow_c_stream__),
        "pandas": lambda: data.to_pandas(),
        "pyarrow": lambda: data.to_arrow(),
    }[library]()
    log = load_log(given, k_core=2)
    assert same(log, expected) and log.fingerprint == load_log(data, k_core=2).fingerprint != expected.fingerprint
    renamed = data.rename({"user_id": "who", "product_id": "what", "timestamp": "when"})
    assert same(load_log(renamed, columns=("who", "what", "when"), k_core=2), expected)


def test_a_data_frame_keeps_fractions_and_takes_titles_and_the_published_order(tmp_path):
    rows = frame(("u", "late", 5), ("u", "early", 5), ("u", "last", 6)).with_columns(
        timestamp=pl.Series([5.5, 5.25, 6])
    )
    (tmp_path / "names.csv").write_text("item,title\nlate,Late\n")
    console = notes()
    log = load_log(rows, console, k_core=0, item_path=str(tmp_path / "names.csv"), timestamp_precision="published")
    assert log.item_ids.gather(log.items - 1).to_list() == ["early", "late", "last"]
    assert log.titles.to_list() == ["Late", None, None] and log.statistics.rounded_timestamps == 2
    assert "data.name=custom is no published data set" in console.file.getvalue()
    assert log.fingerprint != load_log(rows.with_columns(timestamp=pl.Series([5, 5, 6])), k_core=0).fingerprint


def test_what_is_no_log_and_settings_that_do_not_fit_are_refused():
    with pytest.raises(TypeError, match="is no log; give a path, a DataConfig, or a data frame of Polars"):
        load_log([("u", "a", 1)])
    with pytest.raises(ValueError, match="data.path is of files, and a data frame is given"):
        load_log(frame(("u", "a", 1)), path="log.csv")
    for columns in (("user", "item"), "user,item,time"):
        with pytest.raises(ValueError, match="must be three names, of the user, item and time columns"):
            load_log(frame(("u", "a", 1)), columns=columns)
    with pytest.raises(ValueError, match="a DataConfig says all settings itself"):
        load_log(DataConfig(), k_core=3)
    with pytest.raises(TypeError, match="no_such_setting"):
        load_log(frame(("u", "a", 1)), no_such_setting=3)


def test_the_statistics_table_shows_every_number():
    log = clean(frame(*BY_HAND, *[(None, None, None)] * 4), k_core=2, timestamp_precision="int64")
    console = notes()
    console.print(log.statistics.table("by hand"))
    shown = console.file.getvalue()
    for line in (
        "by hand",
        "rows read",
        "13",
        "dropped: blank lines",
        "dropped: 2-core",
        "repeated (user, item) rows, kept",
        "14.3%",
        "1970-01-01 00:00:50",
    ):
        assert line in shown


def test_a_cleaned_log_is_cached_and_the_same_when_read_back(tmp_path, monkeypatch):
    path = write_inter(tmp_path / "log.inter", ROWS)
    (tmp_path / "log.item").write_text("item_id:token\ttitle:token_seq\n3\tThree\n")
    config = DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path / "cache"))
    first = load_log(config)
    assert first.titles.to_list() == [None, None, None, "Three", None, None]

    def unread(*_):
        raise AssertionError("the log was read again")

    monkeypatch.setattr(interactions, "read_log", unread)
    second = load_log(config)
    for name in ("items", "timestamps", "offsets"):
        np.testing.assert_array_equal(getattr(second, name), getattr(first, name))
        assert getattr(second, name).dtype == getattr(first, name).dtype
    for name in ("user_ids", "item_ids", "titles"):
        assert getattr(second, name).to_list() == getattr(first, name).to_list()
    assert second.statistics == first.statistics
    assert second.fingerprint == first.fingerprint


def test_content_and_every_setting_change_the_fingerprint(tmp_path):
    path = write_inter(tmp_path / "log.inter", ROWS)
    config = DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path))
    seen = {load_log(config).fingerprint}
    for change in ({"k_core": 3}, {"timestamp_precision": "float32"}, {"item_column": "item_id"}):
        seen.add(load_log(dataclasses.replace(config, **change)).fingerprint)
    write_inter(path, [*ROWS, (0, 0, 999)])
    seen.add(load_log(config).fingerprint)
    assert len(seen) == 5
    write_inter(path, ROWS)
    assert load_log(config).fingerprint in seen


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "foreign", "gone", "no checksums"])
def test_a_corrupt_cache_entry_is_reported_and_built_again(tmp_path, monkeypatch, damage, mapped):
    monkeypatch.setattr(interactions, "_MAPPED_FROM", 1 if mapped else 1000)
    path = write_inter(tmp_path / "log.inter", ROWS)
    config = DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path / "cache"))
    first = load_log(config)
    assert first.items.flags.owndata != mapped
    (entry,) = (tmp_path / "cache" / "cleaned").iterdir()
    contents = {file.name: file.read_bytes() for file in entry.iterdir()}
    whole, file = contents["items.npy"], entry / "items.npy"
    at = whole.index(first.items.tobytes())
    # Where a log is mapped, its file may be replaced but not written to.
    file.unlink()
    if damage == "no checksums":
        (entry / "sha256.json").write_text("[]")
    if damage != "gone":
        flipped = whole[:at] + b"\xff" + whole[at + 1 :]
        file.write_bytes({"truncated": whole[:-10], "flipped": flipped, "foreign": b"hello"}.get(damage, whole))
    console = notes()
    again = load_log(config, console)
    np.testing.assert_array_equal(again.items, first.items)
    said = console.file.getvalue()
    assert f"the cached log at {entry} cannot be used and is built again" in said
    assert {file.name: file.read_bytes() for file in entry.iterdir()} == contents
    assert list(entry.parent.iterdir()) == [entry]


def test_a_cache_that_cannot_be_written_is_reported(tmp_path):
    path = write_inter(tmp_path / "log.inter", ROWS)
    (tmp_path / "cache").write_text("a file where the folder should be")
    console = notes()
    log = load_log(DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path / "cache")), console)
    assert log.num_rows == len(ROWS)
    assert "the cleaned log could not be cached" in console.file.getvalue()


def test_names_and_paths(tmp_path):
    with pytest.raises(ValueError, match="data.name=custom needs data.path"):
        load_log(DataConfig(name="custom", cache_dir=str(tmp_path)))
    with pytest.raises(ValueError, match=r"unknown data set 'ml-2m'; did you mean ml-1m"):
        load_log(DataConfig(name="ml-2m", path=str(tmp_path), cache_dir=str(tmp_path)))
    assert [DataConfig(name=name).name for name in ("ml1m", "amazon-beauty", "steam")] == ["ml-1m", "beauty", "steam"]
    console = notes()
    path = write_inter(tmp_path / "log.inter", ROWS)
    log = load_log(DataConfig(name="synthetic", path=str(path), cache_dir=str(tmp_path)), console)
    assert log.num_rows == len(ROWS)
    assert "data.path is set: reading" in console.file.getvalue()


def test_an_unexpected_size_is_a_printed_warning(tmp_path):
    path = write_inter(tmp_path / "log.inter", ROWS)
    config = DataConfig(name="ml-100k", path=str(path), cache_dir=str(tmp_path))
    console = notes()
    load_log(config, console)
    assert "warning: ml-100k has 5 / 6 / 30 users / items / rows after 5-core; published are 943 / 1,349 / 99,287" in (
        console.file.getvalue()
    )
    console = notes()
    load_log(dataclasses.replace(config, k_core=2), console)
    assert "warning" not in console.file.getvalue()


def test_the_synthetic_log_is_made_and_cleaned(tmp_path):
    config = DataConfig(synthetic=SyntheticConfig(num_users=200, num_items=30), cache_dir=str(tmp_path))
    log = load_log(config)
    assert 0 < log.num_users <= 200 and 0 < log.num_items <= 30
    assert log.fingerprint == load_log(config).fingerprint
    assert log.fingerprint != load_log(dataclasses.replace(config, synthetic=SyntheticConfig(seed=8))).fingerprint
    assert list(tmp_path.iterdir()) == []


REAL = {
    "ml-1m-imputed": ("ml-1m", (6_040, 3_416, 999_611, 981_491)),
    "amazon-beauty": ("beauty", (22_363, 12_101, 198_502, 131_413)),
    "ml-100k": ("ml-100k", (943, 1_349, 99_287, 96_458)),
}


@pytest.mark.parametrize("folder", REAL)
def test_real_logs_have_their_known_counts(datasets_dir, tmp_path, folder):
    name, expected = REAL[folder]
    console = notes()
    path = datasets_dir / folder / f"{folder}.inter.gz"
    started = time.perf_counter()
    log = load_log(DataConfig(name=name, path=str(path), cache_dir=str(tmp_path)), console)
    split = leave_one_out(log)
    print(f"{folder}: {time.perf_counter() - started:.2f} s from file to ready")
    assert (log.num_users, log.num_items, log.num_rows, len(split.train)) == expected
    assert log.statistics.training_examples == expected[-1]
    assert "warning" not in console.file.getvalue()
    assert (np.bincount(log.items)[1:] >= 5).all()
    # Prefixes are never materialised: two int32 an example.
    assert log.nbytes + split.nbytes < 40e6
    if folder == "amazon-beauty":
        assert round(log.statistics.tied_share, 2) == 0.39
        assert log.titles is None
    else:
        assert log.titles[log.item_ids.to_list().index("1")] == "Toy Story"
