"""The Mamba-2 mixer by the GPU kernels, interpreted, against plain JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.layers.rows import Rows
from tim4rec_jax.layers.ssd_mixer import SSDMixer
from tim4rec_jax.models import SSD4RecConfig

SIZES = {"vocab_size": 10, "max_len": 20, "d_model": 16, "head_dim": 16, "d_state": 16}
KERNELS = {"kernels": "pallas_triton"}


def mixer(**changes):
    return SSDMixer(SSD4RecConfig(**SIZES | changes))


def variables_and_input():
    rng = np.random.default_rng(0)
    u = jnp.asarray(rng.normal(size=(2, 20, 16)), jnp.float32)
    rows = Rows(jnp.ones((2, 20), bool), None, jnp.arange(2), deterministic=True)
    params = mixer().init(jax.random.key(0), u, None, rows)["params"]
    # Gains of 1 and biases of 0 would hide where they are applied.
    params["norm_scale"] = jnp.asarray(rng.normal(size=params["norm_scale"].shape), jnp.float32)
    params["out_proj"]["bias"] = jnp.asarray(rng.normal(size=16), jnp.float32)
    params["out_proj"]["kernel"] *= 50
    return params, u, rows


def run(changes, segment_ids=None):
    """Output, gradients by parameters and input, and what was left for looking at."""
    params, u, rows = variables_and_input()
    rows = rows._replace(segment_ids=segment_ids)

    def apply(params, u):
        (out, _, _), seen = mixer(**changes).apply({"params": params}, u, None, rows, mutable=["intermediates"])
        return jnp.sum(jnp.square(out.astype(jnp.float32))), (out, seen["intermediates"])

    (_, (out, seen)), gradients = jax.jit(jax.value_and_grad(apply, argnums=(0, 1), has_aux=True))(params, u)
    return out, gradients, seen


def near(actual, expected, fraction):
    actual, expected = np.asarray(actual, np.float32), np.asarray(expected, np.float32)
    assert np.abs(actual - expected).max() <= fraction * np.abs(expected).max()


def test_kernels_equal_plain_jax():
    plain, kernels = run({}), run(KERNELS)
    near(kernels[0], plain[0], 2e-6)
    jax.tree.map(lambda a, b: near(a, b, 2e-5), kernels[1], plain[1])


@pytest.mark.exhaustive
def test_kernels_equal_plain_jax_on_rows_of_several_histories():
    segment_ids = jnp.array([[1] * 7 + [2] * 9 + [3] * 4, [1] * 17 + [2] * 3])
    plain, kernels = run({}, segment_ids), run(KERNELS, segment_ids)
    near(kernels[0], plain[0], 2e-6)
    jax.tree.map(lambda a, b: near(a, b, 2e-5), kernels[1], plain[1])
    # Where histories begin is what makes the difference.
    assert np.abs(run(KERNELS)[0] - kernels[0])[0, 7:].max() > 1e-2 * np.abs(kernels[0]).max()


@pytest.mark.exhaustive
def test_kernels_in_bfloat16():
    plain, kernels = run({}), run(KERNELS | {"dtype": "bfloat16"})
    assert kernels[0].dtype == jnp.bfloat16
    near(kernels[0], plain[0], 3e-2)
    jax.tree.map(lambda a, b: near(a, b, 5e-2), kernels[1], plain[1])


def test_steps_and_the_output_of_the_ssd_can_be_looked_at():
    plain, kernels = run({})[2], run(KERNELS)[2]
    assert set(plain) == set(kernels) == {"scan", "step_size"}
    jax.tree.map(lambda a, b: near(a, b, 2e-6), kernels, plain)


@pytest.mark.parametrize("changes", [{}, KERNELS])
def test_the_last_position_alone_equals_the_last_of_all(changes):
    params, u, rows = variables_and_input()
    model, ends = mixer(**changes), jnp.array([19, 6])

    def apply(positions):
        given = rows._replace(positions=positions)
        return jax.jit(lambda p, u: model.apply({"params": p}, u, None, given)[0])(params, u)

    full, last = apply(None), apply(ends[:, None])
    np.testing.assert_allclose(last[:, 0], full[jnp.arange(2), ends], rtol=1e-5, atol=1e-5)
    several = apply(jnp.array([[3, 19], [0, 6]]))
    np.testing.assert_allclose(several[:, 1], last[:, 0], rtol=1e-5, atol=1e-5)
