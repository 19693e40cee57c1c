"""State space duality (Mamba-2): the public operator and its checks."""

from typing import Any, Literal

import jax.numpy as jnp
from jax import Array

from kernels.ssd.config import DEFAULT_CHUNK_SIZE, SsdConfig, default_config, default_implementation
from kernels.ssd.pallas_triton import ssd_pallas_triton
from kernels.ssd.reference import dense_mask as _dense_mask
from kernels.ssd.reference import ssd_reference
from kernels.ssd.xla import ssd_last_xla, ssd_xla
from kernels.starts import real_starts
from kernels.step_size import step_size
from kernels.triton_call import products as resolve_products

Implementation = Literal["reference", "xla", "pallas_triton", "pallas_triton_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "xla", "pallas_triton", "pallas_triton_interpreted")


def _check(name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    if array is not None and array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")


def _check_inputs(x: Array, dt: Array, A: Array, B: Array) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {x.shape}, expected [b, l, h, p]")
    batch, length, heads, _ = x.shape
    if length < 1:
        raise ValueError(f"x has shape {x.shape}: its length {length} must be at least 1")
    _check("dt", dt, (batch, length, heads))
    _check("A", A, (heads,))
    if B.ndim != 4 or B.shape[2] < 1 or heads % B.shape[2]:
        raise ValueError(f"B has shape {B.shape}, expected [b, l, n] or [b, l, g, n] with g dividing h={heads}")
    _check("B", B, (batch, length, *B.shape[2:]))


def _check_optional(
    x: Array, B: Array, D: Array | None, dt_bias: Array | None, initial_state: Array | None, lengths: Array | None
) -> None:
    batch, _, heads, width = x.shape
    for name, per_head in (("D", D), ("dt_bias", dt_bias)):
        _check(name, per_head, (heads,))
    _check("initial_state", initial_state, (batch, heads, width, B.shape[-1]))
    _check("lengths", lengths, (batch,))


def _wide(*arrays: Array | None) -> list[Array | None]:
    """Decays, skips and states are float32 at least, also beside bfloat16 inputs."""
    return [None if a is None else a.astype(jnp.promote_types(a.dtype, jnp.float32)) for a in arrays]


def _plain(inputs: tuple[Array | None, ...], starts: Array | None, chunk_size: int | None) -> tuple[Array, Array]:
    """Runs the chunked form, or the step-by-step one where there is no chunk size."""
    x, dt, A, B, C, D, dt_bias, initial_state, lengths = inputs
    A, D, initial_state = _wide(A, D, initial_state)
    arguments = (x, step_size(dt, dt_bias, lengths), A, B, C, D, initial_state, starts)
    return ssd_reference(*arguments) if chunk_size is None else ssd_xla(*arguments, chunk_size=chunk_size)


def _kernel_options(
    x: Array, B: Array, chunk_size: int, products: str | None, config: SsdConfig | None, implementation: str
) -> dict[str, Any]:
    """Returns how `ssd_pallas_triton` runs x [b, l, h, p] and B [b, l, g, n]: config, products and interpret."""
    batch, length, heads, width = x.shape
    factors = resolve_products(products)
    if config is None:
        wide = factors == "float32" and x.dtype == jnp.float32
        config = default_config(
            batch=batch, length=length, heads=heads, groups=B.shape[2], width=width, state_width=B.shape[3],
            chunk_size=chunk_size, wide_products=wide, itemsize=x.dtype.itemsize,
        )  # fmt: skip
    return {"config": config, "products": factors, "interpret": implementation == "pallas_triton_interpreted"}


def _checked(
    inputs: tuple[Array | None, ...], chunk_size: int, implementation: str | None
) -> tuple[tuple[Array | None, ...], str]:
    """Returns the inputs (x, dt, A, B, C, D, dt_bias, initial_state, lengths) with groups, and the implementation."""
    x, dt, A, B, C, *optional = inputs
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None] if C.ndim == 3 else C
    _check_inputs(x, dt, A, B)
    _check("C", C, B.shape)
    _check_optional(x, B, *optional)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None")
    return (x, dt, A, B, C, *optional), implementation


def ssd(
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
    products: str | None = None,
    config: SsdConfig | None = None,
    implementation: Implementation | None = None,
) -> Array | tuple[Array, Array]:
    """Applies a selective state space layer with one scalar decay a head.

      delta_t = softplus(dt_t + dt_bias)
      state_t = exp(delta_t A) state_{t-1} + delta_t x_t B_t^T
      y_t     = state_t C_t + D x_t

    All inputs must be finite. The chunked forms multiply by 0 what a position does not see, so a NaN or an infinity
    reaches every position of its chunk, also earlier ones and those of other histories in the row, and all that goes on
    from their states; it stops at the next history that begins in a later chunk, and never reaches another row.

    Args:
      x: [b, l, h, p] values; float32, bfloat16 (products accumulate in float32) or float64.
      dt: [b, l, h] raw steps.
      A: [h] decay rates, negative.
      B: [b, l, n], or [b, l, g, n] with one map for each group of h/g heads.
      C: like B.
      D: [h] skip weights, or None.
      dt_bias: [h] added to dt before softplus, or None.
      initial_state: [b, h, p, n], or None for zeros.
      return_final_state: also return the state after the last position.
      lengths: int [b] real positions a row, or None for all; later positions leave the state as it is.
      starts: bool [b, l], true where a history begins: state_{t-1} is 0 there, exactly, so that histories packed into
        one row know nothing of each other; or None for one history a row.
      chunk_size: positions handled densely at once; any length works, and the result does not depend on it.
      products: "tfloat32" or "float32" factors of float32 products in GPU kernels, or None to follow
        `jax_default_matmul_precision`, which rules the other implementations.
      config: how the GPU kernels cut up the work, or None to derive it from the shape and `chunk_size`.
      implementation: "xla" (chunked), "reference" (step by step), "pallas_triton" (GPU kernels),
        "pallas_triton_interpreted" (the same kernels as slow plain JAX, for tests) or None for the best on this
        platform.

    Returns:
      y [b, l, h, p] in the dtype of x; with `return_final_state` also the state [b, h, p, n], float32 or wider.

    Raises:
      ValueError: for shapes that do not fit, starts that are not bool, a chunk size under 1, an unknown implementation,
        or what the named implementation does not offer.

    Source: Dao & Gu 2024 (Mamba-2), sections 3 to 6.
    """
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state, lengths)
    inputs, implementation = _checked(inputs, chunk_size, implementation)
    starts = real_starts(starts, x.shape[:2], lengths)
    if implementation.startswith("pallas_triton"):
        options = _kernel_options(x, inputs[3], chunk_size, products, config, implementation)
        y, state = ssd_pallas_triton(*inputs, starts, **options, return_final_state=return_final_state)
    else:
        y, state = _plain(inputs, starts, None if implementation == "reference" else chunk_size)
    return (y, state) if return_final_state else y


