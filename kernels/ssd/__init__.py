"""State space duality (Mamba-2): `ssd`, at the last position, one position on, and the dense mask."""

from jax import Array

from kernels.decays import in_accum_dtype, step_size
from kernels.dispatch import Implementations, Precision, check_shape, run
from kernels.segment_ids import checked_segment_ids
from kernels.ssd import reference
from kernels.ssd.config import DEFAULT_CHUNK_SIZE, GluonConfig, SsdConfig, default_config
from kernels.ssd.reference import ssd_reference
from kernels.ssd.step import ssd_last, ssd_step
from kernels.ssd.xla import ssd_xla

__all__ = [
    "IMPLEMENTATIONS",
    "GluonConfig",
    "SsdConfig",
    "default_config",
    "dense_mask",
    "ssd",
    "ssd_last",
    "ssd_step",
    "step_size",
]

IMPLEMENTATIONS: Implementations = {
    "reference": ssd_reference,
    "xla": ssd_xla,
    "pallas_triton": "kernels.ssd.pallas_triton:ssd_pallas_triton",
    "gluon": "kernels.ssd.gluon:ssd_gluon",
}


def _checked(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
    segment_ids: Array | None,
) -> tuple[Array | None, ...]:
    """Returns the arrays as implementations read them."""
    if B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None] if C.ndim == 3 else C
    reference.check_inputs(x, dt, A, B, D, dt_bias)
    check_shape("C", C, B.shape)
    check_shape("initial_state", initial_state, (x.shape[0], *x.shape[2:], B.shape[-1]))
    segment_ids = checked_segment_ids(segment_ids, x.shape[:2])
    A, D, initial_state = in_accum_dtype(A, D, initial_state)
    return x, dt, A, B, C, D, dt_bias, initial_state, segment_ids


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
    segment_ids: Array | None = None,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    precision: Precision = None,
    implementation: str | None = None,
    interpret: bool | None = None,
    config: SsdConfig | GluonConfig | None = None,
) -> Array | tuple[Array, Array]:
    """Applies a selective state space layer with one scalar decay per head.

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
      initial_state: [b, h, p, n] before the first history of each row, or None for zeros.
      return_final_state: also return the state after the last real position.
      segment_ids: int32 [b, l], which history a position belongs to, not falling, and 0 for padding, which ends a row;
        or None for rows of one history. state_{t-1} is 0, exactly, where a history begins behind another one. Padding
        leaves the state as it is, and its outputs are what that state and its own C and x give.
      chunk_size: positions handled densely at once; any length works, and the result does not depend on it.
      precision: of products, as in JAX; None follows `jax_default_matmul_precision`. The GPU kernels offer TF32
        ("default", "high") and float32 ("highest") factors.
      implementation: "xla" (chunked), "reference" (step by step), "pallas_triton" or "gluon" (GPU kernels), another
        name of `IMPLEMENTATIONS`, or None for the default.
      interpret: run kernels as slow plain JAX; None does so where there is no GPU.
      config: how the GPU kernels divide the work (a `GluonConfig` for "gluon"), or None to derive it from the shape and
        `chunk_size`.

    Returns:
      y [b, l, h, p] in the dtype of x; with `return_final_state` also the state [b, h, p, n], float32 or wider.

    Raises:
      ValueError: for shapes that do not fit, bad segment ids, a chunk size under 1, an unknown precision or
        implementation, or what the named implementation does not offer.

    Source: Dao & Gu 2024 (Mamba-2), sections 3 to 6.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    arrays = _checked(x, dt, A, B, C, D, dt_bias, initial_state, segment_ids)
    options = {"return_final_state": return_final_state, "chunk_size": chunk_size, "precision": precision}
    options |= {"interpret": interpret, "config": config}
    y, state = run("ssd", IMPLEMENTATIONS, implementation, *arrays, **options)
    return (y, state) if return_final_state else y


def dense_mask(dt: Array, A: Array, *, dt_bias: Array | None = None) -> Array:
    """Builds the [b, h, l, l] decay mask L of the dual form Y = (L o (C B^T)) (delta x) + D x, for looking at.

    Args:
      dt: [b, l, h] raw steps; for the time-aware mask of TiM4Rec, the raw step times the time factor.
      A: [h] decay rates, negative.
      dt_bias: [h], or None.
    """
    return reference.dense_mask(step_size(dt, dt_bias), A)
