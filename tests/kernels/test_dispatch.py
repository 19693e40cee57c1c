"""How operators find what runs them: a backend from outside, names, precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import causal_conv1d as causal_conv1d_room
from kernels import dispatch, selective_scan, softmax_cross_entropy, ssd
from kernels.causal_conv1d import IMPLEMENTATIONS, causal_conv1d


def toy(x, weight, bias, initial, segment_ids, *, activation):
    """Convolves by NumPy's own convolution; somebody's backend."""
    assert bias is None and initial is None and segment_ids is None and activation == "none"
    rows = [[np.convolve(row[:, c], weight[::-1, c])[: len(row)] for c in range(row.shape[1])] for row in np.asarray(x)]
    return jnp.asarray(np.swapaxes(rows, 1, 2))


@pytest.fixture
def with_toy(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "toy", toy)
    return jnp.arange(24.0).reshape(2, 4, 3), jnp.arange(6.0).reshape(2, 3)


def test_a_backend_is_a_function_and_a_line(with_toy):
    np.testing.assert_allclose(causal_conv1d(*with_toy, implementation="toy"), causal_conv1d(*with_toy), rtol=1e-6)
    with pytest.raises(ValueError, match="implementation='toy' of causal_conv1d takes no interpret: leave"):
        causal_conv1d(*with_toy, implementation="toy", interpret=True)


def test_without_it_the_name_is_unknown():
    with pytest.raises(
        ValueError, match=r"'toy' of causal_conv1d must be one of \[.*'pallas_triton', 'reference', 'xla'\]"
    ):
        causal_conv1d(jnp.ones((1, 2, 3)), jnp.ones((1, 3)), implementation="toy")


def test_a_backend_that_cannot_be_imported_says_so(monkeypatch):
    monkeypatch.setitem(IMPLEMENTATIONS, "absent", "kernels.no_such_backend:run")
    with pytest.raises(ValueError, match=r"'absent' of causal_conv1d is not available here \(No module named"):
        causal_conv1d(jnp.ones((1, 2, 3)), jnp.ones((1, 3)), implementation="absent")


def test_precisions_are_those_of_jax():
    assert dispatch.precision_name(None) is None
    assert dispatch.precision_name(jax.lax.Precision.HIGHEST) == "highest"
    assert dispatch.precision_name(jax.lax.DotAlgorithmPreset.TF32_TF32_F32) == "TF32_TF32_F32"
    with pytest.raises(ValueError, match="precision='exact' must be one of 'default', 'high', 'highest'"):
        dispatch.precision_name("exact")


def test_kernels_are_interpreted_where_there_is_no_gpu():
    assert dispatch.interpreted(None) is (jax.default_backend() != "gpu")
    assert dispatch.interpreted(True) and not dispatch.interpreted(False)


@pytest.fixture
def on_hopper(monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: (9, 0))


MEASURED = (
    dispatch.Measured("toys", "float32", {"b": 100, "l": 50}, {"fast": 10, "faster": 5, "xla": 20}, "somewhere"),
    dispatch.Measured("toys", "float32", {"b": 100, "l": 200}, {"fast": 10, "faster": 50, "xla": 20}, "somewhere"),
)


def _toys(monkeypatch):
    """Implementations that say who they are; the fastest offers no option, and no more than 300 positions."""

    def faster(x):
        if x.shape[1] > 300:
            raise ValueError(f"l={x.shape[1]} is over the 300 of faster: use another")
        return "faster"

    monkeypatch.setattr(dispatch, "MEASURED", MEASURED)
    return {"faster": faster, "fast": lambda x, scale=1: "fast", "xla": lambda x, scale=1: "xla"}


def _taken(toys, rows, length, dtype=jnp.float32, name=None, **options):
    x = jnp.zeros((rows, length), dtype)
    return dispatch.run("toys", toys, name, x, sizes={"b": rows, "l": length}, **options)


def test_without_a_gpu_plain_jax_runs(monkeypatch):
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: None)
    assert _taken(_toys(monkeypatch), 100, 50) == "xla"


def test_on_a_gpu_the_fastest_at_the_nearest_shape_runs(monkeypatch, on_hopper):
    toys = _toys(monkeypatch)
    assert [_taken(toys, rows, length) for rows, length in [(100, 50), (10_000, 50), (100, 70)]] == ["faster"] * 3
    assert [_taken(toys, 100, length) for length in (200, 800, 120)] == ["fast"] * 3


def test_away_from_what_was_measured_plain_jax_runs(monkeypatch, on_hopper):
    toys = _toys(monkeypatch)
    assert [_taken(toys, 24, 50), _taken(toys, 100, 12), _taken(toys, 100, 801)] == ["xla"] * 3
    assert _taken(toys, 100, 50, jnp.bfloat16) == "xla"
    assert _taken(toys, 100, 50, computes_with="tfloat32") == "xla"


def test_what_a_backend_does_not_offer_is_passed_over_and_refused_by_name(monkeypatch, on_hopper):
    toys = _toys(monkeypatch)
    assert _taken(toys, 100, 50, scale=2) == "fast"
    with pytest.raises(ValueError, match="'faster' of toys takes no scale"):
        _taken(toys, 100, 50, name="faster", scale=2)
    long = dispatch.Measured("toys", "float32", {"b": 100, "l": 400}, {"faster": 1, "xla": 2}, "somewhere")
    monkeypatch.setattr(dispatch, "MEASURED", (long,))
    assert _taken(toys, 100, 400) == "xla"
    with pytest.raises(ValueError, match="l=400 is over the 300 of faster"):
        _taken(toys, 100, 400, name="faster")


def test_a_backend_that_cannot_run_here_is_passed_over_and_refused_by_name(monkeypatch):
    toys = _toys(monkeypatch)
    monkeypatch.setitem(dispatch.NEEDS, "faster", dispatch.Needs((9, 0)))
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: (8, 6))
    assert _taken(toys, 100, 50) == "fast"
    with pytest.raises(
        ValueError, match=r"'faster' of toys cannot run here: it needs .* 9\.0 or newer, this one has 8\.6"
    ):
        _taken(toys, 100, 50, name="faster")
    # Interpreted, it runs without a GPU; with packages of its own it does not.
    monkeypatch.setattr(dispatch, "gpu_capability", lambda: None)
    assert _taken(toys, 100, 50, name="faster") == "faster"
    for needs, lack in [
        (
            dispatch.Needs((9, 0), packages=("jax",)),
            "it needs an NVIDIA GPU of compute capability 9.0 or newer, and JAX",
        ),
        (dispatch.Needs((9, 0), packages=("no_such",)), "it needs the package no-such, which is not installed"),
        (dispatch.Needs((9, 0), python=(9, 1), packages=("jax",)), "it needs Python 9.1 or newer, this is 3."),
    ]:
        monkeypatch.setitem(dispatch.NEEDS, "faster", needs)
        with pytest.raises(ValueError, match=f"'faster' of toys cannot run here: {lack}"):
            _taken(toys, 100, 50, name="faster")


def test_the_times_of_the_records_are_of_operators_and_backends_that_exist():
    known = {"ssd": ssd, "causal_conv1d": causal_conv1d_room, "selective_scan": selective_scan}
    known["softmax_cross_entropy"] = softmax_cross_entropy
    for one in dispatch.MEASURED:
        assert set(one.microseconds) <= set(known[one.op].IMPLEMENTATIONS) and dispatch.PLAIN in one.microseconds
        assert all(time > 0 for time in one.microseconds.values())


def test_operators_choose_by_shape_and_arithmetic(on_hopper):
    def taken(function, *shapes, **options):
        with dispatch.recording() as names:
            jax.eval_shape(lambda *a: function(*a, **options), *(jax.ShapeDtypeStruct(s, "float32") for s in shapes))
        return names

    wide = ((2048, 50, 192), (4, 192))
    assert taken(causal_conv1d, *wide, interpret=True) == {"causal_conv1d": {"pallas_triton"}}
    assert taken(causal_conv1d, (8, 50, 192), (4, 192)) == {"causal_conv1d": {"xla"}}
    shapes = ((1024, 200, 4, 32), (1024, 200, 4), (4,), (1024, 200, 32), (1024, 200, 32))
    assert taken(ssd.ssd, *shapes, interpret=True) == {"ssd": {"pallas_triton"}}
    assert taken(ssd.ssd, *shapes, precision="highest") == {"ssd": {"xla"}}