def ssd_last(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C_last: Array,
    lengths: Array,
    *,
    D: Array | None = None,
    dt_bias: Array | None = None,
) -> Array:
    """Returns `ssd`'s output at each row's last real position only, in one linear pass.

      y_T = sum_{j<=T} exp(A sum_{k=j+1..T} delta_k) delta_j (C_T . B_j) x_j + D x_T,    T = length - 1

    Args:
      x, dt, A, B, D, dt_bias: as in `ssd`.
      C_last: [b, n] or [b, g, n], C at position T.
      lengths: int [b], 1 to l.

    Returns:
      [b, h, p] in the dtype of x.

    Raises:
      ValueError: for shapes that do not fit.
    """
    if B.ndim == 3:
        B, C_last = B[:, :, None], C_last[:, None] if C_last.ndim == 2 else C_last
    _check_inputs(x, dt, A, B)
    _check("C_last", C_last, (x.shape[0], *B.shape[2:]))
    _check("lengths", lengths, (x.shape[0],))
    _check_optional(x, B, D, dt_bias, None, None)
    A, D = _wide(A, D)
    return ssd_last_xla(x, step_size(dt, dt_bias, lengths), A, B, C_last, D, lengths - 1)


def dense_mask(dt: Array, A: Array, *, dt_bias: Array | None = None) -> Array:
    """Builds the [b, h, l, l] decay mask L of the dual form Y = (L o (C B^T)) (delta x) + D x, for looking at.

    Args:
      dt: [b, l, h] raw steps; for the time-aware mask of TiM4Rec, the raw step times the time factor.
      A: [h] decay rates, negative.
      dt_bias: [h], or None.
    """
    return _dense_mask(step_size(dt, dt_bias), A)
