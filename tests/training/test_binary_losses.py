"""BCE and gBCE: against PyTorch and NumPy with gradients, at last and at every position, refusals."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.training.test_all_positions import PLAIN, assert_alike, config_of, loader_of, small_log, state_of, step_of
from tim4rec_jax import (
    DataConfig,
    ExperimentConfig,
    ModelConfig,
    SyntheticConfig,
    TrainConfig,
    build_model,
    fit,
    load_log,
)
from tim4rec_jax.config import ParallelConfig
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.models import last_hidden
from tim4rec_jax.training import losses as loss_functions
from tim4rec_jax.training.logging import read_metrics
from tim4rec_jax.training.losses import (
    binary_cross_entropy,
    gbce_beta,
    sample_negative,
    sample_negatives,
    target_and_negative_scores,
    weighted_losses,
)
from tim4rec_jax.training.step import value_and_grad

pytestmark = pytest.mark.quick


def _scores(seed=0, rows=7, negatives=5):
    rng = np.random.default_rng(seed)
    return 3 * rng.normal(size=rows), 3 * rng.normal(size=(rows, negatives))


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_value_and_gradient_equal_pytorch(t):
    """gSASRec transforms the target's logit so that its sigmoid is the power beta, then takes the mean of BCE."""
    torch = pytest.importorskip("torch")
    positive, negative = _scores()
    alpha = 5 / 39
    beta = alpha * ((1 - 1 / alpha) * t + 1 / alpha)
    assert gbce_beta(5, 40, t) == pytest.approx(beta, rel=1e-12)
    theirs = [torch.tensor(scores, dtype=torch.float64, requires_grad=True) for scores in (positive, negative)]
    powered = torch.log(1 / (torch.sigmoid(theirs[0]) ** -beta - 1))
    logits = torch.cat([powered[:, None], theirs[1]], dim=1)
    wanted = torch.zeros_like(logits)
    wanted[:, 0] = 1
    expected = torch.nn.functional.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
    expected.sum().backward()
    ours = [jnp.asarray(scores, jnp.float32) for scores in (positive, negative)]
    np.testing.assert_allclose(binary_cross_entropy(*ours, beta), expected.detach(), rtol=2e-6)
    gradients = jax.grad(lambda *scores: binary_cross_entropy(*scores, beta).sum(), argnums=(0, 1))(*ours)
    for gradient, scores in zip(gradients, theirs, strict=True):
        np.testing.assert_allclose(gradient, scores.grad, rtol=1e-5, atol=1e-7)


def test_ends_of_the_calibration():
    assert gbce_beta(7, 50, 0.0) == pytest.approx(1) and gbce_beta(7, 50, 1.0) == pytest.approx(7 / 49)
    assert gbce_beta(49, 50, 0.3) == pytest.approx(1)  # Nothing is left out, so nothing is corrected.


def test_great_scores_stay_finite():
    positive, negative = jnp.array([200.0, -200.0]), jnp.array([[-200.0], [200.0]])
    losses, gradient = jax.value_and_grad(lambda p: binary_cross_entropy(p, negative, 0.5).sum())(positive)
    assert losses == pytest.approx((0.5 * 200 + 200) / 2) and jnp.isfinite(gradient).all()


@pytest.mark.parametrize("num", [2, 6])
def test_negatives_are_their_own_and_never_the_target(num):
    """Whether all scores are made (6 x 8 > 40) or only those asked for."""
    rng = np.random.default_rng(3)
    hidden, table = (
        jnp.asarray(rng.normal(size=(9, 8)), jnp.float32),
        jnp.asarray(rng.normal(size=(40, 8)), jnp.float32),
    )
    targets, keys = jnp.asarray(rng.integers(1, 37, 9)), jax.random.split(jax.random.key(0), 9)
    positive, negative = target_and_negative_scores(hidden, table, targets, keys, num, 38)
    scores = np.asarray(hidden) @ np.asarray(table).T
    for row, (key, target) in enumerate(zip(keys, targets, strict=True)):
        items = np.asarray(sample_negatives(key, target, num, 38))
        assert (items >= 1).all() and (items < 38).all() and target not in items
        np.testing.assert_allclose(negative[row], scores[row, items], rtol=1e-5)
        np.testing.assert_allclose(positive[row], scores[row, target], rtol=1e-5)
        assert sample_negative(key, target, 38) == sample_negatives(key, target, 1, 38)[0]
    assert len({tuple(row.tolist()) for row in np.asarray(negative)}) == 9


