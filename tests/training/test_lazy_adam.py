"""Sampled cross-entropy, and the item table updated only where a step touches it."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.logs import random_log
from tests.models.settings import SMALL_SASREC, sibling
from tim4rec_jax import DataConfig, ExperimentConfig, TrainConfig, build_model
from tim4rec_jax.config import ParallelConfig
from tim4rec_jax.data.loader import make_loader
from tim4rec_jax.data.negatives import Negatives, draw_negatives, make_proposal
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.data.splits import leave_one_out
from tim4rec_jax.parallel.item_table import shardings
from tim4rec_jax.parallel.mesh import make_layout
from tim4rec_jax.training.checkpoint import Checkpointer
from tim4rec_jax.training.losses import cross_entropy, sampled_cross_entropy
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

STEPS = 20
BATCH = {"last": 6, "all": 3, "masked": 3}
MODELS = {"last": SMALL_SASREC, "all": SMALL_SASREC, "masked": sibling(SMALL_SASREC, "bert4rec")}
by_positions = pytest.mark.parametrize("positions", BATCH)


@functools.cache
def log():
    return random_log(num_users=12, num_items=22, min_events=3, max_events=14, seed=5)


class Training:
    """A model with its loader and its compiled step."""

    def __init__(self, positions="last", strategy="single", model=None, vocab_size=None, shards=1, **train):
        options = {"loss": "sampled_ce", "num_negatives": 7, "negatives_power": 0.75, "clip_norm": 0.5}
        options |= {"table_optimizer": "lazy_adam", "learning_rate": 1e-2, "batch_size": BATCH[positions]}
        settings = TrainConfig(positions=positions, **options | train)
        model = model or MODELS[positions]
        model = dataclasses.replace(model, vocab_size=vocab_size or model.vocab_size)
        config = ExperimentConfig("test", model, DataConfig(), settings, parallel=ParallelConfig(strategy, shards))
        self.layout = make_layout(config.parallel)
        places = self.layout.batch_indices(settings.batch_size)
        self.loader = make_loader(config, log(), leave_one_out(log()).train, places)
        self.model, self.optimizer = build_model(model), make_optimizer(settings, STEPS)
        rows = self.layout.rows_per_device(settings.batch_size)
        groups = (LengthGroup(12, min(rows, 2) if positions == "last" else 1),)
        step = functools.partial(train_step, self.model, self.optimizer, config, groups, self.loader)
        self.resident = self.layout.replicate(self.loader.resident)
        self.wrapped = self.layout.compile_step(step)

    @functools.cached_property
    def step(self):
        """The compiled step."""
        return self.wrapped.lower(self.start(), self.resident, self.payload(0)).compile()

    def start(self):
        return self.layout.init_sharded(lambda: init_state(self.model, self.optimizer, 3))

    def payload(self, number):
        epoch, batch = divmod(number, self.loader.num_batches)
        return self.layout.shard_batch(next(self.loader.epoch(epoch + 1, batch)))

    def go_on(self, state, first, last):
        """Returns the state after the steps `first` to `last` - 1, and their losses."""
        losses = []
        for number in range(first, last):
            state, loss = self.step(state, self.resident, self.payload(number))
            losses.append(float(loss))
        return state, losses


def table(tree):
    return np.asarray(tree["item_embedding"]["embedding"])


def moments(state):
    (adam,) = [
        part for part in jax.tree.leaves(state.opt_state, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(part, "mu")
    ]
    return table(adam.mu), table(adam.nu)


@functools.cache
def scores_and_targets():
    rng = np.random.default_rng(0)
    v = 200
    hidden, items = jnp.asarray(0.5 * rng.normal(size=(4, 8))), jnp.asarray(rng.normal(size=(v, 8)))
    return hidden, items, jnp.array([1, 17, 80, 199])


def test_the_loss_over_every_item_once_is_the_softmax_without_padding(x64):
    hidden, items, targets = scores_and_targets()
    every = Negatives(jnp.arange(1, len(items)), jnp.zeros(len(items) - 1))
    full = cross_entropy(hidden @ items[1:].T, targets - 1)
    np.testing.assert_allclose(sampled_cross_entropy(hidden, items, targets, every), full, rtol=1e-12)


def test_more_negatives_come_closer_to_the_softmax_and_only_with_log_q(x64):
    hidden, items, targets = scores_and_targets()
    v = len(items)
    # Frequent are the items with high scores, which uncorrected draws would count too often.
    counts = np.concatenate([[0], 1000 * np.exp(np.asarray(items[1:] @ hidden.sum(0)) / 2)]).astype(np.int64)
    proposal = make_proposal(counts, 0.75)

    def value_and_gradient(negatives):
        loss = lambda items: sampled_cross_entropy(hidden, items, targets, negatives).sum()  # noqa: E731
        return jax.value_and_grad(loss)(items)

    full, d_full = jax.value_and_grad(lambda items: cross_entropy(hidden @ items[1:].T, targets - 1).sum())(items)
    gradient_errors = {}
    for num, most in ((500, 0.3), (50_000, 0.03)):
        value, gradient = value_and_gradient(draw_negatives(proposal, jax.random.key(num), num))
        assert abs(value - full) < most
        gradient_errors[num] = np.abs(gradient - d_full).max()
    # A hundred times the draws: about a tenth of the error.
    assert gradient_errors[50_000] < 0.01 and gradient_errors[50_000] < 0.3 * gradient_errors[500]
    drawn = draw_negatives(proposal, jax.random.key(1), 50_000)
    value, gradient = value_and_gradient(drawn.replace(log_expected=jnp.full(50_000, jnp.log(50_000 / (v - 1)))))
    assert abs(value - full) > 1 and np.abs(gradient - d_full).max() > 0.1


@pytest.mark.exhaustive
@by_positions
def test_where_every_row_is_touched_it_is_adam(positions, x64):
    options = {"num_negatives": 400, "negatives_power": 0.0}
    (lazy, lazy_losses), (dense, dense_losses) = (
        training.go_on(training.start(), 0, 5)
        for training in (Training(positions, table_optimizer=name, **options) for name in ("lazy_adam", "adam"))
    )
    np.testing.assert_allclose(lazy_losses, dense_losses, rtol=0, atol=1e-12)
    for (path, leaf), wanted in zip(jax.tree.leaves_with_path(lazy), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(leaf, wanted, rtol=0, atol=1e-12, err_msg=jax.tree_util.keystr(path))


@by_positions
def test_other_rows_and_their_moments_keep_every_bit(positions):
    model = dataclasses.replace(MODELS[positions], dtype="float32")
    training = Training(positions, model=model, vocab_size=400, negatives_power=0.0)
    state, _ = training.go_on(training.start(), 0, 1)
    before = [table(state.params).copy(), *(m.copy() for m in moments(state))]
    payload = training.payload(1)
    batch = training.loader.batch(training.resident, payload)
    after, _ = training.step(state, training.resident, payload)
    changed = np.flatnonzero((table(after.params) != before[0]).any(axis=1))
    read = np.union1d(np.asarray(batch.items), np.asarray(batch.targets)[np.asarray(batch.weights) > 0])
    # Beside what the batch reads: the negatives, at most 7.
    assert len(np.setdiff1d(changed, read)) <= 7 and len(changed) < 60
    assert set(np.asarray(batch.targets)[np.asarray(batch.weights) > 0]) <= set(changed)
    others = np.setdiff1d(np.arange(400), np.union1d(changed, read))
    for old, new in zip(before, (table(after.params), *moments(after)), strict=True):
        np.testing.assert_array_equal(new[others], old[others])
    # Adam, for comparison, moves rows on by their moments alone.
    dense = Training(positions, model=model, vocab_size=400, table_optimizer="adam")
    first, _ = dense.go_on(dense.start(), 0, 1)
    old = table(first.params).copy()
    second, _ = dense.go_on(first, 1, 2)
    assert (table(second.params) != old).any(axis=1).sum() > len(changed)


# Four devices: a whole table on each, in 4 parts, or two copies in 2 parts.
MANY = {
    "last, whole": ("last", "sharded", 1, "lazy_adam"),
    "all, whole, pmap": ("all", "pmap", 1, "lazy_adam"),
    "all, whole": ("all", "sharded", 1, "lazy_adam"),
    "last, 4 parts": ("last", "sharded", 4, "lazy_adam"),
    "all, 2 parts": ("all", "sharded", 2, "lazy_adam"),
    "last, 2 parts, dense": ("last", "sharded", 2, "adam"),
    "all, 4 parts, dense": ("all", "sharded", 4, "adam"),
    "masked, whole": ("masked", "sharded", 1, "lazy_adam"),
    "masked, 2 parts": ("masked", "sharded", 2, "lazy_adam"),
}


@functools.cache
def on_one_device(positions, table_optimizer):
    training = Training(positions, table_optimizer=table_optimizer)
    state, losses = training.go_on(training.start(), 0, STEPS)
    return jax.tree.map(np.asarray, state), losses


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", MANY)
def test_several_devices_train_as_one(way, x64):
    """Parts too, and rows behind the catalogue's end that only make parts equal."""
    positions, strategy, shards, table_optimizer = MANY[way]
    assert jax.device_count() == 4
    state, losses = on_one_device(positions, table_optimizer)
    model = dataclasses.replace(MODELS[positions], vocab_multiple=8 if shards > 1 else 1)
    many = Training(positions, strategy, model, shards=shards, table_optimizer=table_optimizer)
    other, found = many.go_on(many.start(), 0, STEPS)
    assert len(set(losses)) == STEPS
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-10)
    for actual, expected in zip(everywhere(other), everywhere(state), strict=True):
        np.testing.assert_allclose(actual[: len(expected)], expected, rtol=0, atol=1e-8)
    embedding = other.params["item_embedding"]["embedding"]
    assert {part.data.shape for part in embedding.addressable_shards} == {(len(embedding) // shards, model.table_width)}


@pytest.mark.parametrize("name", ["gru4rec", "lrurec", "caser"])
def test_other_models_train_in_parts_as_on_one_device(name, x64):
    """Every position, sampled loss, lazy Adam: what goes by the name of the item embedding."""
    one, many = (
        Training("all", strategy, sibling(SMALL_SASREC, name, vocab_multiple=8), shards=shards)
        for strategy, shards in (("single", 1), ("sharded", 2))
    )
    (state, losses), (other, found) = (training.go_on(training.start(), 0, 3) for training in (one, many))
    assert len(set(losses)) == 3
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-10)
    for actual, expected in zip(everywhere(other), everywhere(state), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8)


def everywhere(state):
    return [table(state.params), *moments(state)]


@pytest.mark.exhaustive
@pytest.mark.parametrize("table_optimizer", ["adam", "lazy_adam"])
def test_rows_that_only_make_parts_equal_change_nothing(table_optimizer, x64):
    alone, padded = (
        Training(
            "all", model=dataclasses.replace(SMALL_SASREC, vocab_multiple=multiple), table_optimizer=table_optimizer
        )
        for multiple in (1, 16)
    )
    (state, losses), (wider, found) = (training.go_on(training.start(), 0, 5) for training in (alone, padded))
    np.testing.assert_allclose(found, losses, rtol=0, atol=1e-12)
    for actual, expected in zip(everywhere(wider), everywhere(state), strict=True):
        assert len(actual) == 32
        np.testing.assert_allclose(actual[:23], expected, rtol=0, atol=1e-12)
    assert not moments(wider)[0][23:].any()


@pytest.mark.exhaustive
def test_what_parts_trained_goes_on_on_one_device_and_elsewhere(tmp_path, x64):
    model = dataclasses.replace(SMALL_SASREC, vocab_multiple=8)
    ways = [{"strategy": "sharded", "shards": 4}, {"strategy": "single"}, {"strategy": "sharded", "shards": 2}]
    trainings = [Training("all", model=model, **way) for way in ways]
    whole, losses = trainings[1].go_on(trainings[1].start(), 0, 6)
    half, _ = trainings[0].go_on(trainings[0].start(), 0, 3)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save_latest(3, half, {})
        _, saved, _ = checkpoints.restore_latest(jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), half))
    for training in trainings:
        _, rest = training.go_on(training.layout.shard(saved), 3, 6)
        np.testing.assert_allclose(rest, losses[3:], rtol=0, atol=1e-10)


