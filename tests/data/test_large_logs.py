"""Reading and cleaning in pieces: the result of the plain path, within a fixed number of bytes of memory per row."""

import dataclasses
import json

import numpy as np
import polars as pl
import pytest

from experiments import benchmark
from experiments.benchmarks import data
from tim4rec_jax.config import DataConfig
from tim4rec_jax.data import cleaning, interactions, readers
from tim4rec_jax.data.interactions import clean, load_log
from tim4rec_jax.data.loader import Loader, PrefixSampler, epoch_order
from tim4rec_jax.data.readers import read_log
from tim4rec_jax.data.sources import Source
from tim4rec_jax.data.splits import leave_one_out

ROWS = 600_000
# Columns, their successors and the order take under 60 bytes per row; blocks and libraries do not grow with the log.
BYTES_A_ROW = 80
FIXED_BYTES = 150_000_000


def plain_clean(frame, k_core, precision):
    """The cleaned log by data frames alone: the columns in order, the ids, and how many rows were dropped."""
    frame = frame.with_row_index("row")
    while True:
        height = frame.height
        frame = frame.filter(pl.len().over("user") >= k_core, pl.len().over("item") >= k_core)
        if frame.height == height:
            frame = frame.filter(pl.len().over("user") >= 3)
        if frame.height == height:
            break
    users, items = (frame[name].unique(maintain_order=True) for name in ("user", "item"))
    place = users.to_frame("user").with_row_index("u")
    number = items.to_frame("item").with_row_index("i", offset=1)
    frame = frame.join(place, on="user").join(number, on="item")
    seconds = pl.col("timestamp").cast(pl.Float32) if precision == "float32" else pl.col("timestamp")
    # Each user's last two items by exact seconds, which rounded ones may hide.
    exact = frame.sort("u", "timestamp", "row")
    frame = frame.sort("u", seconds, "row").with_columns(exact_row=exact["row"], exact_item=exact["i"])
    # Times of events that tie are in order.
    return frame.with_columns(timestamp=exact["timestamp"]), users, items


def assert_same(log, frame, k_core, precision):
    expected, users, items = plain_clean(frame, k_core, precision)
    np.testing.assert_array_equal(log.items, expected["i"])
    np.testing.assert_array_equal(log.timestamps, expected["timestamp"])
    np.testing.assert_array_equal(np.repeat(np.arange(log.num_users), np.diff(log.offsets)), expected["u"])
    assert log.user_ids.equals(users) and log.item_ids.equals(items)
    assert sum(log.statistics.dropped.values()) == frame.height - expected.height
    assert log.statistics.duplicates == expected.height - expected.select("u", "i").n_unique()
    changed = pl.col("i") != pl.col("exact_item")
    by_user = expected.group_by("u", maintain_order=True).agg(
        (pl.col("row") != pl.col("exact_row")).any().alias("order"),
        changed.get(-2).alias("valid"),
        changed.last().alias("test"),
    )
    counts = log.statistics.reordered_users, log.statistics.changed_valid_targets, log.statistics.changed_test_targets
    assert counts == tuple(by_user.select("order", "valid", "test").sum().row(0))
    assert all(counts) if precision == "float32" else not any(counts)


@pytest.fixture
def small_pieces(monkeypatch):
    """Every block, bucket and piece small, so that a small log has many of them; every array mapped."""
    for module, name, value in (
        (readers, "_PIECE_ROWS", 97),
        (cleaning, "_BLOCK", 61),
        (cleaning, "_BUCKET_ROWS", 16),
        (interactions, "_MAPPED_FROM", 1),
    ):
        monkeypatch.setattr(module, name, value)


def random_frame(num_rows=3000, seed=0):
    rng = np.random.default_rng(seed)
    return pl.DataFrame(
        {
            "user": pl.Series(rng.geometric(0.01, num_rows)).cast(pl.String),
            "item": pl.Series(rng.geometric(0.02, num_rows)).cast(pl.String),
            "timestamp": 978_300_000 + rng.integers(0, 5_000, num_rows),
        }
    )


