"""experiments.convert: raw item ids travel with a checkpoint and bring it together with any order of its log."""

import csv
import functools

import jax
import numpy as np
import polars as pl
import pytest

torch = pytest.importorskip("torch")

from experiments import convert, evaluate
from tests.models.settings import settings_of
from tim4rec_jax.config import DataConfig, EvalConfig, ExperimentConfig, TrainConfig
from tim4rec_jax.data.interactions import load_log
from tim4rec_jax.interop.conversion import make_run
from tim4rec_jax.interop.item_ids import as_csv, read_item_ids
from tim4rec_jax.models import build_model, init_params
from tim4rec_jax.run_dir import read_environment, read_items
from tim4rec_jax.serving.recommender import Recommender

USERS, ITEMS = 20, 11
# Quotes, separators, line breaks, leading zeros and spaces, other scripts: an id is text.
IDS = ["07", "7", 'a"b', "c,d", "e;f", " g", "h ", "ключ", "物", "0x1F", "-1"]
EVAL = EvalConfig(top_k=(3, 5), monitor="ndcg@5")
OPTIONS = ["--data.k_core=0", "--eval.top_k", "3", "5", "--eval.monitor=ndcg@5", "--train.progress=false"]


def _frame(seed=0):
    """Every item occurs; events lie a day apart, so that their order is plain in any precision of time."""
    random = np.random.default_rng(seed)
    lengths = random.integers(4, 9, USERS)
    users = np.repeat(np.arange(USERS), lengths)
    items = np.concatenate([np.arange(ITEMS), random.integers(0, ITEMS, len(users) - ITEMS)])
    times = 10**9 + 86_400 * random.permutation(len(users))
    return pl.DataFrame({"user": users, "item": [IDS[i] for i in items], "timestamp": times})


def _make_run(folder, frame, model="sasrec", **settings):
    """A run with parameters of which no two are alike."""
    folder.mkdir(parents=True, exist_ok=True)
    frame.write_csv(folder / "log.csv")
    data = DataConfig(name="custom", path=str(folder / "log.csv"), k_core=0, cache_dir=str(folder / "cache"))
    log = load_log(data)
    size = dict(
        vocab_size=log.num_items + 1, max_len=6, d_model=16, num_layers=1, inner_size=16, d_state=4, head_dim=16
    )
    config = settings_of(model, **size | settings)
    shapes = jax.eval_shape(functools.partial(init_params, build_model(config)), jax.random.key(0))
    random = np.random.default_rng(1)
    params = jax.tree.map(lambda leaf: np.asarray(random.normal(0, 0.5, leaf.shape), np.float32), shapes)
    experiment = ExperimentConfig("made", config, data, TrainConfig(progress=False), EVAL)
    make_run(folder / "run", experiment, params, log, {})
    return folder / "run"


