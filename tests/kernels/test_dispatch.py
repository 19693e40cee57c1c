"""How operators find what runs them: a backend from outside, names, precisions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels import dispatch
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
        ValueError, match=r"'toy' of causal_conv1d must be one of \['pallas_triton', 'reference', 'xla'\]"
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
