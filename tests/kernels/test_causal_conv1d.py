"""The causal convolution, in every implementation, against loops in NumPy."""

import functools
from dataclasses import dataclass, replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import triton as pltriton
from jax.sharding import PartitionSpec as P

from kernels.causal_conv1d import IMPLEMENTATIONS, causal_conv1d, causal_conv1d_last, pallas_triton
from kernels.causal_conv1d.config import CausalConv1dConfig, default_config
from tests.kernels.walks import ACTIVATIONS, convolution

KERNELS = "pallas_triton"
MOSAIC = "pallas_mosaic"
# Segments that divide nothing, strips and channels that do not exist.
CUT = CausalConv1dConfig(
    channels=4, strips=4, segments=3, forward_unroll=3, backward_unroll=2, forward_warps=1, backward_warps=1
)
# What the interpreter of Mosaic GPU kernels takes seconds for is part of the exhaustive tier.
SLOW = {MOSAIC: [pytest.mark.exhaustive]}
FORMS = {"reference": [None], "xla": [None], KERNELS: [None, CUT], MOSAIC: [None]}
# Outputs and gradients, as shares of the largest magnitude.
TOLERANCES = {"float32": (2e-5, 1e-4), "float64": (1e-10, 1e-10)}

by_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
by_form = pytest.mark.parametrize(
    ("implementation", "config"),
    [
        pytest.param(name, c, id=name if c is None else f"{name}-cut", marks=SLOW.get(name, []))
        for name, configs in FORMS.items()
        for c in configs
    ],
)


@dataclass(frozen=True)
class Case:
    """b, l, c, K, the activation's name, and whether there is a bias."""

    batch: int
    length: int
    channels: int
    taps: int
    activation: str
    bias: bool = True


CASES = [
    Case(1, 1, 1, 1, "none", bias=False),
    Case(3, 2, 5, 4, "silu"),
    Case(3, 17, 5, 8, "hard_swish", bias=False),
    Case(1, 300, 3, 2, "silu", bias=False),
    Case(2, 50, 192, 4, "silu"),
    Case(1, 200, 128, 4, "hard_swish"),
]
SMALL = Case(3, 9, 5, 4, "silu")


@functools.cache
def inputs(case):
    """x, weight, bias or None, and dy, in float64 with float32 values."""
    rng = np.random.default_rng([case.length, case.taps])
    shape = (case.batch, case.length, case.channels)
    x, weight, bias, dy = (
        rng.normal(size=s).astype(np.float32).astype(np.float64)
        for s in (shape, (case.taps, case.channels), (case.channels,), shape)
    )
    return 2 * x, weight, bias if case.bias else None, dy


def value_and_gradients(x, weight, bias, dy, **kwargs):
    """Returns y and the gradients by x, weight and, if there is one, bias."""
    given = [a for a in (x, weight, bias) if a is not None]
    y, pull = jax.vjp(lambda *given: causal_conv1d(*given, **kwargs), *given)
    return [y, *pull(dy)]


def in_dtype(arrays, dtype):
    return [None if a is None else jnp.asarray(a, dtype) for a in arrays]


def assert_near(actual, expected, tolerances):
    """y, then gradients, each within a share of the expected array's largest magnitude."""
    assert len(actual) == len(expected)
    for index, (one, other) in enumerate(zip(actual, expected, strict=True)):
        assert one.shape == other.shape
        worst, limit = np.abs(np.asarray(one, np.float64) - other).max(), np.abs(other).max() * tolerances[index > 0]
        assert worst <= limit, f"array {index}: off by {worst:.2e}, allowed {limit:.2e}"


def check(case, dtype, **kwargs):
    arrays = in_dtype(inputs(case), dtype)
    run = jax.jit(functools.partial(value_and_gradients, activation=case.activation, **kwargs))
    assert_near(run(*arrays), convolution(case.activation, *inputs(case)), TOLERANCES[dtype])


def test_the_suite_knows_every_implementation():
    assert set(FORMS) == set(IMPLEMENTATIONS)


@by_form
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients(case, implementation, config):
    check(case, "float32", implementation=implementation, config=config)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values_and_gradients_in_float64(case, implementation, x64):
    check(case, "float64", implementation=implementation)


@by_form
def test_float32_beside_64_bit_mode(implementation, config, x64):
    check(SMALL, "float32", implementation=implementation, config=config)


def by_loops(x, weight, bias):
    y = np.zeros(x.shape)
    for t in range(x.shape[1]):
        for back in range(min(weight.shape[0], t + 1)):
            y[:, t] += weight[-1 - back] * x[:, t - back]
    return y + bias