def _main(capsys, *argv):
    code = convert.main([str(word) for word in argv])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def _options(folder, log, output="back", checkpoint="m.pth"):
    return [
        f"--checkpoint={folder / checkpoint}",
        f"--settings={folder / 'm.yaml'}",
        f"--output={folder / output}",
        f"--data.path={log}",
        f"--data.cache_dir={folder / 'cache'}",
        *OPTIONS,
    ]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A run and the three files that convert wrote of it."""
    folder = tmp_path_factory.mktemp("written")
    run = _make_run(folder, _frame())
    assert convert.main([f"--run={run}", f"--output={folder / 'm.pth'}"]) == 0
    return folder


@pytest.fixture
def copied(written, tmp_path):
    """The three files in a folder of the test's own."""
    for name in ("m.pth", "m.yaml", "m.item_ids.csv"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    return tmp_path


def _lists(run):
    """The recommendations of every user by raw ids."""
    recommender = Recommender.from_run(run)
    users = [str(user) for user in range(USERS)]
    lists = recommender.recommend([recommender.history_of_user(user) for user in users], 5)
    return {user: [item.item_id for item in items] for user, items in zip(users, lists, strict=True)}


def _refused(capsys, options, message):
    code, _, err = _main(capsys, *options)
    lines = [line for line in err.splitlines() if not line.startswith("reading ")]
    assert code == 2 and len(lines) == 1 and len(lines[0]) < 300 and message in lines[0], err


def test_the_raw_ids_lie_beside_the_checkpoint(written):
    with (written / "m.item_ids.csv").open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    items = read_items(written / "run")
    assert [row["item_id"] for row in rows] == items["item_id"].to_list() and set(IDS) == set(items["item_id"])
    assert [int(row["index"]) for row in rows] == items["index"].to_list() == list(range(1, ITEMS + 1))


@pytest.mark.parametrize("order", ["time", "shuffled", "item"])
def test_a_log_in_another_order_gives_the_same_recommendations(written, tmp_path, capsys, order):
    frame = _frame()
    frame = (
        frame.sample(fraction=1, shuffle=True, seed=4)
        if order == "shuffled"
        else frame.sort("timestamp" if order == "time" else order)
    )
    frame.write_csv(tmp_path / "log.csv")
    options = _options(written, tmp_path / "log.csv")
    options[2] = f"--output={tmp_path / 'back'}"
    code, out, err = _main(capsys, *options)
    assert code == 0 and f"items: {ITEMS} raw ids of m.item_ids.csv" in out, err
    first, second = read_items(written / "run")["item_id"], read_items(tmp_path / "back")["item_id"]
    assert first.to_list() != second.to_list(), "the order is the same: the test shows nothing"
    assert _lists(tmp_path / "back") == _lists(written / "run")
    assert read_environment(tmp_path / "back")["converted_from"]["item_ids"] == "m.item_ids.csv"
    # And once more: what is written of the new run stands for the same.
    assert _main(capsys, f"--run={tmp_path / 'back'}", f"--output={tmp_path / 'm2.pth'}")[0] == 0
    table = {}
    for folder, name in ((written, "m"), (tmp_path, "m2")):
        rows = torch.load(folder / f"{name}.pth", weights_only=True)["item_embedding.weight"][1:]
        table[name] = dict(zip(read_item_ids(folder / f"{name}.item_ids.csv", ITEMS), rows.tolist(), strict=True))
    assert table["m"] == table["m2"]


def test_metrics_are_those_of_the_run(written, tmp_path, capsys):
    _frame().sort("timestamp").write_csv(tmp_path / "log.csv")
    options = _options(written, tmp_path / "log.csv")
    options[2] = f"--output={tmp_path / 'back'}"
    assert _main(capsys, *options)[0] == 0
    tables = []
    for run in (written / "run", tmp_path / "back"):
        assert evaluate.main([f"--run={run}"]) == 0
        tables.append([line for line in capsys.readouterr().out.splitlines() if line.startswith("│")])
    assert tables[0] and tables[0] == tables[1]


def test_the_original_program_loads_the_state_dict(written):
    state = torch.load(written / "m.pth", weights_only=True)
    module = torch.nn.Module()
    module.LayerNorm = torch.nn.LayerNorm(16)
    module.load_state_dict(state, strict=False)
    assert torch.equal(module.LayerNorm.weight, state["LayerNorm.weight"])
    assert all(isinstance(value, torch.Tensor) for value in state.values())


def _change_ids(ids):
    return [ids[1], ids[0], *ids[2:]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda ids: as_csv(_change_ids(ids)), "are not those that m.pth was written with"),
        (lambda ids: as_csv([*ids[:-1], "other"]), "are not those that m.pth was written with"),
        (lambda ids: as_csv(ids[:-1]), "has 10 item ids, the checkpoint 11 items"),
        (lambda ids: as_csv([*ids, "more"]), "has 12 item ids, the checkpoint 11 items; leave out the row of padding"),
        (lambda ids: as_csv([*ids, *ids]), "has more item ids, the checkpoint 11 items"),
        (lambda ids: as_csv([*ids[:-1], ids[0]]), "has ids twice: '07' (items 1 and 11)"),
        (lambda ids: as_csv([*ids[:-1], ""]), "the id of item 11 is empty"),
        (lambda ids: as_csv(ids)[:-9] + b'"', "is not readable as item ids"),
        (lambda ids: as_csv(ids).replace(b"item_id", b"item"), "no column item_id"),
        (lambda ids: as_csv(ids).replace(b"\n11,", b"\n10,"), "each once; one stands twice"),
        (lambda ids: as_csv(ids).replace(b"\n11,", b"\n0,"), "index 0 does not lie between 1 and 11"),
        (lambda ids: as_csv(ids).replace(b"\n11,", b"\nxi,"), "index 'xi' is no whole number"),
        (lambda ids: b"\xff\xfe" + as_csv(ids), "is not readable as item ids"),
        (lambda ids: b"", "no column item_id"),
        (lambda ids: as_csv(ids) + b"\n" * 2**21, "bytes, too many for 11 item ids"),
    ],
)
def test_other_ids_beside_the_checkpoint_are_refused(copied, written, capsys, change, message):
    file = copied / "m.item_ids.csv"
    file.write_bytes(change(read_items(written / "run")["item_id"].to_list()))
    _refused(capsys, _options(copied, written / "log.csv"), message)
    assert not (copied / "back").exists()