def test_in_pieces_they_have_the_gradient_of_the_whole(monkeypatch):
    monkeypatch.setattr(loss_functions, "_LEAST_LOSS_POSITIONS", 4)
    rng = np.random.default_rng(4)
    hidden, table = (jnp.asarray(rng.normal(size=(rows, 8)), jnp.float32) for rows in (19, 30))
    targets = jnp.asarray(rng.integers(1, 30, 19))
    weights = jnp.asarray(rng.integers(0, 2, 19), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 19)

    def losses(hidden, table, targets, index):
        return binary_cross_entropy(*target_and_negative_scores(hidden, table, targets, keys[index], 3, 30), 0.4)

    def whole(hidden, table):
        return jnp.sum(weights * losses(hidden, table, targets, jnp.arange(19)))

    total, gradients = weighted_losses(losses, hidden, table, targets, weights)
    expected, wanted = jax.value_and_grad(whole, argnums=(0, 1))(hidden, table)
    assert float(total) == pytest.approx(float(expected), rel=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize("loss", ["bce", "gbce"])
def test_every_position_in_microbatches(loss):
    """The same negatives, loss and gradients however many rows are computed at once."""
    config = config_of(PLAIN, 6, loss=loss, num_negatives=4)
    loader = loader_of(config)
    payload = next(iter(loader.epoch(1)))
    found = [step_of(config, rows, loader)(state_of(PLAIN), loader.resident, payload) for rows in (6, 2)]
    assert_alike(*found, 2e-5)
    assert 0.3 < float(found[0][1]) < 3


def test_last_positions_hold_their_own_losses():
    """A batch's loss is the sum over its examples of the formula, with the negatives of each one's id."""
    config = dataclasses.replace(config_of(PLAIN, 6), train=TrainConfig(loss="gbce", num_negatives=3, batch_size=6))
    loader, model = loader_of(config), build_model(PLAIN)
    batch = loader.batch(loader.resident, next(iter(loader.epoch(1))))
    params, key = state_of(PLAIN).params, jax.random.key(5, impl="threefry2x32")
    groups = (LengthGroup(PLAIN.max_len, 6),)
    total, gradient = value_and_grad(model, config.train, params, batch, groups, key)
    hidden = last_hidden(model, {"params": params}, batch.items, batch.lengths, batch.timestamps)
    scores = np.asarray(model.apply({"params": params}, hidden, method="score"), np.float64)
    _, negative_key = jax.random.split(key)
    beta, expected = gbce_beta(3, PLAIN.vocab_size - 1, 0.75), 0.0
    for row in range(6):
        items = sample_negatives(jax.random.fold_in(negative_key, row), batch.targets[row], 3, PLAIN.vocab_size)
        told = beta * np.log(1 / (1 + np.exp(-scores[row, batch.targets[row]])))
        told += np.log(1 - 1 / (1 + np.exp(-scores[row, np.asarray(items)]))).sum()
        expected -= float(batch.weights[row]) * told / 4
    assert float(total) == pytest.approx(expected, rel=1e-5)
    halves, same = value_and_grad(model, config.train, params, batch, (LengthGroup(PLAIN.max_len, 2),), key)
    assert float(halves) == pytest.approx(float(total), rel=1e-5)
    for ours, theirs in zip(jax.tree.leaves(gradient), jax.tree.leaves(same), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("positions", ["last", "all"])
def test_several_devices_draw_the_same_negatives(tmp_path, positions):
    if len(jax.devices()) < 2:
        pytest.skip("one device")
    settings = {"epochs": 3, "d_model": 8, "num_layers": 1, "inner_size": 8, "batch_size": 8, "loss": "bce"}
    settings |= {"num_negatives": 3, "positions": positions, "schedule": "constant", "dropout": 0.0}
    settings |= {
        "attention_dropout": 0.0,
        "learning_rate": 0.1,
        "log_every": 1,
        "tensorboard": False,
        "progress": False,
    }
    losses = {}
    for strategy in ("single", "sharded"):
        run = fit(small_log(), "sasrec", run_dir=tmp_path / strategy, strategy=strategy, **settings)
        losses[strategy] = [line["loss"] for line in read_metrics(run.run_dir) if line["kind"] == "train"]
    assert losses["single"] == pytest.approx(losses["sharded"], rel=1e-4) and len(losses["single"]) > 1


@pytest.mark.parametrize("positions", ["last", "all"])
def test_a_run_learns(tmp_path, positions):
    synthetic = SyntheticConfig(num_users=60, num_items=20, min_events=8, max_events=12, noise=0.02)
    settings = {"epochs": 4, "d_model": 16, "num_layers": 1, "inner_size": 16, "batch_size": 8, "learning_rate": 1e-2}
    settings |= {"loss": "gbce", "num_negatives": 8, "positions": positions, "tensorboard": False, "progress": False}
    log = load_log(DataConfig(synthetic=synthetic))
    run = fit(log, "sasrec", run_dir=tmp_path / "run", schedule="constant", **settings)
    assert run.config.train.calibration == 0.75 and run.results["epochs"] == 4
    losses = [line["train_loss"] for line in read_metrics(run.run_dir) if line["kind"] == "valid"]
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss": "bce"}, "num_negatives=None must be at least 1 with loss='bce', for instance 1"),
        ({"loss": "gbce", "num_negatives": 0}, "num_negatives=0 must be at least 1 with loss='gbce', for instance 256"),
        ({"loss": "gbce", "num_negatives": 1, "gbce_t": 1.01}, "gbce_t=1.01 must lie between 0"),
        ({"loss": "gbce", "num_negatives": 1, "gbce_t": -0.1}, "gbce_t=-0.1 must lie between 0"),
        (
            {"loss": "bce", "num_negatives": 1, "gbce_t": 0.5},
            "gbce_t=0.5 is for loss='gbce'; with loss='bce' leave it out",
        ),
        (
            {"num_negatives": 1},
            "num_negatives=1 is for loss='sampled_ce' or 'bce' or 'gbce'; with loss='ce' leave it out",
        ),
        ({"loss": "bce", "num_negatives": 1, "negatives_power": 0.5}, "negatives_power=0.5 is for loss='sampled_ce'"),
        ({"loss": "gbce", "num_negatives": 1, "table_optimizer": "lazy_adam"}, "table_optimizer='lazy_adam' is for"),
        ({"loss": "bce", "num_negatives": 1, "loss_in_tiles": True}, "loss_in_tiles=True is for loss='ce'"),
        ({"loss": "gcbe"}, "loss='gcbe' must be one of"),
    ],
)
def test_bad_settings_are_one_line(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        TrainConfig(**settings)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_what_does_not_fit_a_catalogue_or_its_parts():
    train = TrainConfig(loss="gbce", num_negatives=9)
    with pytest.raises(ValueError, match="train.num_negatives=9 must be at most 8: .* a catalogue of 9"):
        ExperimentConfig("x", ModelConfig(vocab_size=10), train=train)
    with pytest.raises(ValueError, match="trains with train.loss='ce' or 'sampled_ce', not 'gbce'"):
        ExperimentConfig("x", train=train, parallel=ParallelConfig(catalogue_shards=2))
