"""EchoMamba4Rec's spectral filter."""

import jax.numpy as jnp
import numpy as np
import pytest

from tim4rec_jax.layers.spectral_filter import spectral_filter


@pytest.mark.parametrize("length", [7, 8])
def test_the_filter_is_a_circular_convolution(length):
    rng = np.random.default_rng(0)
    x, taps = rng.normal(size=(2, length, 3)), rng.normal(size=(length, 3))
    spectrum = np.fft.rfft(taps, axis=0)
    given = jnp.asarray(x, jnp.float32), jnp.asarray(np.stack([spectrum.real, spectrum.imag], -1), jnp.float32)
    expected = sum(np.roll(x, shift, axis=1) * taps[shift] for shift in range(length))
    np.testing.assert_allclose(spectral_filter(*given), expected, rtol=0, atol=1e-5)


def test_bad_input():
    expected = r"weight has shape \(5, 3, 2\), expected \(l // 2 \+ 1, d, 2\)=\(4, 3, 2\) for x \(2, 7, 3\)"
    with pytest.raises(ValueError, match=expected):
        spectral_filter(jnp.zeros((2, 7, 3)), jnp.zeros((5, 3, 2)))
