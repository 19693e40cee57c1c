"""The training program from the command line: a small log from start to recommendations, interruptions, bad input."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from experiments import evaluate, recommend, train
from experiments.cli import run_program
from experiments.comparison.published import PUBLISHED
from tests.quick_flags import quick_flags
from tests.training.ctrl_c import ctrl_c_at
from tim4rec_jax.data.splits import split_log
from tim4rec_jax.evaluation.baselines import popularity_metrics
from tim4rec_jax.evaluation.measures import metrics_of_ranks
from tim4rec_jax.run_dir import (
    CHECKPOINTS,
    read_config,
    read_environment,
    read_items,
    read_results,
    read_test_ranks,
)
from tim4rec_jax.training import stored_run
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.loop import Session
from tim4rec_jax.training.setup import Setup
from tim4rec_jax.training.stored_run import evaluate_run

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMALL = [
    "--config=quickstart",
    "--data.synthetic.num_users=120",
    "--data.synthetic.num_items=30",
    "--model.max_len=10",
    "--model.d_model=16",
    "--model.d_state=8",
    "--model.head_dim=16",
    "--train.batch_size=128",
    "--train.epochs=2",
    "--train.log_every=3",
    "--train.progress=false",
    "--train.tensorboard=false",
]


# What any model reads, and a model for where it does not matter.
SHAPE = [option for option in SMALL if not option.startswith(("--model.d_state", "--model.head_dim"))]
FAST = [
    *SHAPE,
    "--model.name=sasrec",
    "--model.num_layers=1",
    "--model.inner_size=16",
    "--train.length_groups=1",
    "--eval.baselines",
    "popularity",
]


def _run_folder(tmp_path: pathlib.Path, name: str = "run") -> list[str]:
    return [f"--run_dir={tmp_path / name}"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> pathlib.Path:
    """A run of two epochs with both baselines."""
    folder = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main([*SMALL, f"--run_dir={folder}"]) == 0
    return folder


@pytest.mark.quick
def test_the_run_folder_holds_everything(finished):
    for name in (
        "config.json",
        "metrics.jsonl",
        "item_ids.parquet",
        "histories.parquet",
        "environment.json",
        "results.json",
        "curves.png",
        "checkpoints/best",
        "checkpoints/latest",
    ):
        assert (finished / name).exists(), name
    config = read_config(finished)
    assert config.model.vocab_size == len(read_items(finished)) + 1 and config.train.epochs == 2
    assert read_environment(finished)["data_fingerprint"]
    lines = read_metrics(finished)
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps)) and all(np.isfinite(line["loss"]) for line in lines if line["kind"] == "train")
    assert [line["epoch"] for line in lines if line["kind"] == "valid"] == [1, 2]
    results = read_results(finished)
    assert set(results["baselines"]) == {"tim4rec, time off", "popularity"}
    assert (finished / "time_off" / "results.json").exists()
    assert not list(finished.rglob("*.pkl"))


def test_evaluate_repeats_the_test_numbers(finished, capsys):
    assert evaluate.main([f"--run={finished}"]) == 0
    shown = capsys.readouterr().out
    for value in read_results(finished)["test"].values():
        assert f"{value:.4f}" in shown
    again, results = evaluate_run(finished), read_results(finished)
    assert again.metrics == pytest.approx(results["test"], abs=1e-12)
    assert again.other is not None and again.other.metrics == pytest.approx(results["test_seen_excluded"], abs=1e-12)
    best = evaluate_run(finished, split="valid")
    assert best.other is not None and best.metrics == pytest.approx(results["valid"], abs=1e-12)
    assert best.other.metrics == pytest.approx(results["valid_seen_excluded"], abs=1e-12)
    assert results["baselines_seen_excluded"].keys() == results["baselines"].keys()
    ranks = read_test_ranks(finished, "seen_excluded")
    assert metrics_of_ranks(ranks["rank"].to_numpy(), list(results["test"])) == results["test_seen_excluded"]
    assert len(ranks) == len(again.other.ranks) <= len(read_test_ranks(finished))
    with pytest.raises(ValueError, match="has no rank_all_items: it is of an earlier version"):
        read_test_ranks(finished, "all_items")


@pytest.mark.quick
def test_recommend_answers_from_the_run(finished, capsys):
    assert recommend.main([f"--run={finished}", "--user=7", "--k=5"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 5


@pytest.mark.exhaustive
def test_a_temporal_split_from_training_to_recommendations(tmp_path, capsys):
    folder = tmp_path / "temporal"
    argv = [*FAST, "--data.split=temporal", "--data.temporal_targets=all", "--data.loader=grain", "--train.epochs=1"]
    assert train.main([*argv, f"--run_dir={folder}"]) == 0
    shown, results = capsys.readouterr().out, read_results(folder)
    assert "temporal split" in shown and "test: users without a target" in shown
    config, log = read_config(folder), stored_run.load_log(folder)
    split = split_log(log, config.data)
    assert results["split"] == dataclasses.asdict(split.report) and split.report.test == len(read_test_ranks(folder))
    assert results["baselines"]["popularity"] == popularity_metrics(log, config)["all_items"]
    assert evaluate_run(folder).metrics == pytest.approx(results["test"], abs=1e-12)
    # Histories are whole: what tests is read when the next item is recommended.
    assert recommend.main([f"--run={folder}", f"--user={log.user_ids[0]}", "--k=5"]) == 0
    other = [*argv, f"--run_dir={folder}", "--data.temporal_targets=last", "--resume"]
    assert train.main(other) == 2
    assert "data.temporal_targets: 'all' → 'last'" in capsys.readouterr().err


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "loss", [[], ["--train.loss=sampled_ce", "--train.num_negatives=16", "--train.table_optimizer=lazy_adam"]]
)
def test_a_catalogue_in_parts_from_training_to_recommendations(tmp_path, capsys, loss):
    """With parts of the embedding on devices, and then on one device."""
    folder = tmp_path / "parts"
    options = [*FAST, f"--run_dir={folder}", *loss]
    assert train.main([*options, "--parallel.catalogue_shards=2", "--train.max_steps=6"]) == 0
    assert "model.vocab_multiple=64: the item embedding gets so many rows" in capsys.readouterr().out
    assert read_config(folder).model.embedding_rows == 64 > read_config(folder).model.vocab_size
    assert evaluate_run(folder).metrics == pytest.approx(read_results(folder)["test"], abs=1e-12)
    assert recommend.main([f"--run={folder}", "--user=7", "--k=5"]) == 0
    alone = [*options, "--parallel.strategy=single", "--resume", "--train.max_steps=9"]
    assert train.main(alone) == 2
    assert "model.vocab_multiple: 64 → 1" in capsys.readouterr().err
    assert train.main([*alone, "--model.vocab_multiple=64"]) == 0
    assert [line["step"] for line in read_metrics(folder) if line["kind"] == "train"] == [3, 6, 9]


def test_a_finished_run_is_not_overwritten(finished, capsys):
    assert train.main([*SMALL, f"--run_dir={finished}"]) == 2
    assert "already holds this run" in capsys.readouterr().err
    assert train.main([*SMALL, f"--run_dir={finished}", "--train.learning_rate=0.5"]) == 2
    assert "train.learning_rate: 0.005 → 0.5" in capsys.readouterr().err.replace("0.01", "0.005")


def test_resuming_a_finished_run_changes_nothing(finished):
    before = read_results(finished)["test"]
    assert train.main([*SMALL, f"--run_dir={finished}", "--resume"]) == 0
    assert read_results(finished)["test"] == before


@pytest.fixture
def usual_fusion(monkeypatch):
    """Steps are compiled with XLA's usual fusion: two programs that fuse otherwise round otherwise."""
    quick = jax.stages.Lowered.compile
    # Where quick flags leave it alone, XLA need not know the option.
    options = {"xla_cpu_use_fusion_emitters": True} if "fusion_emitters" in quick_flags() else {}

    def compiled(lowered, compiler_options=None):
        return quick(lowered, compiler_options={**(compiler_options or {}), **options})

    monkeypatch.setattr(jax.stages.Lowered, "compile", compiled)