@pytest.mark.parametrize("positions", ["all", "masked"])
def test_a_checkpoint_goes_on_bit_for_bit(positions, tmp_path):
    training = Training(positions, model=dataclasses.replace(MODELS[positions], dtype="float32"))
    whole, losses = training.go_on(training.start(), 0, 6)
    half, _ = training.go_on(training.start(), 0, 3)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save_latest(3, half, {})
        _, saved, _ = checkpoints.restore_latest(jax.tree.map(np.asarray, half))
    resumed, rest = training.go_on(training.layout.replicate(saved), 3, 6)
    assert rest == losses[3:]
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def compiled(vocab_size, multiple=1, **train):
    model = dataclasses.replace(
        SMALL_SASREC, dtype="float32", vocab_size=vocab_size, num_layers=1, vocab_multiple=multiple
    )
    training = Training("all", model=model, negatives_power=0.0, **train)
    state = jax.eval_shape(lambda: init_state(training.model, training.optimizer, 0))
    if training.layout.catalogue_shards > 1:
        placed = shardings(training.layout.mesh, state)
        state = jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), state, placed)
    return training.wrapped.lower(state, training.resident, training.payload(0)).compile()


def test_a_step_costs_the_same_for_any_catalogue():
    small, large = compiled(10_007), compiled(1_000_003)
    flops = [program.cost_analysis()["flops"] for program in (small, large)]
    assert flops[1] == pytest.approx(flops[0], rel=0.01)
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (small, large)]
    assert temporary[1] < 1.1 * temporary[0] + 4096
    # The table and its moments are read from and written to where they lie, by these instructions and no other.
    pattern = r"= f32\[1000003,8\]\S* ([\w-]+)\("
    assert set(re.findall(pattern, large.as_text())) <= {
        "parameter",
        "scatter",
        "get-tuple-element",
        "bitcast",
        "fusion",
        "while",
        "call",
        "dynamic-update-slice",
    }
    assert not re.search(r"\[\d+,1000003\]|\[1000003\]", large.as_text())
    dense = compiled(1_000_003, table_optimizer="adam").cost_analysis()["flops"]
    assert dense > 50 * flops[1]


