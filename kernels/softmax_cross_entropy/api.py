"""Softmax cross-entropy over a catalogue, and its log-sum-exp alone: the public operators and their checks."""

from typing import Literal

import jax.numpy as jnp
from jax import Array

from kernels.softmax_cross_entropy.config import (
    TritonConfig,
    XlaConfig,
    default_implementation,
    triton_config,
    xla_config,
)
from kernels.softmax_cross_entropy.pallas_triton import DTYPES, LARGEST_WIDTH, TritonPasses
from kernels.softmax_cross_entropy.reference import log_sum_exp_reference, softmax_cross_entropy_reference
from kernels.softmax_cross_entropy.rule import Passes, log_sum_exp_from_passes, loss_from_passes
from kernels.softmax_cross_entropy.xla import XlaPasses, precision_of
from kernels.triton_call import Products, vary_together
from kernels.triton_call import products as products_of

Implementation = Literal["reference", "xla", "pallas_triton", "pallas_triton_interpreted"]
IMPLEMENTATIONS: tuple[str, ...] = ("reference", "xla", "pallas_triton", "pallas_triton_interpreted")


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


def _triton_passes(
    hidden: Array, embedding: Array, products: Products | None, config: TritonConfig | None, interpret: bool
) -> TritonPasses:
    width = hidden.shape[1]
    if width > LARGEST_WIDTH:
        raise ValueError(f"d={width} is more than the {LARGEST_WIDTH} that the GPU kernels take; use 'xla'")
    for name, array in (("hidden", hidden), ("embedding", embedding)):
        if array.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}, the GPU kernels take {DTYPES}; use 'xla'")
    products = products_of(products)
    return TritonPasses(config or triton_config(width, hidden.dtype.itemsize, products), products, interpret)


def _passes(
    hidden: Array,
    embedding: Array,
    products: Products | None,
    implementation: str | None,
    config: XlaConfig | TritonConfig | None,
) -> Passes | None:
    """Returns the passes of the implementation asked for, None for the definition."""
    implementation = implementation or default_implementation()
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r} must be one of {IMPLEMENTATIONS}, or None")
    wanted = {"xla": XlaConfig, "reference": type(None)}.get(implementation, TritonConfig)
    if config is not None and not isinstance(config, wanted):
        raise ValueError(f"config={config!r} is not for implementation={implementation!r}")
    if implementation == "reference":
        return None
    if implementation == "xla":
        return XlaPasses((config or xla_config(hidden.shape[0])).tile_size, precision_of(products))
    return _triton_passes(hidden, embedding, products, config, implementation == "pallas_triton_interpreted")


def softmax_cross_entropy(
    hidden: Array,
    embedding: Array,
    targets: Array,
    *,
    masked: Array | None = None,
    products: Products | None = None,
    implementation: Implementation | None = None,
    config: XlaConfig | TritonConfig | None = None,
) -> Array:
    """Computes softmax cross-entropy over a catalogue from embeddings, without the [t, v] scores ever existing.

      loss_t = log sum_{v not masked} exp(hidden_t . E_v) - hidden_t . E_target

    Scores exist a tile at a time, forward and backward; kept for the gradient is the log-sum-exp [t] alone.
    Products are made in the dtype of hidden and summed in float32 or wider; gradients have their arguments' dtypes.

    Args:
      hidden: [t, d] outputs of the model; float32, bfloat16 or (not in the GPU kernels) float64.
      embedding: [v, d] one row an item, row 0 included like any other.
      targets: int [t]. A negative one says that the row has none: loss 0 and no gradient. One of v or more, which
        cannot be refused inside jit, gives loss NaN.
      masked: bool [v] items of probability 0, or None; one at least must be left. A target among them has loss +inf
        and the gradient of the log-sum-exp alone.
      products: "tfloat32" or "float32", how GPUs multiply float32; None follows jax_default_matmul_precision.
      implementation: "xla" (tiles in plain JAX), "pallas_triton" (GPU kernels; d up to 256, float32 and bfloat16),
        "pallas_triton_interpreted" (the same on any platform, slowly), "reference" (all scores at once) or None for
        the best on this platform.
      config: how the named implementation cuts its work, `XlaConfig` or `TritonConfig`; None chooses.

    Returns:
      [t] in float32, or float64 where hidden is.

    Raises:
      ValueError: for shapes, dtypes, products or configurations that do not fit, or an unknown implementation.

    Source: the online log-sum-exp of Milakov & Gimelshein 2018 (arXiv 1805.02867), over tiles.
    """
    _check(hidden, embedding, targets, masked)
    passes = _passes(hidden, embedding, products, implementation, config)
    if passes is None:
        return softmax_cross_entropy_reference(hidden, embedding, targets, masked)
    return loss_from_passes(passes, *vary_together(hidden, embedding, targets.astype(jnp.int32), masked))


def log_sum_exp(
    hidden: Array,
    embedding: Array,
    *,
    masked: Array | None = None,
    products: Products | None = None,
    implementation: Implementation | None = None,
    config: XlaConfig | TritonConfig | None = None,
) -> Array:
    """Computes the log-sum-exp of the scores of a catalogue, or of a part of one, a tile of scores at a time.

      lse_t = log sum_{v not masked} exp(hidden_t . E_v)

    Those of parts of a catalogue on several devices give that of the whole, log sum_i exp(lse_i).

    Args:
      hidden, embedding, products, implementation, config: as in `softmax_cross_entropy`.
      masked: bool [v] items left out, or None. With all of them left out the result is -inf and the gradient 0.

    Returns:
      [t] in float32, or float64 where hidden is.

    Raises:
      ValueError: as `softmax_cross_entropy`.
    """
    _check(hidden, embedding, None, masked)
    passes = _passes(hidden, embedding, products, implementation, config)
    if passes is None:
        return log_sum_exp_reference(hidden, embedding, masked)
    return log_sum_exp_from_passes(passes, *vary_together(hidden, embedding, masked))
