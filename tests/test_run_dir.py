"""The run folder keeps what it is given and refuses what it must not mix."""

import dataclasses
import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import numpy as np
import polars as pl
import pytest

from tim4rec_jax import ModelConfig, files, run_dir, run_environment, run_manifest
from tim4rec_jax.config import EvalConfig, ExperimentConfig, TrainConfig, flat

pytestmark = pytest.mark.quick

CONFIG = ExperimentConfig(
    "small", model=ModelConfig(vocab_size=4, max_len=8), eval=EvalConfig(top_k=(5, 10), monitor="ndcg@5")
)
COMMAND = ["python", "-m", "experiments.train"]


def _log(**changes):
    log = {
        "items": np.array([1, 2, 3, 3, 1], np.int32),
        "timestamps": np.array([10, 20, 2**40, 5, 6]),
        "offsets": np.array([0, 3, 5]),
        "user_ids": pl.Series(["u7", "u2"]),
        "item_ids": pl.Series(["a", "b", "ç"]),
        "titles": pl.Series(["A", None, "C"], dtype=pl.String),
        "fingerprint": "f00d",
        "parts": None,
        "bad_rows": (),
    }
    return SimpleNamespace(**(log | changes))


def _with_train(**changes):
    return dataclasses.replace(CONFIG, train=dataclasses.replace(CONFIG.train, **changes))


@pytest.fixture
def run(tmp_path):
    return run_dir.create_run(tmp_path / "runs" / "one", CONFIG, _log(), command=COMMAND)


@pytest.fixture
def begun(run):
    """A run in which something was trained."""
    (run / "metrics.jsonl").write_text('{"kind": "event"}\n')
    return run


def test_round_trip_of_everything(run):
    assert run_dir.read_config(run) == CONFIG
    assert json.loads((run / "config.json").read_text())["format_version"] == 1
    items = run_dir.read_items(run)
    assert items.schema == {"index": pl.Int32, "item_id": pl.String, "title": pl.String}
    assert items.rows() == [(1, "a", "A"), (2, "b", None), (3, "ç", "C")]
    histories = run_dir.read_histories(run)
    assert histories.schema == {"user_id": pl.String, "items": pl.List(pl.Int32), "timestamps": pl.List(pl.Int64)}
    assert histories.rows() == [("u7", [1, 2, 3], [10, 20, 2**40]), ("u2", [3, 1], [5, 6])]
    run_dir.write_results(run, {"test": {"ndcg@10": 0.0369}, "epoch": 16})
    assert run_dir.read_results(run) == {"test": {"ndcg@10": 0.0369}, "epoch": 16}
    assert sorted(path.name for path in run.iterdir()) == [
        "config.json",
        "environment.json",
        "histories.parquet",
        "item_ids.parquet",
        "manifest.json",
        "results.json",
    ]


def test_titles_are_optional(tmp_path):
    run = run_dir.create_run(tmp_path, CONFIG, _log(titles=None))
    assert run_dir.read_items(run)["title"].to_list() == [None, None, None]


def test_environment_names_what_a_result_depends_on(run):
    environment = run_dir.read_environment(run)
    assert environment["jax"] == jax.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["backend"] == jax.default_backend()
    assert (environment["device_kind"], environment["device_count"]) == (
        jax.devices()[0].device_kind,
        jax.device_count(),
    )
    assert environment["data_fingerprint"] == "f00d"
    assert environment["command"] == COMMAND
    assert environment["start_utc"].endswith("+00:00")
    assert {"flax", "optax", "orbax", "jaxlib", "tim4rec_jax", "platform"} <= environment.keys()


def test_git_state_of_a_checkout_and_elsewhere(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=n", "-c", "user.email=e@x")
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    file = tmp_path / "package" / "module.py"
    file.parent.mkdir()
    file.write_text("x = 1\n")
    nothing = {"git_commit": None, "git_dirty": None}
    assert run_environment._git_state(file) == nothing
    git("init", "-q")
    assert run_environment._git_state(file) == nothing  # in a checkout, but not its own
    git("add", ".")
    git("commit", "-q", "-m", "m")
    assert run_environment._git_state(file) == {"git_commit": git("rev-parse", "HEAD"), "git_dirty": False}
    file.write_text("x = 2\n")
    assert run_environment._git_state(file)["git_dirty"] is True


def test_folder_that_is_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"there is no run folder {tmp_path / 'nowhere'}"):
        run_dir.read_config(tmp_path / "nowhere")
    for read, name in (
        (run_dir.read_config, "config.json"),
        (run_dir.read_items, "item_ids.parquet"),
        (run_dir.read_histories, "histories.parquet"),
    ):
        with pytest.raises(FileNotFoundError, match=f"{tmp_path} is not a run folder: {name} is missing"):
            read(tmp_path)
    with pytest.raises(FileNotFoundError, match="results.json yet: the run has not finished"):
        run_dir.read_results(tmp_path)