def test_of_a_table_in_parts_no_device_holds_more_than_one():
    """Nor a gradient of the size of its part; what it does depends on neither."""
    options = {"multiple": 4, "strategy": "sharded", "shards": 4}
    small, large = compiled(10_000, **options), compiled(1_000_000, **options)
    flops = [program.cost_analysis()["flops"] for program in (small, large)]
    assert flops[1] == pytest.approx(flops[0], rel=0.01)
    memory = [program.memory_analysis() for program in (small, large)]
    assert memory[1].temp_size_in_bytes < 1.1 * memory[0].temp_size_in_bytes + 4096
    # The table and two moments, of which every device has a quarter.
    grown = memory[1].argument_size_in_bytes - memory[0].argument_size_in_bytes
    assert grown == 3 * (1_000_000 - 10_000) // 4 * SMALL_SASREC.d_model * 4
    text = large.as_text()
    assert not re.search(r"\[(?:\d+,)*1000000[,\]]", text) and re.search(r"\[250000,8\]", text)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": "sampled_ce"}, r"num_negatives=None must be at least 1 with loss='sampled_ce'"),
        ({"loss": "sampled_ce", "num_negatives": 0}, r"num_negatives=0 must be at least 1"),
        ({"loss": "sampled_ce", "num_negatives": 5, "negatives_power": 2.0}, r"negatives_power=2.0 must lie between 0"),
        ({"num_negatives": 5}, r"num_negatives=5 is for loss='sampled_ce' or .*; with loss='ce' leave it out"),
        ({"table_optimizer": "lazy_adam"}, r"with loss='ce' every row of the item table has a gradient"),
        ({"table_optimizer": "sgd"}, r"table_optimizer='sgd' must be one of \('adam', 'lazy_adam'\)"),
        (
            {"loss": "sampled_ce", "num_negatives": 5, "table_optimizer": "lazy_adam", "weight_decay": 0.1},
            r"weight_decay=0.1 decays every row of the item table in every step",
        ),
        ({"loss": "bpr", "positions": "all"}, r"positions='all' trains with every loss but 'bpr'"),
        ({"loss": "softmax"}, r"loss='softmax' must be one of"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(**changes)
