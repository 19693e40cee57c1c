"""Bad rows stop a log with their line, or are left out, counted by reason and kept with file, line and text."""

import hypothesis
import hypothesis.strategies as st
import polars as pl
import pytest

from tests.data.test_odd_input import loaded, refused
from tests.data.test_readers import with_frame
from tim4rec_jax.config import EvalConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.data.columns import BadRow
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.data.log_files import find_log
from tim4rec_jax.data.readers import Rules, read_log
from tim4rec_jax.data_config import DataConfig
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.run_dir import BAD_ROWS, create_run, discard_run
from tim4rec_jax.training.setup import with_data

pytestmark = pytest.mark.quick

GOOD = "u,a,100\nu,b,200\nu,c,300\n"
BAD = {
    "u,d,-1": "negative time",
    "u,d,soon": "time is no number",
    "u,d,": "no time",
    "u,d,999999999999": "time past the year 9999",
    ",d,100": "no user id",
    "u,,100": "no item id",
    "u,d,100,7": "too many fields",
    "u,d\re,100": "carriage return inside the line",
    "u,\udcff,100": "no UTF-8 text",
}


def skipping(path, log_format="auto"):
    sources, log_format = find_log(str(path), log_format)
    return with_frame(read_log(sources, log_format, rules=Rules(time_unit="s", skip_bad=True)))


def write(path, lines):
    path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
    return path


@pytest.mark.parametrize(("line", "reason"), BAD.items())
def test_a_bad_row_is_refused_or_left_out_with_its_line(tmp_path, line, reason):
    path = write(tmp_path / "log.csv", ["user,item,timestamp\n", GOOD, "\n", line, "\nu,e,400\n"])
    assert str(path) in refused(path)
    log = skipping(path)
    assert log.frame["item"].to_list() == ["a", "b", "c", "e"] and log.blank_lines == 1
    text = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    assert log.bad_rows == [BadRow(str(path), 6, reason, text)] and log.dropped == {f"bad: {reason}": 1}


@hypothesis.given(st.lists(st.sampled_from([None, *BAD]), min_size=1, max_size=25))
@hypothesis.settings(deadline=None, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_every_row_is_read_or_listed(tmp_path, lines):
    rows = [f"u,i{n},{n}" if line is None else line for n, line in enumerate(lines)]
    path = write(tmp_path / "log.csv", ["user,item,timestamp\nu,x,100\n", *(f"{row}\n" for row in rows)])
    log = skipping(path)
    assert log.frame["item"].to_list() == ["x", *(f"i{n}" for n, line in enumerate(lines) if line is None)]
    expected = {(n + 3, BAD[line]) for n, line in enumerate(lines) if line is not None}
    assert {(row.line, row.reason) for row in log.bad_rows} == expected and len(log.bad_rows) == len(expected)
    assert sum(log.dropped.values()) == len(expected)


def test_bad_rows_of_other_formats(tmp_path):
    path = tmp_path / "log.jsonl"
    good = '{"user": "u", "item": "a", "timestamp": 5}\n'
    path.write_text(good + "{bad\n\n[1]\n" + good + '{"user": "u", "timestamp": 5}\n')
    log = skipping(path)
    found = [(row.line, row.reason) for row in log.bad_rows]
    assert found == [(2, "no JSON"), (4, "no JSON object"), (6, "no item id")]
    assert log.frame.height == 2 and log.bad_rows[0].text == "{bad"
    path.write_text(good + '{"user": {"id": 1}, "item": "a", "timestamp": 5}\n' + good)
    log = skipping(path)
    assert [(row.line, row.reason) for row in log.bad_rows] == [
        (2, "an id is no single value")
    ] and log.frame.height == 2
    path = tmp_path / "log.parquet"
    pl.DataFrame({"user": ["u", None, "u"], "item": [1.0, 2.0, 2.5], "timestamp": [1, 2, 3]}).write_parquet(path)
    log = skipping(path)
    assert [(row.line, row.reason) for row in log.bad_rows] == [
        (3, "item id is no whole number"),
        (2, "no user id"),
    ] or [(row.line, row.reason) for row in log.bad_rows] == [(2, "no user id"), (3, "item id is no whole number")]
    assert '"item": 2.5' in max(log.bad_rows, key=lambda row: row.line).text
    path = write(tmp_path / "quoted.csv", ["user,item,timestamp\n", '"u","a",1\n', '"u","b",x\n'])
    text = '{"user": "u", "item": "b", "timestamp": "x"}'
    assert skipping(path).bad_rows == [BadRow(str(path), 2, "time is no number", text)]


def test_a_log_of_bad_rows_alone_is_refused_with_their_counts(tmp_path):
    path = write(tmp_path / "log.csv", ["user,item,timestamp\n", "u,a,x\n", ",a,1\n"])
    with pytest.raises(ValueError, match=r"no row of the log is left \(left out: .*1 by bad: no user id"):
        loaded(path, bad_rows="skip")


def test_the_run_folder_lists_them_and_the_cache_keeps_them(tmp_path):
    rows = "".join(f"{user},{item},{100 + item}\n" for user in "uvw" for item in range(5))
    path = write(tmp_path / "log.csv", ["user,item,timestamp\n", rows, "x,late, or never,soon\n", "u,1,-5\n"])
    data = DataConfig(name="custom", path=str(path), k_core=0, bad_rows="skip", cache_dir=str(tmp_path / "cache"))
    log, again = load_log(data), load_log(data)
    assert again.bad_rows == log.bad_rows and len(log.bad_rows) == 2
    assert log.statistics.dropped["bad: negative time"] == 1
    config = ExperimentConfig("x", ModelConfig(), data, TrainConfig(), EvalConfig())
    run = create_run(tmp_path / "run", with_data(config, log), log)
    written = pl.read_csv(run / BAD_ROWS)
    assert written.columns == ["file", "line", "reason", "text"]
    assert written.sort("line")["text"].to_list() == ["x,late, or never,soon", "u,1,-5"]
    discard_run(run)
    assert not run.exists()