def test_ids_that_are_gone_or_of_another_checkpoint(copied, written, capsys):
    (copied / "m.item_ids.csv").rename(copied / "elsewhere.csv")
    _refused(capsys, _options(copied, written / "log.csv"), "which is missing; put it back beside the checkpoint")
    named = [*_options(copied, written / "log.csv"), f"--item_ids={copied / 'elsewhere.csv'}"]
    assert _main(capsys, *named)[0] == 0
    other = _make_run(copied / "other", _frame(seed=9).sort("item"))
    assert _main(capsys, f"--run={other}", f"--output={copied / 'other' / 'm.pth'}")[0] == 0
    (copied / "other" / "m.item_ids.csv").rename(copied / "m.item_ids.csv")
    _refused(capsys, _options(copied, written / "log.csv", "two"), "are not those that m.pth was written with")
    _refused(
        capsys,
        [*_options(copied, written / "log.csv", "two"), f"--item_ids={copied / 'm.item_ids.csv'}"],
        "are not those that m.pth was written with",
    )


def test_a_log_with_other_items_names_how_many_and_one(copied, written, capsys):
    frame = _frame()
    frame.with_columns(pl.col("item").replace("物", "new")).write_csv(copied / "log.csv")
    _refused(
        capsys,
        _options(copied, copied / "log.csv"),
        "1 items of the log are not in the checkpoint (such as 'new') and 1 items of the checkpoint are not in the log "
        "(such as '物')",
    )
    frame.filter(~pl.col("item").is_in(["物", "07"])).write_csv(copied / "log.csv")
    _refused(
        capsys, _options(copied, copied / "log.csv"), "2 items of the checkpoint are not in the log (such as '07')"
    )


def _foreign(folder, capsys, written, ids=None):
    """A checkpoint that does not know its ids, and the options to read it."""
    state = {name: value.clone() for name, value in torch.load(written / "m.pth", weights_only=True).items()}
    torch.save(state, folder / "m.pth")
    (folder / "m.item_ids.csv").rename(folder / "ids.csv")
    _frame().sort("timestamp").write_csv(folder / "log.csv")
    return _options(folder, folder / "log.csv")


def test_a_checkpoint_without_ids_says_that_order_of_appearance_is_taken(copied, written, capsys):
    options = _foreign(copied, capsys, written)
    code, out, _ = _main(capsys, *options)
    assert code == 0 and "m.pth does not say which items its rows are: row i" in out and "first appearance" in out
    assert _lists(copied / "back") != _lists(written / "run")
    (copied / "ids.csv").rename(copied / "m.item_ids.csv")
    options[2] = f"--output={copied / 'two'}"
    _refused(capsys, options, "lies beside m.pth, which does not say that these are its items")


