"""Exported programs run where this library cannot be imported, and say what the model says."""

import dataclasses
import json
import subprocess
import sys

import jax
import numpy as np
import polars as pl
import pytest

from experiments import export as program
from tests.serving.tiny_run import MAX_LEN, NUM_ITEMS, make_causal_config, make_config, make_log, make_run
from tim4rec_jax.models import last_hidden
from tim4rec_jax.serving.export import export_model, flat_arrays
from tim4rec_jax.serving.recommender import Recommender
from tim4rec_jax.serving.streaming import Streamer

K, BATCH = 6, 5
SMALL = {"attention_heads": 2, "inner_size": 16, "norm_eps": 1e-6}
CONFIGS = {
    "faithful": dataclasses.replace(
        make_config(norm_eps=1e-6),
        data=dataclasses.replace(make_config().data, timestamp_precision="float32"),
    ),
    "seconds": make_config(norm_eps=1e-6),
    "causal": make_causal_config(num_layers=2, use_ffn=True),
    "ssd4rec": make_config("ssd4rec", norm_eps=1e-6),
    "mamba4rec": make_config("mamba4rec", **SMALL),
    "echomamba4rec": make_config("echomamba4rec", **SMALL),
    "sasrec": make_config("sasrec", **SMALL),
    "tisasrec": make_config("tisasrec", **SMALL),
    "gru4rec": make_config("gru4rec"),
    "lrurec": make_config("lrurec", norm_eps=1e-6),
    "caser": make_config("caser"),
    "bert4rec": make_config("bert4rec", **SMALL),
}
STREAMABLE = ("causal", "ssd4rec", "mamba4rec", "gru4rec", "lrurec", "caser")
TIMES = {"faithful": np.float32, "seconds": np.int32, "causal": np.int32, "tisasrec": np.int32}

# Runs with JAX and NumPy only: our packages cannot be imported.
CONSUMER = """
import json, pathlib, sys
for name in ("tim4rec_jax", "kernels", "experiments", "flax"):
    sys.modules[name] = None
import jax, jax.export, numpy as np

root = pathlib.Path(sys.argv[1])
for folder in sorted(path.parent for path in root.glob("*/export.json")):
    said = json.loads((folder / "export.json").read_text())
    programs = {
        name: jax.export.deserialize((folder / one["file"]).read_bytes()) for name, one in said["programs"].items()
    }
    parameters = dict(np.load(folder / "parameters.npz"))
    given = dict(np.load(root / f"{folder.name}_inputs.npz"))
    names = [one["name"] for one in said["programs"]["recommend"]["inputs"]]
    best, scores = programs["recommend"].call(parameters, *(given[name] for name in names[1:]))
    results = {"best": best, "scores": scores}
    if "step" in programs:
        inputs = {one["name"]: one for one in said["programs"]["step"]["inputs"]}
        state = {
            name: np.zeros([len(given["items"]) if size == "b" else size for size in array["shape"]], array["dtype"])
            for name, array in inputs["state"]["arrays"].items()
        }
        for i in range(given["items"].shape[1]):
            event = {"item": given["items"][:, i]}
            if "timestamp" in inputs:
                event["timestamp"] = given["timestamps"][:, i]
            state, hidden = programs["step"].call(parameters, state, *event.values())
        results["step_hidden"] = hidden
        rules = given["excluded"], given["allowed"]
        results["step_best"], results["step_scores"] = programs["top_k"].call(parameters, hidden, *rules)
    np.savez(root / f"{folder.name}_outputs.npz", **{name: np.asarray(a) for name, a in results.items()})
"""