@pytest.mark.parametrize("precision", ["float32", "int64"])
def test_pieces_give_what_the_plain_path_gives(tmp_path, small_pieces, precision):
    frame = random_frame()
    frame.write_parquet(tmp_path / "log.parquet")
    config = DataConfig(
        name="custom", path=str(tmp_path / "log.parquet"), cache_dir=str(tmp_path), timestamp_precision=precision
    )
    log = load_log(config)
    assert not log.items.flags.owndata and log.items.ctypes.data % 64 == log.timestamps.ctypes.data % 64 == 0
    assert_same(log, frame, 5, precision)
    again, cleaned = load_log(config), clean(frame, k_core=5, timestamp_precision=precision)
    for name in ("items", "timestamps", "offsets"):
        np.testing.assert_array_equal(getattr(again, name), getattr(cleaned, name))
    assert again.statistics == cleaned.statistics == log.statistics
    # A mapped log trains as one in memory does.
    samplers = [
        PrefixSampler(one, leave_one_out(one).train, max_len=7, batch_size=64, seed=3) for one in (log, cleaned)
    ]
    loaders = [Loader(sampler, on_device=False, precision=precision) for sampler in samplers]
    for mine, theirs in zip(*(loader.epoch(2, loader.num_batches - 3) for loader in loaders), strict=True):
        for name in ("items", "timestamps", "targets", "weights"):
            a, b = getattr(mine, name), getattr(theirs, name)
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)


def test_bad_rows_of_a_later_piece_are_named_by_their_row_and_all_counted(tmp_path, small_pieces):
    frame = random_frame(500).with_columns(
        pl.when(pl.int_range(pl.len()).is_in([200, 400])).then(None).otherwise(pl.col("item")).alias("item")
    )
    frame.write_parquet(tmp_path / "log.parquet")
    source = Source(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match=r"log\.parquet, row 201: no item id \(2 such rows\)"):
        read_log([source], "parquet")
    blank = pl.DataFrame({"user": [None] * 150, "item": [None] * 150, "timestamp": [None] * 150}, schema=frame.schema)
    pl.concat([blank, random_frame(100)]).write_parquet(tmp_path / "log.parquet")
    log = read_log([source], "parquet")
    assert (log.blank_lines, len(log.users)) == (150, 100)
    blank.write_parquet(tmp_path / "log.parquet")
    with pytest.raises(ValueError, match="holds no rows below its header"):
        read_log([source], "parquet")


def test_the_order_of_an_epoch_is_numpys_permutation():
    for num in (1, 2, 1000, 70_001):
        expected = np.random.Generator(np.random.Philox(key=[5, 9])).permutation(num)
        order = epoch_order(5, 9, num)
        assert order.dtype == np.int32
        np.testing.assert_array_equal(order, expected)


def test_a_log_has_the_users_and_items_asked_for(tmp_path):
    data.write_log(tmp_path / "log.parquet", 5000, 0, num_users=7, num_items=11)
    frame = pl.read_parquet(tmp_path / "log.parquet")
    assert (frame.height, frame["user"].n_unique(), frame["item"].n_unique()) == (5000, 7, 11)


@pytest.mark.parametrize("option", ["--users=0", "--items=2000"])
def test_more_users_or_items_than_rows_are_refused(option, capsys):
    assert benchmark.main(["logs", "--rows=1000", option]) == 2
    assert option in capsys.readouterr().err


def test_memory_is_bounded_by_the_rows(tmp_path, capsys):
    output = tmp_path / "logs.json"
    argv = ["logs", f"--rows={ROWS}", f"--output={output}", f"--folder={tmp_path}", "--seconds=0.2"]
    assert benchmark.main(argv) == 0
    record = json.loads(output.read_text())
    assert record["environment"]["backend"] == "cpu" and record["settings"]["rows"] == [ROWS]
    (one,) = record["results"]
    read, batches = one["ingest"], one["loader"]
    for part in (read, batches):
        assert 0 < part["start_bytes"] <= part["peak_bytes"] < part["start_bytes"] + FIXED_BYTES + BYTES_A_ROW * ROWS
    assert read["rows_read"] == ROWS and batches["examples"] == read["rows"] - 3 * read["users"]
    assert batches["batches"] >= 2 and batches["batches_a_second"] > 0
    assert "peak MB" in capsys.readouterr().out
    # The files are gone; the same rows, cleaned here, are what the process found.
    assert list(tmp_path.iterdir()) == [output]
    data.write_log(tmp_path / "log.parquet", ROWS, 0)
    frame = pl.read_parquet(tmp_path / "log.parquet")
    log = clean(frame, k_core=5, timestamp_precision="int64")
    assert_same(log, frame, 5, "int64")
    found = (read["rows"], read["users"], read["items"])
    assert (log.num_rows, log.num_users, log.num_items) == found
    assert dataclasses.asdict(log.statistics)["rows_read"] == ROWS