@pytest.mark.parametrize(("version", "said"), [(2, "format 2"), (None, "format None")])
def test_other_format_version_names_both(begun, version, said):
    run = begun
    values = json.loads((run / "config.json").read_text())
    del values["format_version"]
    (run / "config.json").write_text(json.dumps(values | ({} if version is None else {"format_version": version})))
    with pytest.raises(ValueError, match=f"is a run folder of {said}, this program reads format 1"):
        run_dir.read_config(run)
    with pytest.raises(ValueError, match="this program reads format 1"):
        run_dir.create_run(run, CONFIG, _log(), resume=True)


def test_unreadable_and_unknown_settings(run):
    values = json.loads((run / "config.json").read_text())
    values["train"]["batchsize"] = 3
    (run / "manifest.json").unlink()
    (run / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"config.json: unknown settings \['train.batchsize'\]"):
        run_dir.read_config(run)
    (run / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is not readable as JSON"):
        run_dir.read_config(run)
    (run / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="config.json holds a list"):
        run_dir.read_config(run)


def test_other_settings_are_refused_and_listed(begun):
    run = begun
    before = (run / "config.json").read_bytes()
    other = dataclasses.replace(CONFIG, model=ModelConfig(vocab_size=5, max_len=8), train=TrainConfig(epochs=2))
    with pytest.raises(ValueError, match="holds a run with other settings") as error:
        run_dir.create_run(run, other, _log())
    assert "other settings: model.vocab_size: 4 → 5, train.epochs: 300 → 2; choose another" in str(error.value)
    assert (run / "config.json").read_bytes() == before


def test_resume_takes_only_settings_that_keep_the_steps_taken(run):
    (run / "metrics.jsonl").write_text("{}\n")
    longer = _with_train(epochs=500, progress=False)
    start = run_dir.read_environment(run)["start_utc"]
    assert run_dir.create_run(run, longer, _log(), resume=True, command=["again"]) == run
    assert run_dir.read_config(run) == longer
    assert run_dir.read_environment(run)["start_utc"] == start
    assert run_dir.read_environment(run)["command"] == COMMAND
    assert (run / "metrics.jsonl").read_text() == "{}\n"
    with pytest.raises(ValueError, match="train.seed: 2020 → 1; resuming cannot change these"):
        run_dir.create_run(run, _with_train(seed=1, epochs=7), _log(), resume=True)
    assert run_dir.read_config(run) == longer


def test_every_setting_changeable_on_resume_exists():
    assert set(run_dir.CHANGEABLE_ON_RESUME) <= flat(CONFIG.to_dict()).keys()


@pytest.mark.parametrize("resume", [False, True])
def test_other_data_is_refused(begun, resume):
    run = begun
    with pytest.raises(ValueError, match="holds a run on other data: fingerprint f00d → beef"):
        run_dir.create_run(run, CONFIG, _log(fingerprint="beef"), resume=resume)


@pytest.mark.parametrize("trace", ["metrics.jsonl", "checkpoints", "results.json"])
def test_begun_run_is_not_overwritten(run, trace):
    assert run_dir.create_run(run, CONFIG, _log()) == run  # nothing done in it yet
    if trace == "checkpoints":
        (run / trace / "best" / "000001_step_1").mkdir(parents=True)
    else:
        (run / trace).write_text("{}\n")
    with pytest.raises(FileExistsError, match="already holds this run; continue it with resume"):
        run_dir.create_run(run, CONFIG, _log())


def test_resume_without_a_run_makes_one(tmp_path):
    run = run_dir.create_run(tmp_path / "new", CONFIG, _log(), resume=True)
    assert run_dir.read_config(run) == CONFIG
    assert run_dir.read_histories(run).height == 2


def test_user_without_events_is_refused(tmp_path):
    with pytest.raises(ValueError, match="2 users and 2 histories, 1 of them empty"):
        run_dir.create_run(tmp_path, CONFIG, _log(offsets=np.array([0, 0, 5])))


def test_creation_cut_short_is_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_dir, "environment", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_dir.create_run(tmp_path, CONFIG, _log())
    with pytest.raises(FileNotFoundError, match="config.json is missing"):
        run_dir.read_config(tmp_path)
    monkeypatch.undo()
    assert run_dir.read_config(run_dir.create_run(tmp_path, CONFIG, _log())) == CONFIG


def test_failed_write_keeps_the_old_file(run, monkeypatch):
    run_dir.write_results(run, {"epoch": 1})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device"):
        run_dir.write_results(run, {"epoch": 2})
    assert run_dir.read_results(run) == {"epoch": 1}
    assert not list(run.glob(".*"))


def test_results_must_be_finite(run):
    with pytest.raises(ValueError, match="not JSON compliant"):
        run_dir.write_results(run, {"hit@10": float("nan")})
    assert not (run / "results.json").exists()


@pytest.mark.parametrize("value", ["1" + "0" * 400, "-1" + "0" * 400, "1e999", "true", '"x"', "null"])
def test_results_that_are_no_finite_numbers(run, value):
    (run / "results.json").write_text(f'{{"test": {{"hit@10": {value}}}}}')
    with pytest.raises(ValueError, match="results.json has no finite numbers"):
        run_dir.read_results(run)


def test_a_folder_in_which_nothing_was_trained_is_begun_anew(run):
    """Also with other settings and other data: there is nothing to lose."""
    (run / "metrics.jsonl").touch()  # of a start that was refused before its first line
    first = run_manifest.identity(run)
    run_dir.create_run(run, _with_train(seed=7), _log(fingerprint="beef", user_ids=pl.Series(["v1", "v2"])))
    assert run_dir.read_config(run).train.seed == 7
    assert run_dir.read_environment(run)["data_fingerprint"] == "beef"
    assert run_dir.read_histories(run)["user_id"].to_list() == ["v1", "v2"]
    assert run_manifest.identity(run)["id"] != first["id"]


def test_a_run_without_its_settings_is_not_written_over(begun):
    (begun / "config.json").unlink()
    with pytest.raises(ValueError, match="holds a run without its config.json"):
        run_dir.create_run(begun, CONFIG, _log(), resume=True)


def test_only_what_nothing_was_trained_in_is_discarded(begun):
    run_dir.discard_run(begun)
    assert run_dir.read_config(begun) == CONFIG
    (begun / "metrics.jsonl").write_text("")
    run_dir.discard_run(begun)
    assert not begun.exists()


class _Killed(BaseException):
    """In place of a kill -9: nothing after it runs."""


def _killed_at_write(monkeypatch, number):
    """Ends the program just before the `number`-th file is written."""
    writes = []

    def counted(write):
        def one(*arguments):
            writes.append(1)
            if len(writes) == number:
                raise _Killed
            return write(*arguments)

        return one

    for place in ("write_object", "write_manifest", "write_atomically", "_write_items", "_write_histories"):
        monkeypatch.setattr(run_dir, place, counted(getattr(run_dir, place)))
    return writes


@pytest.mark.parametrize("there", [False, True])
@pytest.mark.parametrize("number", [1, 2, 3, 4, 5])
def test_a_kill_between_any_two_files_of_a_new_run(tmp_path, monkeypatch, number, there):
    """Over nothing, and over an untrained run with other settings: the same command makes it."""
    if there:
        run_dir.create_run(tmp_path / "run", _with_train(seed=1), _log(fingerprint="beef"))
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _killed_at_write(patch, number)
        run_dir.create_run(tmp_path / "run", CONFIG, _log())
    run = run_dir.create_run(tmp_path / "run", CONFIG, _log())
    assert run_dir.read_config(run) == CONFIG and run_dir.read_histories(run).height == 2


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_kill_while_settings_are_exchanged(begun, monkeypatch, number):
    longer = _with_train(epochs=500)
    with monkeypatch.context() as patch, pytest.raises(_Killed):
        _killed_at_write(patch, number)
        run_dir.create_run(begun, longer, _log(), resume=True)
    assert run_dir.read_config(begun).train.epochs in (CONFIG.train.epochs, 500)
    run_dir.create_run(begun, longer, _log(), resume=True)
    assert run_dir.read_config(begun) == longer
    assert len(run_manifest.read_manifest(begun).files["config.json"]) == 1


@pytest.mark.parametrize("name", ["config.json", "item_ids.parquet", "histories.parquet"])
def test_a_changed_file_is_named(begun, name):
    file = begun / name
    if name == "config.json":
        file.write_text(file.read_text().replace('"float32"', '"bfloat16"', 1))
    else:
        table = pl.read_parquet(file)
        table.reverse().write_parquet(file)
    read = {"config.json": run_dir.read_config, "item_ids.parquet": run_dir.read_items}.get(
        name, run_dir.read_histories
    )
    with pytest.raises(ValueError, match=f"{name} is not as it was written.*put back"):
        read(begun)
    with pytest.raises(ValueError, match=f"{name} is not as it was written"):
        run_dir.create_run(begun, CONFIG, _log(), resume=True)


def _changed(run, name, change):
    """The table of a run without a manifest, changed."""
    (run / "manifest.json").unlink(missing_ok=True)
    change(pl.read_parquet(run / name)).write_parquet(run / name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.reverse(), "its index does not count 1, 2, 3"),
        (lambda t: t.with_columns(item_id=pl.lit("a")), "item_id 'a' is there more than once"),
        (lambda t: t.with_columns(item_id=pl.lit(None, pl.String)), "a value of item_id is missing"),
        (lambda t: t.drop("title"), "it does not have the columns index Int32"),
        (lambda t: t.with_columns(pl.col("index").cast(pl.Int64)), "it does not have the columns index Int32"),
    ],
)
def test_items_that_are_no_numbering(run, change, message):
    _changed(run, "item_ids.parquet", change)
    with pytest.raises(ValueError, match=f"item_ids.parquet: {message}"):
        run_dir.read_items(run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.with_columns(items=pl.col("items").list.eval(-pl.element())), "an item lies outside 1 to 3"),
        (lambda t: t.with_columns(items=pl.col("items").list.eval(pl.element() * 0)), "an item lies outside 1 to 3"),
        (lambda t: t.with_columns(items=pl.col("items").list.eval(pl.element() + 1)), "an item lies outside 1 to 3"),
        (lambda t: t.with_columns(timestamps=pl.col("timestamps").list.reverse()), "times of a user run backwards"),
        (lambda t: t.with_columns(timestamps=pl.col("timestamps").list.head(1)), "not one time for each item"),
        (lambda t: t.with_columns(user_id=pl.lit("u7")), "user_id 'u7' is there more than once"),
        (lambda t: t.head(0), "there are no users"),
    ],
)
def test_histories_that_cannot_be(run, change, message):
    _changed(run, "histories.parquet", change)
    with pytest.raises(ValueError, match=f"histories.parquet: .*{message}"):
        run_dir.read_histories(run)


