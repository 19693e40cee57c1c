"""Training on every position: its loss and gradients against those of prefixes, microbatches, what is refused."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.evaluation.logs import random_log
from tests.models.calls import spread
from tests.models.settings import settings_of
from tests.training.test_step import reveal_gradients
from tim4rec_jax import DataConfig, ExperimentConfig, ModelConfig, TrainConfig, build_model
from tim4rec_jax.data.loader import make_loader
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.data.splits import gather_windows, leave_one_out
from tim4rec_jax.models import SASRecConfig, last_hidden
from tim4rec_jax.training import losses as loss_functions
from tim4rec_jax.training.losses import weighted_cross_entropy
from tim4rec_jax.training.step import TrainState, init_state, make_optimizer, train_step

MAX_LEN, ITEMS = 12, 22
MODEL = SASRecConfig(
    vocab_size=ITEMS + 1,
    max_len=MAX_LEN,
    d_model=16,
    attention_heads=2,
    inner_size=24,
    dropout=0.3,
    attention_dropout=0.2,
    norm_eps=1e-5,
    num_layers=2,
)
PLAIN = dataclasses.replace(MODEL, dropout=0.0, attention_dropout=0.0)
FAMILY = (
    {"name": "sasrec"},
    {"name": "mamba4rec"},
    {"name": "tim4rec_causal", "head_dim": 8, "time_dropout": 0.0},
    {"name": "gru4rec", "hidden_size": 24},
    {"name": "lrurec"},
    {"name": "caser"},
)


@functools.cache
def small_log(max_events=MAX_LEN + 2):
    return random_log(num_users=12, num_items=ITEMS, min_events=3, max_events=max_events, seed=5)


def assert_alike(actual, expected, tolerance):
    """Loss and gradients, which the optimiser keeps as its state."""
    np.testing.assert_allclose(actual[1], expected[1], rtol=tolerance)
    ours, theirs = actual[0].opt_state, expected[0].opt_state
    for (path, gradient), wanted in zip(jax.tree.leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        # A key's bias moves all scores of a query alike: its gradient is 0 but for rounding, of what it is the sum of.
        name = jax.tree_util.keystr(path)
        atol = tolerance * max(np.abs(wanted).max(), 1e-2 if name.endswith("['key']['bias']") else 1e-3)
        np.testing.assert_allclose(gradient, wanted, rtol=0, atol=atol, err_msg=name)
    assert any(np.abs(leaf).max() > 1e-2 for leaf in jax.tree.leaves(theirs))


def config_of(model, batch_size, **train):
    data = DataConfig(timestamp_precision="int64")
    return ExperimentConfig("test", model, data, TrainConfig(positions="all", batch_size=batch_size, **train))


def loader_of(config, max_events=MAX_LEN + 2):
    log = small_log(max_events)
    return make_loader(config, log, leave_one_out(log).train)


def state_of(model):
    params = jax.tree.map(
        lambda leaf: jnp.asarray(leaf, model.dtype), spread(dataclasses.replace(model, dtype="float32"))
    )
    return TrainState(jnp.int32(0), params, reveal_gradients().init(params), jnp.array([1, 2], jnp.uint32))


def step_of(config, rows_at_once, loader, optimizer=None):
    groups = (LengthGroup(config.model.max_len, rows_at_once),)
    model = build_model(config.model)
    step = functools.partial(train_step, model, optimizer or reveal_gradients(), config, groups, loader)
    return jax.jit(step)


def only_batch(loader):
    (payload,) = loader.epoch(1)
    return payload


@functools.cache
def prefix_loss(model_config):
    """Jitted parameters -> mean loss over the prefixes of the training part, and its gradients."""
    log, model = small_log(), build_model(model_config)
    train = leave_one_out(log).train
    windows = gather_windows(log.items, log.timestamps, log.offsets, train.users, train.ends, MAX_LEN)

    @jax.jit
    @jax.value_and_grad
    def mean_loss(params):
        given = windows.items, windows.lengths, windows.timestamps.astype(np.int32)
        hidden = last_hidden(model, {"params": params}, *given)
        scores = model.apply({"params": params}, hidden, method="score")
        return optax.softmax_cross_entropy_with_integer_labels(scores, windows.targets).mean()

    return mean_loss


def check_against_prefixes(model, tolerance):
    state = state_of(model)
    loss, gradients = prefix_loss(model)(state.params)
    expected = TrainState(None, None, gradients, None), loss
    # The rows: fewer than, as many as, and not a multiple of those at once.
    for batch_size, rows_at_once in ((20, 20), (20, 3)):
        config = config_of(model, batch_size)
        loader = loader_of(config)
        assert loader.num_batches == 1
        actual = step_of(config, rows_at_once, loader)(state, loader.resident, only_batch(loader))
        assert_alike(actual, expected, tolerance)


def test_its_loss_and_gradients_are_those_of_all_prefixes():
    check_against_prefixes(PLAIN, 5e-6)


@pytest.mark.parametrize("changes", FAMILY, ids=lambda changes: changes["name"])
def test_its_loss_and_gradients_are_those_of_all_prefixes_to_the_last_digits(changes, x64):
    check_against_prefixes(settings_of(**dataclasses.asdict(PLAIN) | changes | {"dtype": "float64"}), 1e-11)


@pytest.mark.exhaustive
def test_microbatches_do_not_matter_with_dropout():
    """Nor does leaving out those that only fill the batch."""
    config = config_of(MODEL, 40, window_context=3)
    loader = loader_of(config, max_events=40)
    payload, state = only_batch(loader), state_of(MODEL)
    real = payload.trained.any(axis=1).sum()
    assert 20 < real < 32 and not payload.trained[payload.rows >= 0].all()
    expected = step_of(config, 40, loader)(state, loader.resident, payload)
    for rows_at_once in (7, 16):
        assert_alike(step_of(config, rows_at_once, loader)(state, loader.resident, payload), expected, 1e-5)


@pytest.mark.parametrize("implementation", ["xla", None])
@pytest.mark.parametrize("num_trained", [0, 1, 300, 301, 700])
def test_pieces_of_the_loss_give_the_whole_sum(monkeypatch, num_trained, implementation):
    monkeypatch.setattr(loss_functions, "loss_positions", lambda num_positions: 100)
    rng = np.random.default_rng(0)
    hidden, table = (jnp.asarray(rng.normal(size=(n, 8)), jnp.float32) for n in (730, 30))
    targets = jnp.asarray(rng.integers(0, 30, 730))
    weights = np.zeros(730, np.float32)
    weights[rng.permutation(730)[:num_trained]] = rng.choice([0.5, 1, 2], num_trained)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1))
    def expected(hidden, table):
        return jnp.sum(weights * optax.softmax_cross_entropy_with_integer_labels(hidden @ table.T, targets))

    loss = functools.partial(weighted_cross_entropy, in_tiles=implementation is not None, kernels=implementation)
    total, gradients = jax.jit(loss)(hidden, table, targets, weights)
    wanted, wanted_gradients = expected(hidden, table)
    np.testing.assert_allclose(total, wanted, rtol=1e-5)
    for mine, other in zip(gradients, wanted_gradients, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=2e-5 * max(1, np.abs(other).max()))


def test_the_loss_is_computed_where_there_is_weight_only():
    """What has no weight may be anything: it is not read."""
    hidden = np.ones((2000, 4), np.float32)
    hidden[500:] = np.nan
    weights = np.zeros(2000, np.float32)
    weights[:500] = 1
    assert loss_functions.loss_positions(2000) == 256
    # The second piece of 256 would reach into what has none.
    hidden[500:512] = 0
    total, (d_hidden, d_table) = jax.jit(functools.partial(weighted_cross_entropy, in_tiles=True, kernels="xla"))(
        hidden, jnp.ones((6, 4)), jnp.zeros(2000, jnp.int32), weights
    )
    assert total == pytest.approx(500 * np.log(6), rel=1e-5)
    assert np.isfinite(d_hidden).all() and np.isfinite(d_table).all()


@pytest.mark.parametrize(("positions", "expected"), [(100, 100), (256, 256), (2000, 256), (2050, 257), (51200, 6400)])
def test_an_eighth_of_the_positions_goes_at_once(positions, expected):
    assert loss_functions.loss_positions(positions) == expected


def test_same_seed_same_bits_and_steps_lower_the_loss():
    config = config_of(MODEL, 4, learning_rate=1e-2)
    loader = loader_of(config)
    optimizer = make_optimizer(config.train, 100)
    step = step_of(config, 2, loader, optimizer)

    def train():
        state, losses = init_state(build_model(MODEL), optimizer, seed=1), []
        for epoch in range(1, 6):
            for payload in loader.epoch(epoch):
                state, loss = step(state, loader.resident, payload)
                losses.append(float(loss))
        return state, losses

    (first, losses), (again, same_losses) = train(), train()
    assert losses == same_losses
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert losses[0] == pytest.approx(np.log(ITEMS + 1), rel=0.1)
    assert np.mean(losses[-loader.num_batches :]) < np.mean(losses[: loader.num_batches]) - 0.1


def test_backends_of_the_loss_agree():
    config = config_of(PLAIN, 20)
    loader = loader_of(config)
    payload, state = only_batch(loader), state_of(PLAIN)
    expected = step_of(config, 20, loader)(state, loader.resident, payload)
    for name in ("reference", "xla"):
        named = config_of(dataclasses.replace(PLAIN, kernels=name), 20, loss_in_tiles=True)
        assert_alike(step_of(named, 20, loader)(state, loader.resident, payload), expected, 5e-6)


def test_scores_of_a_piece_that_are_too_many_go_in_tiles(monkeypatch):
    """Without a named backend the largest array holds either all scores of a piece, or none of their number."""

    def widest(bytes_at_once):
        monkeypatch.setattr(loss_functions, "_SCORE_BYTES", bytes_at_once)
        shapes = [jax.ShapeDtypeStruct(s, t) for s, t in (((256, 4), "float32"), ((9999, 4), "float32"))]
        shapes += [jax.ShapeDtypeStruct((256,), "int32"), jax.ShapeDtypeStruct((256,), "float32")]
        return "256x9999xf32" in jax.jit(functools.partial(weighted_cross_entropy)).lower(*shapes).as_text()

    assert widest(4 * 256 * 9999) and not widest(4 * 256 * 9999 - 1)


def test_padding_alone_is_finite():
    """A row that only fills the batch gives no gradient, and no NaN, in one microbatch with others."""
    config = config_of(MODEL, 2)
    loader = loader_of(config)
    payload = only_batch(loader_of(config_of(MODEL, 40)))
    payload = jax.tree.map(lambda a: a[np.array([0, 39])], payload)
    assert (payload.rows[1] == -1).all()
    state, loss = step_of(config, 2, loader)(state_of(MODEL), loader.resident, payload)
    assert np.isfinite(loss)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.opt_state))


@pytest.mark.parametrize("name", ["tim4rec", "tisasrec", "echomamba4rec"])
def test_models_that_cannot_start_anew_inside_a_row_are_refused(name):
    message = f"train.positions='all' needs a causal model .* model.name='{name}' is not: .*, or train.positions='last'"
    with pytest.raises(ValueError, match=message):
        ExperimentConfig("test", ModelConfig(name=name), train=TrainConfig(positions="all"))
