"""Softmax cross-entropy fused with the product by the catalogue, its log-sum-exp alone, and their configurations."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from kernels.dispatch import Implementations, Precision, arithmetic, run
from kernels.softmax_cross_entropy.config import LoopConfig, TritonConfig, XlaConfig
from kernels.softmax_cross_entropy.reference import softmax_cross_entropy_reference
from kernels.softmax_cross_entropy.xla import softmax_cross_entropy_xla

__all__ = ["IMPLEMENTATIONS", "LoopConfig", "TritonConfig", "XlaConfig", "log_sum_exp", "softmax_cross_entropy"]

# Of both operators: without targets an implementation returns the log-sum-exp.
IMPLEMENTATIONS: Implementations = {
    "reference": softmax_cross_entropy_reference,
    "xla": softmax_cross_entropy_xla,
    "pallas_triton": "kernels.softmax_cross_entropy.pallas_triton:softmax_cross_entropy_pallas_triton",
    "pallas_mosaic": "kernels.softmax_cross_entropy.pallas_mosaic:softmax_cross_entropy_pallas_mosaic",
}


def _check(hidden: Array, embedding: Array, targets: Array | None, masked: Array | None) -> None:
    if hidden.ndim != 2 or 0 in hidden.shape:
        raise ValueError(f"hidden has shape {hidden.shape}, expected [t, d] with t and d at least 1")
    num_targets, width = hidden.shape
    if embedding.ndim != 2 or embedding.shape[0] < 1 or embedding.shape[1] != width:
        raise ValueError(f"embedding has shape {embedding.shape}, expected [v, {width}] with v at least 1")
    for name, array in (("hidden", hidden), ("embedding", embedding)):
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise ValueError(f"{name} has dtype {array.dtype}, expected a floating one")
    if targets is not None and not (targets.shape == (num_targets,) and jnp.issubdtype(targets.dtype, jnp.integer)):
        raise ValueError(f"targets is {targets.dtype} of shape {targets.shape}, expected integers ({num_targets},)")
    items = embedding.shape[0]
    if masked is not None and (masked.shape != (items,) or masked.dtype != jnp.bool_):
        raise ValueError(f"masked is {masked.dtype} of shape {masked.shape}, expected bool ({items},)")


def _shape(hidden: Array, embedding: Array, precision: Precision) -> dict[str, Any]:
    """Returns what the choice of an implementation goes by."""
    sizes = {"t": hidden.shape[0], "v": embedding.shape[0], "d": hidden.shape[1]}
    return {"sizes": sizes, "computes_with": arithmetic(hidden, precision)}


def softmax_cross_entropy(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    masked: Array | None = None,
    precision: Precision = None,
    implementation: str | None = None,
    interpret: bool | None = None,
    config: XlaConfig | TritonConfig | None = None,
) -> Array:
    """Computes softmax cross-entropy over a catalogue from embeddings, without the [t, v] scores ever existing.

      loss_t = log sum_{v not masked} exp(hidden_t . E_v) - hidden_t . E_target

    Scores exist a tile at a time, forward and backward; kept for the gradient is the log-sum-exp [t] alone.
    Products are made in the dtype of hidden and summed in float32 or wider; gradients have their arguments' dtypes.

    Args:
      hidden: [t, d] outputs of the model; float32, bfloat16 or (not in the GPU kernels) float64.
      embedding: [v, d] one row per item, row 0 included like any other.
      targets: int [t]. A negative one says that the row has none: loss 0 and no gradient. One of v or more, which
        cannot be refused inside jit, gives loss NaN.
      masked: bool [v] items of probability 0, or None; one at least must be left. A target among them has loss +inf
        and the gradient of the log-sum-exp alone.
      precision: of products, as in JAX; None follows `jax_default_matmul_precision`. The GPU kernels offer TF32
        ("default", "high") and float32 ("highest") factors; the definition is always "highest".
      implementation: "xla" (tiles in plain JAX), "pallas_triton" (GPU kernels; d up to 256, float32 and bfloat16),
        "reference" (all scores at once), another name of `IMPLEMENTATIONS`, or None for the default.
      interpret: run kernels as slow plain JAX; None does so where there is no GPU.
      config: how the named implementation divides its work, `XlaConfig` or `TritonConfig`; None chooses.

    Returns:
      [t] in float32, or float64 where hidden is.

    Raises:
      ValueError: for shapes, dtypes, a precision or configuration that do not fit, or an unknown implementation.

    Source: the online log-sum-exp of Milakov & Gimelshein 2018 (arXiv 1805.02867), over tiles.
    """
    _check(hidden, embedding, targets, masked)
    options = {"precision": precision, "interpret": interpret, "config": config}
    arrays = (hidden, embedding, targets.astype(jnp.int32), masked)
    return run(
        "softmax_cross_entropy",
        IMPLEMENTATIONS,
        implementation,
        *arrays,
        **_shape(hidden, embedding, precision),
        **options,
    )


def log_sum_exp(
    hidden: Array,
    embedding: Array,
    *,
    masked: Array | None = None,
    precision: Precision = None,
    implementation: str | None = None,
    interpret: bool | None = None,
    config: XlaConfig | TritonConfig | None = None,
) -> Array:
    """Computes the log-sum-exp of the scores of a catalogue, or of a part of one, a tile of scores at a time.

      lse_t = log sum_{v not masked} exp(hidden_t . E_v)

    Those of parts of a catalogue on several devices give that of the whole, log sum_i exp(lse_i).

    Args:
      hidden, embedding, precision, implementation, interpret, config: as in `softmax_cross_entropy`.
      masked: bool [v] items left out, or None. With all of them left out the result is -inf and the gradient 0.

    Returns:
      [t] in float32, or float64 where hidden is.

    Raises:
      ValueError: as `softmax_cross_entropy`.
    """
    _check(hidden, embedding, None, masked)
    options = {"precision": precision, "interpret": interpret, "config": config}
    arrays = (hidden, embedding, None, masked)
    # Of the loss it is all but one addend per target: what was measured of it holds here.
    return run(
        "softmax_cross_entropy",
        IMPLEMENTATIONS,
        implementation,
        *arrays,
        **_shape(hidden, embedding, precision),
        **options,
    )