@pytest.mark.usefixtures("usual_fusion")
def test_both_loaders_train_alike(tmp_path):
    options = [*FAST, "--train.epochs=1", "--train.max_steps=4"]
    for loader in ("device", "grain"):
        assert train.main([*options, *_run_folder(tmp_path, loader), f"--data.loader={loader}"]) == 0
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / loader) if line["kind"] == "train"]
        for loader in ("device", "grain")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 2
    assert [line["step"] for line in read_metrics(tmp_path / "grain") if line["kind"] == "train"] == [3, 4]


PACKED = [
    *SHAPE[1:],
    "--config=quickstart_sasrec",
    "--train.positions=all",
    "--train.batch_size=32",
    "--train.log_every=1",
    "--eval.baselines",
    "popularity",
]


@pytest.mark.usefixtures("usual_fusion")
def test_training_on_all_positions_resumes_inside_an_epoch_with_either_loader(tmp_path):
    """The bits of a run with the one loader are those of one with the other that was stopped on the way."""
    folders = whole, stopped = tmp_path / "device", tmp_path / "grain"
    assert train.main([*PACKED, f"--run_dir={whole}"]) == 0
    again = [*PACKED, f"--run_dir={stopped}", "--data.loader=grain"]
    with ctrl_c_at(5):
        assert train.main(again) == 130
    assert [line["step"] for line in read_metrics(stopped)] == [1, 2, 3, 4, 5]
    assert train.main([*again, "--resume"]) == 0

    (step, leaves), (other_step, others) = map(_state, folders)
    assert step == other_step > 20
    for ours, theirs in zip(leaves, others, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert read_results(whole)["test"] == read_results(stopped)["test"]
    losses = [[line["loss"] for line in read_metrics(folder) if line["kind"] == "train"] for folder in folders]
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-5:]) < 0.97 * np.mean(losses[0][:5])


