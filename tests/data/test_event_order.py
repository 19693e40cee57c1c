"""Who is tested on what: exact seconds decide, whatever the order of the rows in the file."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_interactions import frame, notes
from tim4rec_jax.data import catalog, readers
from tim4rec_jax.data.interactions import clean, load_log, with_precision
from tim4rec_jax.data.splits import leave_one_out, split_log, temporal_split
from tim4rec_jax.data_config import DataConfig
from tim4rec_jax.evaluation.baselines import markov_ranks, popularity_counts, popularity_ranks, transition_counts

START = 1_600_000_000  # float32 steps by 128 seconds here


def facts(log, split):
    """What a log and its split say, by raw ids."""
    users, items = log.user_ids.to_list(), np.array([None, *log.item_ids])
    found = {"histories": {}, "counts": {}}
    for user, first, last in zip(users, log.offsets[:-1], log.offsets[1:], strict=True):
        found["histories"][user] = list(zip(items[log.items[first:last]], log.timestamps[first:last], strict=True))
    counts = popularity_counts(log, split.first_held_out)
    found["counts"] = dict(zip(items[1:], counts[1:], strict=True))
    transitions = transition_counts(log, split.first_held_out)
    for part in ("train", "valid", "test"):
        examples = getattr(split, part)
        targets = items[log.items[log.offsets[examples.users] + examples.ends]]
        ranks = (
            *popularity_ranks(log, counts, examples).values(),
            *markov_ranks(log, transitions, counts, examples).values(),
        )
        names = [users[user] for user in examples.users]
        found[part] = sorted(zip(names, examples.ends, targets, *ranks, strict=True))
    return found


# Each user's events are seconds apart, and so far more often than not one number in float32.
event = st.tuples(st.integers(0, 5), st.integers(0, 400))
histories = st.lists(st.lists(event, min_size=3, max_size=8, unique_by=lambda e: e[1]), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(histories, st.randoms(use_true_random=False))
def test_the_order_of_rows_in_a_file_changes_nothing(events, random):
    # The last user has something in every part of a cut in time.
    events = [*events, [(i, 50 * i) for i in range(6)], [(0, 10), (1, 130), (2, 260)]]
    rows = [(f"u{user}", f"i{item}", START + t) for user, history in enumerate(events) for item, t in history]
    shuffled = list(rows)
    random.shuffle(shuffled)
    one, other = (clean(frame(*order), k_core=2, timestamp_precision="int64") for order in (rows, shuffled))
    assert facts(one, leave_one_out(one)) == facts(other, leave_one_out(other))
    ours, theirs = (temporal_split(log, START + 120, START + 250, targets="all") for log in (one, other))
    assert facts(one, ours) == facts(other, theirs)
    left = dataclasses.asdict(one.statistics), dataclasses.asdict(other.statistics)
    assert left[0] == left[1]
    for user, history in facts(one, ours)["histories"].items():
        times = [t for _, t in history]
        assert times == sorted(times), user


def newest_first(users=30, length=8, gap=10):
    """Rows of a log written newest first; the item is its true place from 1."""
    return [
        (str(user), str(place), START + 100_000 * user + gap * place)
        for user in range(users, 0, -1)
        for place in range(length, 0, -1)
    ]


def write_csv(path, rows):
    path.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    return path


def settings_of(tmp_path, path, **changes):
    return DataConfig(**{"name": "custom", "path": str(path), "cache_dir": str(tmp_path / "cache"), **changes})


def items_tested(log):
    split = leave_one_out(log)
    return log.item_ids.gather(log.items[log.offsets[split.test.users] + split.test.ends] - 1).unique().to_list()


def test_a_log_written_newest_first_is_tested_on_the_last_event(tmp_path):
    path = write_csv(tmp_path / "log.csv", newest_first())
    log = load_log(settings_of(tmp_path, path))
    assert items_tested(log) == ["8"]
    for user in range(log.num_users):
        history = log.items[log.offsets[user] : log.offsets[user + 1]]
        assert log.item_ids.gather(history - 1).to_list() == [str(place) for place in range(1, 9)]
    by_hand = load_log(settings_of(tmp_path, path, timestamp_precision="float32"))
    assert items_tested(by_hand) != ["8"]
    statistics = by_hand.statistics
    assert statistics.reordered_users == statistics.changed_test_targets == 30
    console = notes()
    console.print(statistics.table())
    lines = {
        line.split("│")[1].strip(): line.split("│")[2].strip()
        for line in console.file.getvalue().splitlines()
        if line.startswith("│")
    }
    assert lines["events ordered by"] == "float32"
    assert lines["users whose order float32 changes"] == "30"
    assert lines["test targets float32 changes, leave one out"] == "30"
    assert lines["validation targets float32 changes, leave one out"] == str(statistics.changed_valid_targets)


def entry_of(monkeypatch, **changes):
    entry = dataclasses.replace(catalog.CATALOG["ml-1m"], **changes)
    monkeypatch.setitem(catalog.CATALOG, "ml-1m", entry)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"name": "custom"}, "data.name=custom is no published data set"),
        ({"name": "ml-1m"}, "ml-1m has 30 / 8 / 240 users / items / rows after 5-core; published are 6,040 /"),
        ({"name": "ml-1m", "k_core": 0}, "data.k_core=0, and the published logs are cleaned with 5"),
        ({"name": "steam"}, "no published counts of steam are known to tell by what the log is"),
    ],
)
def test_the_published_order_is_for_published_logs_alone(tmp_path, changes, reason):
    config = settings_of(tmp_path, write_csv(tmp_path / "log.csv", newest_first()), **changes)
    config = dataclasses.replace(config, timestamp_precision="published")
    console = notes()
    log = load_log(config, console)
    [line] = [line for line in console.file.getvalue().splitlines() if "exact seconds" in line]
    assert line.startswith("events are ordered by exact seconds (--data.timestamp_precision=float32 gives")
    assert reason in line and len(line) < 300
    assert items_tested(log) == ["8"] and with_precision(config, log).timestamp_precision == "int64"
    exact = load_log(dataclasses.replace(config, timestamp_precision="int64"))
    assert log.fingerprint == exact.fingerprint and log.statistics == exact.statistics


def test_the_published_order_of_a_published_log(tmp_path, monkeypatch):
    entry_of(monkeypatch, expected=(30, 8, 240))
    path = write_csv(tmp_path / "log.csv", newest_first())
    config = settings_of(tmp_path, path, name="ml-1m", timestamp_precision="published")
    console = notes()
    log = load_log(config, console)
    assert "exact seconds" not in console.file.getvalue() and "warning" not in console.file.getvalue()
    assert with_precision(config, log).timestamp_precision == log.statistics.timestamp_precision == "float32"
    assert log.fingerprint == load_log(with_precision(config, log)).fingerprint
    assert split_log(log, config).test.ends.tolist() == [7] * 30


def test_a_generated_log_is_no_published_one(tmp_path):
    console = notes()
    config = DataConfig(timestamp_precision="published", cache_dir=str(tmp_path))
    log = load_log(config, console)
    assert with_precision(config, log).timestamp_precision == "int64"
    assert "data.name=synthetic is no published data set" in console.file.getvalue()


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match=r"data\.timestamp_precision='float16' must be one of"):
        DataConfig(timestamp_precision="float16")


def test_a_fraction_of_a_second_orders_events_within_it(tmp_path, monkeypatch):
    rows = [("u", "d", "12.25"), ("u", "c", "11.75"), ("u", "b", "11.5"), ("u", "a", "11"), ("u", "e", "12.25")]
    rows += [("v", "c", "7.000002"), ("v", "b", "7.000001"), ("v", "a", "7")]
    rows += [("w", "b", "3"), ("w", "a", "3"), ("w", "c", "4")]
    log = load_log(settings_of(tmp_path, write_csv(tmp_path / "log.csv", rows), k_core=0))
    raw = log.item_ids.gather(log.items - 1).to_list()
    assert raw == [*"abcde", *"abc", *"bac"]
    assert log.timestamps.tolist() == [11, 11, 11, 12, 12, 7, 7, 7, 3, 3, 4]
    assert log.statistics.rounded_timestamps == 6
    # Pieces without a fraction before and after one that has some.
    parts = [rows[8:], rows[:8], [("x", "a", "1"), ("x", "b", "2"), ("x", "c", "2")]]
    frames = [pl.DataFrame(part, schema=["user", "item", "timestamp"], orient="row") for part in parts]
    whole = pl.concat(frames).with_columns(pl.col("timestamp").cast(pl.Float64))
    whole.write_parquet(tmp_path / "log.parquet")
    monkeypatch.setattr(readers, "_PIECE_ROWS", 3)
    pieces = load_log(settings_of(tmp_path, tmp_path / "log.parquet", k_core=0))
    assert pieces.user_ids.to_list() == ["w", "u", "v", "x"]
    assert pieces.item_ids.gather(pieces.items - 1).to_list() == [*"bac", *"abcde", *"abc", *"abc"]


def test_moments_within_a_second_keep_their_order(tmp_path):
    """Datetime columns, and milliseconds of a log that has them by definition."""
    moments = [1_600_000_000_750, 1_600_000_000_250, 1_600_000_000_500, 1_600_000_000_000]
    table = pl.DataFrame({"user": ["u"] * 4, "item": list("dbca"), "timestamp": moments})
    table.with_columns(pl.col("timestamp").cast(pl.Datetime("ms"))).write_parquet(tmp_path / "log.parquet")
    log = load_log(settings_of(tmp_path, tmp_path / "log.parquet", k_core=0))
    assert log.item_ids.gather(log.items - 1).to_list() == [*"abcd"]
    table.rename({"user": "user_id", "item": "video_id", "timestamp": "time_ms"}).write_csv(tmp_path / "log_1.csv")
    log = load_log(settings_of(tmp_path, tmp_path / "log_1.csv", k_core=0))
    assert log.item_ids.gather(log.items - 1).to_list() == [*"abcd"]
    assert log.statistics.rounded_timestamps == 0 and log.timestamps.tolist() == [1_600_000_000] * 4
