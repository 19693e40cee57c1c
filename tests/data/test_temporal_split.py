"""The temporal split against a log worked by hand, and that it neither leaks nor loses an event."""

import dataclasses

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tim4rec_jax.config import DataConfig
from tim4rec_jax.data.interactions import InteractionLog, clean, load_log
from tim4rec_jax.data.splits import gap_statistics, leave_one_out, split_log, temporal_split, training_span
from tim4rec_jax.evaluation.baselines import popularity_counts, transition_counts

pytestmark = pytest.mark.quick


def log_of(histories, precision="int64"):
    rows = [(user, item, t) for user, events in histories.items() for item, t in events]
    frame = pl.DataFrame(rows, schema={"user": pl.String, "item": pl.String, "timestamp": pl.Int64}, orient="row")
    return clean(frame, k_core=0, timestamp_precision=precision)


def quick_log(times):
    """A sorted log of users with these times and one item each an event, made without cleaning."""
    rows = [np.sort(row) for row in times]
    num = sum(map(len, rows))
    ids = pl.Series(range(1, num + 1)).cast(pl.String)
    return InteractionLog(
        items=np.arange(1, num + 1, dtype=np.int32),
        timestamps=np.concatenate(rows),
        offsets=np.cumsum([0, *map(len, rows)]),
        user_ids=ids[: len(rows)],
        item_ids=ids,
        titles=None,
        statistics=None,
        fingerprint="",
    )


def pairs(examples):
    return list(zip(examples.users.tolist(), examples.ends.tolist(), strict=True))


HISTORIES = {
    "early": [("a", 10), ("b", 20), ("c", 30)],
    "long": [("a", 11), ("c", 12), ("b", 100), ("d", 110), ("a", 200), ("e", 210), ("b", 220)],
    "late": [("e", 205), ("a", 206), ("c", 207)],
    "middle": [("b", 105), ("c", 115), ("d", 116)],
}


@pytest.mark.parametrize(
    ("targets", "valid", "test", "left"),
    [
        ("last", [(1, 3), (3, 2)], [(1, 6), (2, 2)], (2, 3)),
        ("first", [(1, 2), (3, 1)], [(1, 4), (2, 1)], (2, 3)),
        ("all", [(1, 2), (1, 3), (3, 1), (3, 2)], [(1, 4), (1, 5), (1, 6), (2, 1), (2, 2)], (0, 0)),
    ],
)
def test_the_split_of_a_log_worked_by_hand(targets, valid, test, left):
    split = temporal_split(log_of(HISTORIES), 100, 200, targets=targets)
    assert pairs(split.train) == [(0, 1), (0, 2), (1, 1)]
    assert (pairs(split.valid), pairs(split.test)) == (valid, test)
    assert pairs(split.first_held_out) == [(0, 3), (1, 2), (2, 0), (3, 0)]
    report = split.report
    assert (report.valid_not_targets, report.test_not_targets, report.first_events) == (*left, 4)
    assert (report.users_without_train, report.users_without_valid, report.users_without_test) == (2, 2, 2)
    # d and e have no event before 100; both stay in the ranking.
    unseen = {"last": (2, 0), "first": (0, 0), "all": (2, 1)}[targets]
    assert (report.items_not_in_train, report.valid_unseen_targets, report.test_unseen_targets) == (2, *unseen)
    for part in (split.train, split.valid, split.test):
        assert part.users.dtype == part.ends.dtype == np.int32


def test_statistics_and_baselines_use_training_events_only():
    log = log_of(HISTORIES)
    split = temporal_split(log, 100, 200, targets="all")
    names = dict(zip(log.item_ids, range(1, 6), strict=True))
    counts = popularity_counts(log, split.first_held_out)
    assert {name: counts[i] for name, i in names.items()} == {"a": 2, "b": 1, "c": 2, "d": 0, "e": 0}
    transitions = transition_counts(log, split.first_held_out)
    assert transitions.counts.sum() == 3 and transitions.row(names["a"])[1].tolist() == [1, 1]
    assert training_span(log, split) == (10, 30)
    later = log.timestamps >= 100
    moved = dataclasses.replace(
        log, timestamps=np.where(later, log.timestamps + 7 * np.arange(log.num_rows), log.timestamps)
    )
    assert gap_statistics(moved, split) == gap_statistics(log, split)


