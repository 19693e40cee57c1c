"""Logs of one's own: the table of options in the README reads what it says, and runs remember how they were read."""

import json
import pathlib
import re
import shlex

import polars as pl
import pytest

from experiments import evaluate, recommend, train
from experiments.cli import run_program
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.run_dir import BAD_ROWS, read_config, read_histories, read_results
from tim4rec_jax.training import stored_run
from tim4rec_jax.training.stored_run import evaluate_run

README = pathlib.Path(__file__).resolve().parents[2] / "experiments" / "README.md"
EVENTS = [("7", item, 1_599_999_960 + 60 * n) for n, item in enumerate("baccad")]
ITEMS = list("baccad")
COMMON = ["--config=ml100k_ssd4rec", "--data.name=custom", "--data.k_core=0"]


def text(separator, rows=EVENTS, header=None):
    return "".join(separator.join(map(str, row)) + "\n" for row in ([header] if header else []) + list(rows))


def moment(seconds, form):
    return pl.from_epoch(pl.Series([seconds])).dt.strftime(form)[0]


NAMES = ("user", "item", "timestamp")
RATED = [(item, user, 5, time) for user, item, time in EVENTS]
MILLISECONDS = [(user, item, 1000 * time) for user, item, time in EVENTS]
PLAIN = text(",", header=NAMES)
# By a word of the first column: the file, its content, and the items that are read.
EXAMPLES = {
    "CSV of commas": ("log.csv", text(";", header=NAMES), ITEMS),
    "columns of other names": ("log.csv", text(",", header=("who", "what", "when")), ITEMS),
    "the names of all fields": ("log.csv", text(",", RATED), ITEMS),
    "the numbers of the fields": ("log.csv", text(",", RATED), ITEMS),
    "another separator": ("log.csv", text("^", header=NAMES), ITEMS),
    "ISO 8601": ("log.csv", text(",", [(u, i, moment(t, "%FT%TZ")) for u, i, t in EVENTS], NAMES), ITEMS),
    "numbers whose size": ("log.csv", text(",", MILLISECONDS, NAMES), ITEMS),
    "dates of another form": (
        "log.csv",
        text(",", [(u, i, moment(t, "%d/%m/%Y %H:%M")) for u, i, t in EVENTS], NAMES),
        ITEMS,
    ),
    "part files": ("logs/part-0.csv", PLAIN, ITEMS),
    "Parquet with a row per user": ("log.parquet", None, ITEMS),
    "no times": ("log.csv", text(",", [row[:2] for row in EVENTS], NAMES[:2]), ITEMS),
    "SASRec": ("log.txt", text(" ", [row[:2] for row in EVENTS]), ITEMS),
    "all its items a line": ("log.txt", "7 " + " ".join(ITEMS) + "\n", ITEMS),
    "split already": ("split/train.csv", text(",", EVENTS[:4], NAMES), ITEMS),
    "only some": (
        "log.csv",
        text(
            ",", [(*e, n % 2 + 4, "x" if n == 1 else "buy") for n, e in enumerate(EVENTS)], (*NAMES, "rating", "event")
        ),
        [item for n, item in enumerate(ITEMS) if n != 1],
    ),
    "one event of": ("log.csv", PLAIN, list("bacd")),
    "rows that cannot be read": ("log.csv", PLAIN + "7,x,soon\n", ITEMS),
}


def rows_of_the_table():
    section = README.read_text(encoding="utf-8").split("## Your own log")[1].split("\n## ")[0]
    return re.findall(r"^\| (.+?) \| (none|`.+`) \|$", section, re.MULTILINE)


def read(folder, name, content, options):
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    if content is None:
        lists = {"user": ["7"], "item": [ITEMS], "timestamp": [[time for _, _, time in EVENTS]]}
        pl.DataFrame(lists).write_parquet(path)
    else:
        path.write_text(content)
    if name.startswith("split/"):
        for part, rows in (("valid", EVENTS[4:5]), ("test", EVENTS[5:])):
            (path.parent / f"{part}.csv").write_text(text(",", rows, NAMES))
        path = path.parent
    given = [] if any(option.startswith("--data.path=") for option in options) else [f"--data.path={path}"]
    return train.parse([*COMMON, f"--data.cache_dir={folder / 'cache'}", *given, *options])[0].data


