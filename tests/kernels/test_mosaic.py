"""The kernels on Mosaic GPU in short: right on small inputs when interpreted, and lowered for a GPU at the real sizes.

The whole suite of each operator runs over them in the exhaustive tier.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kernels import mosaic
from kernels.causal_conv1d import causal_conv1d, pallas_mosaic
from kernels.selective_scan import selective_scan
from kernels.softmax_cross_entropy import softmax_cross_entropy
from tests.kernels.codegen import mosaic_kernels
from tests.kernels.op_suite import assert_near, ids_of

CONV = ["causal_conv1d_forward", "causal_conv1d_backward"]
SCAN = ["selective_scan_forward", "selective_scan_backward"]
LOSS = [f"softmax_cross_entropy_{name}" for name in ("forward", "d_hidden", "d_embedding")]


def value_and_gradients(op, arrays, cotangent, **options):
    """Value of an operator and its gradients by arrays by name."""
    y, pull = jax.vjp(lambda arrays: op(**arrays, **options), arrays)
    return y, pull(cotangent)[0]


def numbers(shapes, seed=0):
    """Normal float32 numbers of some shapes by name."""
    rng = np.random.default_rng(seed)
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def check(op, arrays, cotangent, kernel_options=None, **options):
    run = jax.jit(
        functools.partial(value_and_gradients, op, implementation="pallas_mosaic", **kernel_options or {}, **options)
    )
    actual = run(arrays, cotangent)
    expected = value_and_gradients(op, arrays, cotangent, implementation="reference", **options)
    for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        assert_near(one, other, 2e-6, "value or gradient")


def conv_shapes(batch, length, channels):
    return {"x": (batch, length, channels), "weight": (4, channels), "bias": (channels,)}


def scan_shapes(batch, length, width, state):
    maps, values = (batch, length, state), (batch, length, width)
    return {"x": values, "dt": values, "A": (width, state), "B": maps, "C": maps, "D": (width,), "dt_bias": (width,)}


def test_convolution_of_several_histories():
    # A second block of channels that overlaps the first.
    arrays = numbers(conv_shapes(2, 7, 130))
    ids = ids_of([(3, 4), (2, 1, 2)], 7)
    check(causal_conv1d, arrays, numbers({"dy": (2, 7, 130)}, 1)["dy"], activation="silu", segment_ids=ids)


@pytest.mark.exhaustive
def test_convolution_of_a_long_row_in_strips():
    assert pallas_mosaic.default_segments(1, 70, 5) == 2
    arrays = numbers(conv_shapes(1, 70, 5))
    for ids in (None, ids_of([(33, 3, 34)], 70)):
        check(causal_conv1d, arrays, numbers({"dy": (1, 70, 5)}, 1)["dy"], activation="silu", segment_ids=ids)


def test_scan_of_several_histories():
    # More than one chunk of positions, the last of them short.
    arrays = numbers(scan_shapes(2, 6, 5, 3) | {"initial_state": (2, 5, 3)})
    arrays["A"] = -jnp.exp(arrays["A"])
    cotangent = numbers({"y": (2, 6, 5), "state": (2, 5, 3)}, 1)
    options = {"return_final_state": True, "segment_ids": ids_of([(2, 4), (1, 3)], 6)}
    check(selective_scan, arrays, (cotangent["y"], cotangent["state"]), **options)


@pytest.mark.skipif(not mosaic.INTERPRETS_PRODUCTS, reason="JAX 0.10 does not interpret its products")
def test_loss_over_a_catalogue_with_masked_items():
    arrays = numbers({"hidden": (5, 8), "embedding": (70, 8)})
    options = {"targets": jnp.array([0, 69, -1, 7, 30]), "masked": jnp.arange(70) % 5 == 1}
    check(softmax_cross_entropy, arrays, numbers({"d": (5,)}, 1)["d"], {"precision": "default"}, **options)


def shaped(shapes, dtype, wide=()):
    return {name: jax.ShapeDtypeStruct(s, jnp.float32 if name in wide else dtype) for name, s in shapes.items()}


def lowered(op, arrays, cotangent, **options):
    options = options | {"implementation": "pallas_mosaic", "interpret": False}
    return mosaic_kernels(functools.partial(value_and_gradients, op, **options), arrays, cotangent)


both = pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.exhaustive)])


@both
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.parametrize("shape", [(2048, 50, 192), (1024, 200, 192), (2048, 50, 640), (1, 65536, 192), (3, 5, 7)])
def test_convolution_lowers(shape, packed, dtype):
    arrays = shaped(conv_shapes(*shape), dtype, wide=("weight", "bias"))
    ids = jnp.ones(shape[:2], jnp.int32) if packed else None
    dy = jax.ShapeDtypeStruct(shape, dtype)
    for activation in ("silu",) if packed else ("silu", "hard_swish", "none"):
        assert lowered(causal_conv1d, arrays, dy, activation=activation, segment_ids=ids) == CONV


@both
@pytest.mark.parametrize("packed", [pytest.param(False, marks=pytest.mark.exhaustive), True])
@pytest.mark.parametrize("shape", [(512, 200, 128, 32), (64, 50, 128, 16), (1, 65536, 640, 64), (3, 7, 5, 3)])
def test_scan_lowers(shape, packed, dtype):
    batch, length, width, state = shape
    arrays = shaped(scan_shapes(*shape) | {"initial_state": (batch, width, state)}, dtype, wide=("A", "D", "dt_bias"))
    ids = jnp.ones((batch, length), jnp.int32) if packed else None
    dy = jax.ShapeDtypeStruct((batch, length, width), dtype)
    if not packed:
        assert lowered(selective_scan, arrays, dy) == SCAN
    d_final = jax.ShapeDtypeStruct((batch, width, state), jnp.float32)
    assert lowered(selective_scan, arrays, (dy, d_final), segment_ids=ids, return_final_state=True) == SCAN


@both
@pytest.mark.parametrize("shape", [(2048, 12102, 64), (2048, 3417, 128), (4096, 1_000_000, 256), (5, 3, 8)])
def test_loss_lowers(shape, dtype):
    targets, items, width = shape
    arrays = shaped({"hidden": (targets, width), "embedding": (items, width)}, dtype)
    options = {"targets": jnp.zeros(targets, jnp.int32), "masked": jnp.zeros(items, bool)}
    assert lowered(softmax_cross_entropy, arrays, jax.ShapeDtypeStruct((targets,), jnp.float32), **options) == LOSS


def test_lowers_inside_a_checked_shard_map():
    """Gradients of parameters, the same on all devices, are summed."""
    rows, same = P("rows"), P()
    mesh = jax.make_mesh((len(jax.devices()),), ("rows",), axis_types=(jax.sharding.AxisType.Auto,))
    options = {"implementation": "pallas_mosaic", "interpret": False}
    sharded = jax.shard_map(
        lambda x, weight: causal_conv1d(x, weight, **options), mesh=mesh, in_specs=(rows, same), out_specs=rows
    )
    gradients = jax.value_and_grad(lambda *arrays: (sharded(*arrays) ** 2).sum(), argnums=(0, 1))
    x, weight = (jax.ShapeDtypeStruct(s, jnp.float32) for s in [(8, 70, 192), (4, 192)])
    assert mosaic_kernels(gradients, x, weight) == CONV
    assert "psum" in str(jax.make_jaxpr(gradients)(x, weight))


def test_nothing_is_lowered_for_what_has_no_kernels():
    x = jax.ShapeDtypeStruct((2, 5, 7), jnp.float32)
    assert mosaic_kernels(lambda x: causal_conv1d(x, x[0, :4], implementation="xla"), x) == []