@pytest.mark.parametrize("kind", ["csv", "tsv", "parquet", "whole numbers", "no index", "txt", "crlf", "run"])
def test_ids_of_a_foreign_checkpoint(copied, written, capsys, kind):
    options, ids = _foreign(copied, capsys, written), read_items(written / "run")
    ending = {"tsv": "tsv", "txt": "txt", "crlf": "txt", "csv": "csv", "no index": "csv"}.get(kind, "parquet")
    file = copied / f"given.{ending}"
    rows = ids.select("index", "item_id").sort("item_id")
    if kind in ("csv", "tsv"):
        rows.write_csv(file, separator="\t" if kind == "tsv" else ",")
    elif kind == "no index":
        ids.select("item_id").write_csv(file)
    elif kind == "run":
        file = written / "run" / "item_ids.parquet"
    elif kind == "whole numbers":
        rows = rows.with_columns(item_id=pl.Series(range(100, 100 + ITEMS)))
        renamed = dict(zip(ids.sort("item_id")["item_id"], map(str, rows["item_id"]), strict=True))
        _frame().sort("timestamp").with_columns(pl.col("item").replace(renamed)).write_csv(copied / "log.csv")
        rows.write_parquet(file)
    elif kind == "parquet":
        rows.write_parquet(file)
    else:
        end = "\r\n" if kind == "crlf" else "\n"
        file.write_bytes("".join(f"{item}{end}" for item in ids["item_id"]).encode("utf-8-sig"))
    code, out, err = _main(capsys, *options, f"--item_ids={file}")
    assert code == 0 and f"items: {ITEMS} raw ids of {file.name}" in out, err
    if kind != "whole numbers":
        assert _lists(copied / "back") == _lists(written / "run")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("ids.txt", "a\nb\n", "has 2 item ids, the checkpoint 11 items"),
        ("ids.txt", "[PAD]\n" + "".join(f"{i}\n" for i in range(ITEMS)), "leave out the row of padding"),
        ("ids.txt", "a\n" * ITEMS, "has ids twice: 'a' (items 1 and 2)"),
        ("ids.txt", "\n".join(["a", "", *map(str, range(ITEMS - 2))]), "the id of item 2 is empty"),
        ("ids.parquet", "PAR1 and no more", "is not readable as item ids"),
        ("ids.csv", "item_id\n" + "1,2\n" * ITEMS, "line 2 has 2 fields, the header 1"),
    ],
)
def test_files_of_ids_that_cannot_be(copied, written, capsys, name, content, message):
    options = _foreign(copied, capsys, written)
    (copied / name).write_text(content)
    _refused(capsys, [*options, f"--item_ids={copied / name}"], message)
    _refused(capsys, [*options, f"--item_ids={copied}"], "is a folder, where a file of item ids is expected")
    _refused(capsys, [*options, f"--item_ids={copied / 'none'}"], "there is no file of item ids")


def test_a_run_that_does_not_say_one_id_for_each_item(written, tmp_path, capsys):
    run = _make_run(tmp_path, _frame())
    items = read_items(run)
    for wrong in (items.with_columns(index=pl.lit(1, pl.Int32)), items.with_columns(item_id=pl.lit("a")), items[1:]):
        wrong.write_parquet(run / "item_ids.parquet")
        _refused(capsys, [f"--run={run}", f"--output={tmp_path / 'm.pth'}"], "item")
        assert not (tmp_path / "m.pth").exists()


def test_a_conversion_that_was_stopped_is_taken_up_and_never_mixed(written, tmp_path, capsys):
    # As a kill before the checkpoint was in place leaves it.
    for name in ("m.yaml", "m.item_ids.csv"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    for name in ("m.pth", "m.yaml", "m.item_ids.csv"):
        (tmp_path / f".{name}.0123456789abcdef.tmp").write_bytes(b"half")
    other = _make_run(tmp_path / "other", _frame(seed=9).sort("item"))
    code, _, err = _main(capsys, f"--run={other}", f"--output={tmp_path / 'm.pth'}")
    assert code == 2 and "m.item_ids.csv is there already, with other content" in err
    assert not (tmp_path / "m.pth").exists()
    assert _main(capsys, f"--run={written / 'run'}", f"--output={tmp_path / 'm.pth'}")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m.item_ids.csv", "m.pth", "m.yaml", "other"]
    assert (tmp_path / "m.pth").read_bytes() == (written / "m.pth").read_bytes()
    code, _, err = _main(capsys, f"--run={written / 'run'}", f"--output={tmp_path / 'm.pth'}")
    assert code == 2 and "m.pth is there already" in err


def test_leftovers_of_a_stopped_conversion_to_a_run_are_cleared(copied, written, capsys):
    leftover = copied / ".back.0123456789abcdef.tmp"
    leftover.mkdir()
    (leftover / "config.json").write_text("{}")
    assert _main(capsys, *_options(copied, written / "log.csv"))[0] == 0
    assert not leftover.exists() and not (copied / "back.lock").exists()


def test_models_without_a_counterpart_say_so(tmp_path, capsys):
    run = _make_run(tmp_path, _frame(), model="tim4rec_causal", date_knots=4)
    _refused(capsys, [f"--run={run}", f"--output={tmp_path / 'm.pth'}"], "the model 'tim4rec_causal' has no")
    assert not list(tmp_path.glob("m.*"))


@pytest.mark.parametrize("name", ["m.yaml", "x" * 250])
def test_outputs_that_cannot_be(written, tmp_path, capsys, name):
    _refused(capsys, [f"--run={written / 'run'}", f"--output={tmp_path / name}"], "--output")
    assert not list(tmp_path.iterdir())
