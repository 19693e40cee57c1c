"""Softmax cross-entropy over a catalogue by GPU kernels: the forward pass, and the passes as the rule wants them."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.dispatch import Precision, interpreted
from kernels.softmax_cross_entropy.config import LoopConfig, TritonConfig, triton_config
from kernels.softmax_cross_entropy.pallas_triton_vjp import d_embedding_pass, d_hidden_pass
from kernels.softmax_cross_entropy.rule import from_passes
from kernels.softmax_cross_entropy.tiles import Columns, load_vector
from kernels.triton import DTYPES, TilePrecision, exp, tile_dot, tile_precision, triton_call

_LOWEST = float(jnp.finfo(jnp.float32).min)
LARGEST_WIDTH = 256


def _forward_kernel(*refs: Any, has_mask: bool, loop: LoopConfig, blocks: int, steps: int, dot: Any, exp: Any):
    """Log-sum-exp of a block of targets over a stretch of the catalogue; the first stretch scores the targets too."""
    hidden_ref, embedding_ref, targets_ref = refs[:3]
    mask_ref = refs[3] if has_mask else None
    lse_ref, at_target_ref = refs[3 + has_mask :]
    (num_targets, width), items, dtype = hidden_ref.shape, embedding_ref.shape[0], hidden_ref.dtype
    columns = Columns(width, loop.columns)
    block, part = pl.program_id(0) % blocks, pl.program_id(0) // blocks
    rows = pl.ds(block * loop.own, loop.own)
    hidden = columns.loader(hidden_ref, rows.start, loop.own, dtype)

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        largest, total = carry
        start = (part * steps + i) * loop.other
        scores = columns.scores(hidden, columns.loader(embedding_ref, start, loop.other, dtype), dot)
        counts = start + jnp.arange(loop.other) < items
        if has_mask:
            counts &= load_vector(mask_ref, start, loop.other) == 0
        scores = jnp.where(counts[None, :], scores, -jnp.inf)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=1))
        tile_total = jnp.sum(exp(scores - new_largest[:, None]), axis=1)
        return new_largest, total * exp(largest - new_largest) + tile_total

    # Finite, for a tile may be masked altogether and -inf less -inf is no number.
    carry = jnp.full(loop.own, _LOWEST, jnp.float32), jnp.zeros(loop.own, jnp.float32)
    largest, total = jax.lax.fori_loop(0, steps, step, carry)
    real = rows.start + jnp.arange(loop.own) < num_targets
    pltriton.store(lse_ref.at[part, rows], largest + jnp.log(total), mask=real)

    @pl.when(part == 0)
    def _():
        targets = load_vector(targets_ref, rows.start, loop.own)
        known = (targets >= 0) & (targets < items)
        targets = jnp.where(known, targets, 0)

        def at_targets(column: int) -> Array:
            return columns.load(embedding_ref, targets, known, column).astype(dtype)

        # By the product that made the scores of the loop, so that no rounding takes the loss below 0.
        scores = columns.scores(hidden, at_targets, dot)
        diagonal = jnp.arange(loop.own)[:, None] == jnp.arange(loop.own)[None, :]
        at_target = jnp.sum(jnp.where(diagonal, scores, 0.0), axis=1)
        if mask_ref is not None:
            masked = pltriton.load(mask_ref.at[targets], mask=known, other=0) != 0
            at_target = jnp.where(masked, -jnp.inf, at_target)
        pltriton.store(at_target_ref.at[rows], at_target, mask=real)


@dataclass(frozen=True)
class TritonPasses:
    """The two passes of `rule.Passes`.

    Attributes:
      config: how the work is divided.
      precision: how float32 tiles are multiplied.
      interpret: run as plain JAX.
    """

    config: TritonConfig
    precision: TilePrecision
    interpret: bool

    def forward(self, hidden: Array, embedding: Array, targets: Array, masked: Array | None) -> tuple[Array, Array]:
        loop, num_targets = self.config.forward, hidden.shape[0]
        parts, steps = loop.split(num_targets, embedding.shape[0])
        blocks = loop.blocks(num_targets)
        mask = None if masked is None else masked.astype(jnp.int8)
        kernel = partial(
            _forward_kernel,
            has_mask=mask is not None,
            loop=loop,
            blocks=blocks,
            steps=steps,
            dot=partial(tile_dot, precision=self.precision, interpret=self.interpret),
            exp=partial(exp, interpret=self.interpret),
        )
        lse, at_target = triton_call(
            kernel,
            [hidden, embedding, targets, mask],
            [((parts, num_targets), jnp.float32), ((num_targets,), jnp.float32)],
            grid=blocks * parts,
            num_warps=loop.num_warps,
            num_stages=loop.num_stages,
            interpret=self.interpret,
            name="softmax_cross_entropy_forward",
        )
        return jax.nn.logsumexp(lse, axis=0), at_target

    def backward(
        self, hidden: Array, embedding: Array, targets: Array, masked: Array | None, lse: Array, weights: Array
    ) -> tuple[Array, Array]:
        inputs = hidden, embedding, targets, masked, lse, weights
        options = {"precision": self.precision, "interpret": self.interpret}
        d_hidden = d_hidden_pass(*inputs, loop=self.config.d_hidden, **options)
        return d_hidden, d_embedding_pass(*inputs, loop=self.config.d_embedding, **options)


def softmax_cross_entropy_pallas_triton(
    hidden: Array,
    embedding: Array,
    targets: Array | None,
    masked: Array | None,
    *,
    precision: Precision = None,
    interpret: bool | None = None,
    config: TritonConfig | None = None,
) -> Array:
    """Runs the kernels; arguments and result are those of `reference.softmax_cross_entropy_reference`.

    Raises:
      ValueError: for widths, dtypes, a precision or a config that the kernels do not take.
    """
    width, tiles = hidden.shape[1], tile_precision(precision)
    if width > LARGEST_WIDTH:
        raise ValueError(f"d={width} is more than the {LARGEST_WIDTH} that the GPU kernels take; use 'xla'")
    for name, array in (("hidden", hidden), ("embedding", embedding)):
        if array.dtype not in DTYPES:
            raise ValueError(f"{name} has dtype {array.dtype}, the GPU kernels take {DTYPES}; use 'xla'")
    config = config or triton_config(width, hidden.dtype.itemsize, tiles)
    if not isinstance(config, TritonConfig):
        raise ValueError(f"config={config!r} is not for implementation='pallas_triton'")
    passes = TritonPasses(config, tiles, interpreted(interpret))
    return from_passes(passes, hidden, embedding, targets, masked)
