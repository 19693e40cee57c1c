"""Training on masked events: what is drawn, that neither batch nor microbatch matters, losses, settings, refusals."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.settings import sibling
from tests.training.test_all_positions import (
    ITEMS,
    MODEL,
    assert_alike,
    config_of,
    loader_of,
    only_batch,
    small_log,
    state_of,
    step_of,
)
from tim4rec_jax import ExperimentConfig, ModelConfig, TrainConfig, build_model, fit
from tim4rec_jax.models import draw_masks
from tim4rec_jax.run_dir import read_config
from tim4rec_jax.training.step import init_state, make_optimizer

BERT = dataclasses.replace(sibling(MODEL, "bert4rec"), num_layers=1)
STILL = dataclasses.replace(BERT, dropout=0.0, attention_dropout=0.0)


def packed(rows=200, length=40, seed=0):
    """Segment ids of rows that hold histories of 1 to 12 events and end in padding, and what may be masked.

    The first events of every fourth history are context.
    """
    rng = np.random.default_rng(seed)
    segment_ids, candidates = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        first, number = 0, 0
        while (n := rng.integers(1, 13)) and first + n <= length - 1:
            number += 1
            segment_ids[row, first : first + n] = number
            candidates[row, first + (n // 2 if number % 4 == 0 else 0) : first + n] = True
            first += n
    return segment_ids, candidates


def draw(segment_ids, candidates, rate, last_share, ids=None, seed=0):
    ids = np.arange(len(segment_ids)) if ids is None else ids
    drawn = jax.jit(functools.partial(draw_masks, rate=rate, last_share=last_share))
    return np.asarray(drawn(jax.random.key(seed), ids, segment_ids, candidates))


def histories(segment_ids, *others):
    """Each history's part of the other arrays."""
    for row in range(len(segment_ids)):
        for number in range(1, segment_ids[row].max() + 1):
            yield tuple(other[row, segment_ids[row] == number] for other in others)


@pytest.mark.quick
def test_the_shares_that_are_drawn():
    segment_ids, candidates = packed()
    rate, last_share = 0.3, 0.25
    masked = draw(segment_ids, candidates, rate, last_share)
    assert not (masked & ~candidates).any()
    drawn, sizes, alone, by_chance = 0, 0, 0, 0.0
    for own, may in histories(segment_ids, masked, candidates):
        assert own.any()
        only_last = own.sum() == 1 and own[-1]
        if may.sum() > 1:
            nothing = (1 - rate) ** may.sum()
            alone += only_last
            by_chance += last_share + (1 - last_share) * (nothing + rate * (1 - rate) ** (may.sum() - 1))
            drawn, sizes = drawn + own.sum(), sizes + may.sum()
    assert sizes > 5000
    assert alone == pytest.approx(by_chance, abs=4 * np.sqrt(by_chance))
    # Without the last events alone it is the rate itself, but for histories of which nothing was drawn.
    free = draw(segment_ids, candidates, rate, 0.0)
    expected = [rate * may.sum() + (1 - rate) ** may.sum() for (may,) in histories(segment_ids, candidates)]
    assert free.sum() == pytest.approx(sum(expected), abs=4 * np.sqrt(rate * candidates.sum()))
    long = np.zeros((1, 4000), np.int32) + 1
    assert draw(long, long > 0, 0.2, 0.0).mean() == pytest.approx(0.2, abs=4 * np.sqrt(0.16 / 4000))


@pytest.mark.quick
def test_ends_of_the_shares():
    segment_ids, candidates = packed(rows=20)
    np.testing.assert_array_equal(draw(segment_ids, candidates, 1.0, 0.0), candidates)
    for own in histories(segment_ids, draw(segment_ids, candidates, 0.5, 1.0)):
        assert own[0].tolist() == [False] * (len(own[0]) - 1) + [True]
    # Rows that only fill a batch have nothing to mask.
    assert not draw(np.zeros((2, 5), np.int32), np.zeros((2, 5), bool), 1.0, 1.0).any()


@pytest.mark.quick
def test_a_row_draws_the_same_in_any_batch():
    segment_ids, candidates = packed(rows=12)
    masked = draw(segment_ids, candidates, 0.4, 0.2)
    order = np.array([7, 2, 9])
    np.testing.assert_array_equal(draw(segment_ids[order], candidates[order], 0.4, 0.2, ids=order), masked[order])
    for other in (
        draw(segment_ids, candidates, 0.4, 0.2, ids=100 + np.arange(12)),
        draw(segment_ids, candidates, 0.4, 0.2, seed=1),
    ):
        assert 0.2 < (other != masked)[candidates].mean() < 0.6
    # Nor do two rows draw alike.
    same = np.broadcast_to(segment_ids[:1], segment_ids.shape), np.broadcast_to(candidates[:1], candidates.shape)
    assert len({row.tobytes() for row in draw(*same, 0.4, 0.0)}) == 12


def masked_config(model=BERT, batch_size=40, **train):
    base = config_of(MODEL, batch_size)
    return dataclasses.replace(base, model=model, train=dataclasses.replace(base.train, positions="masked", **train))


@pytest.mark.exhaustive
def test_microbatches_do_not_matter_with_dropout():
    config = masked_config(window_context=3)
    loader = loader_of(config, max_events=40)
    payload, state = only_batch(loader), state_of(BERT)
    expected = step_of(config, 40, loader)(state, loader.resident, payload)
    for rows_at_once in (7, 16):
        assert_alike(step_of(config, rows_at_once, loader)(state, loader.resident, payload), expected, 1e-5)