def _state(folder: pathlib.Path) -> tuple[int, list[np.ndarray]]:
    config = read_config(folder)
    template = _template(folder, config)
    with Checkpointer(folder / CHECKPOINTS) as checkpoints:
        step, state, _ = checkpoints.restore_latest(template)
    return step, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def _template(folder, config):
    from tim4rec_jax.training.stored_run import load_log

    return Setup(config, load_log(folder)).init_state()


def _start(arguments: list[str]) -> subprocess.Popen:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, "-m", "experiments.train", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def _wait_for_step(folder: pathlib.Path, step: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 240
    file = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        if file.exists():
            text = file.read_text().rpartition("\n")[0]
            lines = [json.loads(line) for line in text.splitlines()]
            if any(line["kind"] == "train" and line["step"] >= step for line in lines):
                return
        if process.poll() is not None:
            raise AssertionError(f"the program ended early:\n{process.stdout.read()}")
        time.sleep(0.02)
    raise AssertionError("the program did not get there in time")


LONG = [*FAST, "--train.epochs=3", "--train.checkpoint_every=5", "--train.log_every=1"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs") / "uninterrupted"
    assert train.main([*LONG, f"--run_dir={folder}"]) == 0
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_resuming_gives_the_bits_of_an_uninterrupted_run(tmp_path, uninterrupted, number):
    """The program itself, once; other moments and Ctrl-C are tried in tests/training."""
    folder = tmp_path / "run"
    process = _start([*LONG, f"--run_dir={folder}"])
    _wait_for_step(folder, 9, process)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 0}[number], output
    if number != signal.SIGKILL:
        assert "--resume" in output and "the state is saved" in output
    assert not (folder / "results.json").exists()

    assert train.main([*LONG, f"--run_dir={folder}", "--resume"]) == 0
    step, leaves = _state(folder)
    expected_step, expected = _state(uninterrupted)
    assert step == expected_step
    for ours, theirs in zip(leaves, expected, strict=True):
        np.testing.assert_array_equal(ours, theirs)

    def lines(run: pathlib.Path) -> list[tuple]:
        kept = [line for line in read_metrics(run) if line["kind"] in ("train", "valid")]
        return [(line["kind"], line["step"], line.get("loss"), line.get("ndcg@10")) for line in kept]

    assert lines(folder) == lines(uninterrupted)
    assert read_results(folder)["test"] == read_results(uninterrupted)["test"]


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, capsys):
    options = [*FAST, "--train.learning_rate=1e30", *_run_folder(tmp_path)]
    assert train.main(options) == 2
    message = capsys.readouterr().err
    assert "at step" in message and "learning rate 1e+30" in message and str(tmp_path / "run") in message


