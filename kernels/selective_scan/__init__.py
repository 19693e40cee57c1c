"""Selective scan (Mamba-1): `selective_scan`."""

from jax import Array

from kernels.decays import in_accum_dtype, step_size
from kernels.dispatch import Implementations, check_shape, run
from kernels.segment_ids import checked_segment_ids
from kernels.selective_scan.config import DEFAULT_CHUNK_SIZE, SelectiveScanConfig
from kernels.selective_scan.reference import selective_scan_reference
from kernels.selective_scan.xla import selective_scan_xla

__all__ = ["IMPLEMENTATIONS", "SelectiveScanConfig", "selective_scan", "step_size"]

IMPLEMENTATIONS: Implementations = {
    "reference": selective_scan_reference,
    "xla": selective_scan_xla,
    "pallas_triton": "kernels.selective_scan.pallas_triton:selective_scan_pallas_triton",
    "pallas_mosaic": "kernels.selective_scan.pallas_mosaic:selective_scan_pallas_mosaic",
}


def _check_shapes(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
) -> None:
    if x.ndim != 3:
        raise ValueError(f"x has shape {x.shape}, expected [b, l, e]")
    batch, length, width = x.shape
    if length < 1:
        raise ValueError(f"x has shape {x.shape}: its length {length} must be at least 1")
    if A.ndim != 2 or A.shape[0] != width or A.shape[1] < 1:
        raise ValueError(f"A has shape {A.shape}, expected [e, n] with e={width}")
    check_shape("dt", dt, x.shape)
    check_shape("B", B, (batch, length, A.shape[1]))
    check_shape("C", C, (batch, length, A.shape[1]))
    check_shape("D", D, (width,))
    check_shape("dt_bias", dt_bias, (width,))
    check_shape("initial_state", initial_state, (batch, *A.shape))


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
    segment_ids: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    implementation: str | None = None,
    interpret: bool | None = None,
    config: SelectiveScanConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Applies a selective state space layer with one decay per channel and state entry.

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
      initial_state: [b, e, n] before the first history of each row, or None for zeros.
      return_final_state: also return the state after the last real position.
      segment_ids: int32 [b, l], which history a position belongs to, not falling, and 0 for padding, which ends a row;
        or None for rows of one history. state_{t-1} is 0, exactly, where a history begins behind another one. Padding
        leaves the state as it is, and its outputs are what that state and its own C and x give.
      chunk_size: positions between two states that "xla" keeps for its gradient; the result does not depend on it.
      implementation: "xla" (plain JAX), "pallas_triton" (GPU kernels), "reference" (step by step), another name of
        `IMPLEMENTATIONS`, or None for the default.
      interpret: run kernels as slow plain JAX; None does so where there is no GPU.
      config: how the GPU kernels divide the work, or None for the best known.

    Returns:
      y [b, l, e] in the dtype of x; with `return_final_state` also the state [b, e, n], float32 or wider.

    Raises:
      ValueError: for shapes that do not fit, bad segment ids, a chunk size under 1, an unknown implementation, or a
        state width, dtype or option that the named one does not take.

    Source: Gu & Dao 2023 (Mamba, arXiv 2312.00752), section 3.
    """
    _check_shapes(x, dt, A, B, C, D, dt_bias, initial_state)
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    segment_ids = checked_segment_ids(segment_ids, x.shape[:2])
    A, D, dt_bias, initial_state = in_accum_dtype(A, D, dt_bias, initial_state)
    options = {"return_final_state": return_final_state, "chunk_size": chunk_size, "interpret": interpret}
    arrays = (x, dt, A, B, C, D, dt_bias, initial_state, segment_ids)
    sizes = dict(zip("blen", (*x.shape, A.shape[1]), strict=True))
    y, state = run("selective_scan", IMPLEMENTATIONS, implementation, *arrays, sizes=sizes, **options, config=config)
    return (y, state) if return_final_state else y