def test_every_step_draws_anew_and_the_same_again():
    config = masked_config(STILL)
    loader = loader_of(config)
    payload, state, step = only_batch(loader), state_of(STILL), step_of(config, 40, loader)
    losses = [
        float(step(dataclasses.replace(state, step=jnp.int32(n)), loader.resident, payload)[1]) for n in (0, 1, 2, 0)
    ]
    assert len(set(losses)) == 3 and losses[0] == losses[3]


def test_an_item_that_is_masked_is_not_read():
    """With all events masked, and places all alike, it does not matter which item stood where: all are only targets."""
    config = masked_config(STILL, mask_rate=1.0, mask_last_share=0.0)
    loader, state = loader_of(config), state_of(STILL)
    payload, step = only_batch(loader), step_of(config, 40, loader)
    encoder = state.params["encoder"]
    alike = jax.tree.map(jnp.zeros_like, encoder["position_embedding"])
    state = dataclasses.replace(state, params=state.params | {"encoder": encoder | {"position_embedding": alike}})
    (items, times), proposal = loader.resident
    read, mixed = np.unique(payload.rows[payload.rows >= 0]), np.array(items)
    mixed[read] = np.random.default_rng(0).permutation(mixed[read])
    losses = [float(step(state, ((column, times), proposal), payload)[1]) for column in (items, jnp.asarray(mixed))]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    state = dataclasses.replace(state, params=state.params | {"encoder": encoder})
    losses = [float(step(state, ((column, times), proposal), payload)[1]) for column in (items, jnp.asarray(mixed))]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


@pytest.mark.parametrize(
    "train",
    [
        {},
        {"loss": "bce", "num_negatives": 2},
        {"loss": "sampled_ce", "num_negatives": 9, "negatives_power": 0.5},
    ],
    ids=lambda train: train.get("loss", "ce"),
)
def test_steps_lower_every_loss(train):
    config = masked_config(batch_size=4, learning_rate=1e-2, **train)
    loader = loader_of(config)
    optimizer = make_optimizer(config.train, 100)
    step, state, losses = step_of(config, 2, loader, optimizer), init_state(build_model(BERT), optimizer, seed=1), []
    for epoch in range(1, 9):
        for payload in loader.epoch(epoch):
            state, loss = step(state, loader.resident, payload)
            losses.append(float(loss))
    assert np.mean(losses[-2 * loader.num_batches :]) < np.mean(losses[: loader.num_batches]) - 0.02
    if config.train.loss == "ce":
        assert losses[0] == pytest.approx(np.log(ITEMS + 1), rel=0.1)


def test_the_first_events_are_counted_among_the_targets_that_negatives_are_drawn_by():
    config = masked_config(loss="sampled_ce", num_negatives=3, negatives_power=1.0)
    log, loader = small_log(), loader_of(config)
    firsts, ends = log.offsets[:-1], log.offsets[1:] - 2
    read = [log.items[first:end] for first, end in zip(firsts, ends, strict=True) if end - first > 1]
    counts = np.bincount(np.concatenate(read), minlength=ITEMS + 1)
    weights = np.maximum(counts[1:], 1)
    expected = weights / weights.sum()
    drawn = np.asarray(loader.negatives(loader.resident, jax.random.key(0)).log_expected)
    assert np.abs(np.exp(drawn)[:, None] / 3 - expected).min(axis=1).max() < 1e-6


def test_fit_masks_events_unless_told_otherwise(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = {"epochs": 1, "d_model": 16, "num_layers": 1, "inner_size": 16, "progress": False, "tensorboard": False}
    run = fit(small_log(), "bert4rec", **small)
    train = read_config(run.run_dir).train
    assert train.positions == "masked" and train.masking == (0.2, 1 / 11)
    assert read_config(run.run_dir).model.max_len == np.diff(small_log().offsets).max()
    [listed] = run.recommender.recommend([run.recommender.history_of_user(run.recommender.users[0])], 4)
    assert len(listed) == 4
    prefixes = fit(small_log(), "bert4rec", positions="last", **small)
    assert read_config(prefixes.run_dir).train.positions == "last" and prefixes.metrics["test"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "train", "message"),
    [
        ("bert4rec", {"positions": "all"}, "'all' needs a causal model .*'bert4rec' is not: .*, or .*='masked'"),
        ("sasrec", {"positions": "masked"}, "'masked' needs a model that reads masked .*'sasrec' does not: .*bert4rec"),
        ("bert4rec", {"positions": "masked", "loss": "bpr"}, "positions='masked' trains with every loss but 'bpr'"),
        ("bert4rec", {"positions": "masked", "mask_rate": 0.0}, "mask_rate=0.0 must be over 0 and at most 1"),
        ("bert4rec", {"positions": "masked", "mask_rate": 1.1}, "mask_rate=1.1 must be over 0 and at most 1"),
        ("bert4rec", {"positions": "masked", "mask_rate": float("nan")}, "mask_rate=nan must be over 0"),
        ("bert4rec", {"positions": "masked", "mask_last_share": -0.1}, "mask_last_share=-0.1 must lie between 0 and 1"),
        ("bert4rec", {"mask_rate": 0.2}, "mask_rate=0.2 is for positions='masked'; with positions='last' leave it out"),
        ("sasrec", {"positions": "all", "mask_last_share": 0.5}, "mask_last_share=0.5 is for positions='masked'"),
    ],
)
def test_settings_that_do_not_go_together(name, train, message):
    with pytest.raises(ValueError, match=message) as raised:
        ExperimentConfig("test", ModelConfig(name=name), train=TrainConfig(**train))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 300


@pytest.mark.quick
def test_a_score_of_what_was_seen_is_refused():
    with pytest.raises(ValueError, match="model.seen_bias needs a causal model, which model.name='bert4rec' is not"):
        ExperimentConfig("test", ModelConfig(name="bert4rec", seen_bias=True))
