"""experiments.recommend: what it prints and writes, and how it refuses."""

import json
import pathlib

import polars as pl
import pytest

from experiments import recommend
from tests.serving.tiny_run import make_config, make_run
from tim4rec_jax.serving import row_files
from tim4rec_jax.serving.history_file import read_histories


def _main(capsys, *argv):
    code = recommend.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_user_with_titles(run, recommender, capsys):
    code, out, err = _main(capsys, f"--run={run}", "--user=u3", "--k=4")
    assert (code, err) == (0, "")
    [expected] = recommender.recommend([recommender.history_of_user("u3")], 4)
    for rank, item in enumerate(expected, start=1):
        row = next(line for line in out.splitlines() if f" {item.item_id} " in line)
        assert f" {rank} " in row and f"{item.score:.4f}" in row and (item.title or "") in row
    assert "times" not in out


def test_history_without_times_says_what_was_assumed(run, recommender, capsys):
    code, out, _ = _main(capsys, f"--run={run}", "--history=i1, i2,i3", "--k=2", "--exclude-seen")
    assert code == 0
    words = " ".join(out.split())
    assert f"no times given: consecutive items are taken to lie {recommender.typical_gap:,} s apart" in words
    history = recommender.history_from_ids(["i1", "i2", "i3"])
    [expected] = recommender.recommend([history], 2, exclude_seen=True)
    assert all(f" {item.item_id} " in out for item in expected)


def test_history_with_times(run, capsys):
    code, out, _ = _main(capsys, f"--run={run}", "--history=i1,i2", "--times=978300000,978400000", "--k=2")
    assert code == 0 and "no times given" not in out


def test_model_without_time_says_that_times_are_not_read(log, tmp_path, capsys):
    make_run(tmp_path / "run", log, make_config("ssd4rec"))
    _, out, _ = _main(capsys, f"--run={tmp_path / 'run'}", "--history=i1", "--k=1")
    assert "this model does not read times" in " ".join(out.split())


def test_batch(run, recommender, tmp_path, capsys):
    source, output = tmp_path / "histories.jsonl", tmp_path / "top.parquet"
    lines = ['{"user": "u5"}', "", '{"history": ["i4", "i9"], "times": [978300000, 978400000]}', '{"history": ["i4"]}']
    source.write_text("\n".join(lines) + "\n")
    code, out, err = _main(capsys, f"--run={run}", f"--input={source}", f"--output={output}", "--k=3")
    assert (code, err) == (0, "")
    assert "3 items for each of 3 histories; 1 histories came without times (column assumed_gap)" in out
    table = pl.read_parquet(output)
    assert table["line"].to_list() == [1] * 3 + [3] * 3 + [4] * 3
    assert table["user"].to_list() == ["u5"] * 3 + [None] * 6
    assert table["rank"].to_list() == [1, 2, 3] * 3
    assert table["assumed_gap"].to_list() == [None] * 6 + [recommender.typical_gap] * 3
    histories = [
        recommender.history_of_user("u5"),
        recommender.history_from_ids(["i4", "i9"], [978_300_000, 978_400_000]),
        recommender.history_from_ids(["i4"]),
    ]
    expected = [item for items in recommender.recommend(histories, 3) for item in items]
    assert table["item_id"].to_list() == [item.item_id for item in expected]
    assert table["title"].to_list() == [item.title for item in expected]
    assert table["score"].to_list() == [item.score for item in expected]
    assert [path.name for path in tmp_path.iterdir() if path.suffix != ".jsonl"] == ["top.parquet"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: not JSON"),
        ('["i1"]', "line 2: must be an object, one per line"),
        ('{"times": [3]}', 'line 2: must be an object with "user", "history" or both'),
        ('{"user": "u1", "times": [3]}', 'line 2: "times" belong to a "history"'),
        ('{"history": ["i1"], "time": [3]}', "line 2: unknown keys ['time']"),
        ('{"history": "i1"}', 'line 2: "history" must be a list of item ids, not "i1"'),
        ('{"history": [1.5]}', "line 2: id 1.5 must be a string or a whole number"),
        ('{"history": ["i1"], "times": ["x"]}', 'line 2: "times" must be a list of whole seconds since 1970'),
        ('{"history": []}', "line 2: the history is empty"),
        ('{"history": ["i1", "i2"], "times": [5, 4]}', "line 2: the history: times go backwards at position 2"),
        ('{"user": 12}', "line 2: unknown user '12'"),
        ("[" * 200_000, "line 2: not JSON"),
        ('{"user": "\\ud800"}', "line 2: id '\\ud800' has half of a surrogate pair"),
        ('{"history": ["i1"], "times": [' + "9" * 5000 + "]}", "line 2: not JSON"),
        ('{"history": "' + "x" * 5000 + '"}', 'line 2: "history" must be a list of item ids'),
    ],
)
def test_bad_lines_are_named(recommender, tmp_path, line, message):
    source = tmp_path / "histories.jsonl"
    source.write_text('{"user": "u1"}\n' + line + "\n")
    with pytest.raises(ValueError) as raised:
        list(read_histories(recommender, source))
    assert f"{source}: {message}" in str(raised.value)
    assert str(raised.value).endswith("; nothing was written")
    assert len(str(raised.value).replace(str(source), "")) < 250


