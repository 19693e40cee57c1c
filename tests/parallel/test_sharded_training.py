"""Training with the item embedding in parts is training with it whole, and no device ever holds all of it."""

import dataclasses
import functools
import json
import re
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from tests.parallel.fake_devices import ROOT, environment
from tests.parallel.sharded_catalogue import RANKED
from tim4rec_jax import ExperimentConfig, ModelConfig, TrainConfig, build_model
from tim4rec_jax.config import ParallelConfig
from tim4rec_jax.models import SASRecConfig, init_params
from tim4rec_jax.parallel.item_table import MODEL_AXIS, ROW_AXES, TABLE, sharded_cross_entropy
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.training.losses import cross_entropy

ROWS, WIDTH, VOCAB = 48, 8, 45


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory):
    """What `sharded_catalogue` writes."""
    output = tmp_path_factory.mktemp("eight") / "found.json"
    command = [sys.executable, "-m", "tests.parallel.sharded_catalogue", str(output)]
    done = subprocess.run(command, cwd=ROOT, env=environment(8), capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(output.read_text())


by_positions = pytest.mark.parametrize("positions", ["last", "all", "masked"])


@pytest.mark.exhaustive
@by_positions
def test_parts_train_evaluate_and_resume_as_the_whole(on_eight, positions):
    """Over 20 steps with dropout and clipping; each layout also goes on with what another saved after 10."""
    assert on_eight["devices"] == 8
    alone = on_eight[positions]["1"]
    assert len(set(alone["losses"])) == 20
    for shards, found in on_eight[positions].items():
        assert found["initial"] == 0, shards
        for name, expected in (("losses", alone["losses"]), ("elsewhere", alone["losses"][10:])):
            np.testing.assert_allclose(found[name], expected, rtol=0, atol=1e-6, err_msg=f"{name}, {shards}")


@pytest.mark.exhaustive
@pytest.mark.parametrize("positions", RANKED)
def test_ranks_and_best_items_of_parts_are_those_of_the_whole(on_eight, positions):
    alone = on_eight[positions]["1"]
    ranks, without_seen = alone["ranks"]
    assert ranks != without_seen
    for shards, found in on_eight[positions].items():
        assert found["ranks"] == alone["ranks"], shards
        scores, ids, finite = found["best"]
        np.testing.assert_allclose(scores, alone["best"][0], rtol=0, atol=1e-12)
        assert (ids, finite) == (alone["best"][1], [True] * 5), shards


@pytest.mark.exhaustive
@by_positions
@pytest.mark.parametrize("shards", [2, 8])
def test_no_device_holds_the_table_or_a_row_of_scores(on_eight, positions, shards):
    """Neither in what the step is given, nor in any array of the compiled program."""
    whole, found = on_eight[positions]["1"], on_eight[positions][str(shards)]
    # Parameters and two moments of Adam.
    saved = 3 * whole["table_bytes"] * (shards - 1) // shards
    assert whole["bytes"] - found["bytes"] == saved
    sizes = {int(size) for dims in re.findall(r"\w\d+\[([\d,]+)\]", found["hlo"]) for size in dims.split(",")}
    assert ROWS // shards in sizes and not sizes & {VOCAB, VOCAB - 1, ROWS, ROWS - 1}
    assert ROWS in {int(size) for dims in re.findall(r"\w\d+\[([\d,]+)\]", whole["hlo"]) for size in dims.split(",")}, (
        "the search would find nothing anyway"
    )


@pytest.mark.exhaustive
@by_positions
@pytest.mark.parametrize("shards", [2, 8])
def test_what_devices_exchange(on_eight, positions, shards):
    """Ids and rows, hidden states and two sums a target, the gradients of both ways, and one sum of the others."""
    hlo = on_eight[positions][str(shards)]["hlo"]
    names = re.findall(
        r" (all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter|collective-broadcast)(?:-start)?\(", hlo
    )
    counts = {name: names.count(name) for name in set(names)}
    # Sums: the largest log-sum-exp, the gradients, the norm for clipping, and with several copies those of the table.
    sums = counts.pop("all-reduce")
    assert counts == {"all-gather": 5, "reduce-scatter": 3}
    assert 3 <= sums <= 4 + (shards < 8)
    inside = [line for line in hlo.splitlines() if "while/body" in line]
    assert inside and not [line for line in inside if re.search(r" (all-\w+|reduce-scatter)(-start)?\(", line)]


@functools.cache
def layout():
    return make_layout(ParallelConfig("sharded", catalogue_shards=jax.device_count()))


def test_cross_entropy_over_parts():
    """Value and gradients in float32, weights and rows beyond the catalogue included."""
    rng = np.random.default_rng(1)
    hidden, table = (rng.normal(size=(n, WIDTH)).astype(np.float32) for n in (20, ROWS))
    table[VOCAB:] = 50.0
    targets = rng.integers(0, VOCAB, 20).astype(np.int32)
    weights = rng.integers(0, 3, 20).astype(np.float32)

    def own(hidden, shard, targets, weights):
        def loss(hidden, shard):
            losses = sharded_cross_entropy(hidden, shard, targets, vocab_size=VOCAB)
            return jnp.sum(weights * losses), losses

        (_, losses), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, shard)
        return losses, *gradients

    rows, parts = P(ROW_AXES), P(MODEL_AXIS)
    specs = {"in_specs": (rows, parts, rows, rows), "out_specs": (rows, rows, parts)}
    sharded = jax.jit(jax.shard_map(own, mesh=layout().mesh, check_vma=False, **specs))

    def loss(hidden, table):
        losses = cross_entropy(hidden @ table[:VOCAB].T, jnp.asarray(targets))
        return jnp.sum(weights * losses), losses

    (_, losses), gradients = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(hidden, table)
    for actual, expected in zip(sharded(hidden, table, targets, weights), (losses, *gradients), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_rows_beyond_the_catalogue_change_nothing():
    config = SASRecConfig(vocab_size=VOCAB, max_len=6, d_model=8, num_layers=1, inner_size=8)
    padded = dataclasses.replace(config, vocab_multiple=16)
    model, wider = build_model(config), build_model(padded)
    key = jax.random.key(0)
    params, more = (jax.jit(functools.partial(init_params, m))(key) for m in (model, wider))
    assert more[TABLE]["embedding"].shape == (ROWS, 8)
    np.testing.assert_array_equal(more[TABLE]["embedding"][:VOCAB], params[TABLE]["embedding"])
    hidden = jnp.ones((2, 8))
    assert wider.apply({"params": more}, method="item_table").shape == (VOCAB, 8)
    np.testing.assert_array_equal(
        wider.apply({"params": more}, hidden, method="score"), model.apply({"params": params}, hidden, method="score")
    )


def experiment(shards=4, train=None, **model):
    parallel = ParallelConfig("sharded", catalogue_shards=shards)
    return ExperimentConfig(
        "test", ModelConfig(vocab_size=VOCAB, **model), train=train or TrainConfig(), parallel=parallel
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            experiment,
            "catalogue_shards=4 must divide the 45 rows of the item embedding .*; set model.vocab_multiple to a "
            "multiple of 4",
        ),
        (
            lambda: experiment(train=TrainConfig(loss="bpr"), vocab_multiple=4),
            "catalogue_shards=4 trains with train.loss='ce' or 'sampled_ce', not 'bpr'",
        ),
        (
            lambda: make_layout(ParallelConfig(catalogue_shards=3)),
            "catalogue_shards=3 must divide the number of devices",
        ),
        (lambda: ParallelConfig(catalogue_shards=0), "catalogue_shards=0 must be at least 1"),
        (lambda: ParallelConfig("pmap", catalogue_shards=2), "catalogue_shards=2 needs parallel.strategy='sharded'"),
        (lambda: ModelConfig(vocab_multiple=0), "vocab_multiple=0 must be at least 1"),
    ],
)
def test_settings_that_do_not_go_together(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_mesh_in_parts():
    many = make_layout(ParallelConfig("sharded", catalogue_shards=2))
    count = jax.device_count()
    assert many.mesh.shape == {"data": count // 2, "model": 2} and many.catalogue_shards == 2
    assert many.num_devices == count and many.batch_indices(4 * count) == range(4 * count)
    experiment(vocab_multiple=8)


def test_a_copy_of_the_embedding_lies_in_one_process(monkeypatch):
    devices = [types.SimpleNamespace(process_index=number // 3, id=number) for number in range(6)]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match="catalogue_shards=2 must divide the 3 devices of each of the 2 processes"):
        make_layout(ParallelConfig(catalogue_shards=2))