@pytest.mark.parametrize(
    ("place", "error"),
    [
        ("training", jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.\nmore")),
        ("validation", MemoryError("no room")),
    ],
)
def test_memory_that_runs_out_is_one_line_and_nothing_saved_is_lost(
    tmp_path, uninterrupted, capsys, monkeypatch, error, place
):
    options = [*LONG, *_run_folder(tmp_path)]

    def fail(*_):
        raise error

    original, taken = Session.compiled_steps, []

    def some_steps(self, state, batches):
        taken.append(1)
        return fail if len(taken) > 7 else original(self, state, batches)

    with monkeypatch.context() as patch:
        if place == "training":
            patch.setattr(Session, "compiled_steps", some_steps)
        else:
            patch.setattr("tim4rec_jax.training.loop.FullSortEvaluator.__call__", fail)
        assert train.main(options) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: out of memory (") and message.count("\n") == 1
    for knob in ("train.batch_size", "train.microbatch_tokens", "eval.batch_size", "model.max_len", "--resume"):
        assert knob in message
    assert train.main([*options, "--resume"]) == 0
    assert read_results(tmp_path / "run")["test"] == read_results(uninterrupted)["test"]


def test_a_device_that_is_really_out_of_memory(capsys):
    assert run_program(lambda _: jax.device_put(jax.numpy.zeros(2**50)).block_until_ready(), []) == 2
    assert "error: out of memory (RESOURCE_EXHAUSTED" in capsys.readouterr().err

    def other(_):
        raise jax.errors.JaxRuntimeError("INTERNAL: something else")

    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        run_program(other, [])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--config=quickstar"], "--config=quickstar is unknown; nearest: quickstart"),
        (["--train.lerning_rate=1"], "unknown option --train.lerning_rate; nearest: --train.learning_rate"),
        (["--train.progress=maybe"], "--train.progress=maybe: expected true or false"),
        (["--model.head_dim=48"], "head_dim=48 must divide expand*d_model=128"),
        (["--model.max_len=0"], "max_len=0 must be at least 1"),
        (["--data.name=ml-2m"], "ml-1m"),
        (["--data.name=custom", "--data.path=/nowhere/log.csv"], "/nowhere/log.csv"),
        (["--data.k_core=500"], "500-core"),
        (["--train.positions=all"], "train.positions='all' needs a causal model"),
        (
            ["--config=quickstart_sasrec", "--train.positions=all", "--train.window_context=50"],
            "window_context=50 must",
        ),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, capsys, options, message):
    assert train.main([*_run_folder(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_published_rows_name_their_source():
    for rows in PUBLISHED.values():
        for row in rows:
            assert row.source and all(0 < value < 1 for value in row.metrics.values())
    original = [row for row in PUBLISHED["beauty"] if row.model == "TiM4Rec"][0]
    assert (original.metrics["hit@10"], original.metrics["ndcg@10"]) == (0.0779, 0.0369)