def test_files_that_are_no_tables(run):
    (run / "manifest.json").unlink()
    for content in (b"", b"x", (run / "item_ids.parquet").read_bytes()[:-20]):
        (run / "item_ids.parquet").write_bytes(content)
        with pytest.raises(ValueError, match="item_ids.parquet: it cannot be read as Parquet") as error:
            run_dir.read_items(run)
        assert "\n" not in str(error.value)


def test_a_run_that_was_moved_is_the_same_run(begun, tmp_path):
    moved = begun.rename(tmp_path / "elsewhere")
    assert run_dir.read_config(moved) == CONFIG and run_dir.read_histories(moved).height == 2
    assert run_dir.create_run(moved, _with_train(epochs=301), _log(), resume=True) == moved


def test_an_environment_of_other_data(run):
    file = run / "environment.json"
    file.write_text(file.read_text().replace("f00d", "beef"))
    with pytest.raises(ValueError, match="environment.json has the data_fingerprint beef, the run was made with f00d"):
        run_dir.read_environment(run)
    file.write_text("{}")
    with pytest.raises(ValueError, match="environment.json has no data_fingerprint"):
        run_dir.read_environment(run)


def test_outputs_do_not_replace_what_a_run_consists_of(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    run_dir.require_no_run_file(tmp_path / "run" / "config.json")  # Not a run yet.
    (tmp_path / "run" / "config.json").write_text("{}")
    for name in ("config.json", "histories.parquet", "test_ranks.parquet", "checkpoints/best/manifest.json"):
        for folder in ("run", "link"):
            with pytest.raises(ValueError, match="is a file of a run, which would be lost; choose another --output"):
                run_dir.require_no_run_file(tmp_path / folder / name)
    for name in ("top.parquet", "longer.json", "sub/config.json"):
        run_dir.require_no_run_file(tmp_path / "run" / name)


def test_ranks_in_halves_and_ranks_of_an_earlier_version(tmp_path):
    users = pl.Series(["a", "b", "c"])
    run_dir.write_test_ranks(tmp_path, users, np.array([1, 2.5, 7], np.float32), {"seen_excluded": np.array([1, 2, 0])})
    assert run_dir.read_test_ranks(tmp_path).rows() == [("a", 1.0), ("b", 2.5), ("c", 7.0)]
    assert run_dir.read_test_ranks(tmp_path, "seen_excluded").rows() == [("a", 1.0), ("b", 2.0)]
    earlier = {"user_id": users, "rank": pl.Series([1, 2, 3], dtype=pl.Int32)}
    pl.DataFrame(earlier | {"rank_seen_excluded": pl.Series([1, None, 3], dtype=pl.Int32)}).write_parquet(
        tmp_path / "test_ranks.parquet"
    )
    assert run_dir.read_test_ranks(tmp_path).rows() == [("a", 1.0), ("b", 2.0), ("c", 3.0)]
    assert run_dir.read_test_ranks(tmp_path, "seen_excluded").rows() == [("a", 1.0), ("c", 3.0)]
    pl.DataFrame(earlier | {"rank": ["1", "2", "3"]}).write_parquet(tmp_path / "test_ranks.parquet")
    with pytest.raises(ValueError, match="it does not have the columns user_id String, rank Float32"):
        run_dir.read_test_ranks(tmp_path)
