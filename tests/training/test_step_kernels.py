"""Training with the GPU kernels, interpreted, against training with plain JAX: on prefixes and on all positions."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.models.settings import sibling
from tim4rec_jax import ExperimentConfig, TrainConfig, build_model
from tim4rec_jax.data.loader import Batch, PackedBatch
from tim4rec_jax.data.packing import LengthGroup
from tim4rec_jax.models import TiM4RecConfig
from tim4rec_jax.training.step import init_state, make_optimizer, train_step

ROWS, MAX_LEN, VOCAB, STEPS = 6, 18, 40, 20
MODEL = TiM4RecConfig(vocab_size=VOCAB, max_len=MAX_LEN, d_model=16, head_dim=16, d_state=16, time_dropout=0.1)
GROUPS = (LengthGroup(MAX_LEN, 4), LengthGroup(7, 3))
KERNELS = {
    "everything": (
        {"kernels": "pallas_triton"},
        {"loss_in_tiles": True},
    ),
    "loss in tiles": ({}, {"loss_in_tiles": True}),
}


class GivenBatches:
    """A loader whose payload is the batch."""

    num_batches, resident = 1, ()

    def batch(self, resident, payload):
        return payload


def batches():
    rng = np.random.default_rng(5)
    for _ in range(STEPS):
        lengths = rng.integers(1, MAX_LEN + 1, ROWS).astype(np.int32)
        inside = np.arange(MAX_LEN) < lengths[:, None]
        items = (rng.integers(1, VOCAB, inside.shape) * inside).astype(np.int32)
        times = (np.cumsum(rng.integers(0, 10_000, inside.shape), axis=1) * inside).astype(np.float32)
        targets = rng.integers(1, VOCAB, ROWS).astype(np.int32)
        yield Batch(*(jnp.asarray(a) for a in (items, lengths, times, targets, np.ones(ROWS, np.float32))))


@functools.cache
def losses(name):
    """The loss of every step."""
    model_changes, train_changes = KERNELS.get(name, ({}, {}))
    train = TrainConfig(batch_size=ROWS, **train_changes)
    config = ExperimentConfig(name="steps", model=dataclasses.replace(MODEL, **model_changes), train=train)
    model, optimizer = build_model(config.model), make_optimizer(train, STEPS)
    state = init_state(model, optimizer, train.seed)
    step = jax.jit(functools.partial(train_step, model, optimizer, config, GROUPS, GivenBatches()))
    values = []
    for batch in batches():
        state, loss = step(state, (), batch)
        values.append(float(loss))
    return np.array(values)


@pytest.mark.parametrize("name", [pytest.param("everything", marks=pytest.mark.exhaustive), "loss in tiles"])
def test_twenty_steps_follow_plain_jax(name):
    plain = losses("plain")
    assert plain[-1] != plain[0]
    np.testing.assert_allclose(losses(name), plain, rtol=1e-5)


def test_the_step_that_is_run_has_kernels_in_it():
    model_changes, train_changes = KERNELS["everything"]
    config = ExperimentConfig(
        name="steps", model=dataclasses.replace(MODEL, **model_changes), train=TrainConfig(**train_changes)
    )
    model, optimizer = build_model(config.model), make_optimizer(config.train, STEPS)
    state = init_state(model, optimizer, 0)
    step = functools.partial(train_step, model, optimizer, config, GROUPS, GivenBatches())
    program = str(jax.make_jaxpr(step)(state, (), next(batches())))
    for kernel in ("ssd_forward", "ssd_backward", "causal_conv1d_forward", "causal_conv1d_backward"):
        assert kernel in program, kernel
    assert program.count("pallas_call") > 6


PACKED_STEPS = 5
# Two histories and padding in a row, which has 18 positions.
PACKED = sibling(MODEL, "tim4rec_causal")


def packed_batches():
    rng = np.random.default_rng(6)
    position = np.arange(MAX_LEN)
    for _ in range(PACKED_STEPS):
        second, end = (np.sort(rng.integers(1, MAX_LEN + 1, (ROWS, 2)), axis=1).T)[:, :, None]
        starts, inside = (position == 0) | (position == second) | (position == end), position < end
        items, targets = ((rng.integers(1, VOCAB, inside.shape) * inside).astype(np.int32) for _ in range(2))
        times = (np.cumsum(rng.integers(0, 10_000, inside.shape), axis=1) * inside).astype(np.int32)
        segment_ids = (np.cumsum(starts, axis=1) * inside).astype(np.int32)
        batch = PackedBatch(items, segment_ids, times, targets, inside.astype(np.float32))
        yield jax.tree.map(jnp.asarray, batch)


def packed_step(name):
    """The step, jitted, and the state before the first one."""
    model_changes, train_changes = KERNELS.get(name, ({}, {}))
    train = TrainConfig(batch_size=ROWS, positions="all", **train_changes)
    config = ExperimentConfig(name="steps", model=dataclasses.replace(PACKED, **model_changes), train=train)
    model, optimizer = build_model(config.model), make_optimizer(train, PACKED_STEPS)
    state = init_state(model, optimizer, train.seed)
    groups = (LengthGroup(MAX_LEN, ROWS),)
    return functools.partial(train_step, model, optimizer, config, groups, GivenBatches()), state


def packed_losses(name):
    step, state = packed_step(name)
    step, values = jax.jit(step), []
    for batch in packed_batches():
        state, loss = step(state, (), batch)
        values.append(float(loss))
    return np.array(values)


@pytest.mark.exhaustive
def test_steps_on_all_positions_follow_plain_jax():
    plain = packed_losses("plain")
    assert plain[-1] != plain[0]
    np.testing.assert_allclose(packed_losses("everything"), plain, rtol=1e-5)


def test_the_step_on_all_positions_has_kernels_in_it():
    step, state = packed_step("everything")
    program = str(jax.make_jaxpr(step)(state, (), next(packed_batches())))
    for kernel in ("ssd_forward", "ssd_backward", "causal_conv1d_forward", "causal_conv1d_backward"):
        assert kernel in program, kernel


def test_a_fused_loss_is_for_cross_entropy_only():
    with pytest.raises(ValueError, match="loss_in_tiles=True is for loss='ce'; leave it out for loss='bpr'"):
        TrainConfig(loss="bpr", loss_in_tiles=True)