def test_shares_and_dates_choose_the_cuts():
    log = log_of(
        {
            "u": [(str(t), t) for t in range(50)],
            "v": [(str(t), t) for t in range(50, 100)],
            "w": [("1", 1), ("2", 95), ("3", 99)],
        }
    )
    report = split_log(log, DataConfig(split="temporal", valid_share=0.2, test_share=0.1)).report
    assert (log.timestamps >= report.test_from).sum() == 10 and (log.timestamps >= report.valid_from).sum() == 31
    dates = DataConfig(split="temporal", valid_from="1970-01-01T00:01:00", test_from="1970-01-01 02:01:30+02:00")
    report = split_log(log, dates).report
    assert (report.valid_from, report.test_from) == (60, 90)
    shown = report.table()
    assert shown.row_count == 14
    assert split_log(log, DataConfig()).report is None


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 400), min_size=1, max_size=9), min_size=1, max_size=6),
    st.integers(65, 180),
    st.integers(200, 330),
    st.sampled_from(["last", "first", "all"]),
)
def test_nothing_leaks_and_nothing_is_lost(times, first_cut, second_cut, targets):
    start = 978_300_000
    # The last user has something to train, to validate and to test on, whatever the others have.
    times = [*times, [0, 1, 180, 199, 395, 400]]
    log = quick_log([[start + t for t in row] for row in times])
    split = temporal_split(log, start + first_cut, start + second_cut, targets=targets)
    report = split.report
    assert (report.valid_from, report.test_from) == (start + first_cut, start + second_cut)
    seconds = {
        part: log.timestamps[log.offsets[e.users] + e.ends]
        for part, e in (("train", split.train), ("valid", split.valid), ("test", split.test))
    }
    assert seconds["train"].max() < report.valid_from
    assert report.valid_from <= seconds["valid"].min() and seconds["valid"].max() < report.test_from
    assert report.test_from <= seconds["test"].min()
    # Whatever training reads lies before its targets, and so before the cut too.
    for user, end in pairs(split.train):
        history = log.timestamps[log.offsets[user] : log.offsets[user] + end]
        assert end >= 1 and history.max() < report.valid_from
    everything = pairs(split.train) + pairs(split.valid) + pairs(split.test)
    assert len(everything) == len(set(everything)) == report.train + report.valid + report.test
    left = report.first_events + report.valid_not_targets + report.test_not_targets
    assert len(everything) + left == log.num_rows
    if targets != "all":
        assert all(len(np.unique(part.users)) == len(part) for part in (split.valid, split.test))
    else:
        assert set(everything) == {(u, i) for u, row in enumerate(times) for i in range(1, len(row))}
    assert report.users_without_test == log.num_users - len(set(split.test.users.tolist()))


def test_a_cut_between_events_that_float32_makes_equal():
    start = 978_300_000
    times = [start - 200, start - 100, start + 31, start + 10, start + 200, start + 300, start + 400]
    # start + 10 and start + 31 are one number in float32, so file order stands between them; their times are in order.
    log = log_of({"u": [(str(t), t) for t in times]}, "float32")
    split = temporal_split(log, start + 20, start + 300, targets="all")
    assert (pairs(split.train), pairs(split.valid)) == ([(0, 1), (0, 2)], [(0, 3), (0, 4)])
    assert log.item_ids.gather(log.items - 1).to_list() == [str(t) for t in times]
    assert log.timestamps.tolist() == sorted(times)
    backwards = dataclasses.replace(log, timestamps=np.array(times))
    with pytest.raises(ValueError, match="the log is not sorted by time within each user; clean it first"):
        temporal_split(backwards, start + 20, start + 300, targets="all")


def test_users_of_one_and_two_events_stay_in_a_temporal_split(tmp_path):
    rows = [("one", "a", 5), ("new", "b", 90), ("two", "a", 10), ("two", "c", 95), ("many", "a", 1), ("many", "b", 2)]
    rows += [("many", "c", 60), ("many", "a", 80)]
    path = tmp_path / "log.csv"
    path.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    moments = {"valid_from": "1970-01-01T00:00:50", "test_from": "1970-01-01T00:01:10"}
    config = DataConfig(
        name="custom", path=str(path), cache_dir=str(tmp_path / "cache"), k_core=0, split="temporal", **moments
    )
    log = load_log(config)
    assert log.user_ids.to_list() == ["one", "new", "two", "many"] and log.statistics.dropped == {}
    assert log.statistics.training_examples == 1  # to leave one out of `many`
    split = split_log(log, config)
    assert (pairs(split.train), pairs(split.valid), pairs(split.test)) == ([(3, 1)], [(3, 2)], [(2, 1), (3, 3)])
    report = split.report
    assert (report.users_without_train, report.users_without_valid, report.users_without_test) == (3, 3, 2)
    assert report.first_events == 4 and report.train + report.valid + report.test + 4 == log.num_rows
    # What a user of one event did before the cut counts like any other training event.
    counts = popularity_counts(log, split.first_held_out)
    assert dict(zip(log.item_ids, counts[1:], strict=True)) == {"a": 3, "b": 1, "c": 0}
    assert transition_counts(log, split.first_held_out).counts.sum() == 1
    # To leave one out, the same file is another log.
    other = load_log(DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path / "cache"), k_core=0))
    assert other.user_ids.to_list() == ["many"] and other.fingerprint != log.fingerprint
    assert other.statistics.dropped == {"users with fewer than 3 events": 4}