@by_activation
def test_equals_the_loops(activation):
    x, weight, bias, _ = in_dtype(inputs(SMALL), np.float32)
    expected = ACTIVATIONS[activation][0](by_loops(x, weight, bias))
    actual = causal_conv1d(x, weight, bias, activation=activation)
    assert actual.dtype == jnp.float32
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@by_activation
@pytest.mark.parametrize("implementation", FORMS)
def test_bfloat16_stays_bfloat16_and_close(activation, implementation):
    x, weight, bias, dy = in_dtype(inputs(SMALL), jnp.bfloat16)
    weight, bias = weight.astype(jnp.float32), bias.astype(jnp.float32)
    run = jax.jit(functools.partial(value_and_gradients, activation=activation, implementation=implementation))
    y, dx, dweight, dbias = run(x, weight, bias, dy)
    assert (y.dtype, dx.dtype) == (jnp.bfloat16, jnp.bfloat16)
    assert (dweight.dtype, dbias.dtype) == (jnp.float32, jnp.float32)
    expected = convolution(activation, x, weight, bias, dy)
    assert_near([y, dx, dweight, dbias], expected, (2e-2, 2e-2))
    if implementation in (KERNELS, MOSAIC):
        # Only what is stored is rounded.
        assert_near([y, dweight, dbias], [expected[0], *expected[2:]], (2**-8, 1e-4))


@pytest.mark.parametrize("implementation", [KERNELS, MOSAIC])
def test_kernels_take_bfloat16_parameters(implementation):
    arrays = in_dtype(inputs(SMALL), jnp.bfloat16)
    run = functools.partial(value_and_gradients, activation="silu", implementation=implementation)
    results = jax.jit(run)(*arrays)
    assert {a.dtype for a in results} == {jnp.dtype(jnp.bfloat16)}
    assert_near(results, convolution("silu", *arrays), (2**-8, 2**-8))


@by_form
def test_vmap(implementation, config):
    x, weight, bias, dy = in_dtype(inputs(SMALL), jnp.float32)
    run = functools.partial(value_and_gradients, activation="silu", implementation=implementation, config=config)
    many = [jnp.stack([a, a[::-1] * 0.5]) for a in (x, weight, dy)]
    results = jax.jit(jax.vmap(run, in_axes=(0, 0, None, 0)))(many[0], many[1], bias, many[2])
    for index in range(2):
        expected = convolution("silu", many[0][index], many[1][index], bias, many[2][index])
        assert_near([a[index] for a in results], expected, TOLERANCES["float32"])


