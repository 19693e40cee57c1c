"""State space duality with the gate and the sums of squares that a norm needs: the end of a Mamba-2 mixer in one pass.

The norm's factor is one number a position and commutes with the projection behind it, so that no program has to see
all heads (`kernels.gated_rms_norm.project_normed`). Bytes a token in device memory, float32, forward and backward, for
e = 128, n = 32, h = 4 and chunks of 32; e, 2 n and h floats are 512, 256 and 16 bytes, and so are states e n / c:

                     SSD and norm apart        here
  forward reads      x dt B C, then y z        x dt B C z
          writes     y states, then out        u states
          bytes      1808 + 1536 = 3344        2320
  backward reads     y z dout, then            x dt B C states z du
                     x dt B C states dy
          writes     dy dz, then dx ddt dB dC  dx ddt dB dC dz
          bytes      2560 + 2592 = 5152        3616
  both               8496                      5936

The backward kernel makes y again from the kept states in a walk of its own over the row, by three more products a
chunk; the walk after it finds x, dt, B, C and the states in the cache. To keep y would cost 1024 bytes, and a kernel of
its own for the gate, which has to make or read y and to write dy, 1536 bytes or more.
"""

import jax
import jax.numpy as jnp
from jax import Array

from kernels.ssd.api import Implementation, checked, kernel_options, ssd
from kernels.ssd.config import DEFAULT_CHUNK_SIZE, SsdConfig
from kernels.ssd.pallas_triton import ssd_pallas_triton
from kernels.starts import real_starts


def _gate(y: Array, z: Array) -> tuple[Array, Array]:
    wide = jnp.promote_types(y.dtype, jnp.float32)
    u = y.astype(wide) * jax.nn.silu(z.astype(wide))
    return u.astype(y.dtype), jnp.sum(jnp.square(u), axis=-1)


def ssd_gated(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    z: Array,
    *,
    D: Array | None = None,
    dt_bias: Array | None = None,
    initial_state: Array | None = None,
    lengths: Array | None = None,
    starts: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    products: str | None = None,
    config: SsdConfig | None = None,
    implementation: Implementation | None = None,
) -> tuple[Array, Array]:
    """Applies `ssd` and gates its output, and adds up the squares of what comes out.

      u = ssd(x, dt, A, B, C) silu(z),    squares[b, l, h] = sum_p u[b, l, h, p]^2

    Args:
      x, dt, A, B, C, D, dt_bias, initial_state, lengths, starts, chunk_size, products, config: as in `ssd`.
      z: [b, l, h, p] gate before its activation.
      implementation: as in `ssd`. The GPU kernels do all of it at once, but for rows cut into segments, where the gate
        comes after them: a gradient would have to make y twice.

    Returns:
      u [b, l, h, p] in the dtype of x, and its sums of squares [b, l, h] before rounding, float32 or wider.

    Raises:
      ValueError: as in `ssd`, and for a z of another shape than x.

    Source: Dao & Gu 2024 (Mamba-2), section 7.
    """
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, lengths)
    inputs, implementation = checked(inputs, chunk_size, implementation)
    if z.shape != x.shape:
        raise ValueError(f"z has shape {z.shape}, expected that of x, {x.shape}")
    if implementation.startswith("pallas_triton"):
        options = kernel_options(x, inputs[3], chunk_size, products, config, implementation)
        if options["config"].segments == 1:
            starts = real_starts(starts, x.shape[:2], lengths)
            return ssd_pallas_triton(*inputs, z, starts, **options, return_final_state=False)[:2]
    y = ssd(
        x, dt, A, B, C, D=D, dt_bias=dt_bias, initial_state=initial_state, lengths=lengths, starts=starts,
        chunk_size=chunk_size, products=products, config=config, implementation=implementation,
    )  # fmt: skip
    return _gate(y, z)
