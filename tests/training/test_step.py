"""One optimiser step: rows grouped by length against the plain padded form, optimiser options, repeatability."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from tests.models.settings import sibling
from tim4rec_jax import ExperimentConfig, TrainConfig, build_model
from tim4rec_jax.data.loader import Batch
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.models import TiM4RecConfig, init_params
from tim4rec_jax.training.step import TrainState, init_state, learning_rate_schedule, make_optimizer, train_step

ROWS, MAX_LEN = 10, 12
LENGTHS = [12, 1, 3, 5, 4, 7, 1, 5, 6, 2]
PLAIN = (LengthGroup(MAX_LEN, ROWS),)
GROUPED = (LengthGroup(MAX_LEN, 3), LengthGroup(5, 4))
MODEL = TiM4RecConfig(
    vocab_size=23,
    max_len=MAX_LEN,
    d_model=16,
    head_dim=8,
    d_state=4,
    chunk_size=5,
    dropout=0.3,
    time_dropout=0.2,
    norm_eps=1e-5,
    num_layers=1,
    use_ffn=False,
)
DEEP = dataclasses.replace(MODEL, num_layers=2, dtype="float64")
TIME_OFF = sibling(MODEL, "ssd4rec")
DOUBLE = dataclasses.replace(TIME_OFF, dtype="float64")


class GivenBatches:
    """A loader whose payload is the batch."""

    num_batches, resident = 1, ()

    def batch(self, resident, payload):
        return payload


def batch_of(lengths=LENGTHS, weights=None):
    rng = np.random.default_rng(3)
    inside = np.arange(MAX_LEN) < np.array(lengths)[:, None]
    items = rng.integers(1, MODEL.vocab_size, inside.shape) * inside
    timestamps = np.cumsum(rng.integers(0, 10_000, inside.shape), axis=1) * inside
    targets = rng.integers(1, MODEL.vocab_size, len(lengths))
    weights = np.ones(len(lengths)) if weights is None else weights
    whole = (np.asarray(a, np.int32) for a in (items, lengths))
    parts = *whole, timestamps.astype(np.float32), targets.astype(np.int32), np.asarray(weights, np.float32)
    return Batch(*(jnp.asarray(a) for a in parts))


def reveal_gradients():
    """An optimiser that changes nothing and keeps the gradients as its state."""

    def update(gradients, state, params=None):
        return jax.tree.map(jnp.zeros_like, gradients), gradients

    return optax.GradientTransformation(lambda params: params, update)


@functools.cache
def program(model_config, groups, loss="ce", optimizer=None):
    config = ExperimentConfig("test", model_config, train=TrainConfig(loss=loss))
    model = build_model(model_config)
    step = functools.partial(train_step, model, optimizer or reveal_gradients(), config, groups, GivenBatches())
    return jax.jit(lambda state, batch: step(state, (), batch))


@functools.cache
def adam():
    return make_optimizer(TrainConfig(learning_rate=1e-2), total_steps=40)


@functools.cache
def start(model_config):
    """A state of random parameters, far from the initial values, where some gradients are next to nothing."""
    shapes = jax.eval_shape(functools.partial(init_params, build_model(model_config)), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    params = tree.unflatten([jnp.asarray(0.4 * rng.normal(size=leaf.shape), leaf.dtype) for leaf in leaves])
    return TrainState(jnp.int32(0), params, reveal_gradients().init(params), jnp.array([1, 2], jnp.uint32))


def assert_same_step(actual, expected, tolerance):
    (state, loss), (wanted_state, wanted_loss) = actual, expected
    np.testing.assert_allclose(loss, wanted_loss, rtol=tolerance)
    for (path, gradient), wanted in zip(
        jax.tree.leaves_with_path(state.opt_state), jax.tree.leaves(wanted_state.opt_state), strict=True
    ):
        scale = np.abs(wanted).max()
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=tolerance * scale, err_msg=jax.tree_util.keystr(path))
    assert any(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(wanted_state.opt_state))


def test_microbatches_give_the_loss_and_gradients_of_the_whole_batch():
    batch = batch_of()
    expected = program(MODEL, PLAIN)(start(MODEL), batch)
    assert_same_step(program(MODEL, (LengthGroup(MAX_LEN, 4),))(start(MODEL), batch), expected, 5e-6)


@pytest.mark.parametrize(("model", "loss"), [(DEEP, "ce"), (DOUBLE, "bpr")], ids=["two layers", "time off, bpr"])
def test_grouped_rows_give_those_of_padded_rows_to_the_last_digits(model, loss, x64):
    assert start(model).params["item_embedding"]["embedding"].dtype == jnp.float64
    for lengths in (LENGTHS, [12] * ROWS, [2] * ROWS):
        # The last of the shortest rows fills microbatches, so it has weight here.
        batch = batch_of(lengths, weights=[1, 0, 1, 1, 0, 1, 1, 1, 1, 1])
        expected = program(model, PLAIN, loss)(start(model), batch)
        assert_same_step(program(model, GROUPED, loss)(start(model), batch), expected, 1e-11)


def test_it_is_the_gradient_of_the_mean_loss_of_rows_with_weight():
    """Against the definition; the microbatches are larger than the batch."""
    config = dataclasses.replace(MODEL, dropout=0.0, time_dropout=0.0)
    model = build_model(config)
    weights = np.array([1, 1, 0, 1, 1, 1, 0, 1, 1, 1])
    batch, real = batch_of(weights=weights), np.flatnonzero(weights)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        hidden, _ = model.apply({"params": params}, batch.items, batch.timestamps)
        last = hidden[np.arange(ROWS), batch.lengths - 1]
        scores = model.apply({"params": params}, last, method="score")
        return optax.softmax_cross_entropy_with_integer_labels(scores[real], batch.targets[real]).mean()

    state = start(MODEL)
    loss, gradients = mean_loss(state.params)
    expected = TrainState(None, None, gradients, None), loss
    wide = (LengthGroup(MAX_LEN, 16), LengthGroup(5, 16))
    assert_same_step(program(config, wide)(state, batch), expected, 5e-6)


@functools.cache
def initial(seed):
    return init_state(build_model(TIME_OFF), adam(), seed)


def test_same_seed_same_bits_and_another_seed_others():
    step, batch = program(TIME_OFF, PLAIN, optimizer=adam()), batch_of()

    def train(state):
        losses = []
        for _ in range(3):
            state, loss = step(state, batch)
            losses.append(float(loss))
        return state, losses

    first, losses = train(initial(seed=1))
    again, same_losses = train(init_state(build_model(TIME_OFF), adam(), seed=1))
    assert losses == same_losses
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert int(first.step) == 3 and first.key.dtype == jnp.uint32
    other, other_losses = train(initial(seed=2))
    assert all(a != b for a, b in zip(losses, other_losses, strict=True))
    np.testing.assert_array_equal(first.key, initial(seed=1).key)
    assert (np.asarray(first.key) != np.asarray(other.key)).any()


def test_every_step_draws_other_dropout_masks():
    state, batch = start(MODEL), batch_of()
    losses = [float(program(MODEL, PLAIN)(state.replace(step=jnp.int32(step)), batch)[1]) for step in range(4)]
    assert len(set(losses)) == 4
    assert np.std(losses) > 1e-4


def test_steps_lower_the_loss():
    state, batch = initial(seed=1), batch_of()
    losses = []
    for _ in range(40):
        state, loss = program(TIME_OFF, PLAIN, optimizer=adam())(state, batch)
        losses.append(float(loss))
    assert losses[0] == pytest.approx(np.log(MODEL.vocab_size), rel=0.1)
    assert np.mean(losses[-5:]) < 0.5 * losses[0]


GRADIENTS = [np.array([3.0, -4.0]), np.array([0.1, 0.2]), np.array([-2.0, 0.5])]


def updates_of(config, gradients, total_steps=10):
    """Parameters after each update, from [1, -2]."""
    optimizer = make_optimizer(config, total_steps)
    update = jax.jit(optimizer.update)
    params, steps = jnp.array([1.0, -2.0]), []
    state = optimizer.init(params)
    for gradient in gradients:
        updates, state = update(jnp.asarray(gradient, jnp.float32), state, params)
        params = params + updates
        steps.append(np.asarray(params))
    return np.array(steps)


def updates_of_pytorch(optimizer, gradients, **options):
    params, steps = torch.tensor([1.0, -2.0], requires_grad=True), []
    made = optimizer([params], **options)
    for gradient in gradients:
        params.grad = torch.tensor(gradient, dtype=torch.float32)
        made.step()
        steps.append(params.detach().numpy().copy())
    return np.array(steps)


def test_the_default_is_pytorchs_adam():
    expected = updates_of_pytorch(torch.optim.Adam, GRADIENTS, lr=1e-3)
    np.testing.assert_allclose(updates_of(TrainConfig(), GRADIENTS), expected, rtol=1e-6)
    config = TrainConfig(learning_rate=0.1, adam_b1=0.7, adam_b2=0.9, adam_eps=0.01)
    expected = updates_of_pytorch(torch.optim.Adam, GRADIENTS, lr=0.1, betas=(0.7, 0.9), eps=0.01)
    np.testing.assert_allclose(updates_of(config, GRADIENTS), expected, rtol=1e-6)


def test_weight_decay_is_decoupled():
    expected = updates_of_pytorch(torch.optim.AdamW, GRADIENTS, lr=0.1, weight_decay=0.3)
    actual = updates_of(TrainConfig(learning_rate=0.1, weight_decay=0.3), GRADIENTS)
    np.testing.assert_allclose(actual, expected, rtol=1e-5)


def test_clipping_bounds_the_norm_of_all_gradients_together():
    clipped = [gradient / max(1.0, np.linalg.norm(gradient)) for gradient in GRADIENTS]
    expected = updates_of(TrainConfig(learning_rate=0.1), clipped)
    actual = updates_of(TrainConfig(learning_rate=0.1, clip_norm=1.0), GRADIENTS)
    np.testing.assert_allclose(actual, expected, rtol=1e-6)
    assert np.abs(actual - updates_of(TrainConfig(learning_rate=0.1), GRADIENTS)).max() > 1e-3


def rates(config, total_steps):
    schedule = learning_rate_schedule(config, total_steps)
    return np.array([float(schedule(step)) for step in range(total_steps + 1)])


def test_schedules():
    np.testing.assert_allclose(rates(TrainConfig(learning_rate=0.5), 3), 0.5)
    warmed = rates(TrainConfig(learning_rate=0.5, warmup_steps=2), 4)
    np.testing.assert_allclose(warmed, [0, 0.25, 0.5, 0.5, 0.5])
    cosine = rates(TrainConfig(learning_rate=0.5, schedule="cosine"), 4)
    np.testing.assert_allclose(cosine, 0.25 * (1 + np.cos(np.pi * np.arange(5) / 4)), atol=1e-7)
    both = rates(TrainConfig(learning_rate=0.5, schedule="cosine", warmup_steps=2), 6)
    np.testing.assert_allclose(both, [0, 0.25, *(0.25 * (1 + np.cos(np.pi * np.arange(5) / 4)))], atol=1e-7)
    assert rates(TrainConfig(schedule="cosine", warmup_steps=5), 3)[-1] == pytest.approx(0.6e-3)


def test_the_optimizer_follows_the_schedule():
    # With gradients of one sign and size Adam moves by the learning rate.
    config = TrainConfig(learning_rate=0.5, warmup_steps=2, schedule="cosine")
    params = updates_of(config, [np.array([1.0, 1.0])] * 6, total_steps=6)
    moved = -np.diff(np.concatenate([[[1.0, -2.0]], params]), axis=0)[:, 0]
    np.testing.assert_allclose(moved, rates(config, 6)[:6], atol=1e-5)