@by_form
def test_inside_shard_map(implementation, config):
    """Rows over the devices, parameters on all of them: their gradient is summed."""
    devices = len(jax.devices())
    x, weight, bias, dy = in_dtype(inputs(replace(SMALL, batch=2 * devices)), jnp.float32)
    rows, same = P("devices"), P()
    sharded = jax.shard_map(
        functools.partial(causal_conv1d, activation="silu", implementation=implementation, config=config),
        mesh=jax.make_mesh((devices,), ("devices",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(rows, same, same),
        out_specs=rows,
        # JAX interprets kernels only without this check; that compiled ones pass it is tested where they are compiled.
        check_vma=implementation not in (KERNELS, MOSAIC),
    )

    def run(x, weight, bias, dy):
        y, pull = jax.vjp(sharded, x, weight, bias)
        return [y, *pull(dy)]

    assert_near(jax.jit(run)(x, weight, bias, dy), convolution("silu", x, weight, bias, dy), TOLERANCES["float32"])


def _guarded(access):
    """Turns a load or store into one that leaves not-a-number behind where it touches what is outside its array."""

    def guarded(ref, *tile, mask, **kwargs):
        outside = False
        for index, size in zip(ref.transforms[-1].indices, ref.ref.shape, strict=True):
            outside |= (index < 0) | (index >= size)
        bad = jnp.any(outside & mask)
        value = access(ref, *(jnp.where(bad, jnp.nan, t) for t in tile), mask=mask, **kwargs)
        return value if tile else jnp.where(bad, jnp.nan, value)

    return guarded


@pytest.mark.parametrize(
    ("case", "config"),
    [
        (Case(3, 13, 5, 4, "silu"), None),
        (Case(3, 13, 5, 4, "silu"), CUT),
        (Case(5, 7, 12, 3, "none"), replace(CUT, segments=1, backward_unroll=5)),
    ],
    ids=["default", "cut", "whole rows"],
)
def test_nothing_outside_an_array_is_touched(case, config, monkeypatch):
    accesses = SimpleNamespace(load=_guarded(pltriton.load), store=_guarded(pltriton.store))
    monkeypatch.setattr(pallas_triton, "pltriton", accesses)
    check(case, "float32", implementation=KERNELS, config=config)


@by_activation
def test_one_position_equals_the_full_form(activation, x64):
    x, weight, bias, _ = inputs(SMALL)
    window = np.pad(x, ((0, 0), (3, 0), (0, 0)))
    full = causal_conv1d(jnp.asarray(x), weight, bias, activation=activation)
    for t in (0, 2, 8):
        one = causal_conv1d_last(jnp.asarray(window[:, t : t + 4]), weight, bias, activation=activation)
        np.testing.assert_allclose(one, full[:, t], rtol=1e-12, atol=1e-12)


def test_one_position_without_bias_in_bfloat16():
    x, weight = (a.astype(np.float32) for a in inputs(SMALL)[:2])
    x = x[:, :4]
    one = causal_conv1d_last(jnp.asarray(x, jnp.bfloat16), weight)
    assert one.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(one, np.float64), by_loops(x, weight, 0)[:, -1], rtol=2e-2, atol=0.1)


@pytest.mark.parametrize("length", [1, 50, 200, 65536])
@pytest.mark.parametrize("channels", [1, 5, 192, 640])
@pytest.mark.parametrize("batch", [1, 2048])
def test_default_config_is_allowed(batch, length, channels):
    config = default_config(batch=batch, length=length, channels=channels)
    config.check()
    assert config.channels * config.strips <= 512
    assert config.segments <= length


def test_one_long_row_fills_a_gpu():
    config = default_config(batch=1, length=65536, channels=192)
    assert 192 * config.segments >= 132 * 512
    assert 65536 // config.segments >= 32


def test_bad_arguments():
    x, weight, bias, _ = in_dtype(inputs(SMALL), np.float32)
    with pytest.raises(ValueError, match=r"x \(3, 9\) and weight \(4, 5\) must be \[b, l, c\] and \[K, c\]"):
        causal_conv1d(x[..., 0], weight)
    with pytest.raises(ValueError, match=r"x \(3, 9, 5\) and weight \(4, 4\) must be \[b, l, c\] and \[K, c\]"):
        causal_conv1d(x, weight[:, :4])
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), expected \(5,\)"):
        causal_conv1d(x, weight, bias[:1])
    with pytest.raises(ValueError, match=r"activation='gelu' must be one of \['hard_swish', 'none', 'silu'\]"):
        causal_conv1d(x, weight, activation="gelu")
    with pytest.raises(ValueError, match=r"implementation='cuda' of causal_conv1d must be one of \['pallas_mosaic', "):
        causal_conv1d(x, weight, implementation="cuda")
    with pytest.raises(ValueError, match=r"window \(3, 9, 5\) must be \[b, K, c\] for weight \(4, 5\)"):
        causal_conv1d_last(x, weight)
    with pytest.raises(ValueError, match=r"bias has shape \(1,\), expected \(5,\)"):
        causal_conv1d_last(x[:, :4], weight, bias[:1])


@pytest.mark.parametrize("implementation", [KERNELS, MOSAIC])
def test_what_the_kernels_do_not_offer(implementation):
    x, weight, bias, _ = in_dtype(inputs(SMALL), np.float32)
    run = functools.partial(causal_conv1d, implementation=implementation)
    with pytest.raises(ValueError, match=r"x is float16: the GPU kernels of causal_conv1d take float32 or bfloat16"):
        run(x.astype(jnp.float16), weight)
    with pytest.raises(ValueError, match=r"bias is float16: "):
        run(x, weight, bias.astype(jnp.float16))
    with pytest.raises(ValueError, match=r"weight has K=9 taps: the GPU kernels of causal_conv1d offer 1 to 8"):
        run(x, jnp.ones((9, 5)))
    with pytest.raises(ValueError, match=r"x \(3, 0, 5\) is empty"):
        run(x[:, :0], weight)
    if implementation == MOSAIC:
        with pytest.raises(ValueError, match="implementation='pallas_mosaic' of causal_conv1d takes no config: leave"):
            run(x, weight, config=CUT)
        return
    for name, value, limit in [
        ("channels", 3, "a power of two from 1 to 1024"),
        ("strips", 2048, "a power of two from 1 to 1024"),
        ("backward_warps", 32, "a power of two from 1 to 16"),
        ("segments", 0, "at least 1"),
        ("forward_unroll", 17, "from 1 to 16"),
    ]:
        with pytest.raises(ValueError, match=f"{name}={value} must be {limit}"):
            run(x, weight, config=replace(CUT, **{name: value}))