def test_many_bad_lines_are_counted(run, tmp_path, capsys):
    source, output = tmp_path / "histories.jsonl", tmp_path / "top.parquet"
    source.write_text("".join(json.dumps({"history": [f"x{i}"]}) + "\n" for i in range(8)))
    code, out, err = _main(capsys, f"--run={run}", f"--input={source}", f"--output={output}")
    assert code == 2 and out == "" and err.count("\n") == 1
    assert "line 1: " in err and "line 2: " not in err and "(and 7 more bad lines); nothing was written" in err
    assert not output.exists()


def test_input_that_is_no_text_is_named(recommender, tmp_path):
    source = tmp_path / "histories.jsonl"
    source.write_bytes(b'{"user": "u1"}\r\n\xff\n')
    with pytest.raises(ValueError, match=r"histories.jsonl: line 2: not JSON in UTF-8 \(byte 1: .*nothing was written"):
        list(read_histories(recommender, source))


def test_a_line_without_an_end_is_not_read_whole(recommender, monkeypatch):
    monkeypatch.setattr(row_files, "LONGEST_LINE", 1000)
    with pytest.raises(ValueError, match="/dev/zero: line 1 has over 1,000 bytes; nothing was written"):
        list(read_histories(recommender, pathlib.Path("/dev/zero")))


def test_empty_input(recommender, tmp_path):
    (tmp_path / "none.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no lines; write one JSON object per line"):
        list(read_histories(recommender, tmp_path / "none.jsonl"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "give exactly one of --user, --history, --input, --users, --pairs and --similar; got none"),
        (["--user=u1", "--history=i1"], "give exactly one of --user, --history"),
        (["--user=u1", "--history=i1"], "got --user and --history"),
        (["--user=u1", "--times=5"], "--times belongs to --history; got --user"),
        (["--input=a.jsonl"], "--output belongs to --input and --users and --pairs, which need it; got --input"),
        (["--user=u1", "--output=a.csv"], "--output belongs to --input and --users and --pairs, which need it; got"),
        (["--user=nobody"], "unknown user 'nobody'; nearest known: "),
        (["--history=i1,i99"], "the history: unknown item 'i99' at position 2; nearest known: 'i9'"),
        (["--history="], "the history is empty; give at least 1 item id"),
        (["--history=i1,,i2"], "--history: nothing stands at position 2 of 'i1,,i2'; remove the comma"),
        (["--history=i1", "--times=yesterday"], "--times: 'yesterday' is not a whole number of seconds since 1970"),
        (["--history=i1", "--times=--5"], "--times: '--5' is not a whole number of seconds since 1970"),
        (["--history=i1", "--times=" + "9" * 5000], "is not a whole number of seconds since 1970"),
        (["--user=u1", "--usr=u1"], "unknown option --usr; nearest: --user"),
        (["--user=u1", "--k=many"], "--k=many: expected a whole number"),
        (["--history=i1,i2", "--times=5"], "the history has 2 items but 1 times"),
        (["--user=u1", "--k=31"], "k=31 is larger than the catalogue of 30 items"),
        (["--user=u1", "--k=0"], "k=0 must be at least 1"),
        (["--input=missing.jsonl", "--output=top.parquet"], "missing.jsonl"),
        (["--input=a.jsonl", "--output=top.xls"], "--output=top.xls: the ending says what the file holds: .csv, "),
        (["--users=no.csv", "--output=top.csv"], "there is no file no.csv"),
        (["--user=u1", "--exclude_seen=maybe"], "--exclude_seen=maybe: expected true or false"),
    ],
)
def test_refusals_are_one_line(run, capsys, argv, message):
    code, out, err = _main(capsys, f"--run={run}", *argv)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_output_folder_is_missing(run, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"user": "u1"}\n')
    output = tmp_path / "no" / "top.parquet"
    code, _, err = _main(capsys, f"--run={run}", f"--input={tmp_path / 'in.jsonl'}", f"--output={output}")
    assert code == 2 and f"there is no folder {tmp_path / 'no'}" in err


def test_no_run(tmp_path, capsys):
    code, _, err = _main(capsys, f"--run={tmp_path / 'nowhere'}", "--user=1")
    assert code == 2 and err == f"error: there is no run folder {tmp_path / 'nowhere'}\n"


def test_who_has_seen_nearly_all_gets_a_shorter_list(run, tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "top.parquet"
    nearly_all = [f"i{i}" for i in range(1, 29)]
    source.write_text(json.dumps({"history": nearly_all}) + '\n{"history": ["i3"]}\n')
    options = [f"--run={run}", f"--input={source}", f"--output={output}", "--k=5", "--exclude_seen=true"]
    code, out, err = _main(capsys, *options)
    assert (code, err) == (0, "") and "1 lists are shorter, because no more items are left to them" in out
    table = pl.read_parquet(output)
    first = table.filter(pl.col("line") == 1)
    assert first["rank"].to_list() == [1, 2] and set(first["item_id"]) == {"i29", "i30"}
    assert table.filter(pl.col("line") == 2).height == 5