@pytest.mark.quick
@pytest.mark.parametrize("word", EXAMPLES)
def test_the_options_of_the_readme_read_such_a_log(tmp_path, monkeypatch, word):
    monkeypatch.chdir(tmp_path)
    (options,) = [options for what, options in rows_of_the_table() if word in what]
    name, content, items = EXAMPLES[word]
    log = load_log(read(tmp_path, name, content, [] if options == "none" else shlex.split(options.strip("`"))))
    assert [log.item_ids[int(item) - 1] for item in log.items] == items
    if word not in ("no times", "SASRec", "all its items a line"):
        first = EVENTS[0][2]
        assert (log.timestamps[0], log.timestamps[-1]) == (first, first + 300)


def test_every_row_of_the_table_is_tried():
    table = rows_of_the_table()
    assert len(table) == len(EXAMPLES) and all(any(word in what for word in EXAMPLES) for what, _ in table)


def test_json_lines_and_parquet_need_no_option_either(tmp_path):
    events = pl.DataFrame(EVENTS, schema=NAMES, orient="row")
    events.write_ndjson(tmp_path / "log.jsonl")
    events.write_parquet(tmp_path / "log.parquet")
    for name in ("log.jsonl", "log.parquet"):
        config = train.parse([*COMMON, f"--data.cache_dir={tmp_path / 'cache'}", f"--data.path={tmp_path / name}"])[0]
        assert load_log(config.data).num_rows == len(EVENTS)


SMALL = [
    "--config=ml100k_ssd4rec",
    "--data.name=custom",
    "--data.k_core=0",
    *("--model.num_layers=1", "--model.d_model=16", "--model.d_state=8", "--model.head_dim=16", "--model.max_len=8"),
    *("--train.batch_size=64", "--train.epochs=1", "--train.length_groups=1", "--train.positions=last"),
    *("--train.progress=false", "--train.tensorboard=false", "--eval.top_k=3", "--eval.monitor=ndcg@3"),
]


def trained(folder, *options):
    run = folder / "run"
    assert run_program(train.main, [*SMALL, *options, f"--data.cache_dir={folder / 'cache'}", f"--run_dir={run}"]) == 0
    return run


def test_a_run_on_a_split_log_is_measured_and_served_from_its_folder_alone(tmp_path, capsys):
    rows = [(f"u{u}", f"i{(u + n) % 9}", 60 * n + u) for u in range(20) for n in range(7)]
    for name, kept in (("train", range(4)), ("valid", (4, 5)), ("test", (6,))):
        part = [row for n, row in enumerate(rows) if n % 7 in kept]
        (tmp_path / f"{name}.csv").write_text(text(",", part, NAMES))
    run = trained(tmp_path, f"--data.path={tmp_path}/*.csv", "--data.split=given")
    histories = read_histories(run)
    assert histories["before_valid"].to_list() == [4] * 20 and histories["before_test"].to_list() == [6] * 20
    assert evaluate_run(run).metrics == pytest.approx(read_results(run)["test"])
    for file in tmp_path.glob("*.csv"):
        file.unlink()
    assert evaluate.main([f"--run={run}"]) == 0
    assert "files already split" in " ".join(capsys.readouterr().out.split())
    assert recommend.main([f"--run={run}", "--user=u3", "--k=3"]) == 0
    # Without what says how the files were split the run is refused, not measured otherwise.
    histories.drop("before_valid", "before_test").write_parquet(run / "histories.parquet")
    (run / "manifest.json").unlink()
    with pytest.raises(ValueError, match="do not say how the files were split"):
        stored_run.load_log(run)


@pytest.mark.exhaustive
def test_a_run_in_the_order_of_its_file_and_one_that_read_otherwise(tmp_path, capsys):
    rows = [(f"u{u}", f"i{(u + n) % 9}") for u in range(20) for n in range(6)]
    (tmp_path / "log.txt").write_text(text(" ", [*rows, ("u1",)]))
    options = [f"--data.path={tmp_path / 'log.txt'}", "--data.format=pairs", "--data.order=file"]
    run = trained(tmp_path, *options, "--data.bad_rows=skip")
    assert pl.read_csv(run / BAD_ROWS).rows() == [(str(tmp_path / "log.txt"), 121, "not two fields", "u1")]
    assert json.loads((run / "config.json").read_text())["data"]["order"] == "file"
    assert read_config(run).data.bad_rows == "skip"
    capsys.readouterr()
    assert recommend.main([f"--run={run}", "--user=u3", "--k=3"]) == 0
    others = [*SMALL, *options, f"--data.cache_dir={tmp_path / 'cache'}", f"--run_dir={run}", "--resume"]
    assert run_program(train.main, [*others, "--data.bad_rows=skip", "--data.duplicates=first"]) == 2
    assert "data.duplicates: 'keep' → 'first'" in capsys.readouterr().err
