"""Selective scan (Mamba-1): the public operator and its checks."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from kernels.selective_scan.config import (
    DEFAULT_CHUNK_SIZE,
    MAX_STATE_WIDTH,
    SelectiveScanConfig,
    default_config,
    default_implementation,
)
from kernels.selective_scan.pallas_triton import selective_scan_pallas_triton
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.xla import selective_scan_xla
from kernels.starts import real_starts
from kernels.step_size import step_size

Implementation = Literal["reference", "xla", "pallas_triton", "pallas_triton_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "xla", "pallas_triton", "pallas_triton_interpreted")


def _check(name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    if array is not None and array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")


def _check_inputs(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
    lengths: Array | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [b, l, e]")
    batch, length, width = x.shape
    if length < 1:
        raise ValueError(f"x has shape {x.shape}: its length {length} must be at least 1")
    if A.ndim != 2 or A.shape[0] != width or A.shape[1] < 1:
        raise ValueError(f"A has shape {A.shape}, expected [e, n] with e={width}")
    _check("dt", dt, x.shape)
    for name, maps in (("B", B), ("C", C)):
        _check(name, maps, (batch, length, A.shape[1]))
    for name, by_channel in (("D", D), ("dt_bias", dt_bias)):
        _check(name, by_channel, (width,))
    _check("initial_state", initial_state, (batch, *A.shape))
    _check("lengths", lengths, (batch,))


def _checked_implementation(implementation: str | None, chunk_size: int) -> str:
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None")
    return implementation


def _check_kernel_limits(state_width: int, **arrays: Array | None) -> None:
    if state_width > MAX_STATE_WIDTH:
        raise ValueError(
            f"n={state_width} of A and B: the GPU kernels hold at most {MAX_STATE_WIDTH} state entries a channel; "
            "implementation='xla' takes any"
        )
    for name, array in arrays.items():
        if array is not None and array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(
                f"{name} is {array.dtype}: the GPU kernels take float32 and bfloat16; implementation='xla' takes others"
            )


def _wide(*arrays: Array | None) -> list[Array | None]:
    """Decays, skips and states are float32 at least, also beside bfloat16 inputs."""
    return [None if a is None else a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]


def selective_scan(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    *,
    D: Array | None = None,
    dt_bias: Array | None = None,
    initial_state: Array | None = None,
    return_final_state: bool = False,
    lengths: Array | None = None,
    starts: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    implementation: Implementation | None = None,
    config: SelectiveScanConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Applies a selective state space layer with one decay a channel and state entry.

      delta_t = softplus(dt_t + dt_bias)
      state_t = exp(delta_t A) state_{t-1} + delta_t x_t B_t        for each channel, state [n]
      y_t     = state_t . C_t + D x_t

    Args:
      x: [b, l, e] values; float32, bfloat16 (states and sums are float32) or, in plain JAX, float64.
      dt: [b, l, e] raw steps.
      A: [e, n] decay rates, negative.
      B: [b, l, n] input maps, shared by the channels.
      C: [b, l, n] output maps.
      D: [e] skip weights, or None.
      dt_bias: [e] added to dt before softplus, or None.
      initial_state: [b, e, n], or None for zeros.
      return_final_state: also return the state after the last position.
      lengths: int [b] real positions a row, or None for all; later positions leave the state as it is.
      starts: bool [b, l], true where a history begins: state_{t-1} is 0 there, exactly, so that histories packed into
        one row know nothing of each other; or None for one history a row.
      chunk_size: positions between two states that "xla" keeps for its gradient; the result does not depend on it.
      implementation: "xla" (plain JAX), "pallas_triton" (GPU kernels), "pallas_triton_interpreted" (the same kernels,
        slowly, on any platform), "reference" (step by step) or None for the best on this platform.
      config: how the GPU kernels divide the work, or None for the best known.

    Returns:
      y [b, l, e] in the dtype of x; with `return_final_state` also the state [b, e, n], float32 or wider.

    Raises:
      ValueError: for shapes that do not fit, starts that are not bool, a chunk size under 1, an unknown implementation,
        or a state width or dtype that the named kernels do not take.

    Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752), section 3.
    """
    _check_inputs(x, dt, A, B, C, D, dt_bias, initial_state, lengths)
    implementation = _checked_implementation(implementation, chunk_size)
    starts = real_starts(starts, x.shape[:2], lengths)

    A, D, dt_bias, initial_state = _wide(A, D, dt_bias, initial_state)
    if implementation.startswith("pallas_triton"):
        _check_kernel_limits(A.shape[1], x=x, dt=dt, A=A, B=B, C=C, D=D, dt_bias=dt_bias, initial_state=initial_state)
        y, state = selective_scan_pallas_triton(
            *(x, dt, A, B, C, D, dt_bias, initial_state, lengths, starts),
            return_final_state=return_final_state,
            config=config or default_config(A.shape[1]),
            interpret=implementation == "pallas_triton_interpreted",
        )
    elif implementation == "reference":
        y, state = selective_scan_reference(x, step_size(dt, dt_bias, lengths), A, B, C, D, initial_state, starts)
    else:
        delta = step_size(dt, dt_bias, lengths)
        y, state = selective_scan_xla(x, delta, A, B, C, D, initial_state, starts, chunk_size=chunk_size)
    return (y, state) if return_final_state else y