def _inputs(name, rng):
    items = rng.integers(1, NUM_ITEMS + 1, (BATCH, MAX_LEN)).astype(np.int32)
    times = 978_300_000 + np.cumsum(rng.integers(0, 4 * 86_400, (BATCH, MAX_LEN)), axis=1)
    lengths = np.array([MAX_LEN] * BATCH if name in STREAMABLE else [1, 3, 7, MAX_LEN - 1, MAX_LEN], np.int32)
    inside = np.arange(MAX_LEN) < lengths[:, None]
    excluded = np.array([[1, 2, 3], [4, 0, 4], [0, 0, 0], [9, 9, 30], [0, 0, 0]], np.int32)
    allowed = np.arange(NUM_ITEMS + 1) % 7 > 0
    inputs = {"items": np.where(inside, items, 0), "lengths": lengths, "excluded": excluded, "allowed": allowed}
    return inputs | {"timestamps": np.where(inside, times, 0).astype(TIMES.get(name, np.int32))}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Every model exported, and what each export answered in a process of its own: recommender, inputs, outputs."""
    root, log, rng = tmp_path_factory.mktemp("exported"), make_log(), np.random.default_rng(3)
    recommenders, inputs = {}, {}
    for name, config in CONFIGS.items():
        make_run(root / "runs" / name, log, config)
        recommenders[name], inputs[name] = Recommender.from_run(root / "runs" / name), _inputs(name, rng)
        export_model(recommenders[name], root / name, k=K)
        np.savez(root / f"{name}_inputs.npz", **inputs[name])
    done = subprocess.run([sys.executable, "-c", CONSUMER, root], capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    outputs = {name: dict(np.load(root / f"{name}_outputs.npz")) for name in CONFIGS}
    return root, recommenders, inputs, outputs


def _assert_ranked(best, scores, all_scores, excluded):
    for row, (found, found_scores) in enumerate(zip(best, scores, strict=True)):
        allowed = [i for i in range(1, NUM_ITEMS + 1) if i % 7 and i not in excluded[row]]
        expected = sorted(allowed, key=lambda i, row=row: -all_scores[row, i])[:K]
        assert found.tolist() == expected
        np.testing.assert_allclose(found_scores, all_scores[row, expected], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_exported_program_is_the_model(exported, name):
    _, recommenders, inputs, outputs = exported
    model, params, given = recommenders[name].model, recommenders[name].params, inputs[name]

    @jax.jit
    def score(params, items, lengths, timestamps):
        variables = {"params": params}
        hidden = last_hidden(model, variables, items, lengths, timestamps)
        return model.apply(variables, hidden, method="score")

    scores = np.asarray(score(params, given["items"], given["lengths"], given["timestamps"]))
    _assert_ranked(outputs[name]["best"], outputs[name]["scores"], scores, given["excluded"])


@pytest.mark.parametrize("name", STREAMABLE)
def test_the_exported_step_is_the_streamer(exported, name):
    _, recommenders, inputs, outputs = exported
    streamer, given = Streamer(recommenders[name].model, recommenders[name].params), inputs[name]
    state = streamer.init_state(BATCH)
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(state))
    for i in range(MAX_LEN):
        state, hidden = streamer.step(state, given["items"][:, i], given["timestamps"][:, i])
    np.testing.assert_allclose(outputs[name]["step_hidden"], hidden, rtol=1e-4, atol=1e-5)
    scores = np.asarray(streamer.model.apply({"params": streamer.params}, hidden, method="score"))
    _assert_ranked(outputs[name]["step_best"], outputs[name]["step_scores"], scores, given["excluded"])
    # A state that has read everything knows what the whole history says.
    np.testing.assert_array_equal(outputs[name]["step_best"], outputs[name]["best"])


def test_any_number_of_histories(exported):
    root, _, inputs, outputs = exported
    called = jax.export.deserialize((root / "causal" / "recommend.jax_export").read_bytes())
    with np.load(root / "causal" / "parameters.npz") as file:
        parameters = dict(file)
    names, allowed = ("items", "lengths", "timestamps", "excluded"), inputs["causal"]["allowed"]
    for rows, width in ((slice(0, 1), 3), (slice(1, 4), 1)):
        given = {name: inputs["causal"][name][rows] for name in names}
        given["excluded"] = given["excluded"][:, :width]
        best, _ = called.call(parameters, *given.values(), allowed)
        if width == 3:
            np.testing.assert_array_equal(best, outputs["causal"]["best"][rows])
        assert best.shape == (rows.stop - rows.start, K)
    assert called.platforms == ("cpu", "cuda", "tpu")


def test_the_description(exported):
    root, recommenders, _, _ = exported
    for name in CONFIGS:
        said = json.loads((root / name / "export.json").read_text())
        files = {"export.json", "items.parquet", "parameters.npz", "allowed.npy"} | {
            p["file"] for p in said["programs"].values()
        }
        assert {path.name for path in (root / name).iterdir()} == files
        assert set(said["programs"]) == ({"recommend", "step", "top_k"} if name in STREAMABLE else {"recommend"})
        inputs = {one["name"]: one for one in said["programs"]["recommend"]["inputs"]}
        assert ("timestamps" in inputs) == recommenders[name].model.uses_time == (name in TIMES)
        if name in TIMES:
            assert inputs["timestamps"]["dtype"] == np.dtype(TIMES[name]).name
        assert inputs["items"]["shape"] == ["b", MAX_LEN] and said["k"] == K and said["num_items"] == NUM_ITEMS
        outputs = {one["name"]: one for one in said["programs"]["recommend"]["outputs"]}
        assert outputs["best"]["shape"] == ["b", K] and outputs["scores"]["dtype"] == "float32"
        parameters = flat_arrays(recommenders[name].params)
        assert set(said["parameters"]["arrays"]) == set(parameters)
        with np.load(root / name / "parameters.npz") as file:
            for key, leaf in parameters.items():
                np.testing.assert_array_equal(file[key], leaf)
                assert said["parameters"]["arrays"][key]["shape"] == list(leaf.shape)
    # The calls, spelled out, name their inputs.
    said = json.loads((root / "tisasrec" / "export.json").read_text())
    call = "best, scores = call(parameters, items, lengths, timestamps, excluded, allowed)"
    assert said["programs"]["recommend"]["call"] == call


def test_items_with_their_embeddings(exported):
    root, recommenders, _, _ = exported
    table = pl.read_parquet(root / "causal" / "items.parquet")
    assert table.columns == ["index", "item_id", "title", "training_events", "embedding"]
    assert table["training_events"].to_list() == recommenders["causal"].training_counts[1:].tolist()
    assert table["index"].to_list() == list(range(1, NUM_ITEMS + 1))
    assert table["item_id"].to_list() == recommenders["causal"].item_ids
    assert table["title"].to_list() == recommenders["causal"].titles
    rows = np.asarray(recommenders["causal"].params["item_embedding"]["embedding"])[1:]
    np.testing.assert_array_equal(table["embedding"].to_numpy(), rows)


def test_lists_that_cannot_be_filled_end_in_zeros(exported, tmp_path):
    root, recommenders, inputs, _ = exported
    export_model(recommenders["sasrec"], tmp_path / "out", k=NUM_ITEMS, platforms=("cpu",))
    called = jax.export.deserialize((tmp_path / "out" / "recommend.jax_export").read_bytes())
    given = inputs["sasrec"]
    parameters = flat_arrays(recommenders["sasrec"].params)
    allowed = np.load(tmp_path / "out" / "allowed.npy")
    best, scores = called.call(parameters, given["items"], given["lengths"], given["excluded"], allowed)
    left = [NUM_ITEMS - len(set(row) - {0}) for row in given["excluded"].tolist()]
    assert [(row > 0).sum() for row in np.asarray(best)] == left
    assert [np.isfinite(row).sum() for row in np.asarray(scores)] == left


def test_the_program(run, tmp_path, capsys):
    assert program.main([f"--run={run}", f"--output={tmp_path / 'out'}", "--k=3", "--platforms", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert all(word in shown for word in ("for cpu", "recommend.jax_export", "items.parquet", "best, scores = call("))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    for options, message in (
        ([f"--output={tmp_path / 'out'}"], f"{tmp_path / 'out'} exists; choose another folder, or remove this one"),
        ([f"--output={tmp_path / 'no' / 'out'}"], f"there is no folder {tmp_path / 'no'} to write out to"),
        ([f"--output={tmp_path / 'two'}", "--k=31"], "k=31 is larger than the catalogue of 30 items"),
        (
            [f"--output={tmp_path / 'two'}", "--platforms", "gpu"],
            "--platforms=gpu: expected one of cpu, cuda, rocm, tpu",
        ),
    ):
        assert program.main([f"--run={run}", *options]) == 2
        assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_rules_of_an_export(run, recommender, tmp_path, capsys):
    index = sorted(recommender.index_of_item[name] for name in ("i2", "i9"))
    options = [f"--run={run}", f"--output={tmp_path / 'out'}", "--k=3", "--platforms", "cpu"]
    assert program.main([*options, "--allow=i2,i5,i9", "--deny=i5"]) == 0
    assert np.flatnonzero(np.load(tmp_path / "out" / "allowed.npy")).tolist() == index
    options[1] = f"--output={tmp_path / 'two'}"
    assert program.main([*options, "--exclude_seen"]) == 2
    assert "--exclude_seen is decided at every call of an exported program" in capsys.readouterr().err
    assert program.main([*options, "--allow=i2,nothing"]) == 2
    assert "--allow: 1 of 2 ids are no item of the run: 'nothing'" in capsys.readouterr().err
    assert not (tmp_path / "two").exists()


def test_a_failure_leaves_nothing(recommender, tmp_path, monkeypatch):
    def broken(*_):
        raise OSError("no space left")

    monkeypatch.setattr("tim4rec_jax.serving.export._write_items", broken)
    with pytest.raises(OSError, match="no space left"):
        export_model(recommender, tmp_path / "out", k=3, platforms=("cpu",))
    assert list(tmp_path.iterdir()) == []