def test_the_split_is_part_of_a_cached_log_only_where_cleaning_depends_on_it(tmp_path):
    path = tmp_path / "log.csv"
    rows = [(u, i, 10 * i + u) for u in range(4) for i in range(4)]
    path.write_text("user,item,timestamp\n" + "".join(f"{u},{i},{t}\n" for u, i, t in rows))
    config = DataConfig(name="custom", path=str(path), cache_dir=str(tmp_path / "cache"))
    for k_core, logs in ((0, 2), (2, 2), (3, 1), (4, 1)):
        configs = [dataclasses.replace(config, k_core=k_core, split=name) for name in ("leave_one_out", "temporal")]
        assert len({load_log(config).fingerprint for config in configs}) == logs


@pytest.mark.parametrize(
    ("settings_", "complaint"),
    [
        ({"valid_share": 0.5, "test_share": 0.5}, r"data\.valid_share=0\.5, data\.test_share=0\.5 must be"),
        ({"valid_share": 0.0}, "must be positive and sum to less than 1"),
        ({"valid_from": "2000-12-01"}, r"data\.valid_from=2000-12-01 is given alone"),
        ({"valid_from": "soon", "test_from": "2001-01-01"}, r"data\.valid_from=soon is no date \(.*; write 2000-12"),
        ({"valid_from": "2001-13-01", "test_from": "2001-14-01"}, r"data\.valid_from=2001-13-01 is no date"),
        ({"valid_from": "2001-01-01", "test_from": "2000-01-01"}, r"2001-01-01 must lie before data\.test_from=2000"),
        ({"split": "leave_one_out", "valid_from": "2000-01-01", "test_from": "2001-01-01"}, "is for data.split"),
        ({"split": "random"}, r"data\.split='random' must be one of"),
        ({"temporal_targets": "some"}, r"data\.temporal_targets='some' must be one of"),
    ],
)
def test_bad_settings_are_refused(settings_, complaint):
    with pytest.raises(ValueError, match=complaint):
        DataConfig(**{"split": "temporal", **settings_})


@pytest.mark.parametrize(
    ("cuts", "complaint"),
    [
        ((5, 200), "must lie in this order within the log's span, 1970-01-01 00:00:10 UTC to 1970-01-01 00:03:40 UTC"),
        ((100, 221), "must lie in this order within the log's span"),
        ((200, 100), "must lie in this order"),
        ((11, 200), "leave no training example: no user has an event in that period and one before it"),
        ((31, 32), "leave no validation target"),
    ],
)
def test_cuts_that_fit_no_log_are_refused(cuts, complaint):
    with pytest.raises(ValueError, match=complaint):
        temporal_split(log_of(HISTORIES), *cuts, targets="last")


def test_a_test_period_without_users_and_shares_that_coincide_are_refused():
    log = log_of({"u": [("a", 1), ("b", 2), ("c", 3)], "v": [("a", 9), ("b", 9), ("c", 9)]})
    with pytest.raises(ValueError, match=r"both begin at 1970-01-01 00:00:09 UTC; give larger shares"):
        split_log(log, DataConfig(split="temporal", valid_share=0.2, test_share=0.2))
    alone = dataclasses.replace(log, timestamps=np.array([1, 2, 3, 9, 9, 9]), offsets=np.array([0, 3, 4, 5, 6]))
    with pytest.raises(ValueError, match="leave no test target"):
        temporal_split(alone, 3, 9, targets="last")


def test_leave_one_out_holds_its_first_held_out_event():
    split = leave_one_out(log_of(HISTORIES))
    assert split.first_held_out is split.valid and split.report is None
