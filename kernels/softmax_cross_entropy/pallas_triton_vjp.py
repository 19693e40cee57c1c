"""Softmax cross-entropy over a catalogue by GPU kernels: the two loops of the gradient.

The gradient of the scores, w_t (exp(s_tv - lse_t) - [v = target_t]), is made again tile by tile in each of them. By
hidden it is multiplied while a block of targets loops over the catalogue, by embedding while a block of rows loops over
the targets; every sum has one owner or is added up outside, so nothing is scattered and the order is always the same.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from kernels.softmax_cross_entropy.config import LoopConfig
from kernels.softmax_cross_entropy.tiles import Columns, load_vector
from kernels.triton import TilePrecision, exp, tile_dot, triton_call


def _items(mask_refs: tuple[Any, ...], start: Array, size: int) -> tuple[Array, Array | None]:
    """Returns the ids of a stretch of the catalogue and which of them are masked."""
    masked = load_vector(mask_refs[0], start, size) != 0 if mask_refs else None
    return start + jnp.arange(size, dtype=jnp.int32), masked


def _targets(refs: tuple[Any, ...], start: Array, size: int) -> tuple[Array, ...]:
    """Returns ids, log-sum-exps and weights of a stretch of targets; beyond the last one the weight is 0."""
    return tuple(load_vector(ref, start, size) for ref in refs)


def _d_scores(scores: Array, items: tuple[Any, ...], targets: tuple[Any, ...], *, items_axis: int, exp: Any) -> Array:
    """Gradient of a tile of scores, whose items lie along `items_axis` and targets along the other one."""
    (ids, masked), (target_ids, lse, weights) = items, targets
    along_items = partial(jnp.expand_dims, axis=1 - items_axis)
    along_targets = partial(jnp.expand_dims, axis=items_axis)
    is_target = along_items(ids) == along_targets(target_ids)
    d_scores = exp(scores - along_targets(lse)) - is_target.astype(jnp.float32)
    if masked is not None:
        d_scores = jnp.where(along_items(masked), 0.0, d_scores)
    return along_targets(weights) * d_scores


def _kernel(
    hidden_ref: Any,
    embedding_ref: Any,
    *all_refs: Any,
    by_hidden: bool,
    loop: LoopConfig,
    blocks: int,
    steps: int,
    dot: Any,
    exp: Any,
):
    """Gradient by a block of own rows, summed over a stretch of the other side."""
    *refs, out_ref = all_refs
    target_refs, mask_refs = tuple(refs[:3]), tuple(refs[3:])
    block, part = pl.program_id(0) % blocks, pl.program_id(0) // blocks
    own_ref, other_ref = (hidden_ref, embedding_ref) if by_hidden else (embedding_ref, hidden_ref)
    (num_rows, width), dtype = own_ref.shape, hidden_ref.dtype
    columns = Columns(width, loop.columns)
    first = block * loop.own
    own = columns.loader(own_ref, first, loop.own, dtype)
    load_own, load_other = (_targets, _items) if by_hidden else (_items, _targets)
    own_refs, other_refs = (target_refs, mask_refs) if by_hidden else (mask_refs, target_refs)
    own_facts = load_own(own_refs, first, loop.own)

    def step(i: Array, totals: list[Array]) -> list[Array]:
        start = (part * steps + i) * loop.other
        other = columns.loader(other_ref, start, loop.other, dtype)
        other_facts = load_other(other_refs, start, loop.other)
        items, targets = (other_facts, own_facts) if by_hidden else (own_facts, other_facts)
        # Beyond the end nothing is added: items there are rows of 0, targets there have weight 0.
        scores = columns.scores(own, other, dot)
        d_scores = _d_scores(scores, items, targets, items_axis=1 if by_hidden else 0, exp=exp)
        d_scores = d_scores.astype(dtype)
        return [total + dot(d_scores, other(column)) for total, column in zip(totals, columns.starts, strict=True)]

    totals = [jnp.zeros((loop.own, columns.size), jnp.float32) for _ in columns.starts]
    totals = jax.lax.fori_loop(0, steps, step, totals)
    ids = first + jnp.arange(loop.own)
    for total, column in zip(totals, columns.starts, strict=True):
        columns.store(out_ref, part * num_rows + ids, ids < num_rows, column, total.astype(out_ref.dtype))


def _gradient(
    hidden: Array,
    embedding: Array,
    targets: Array,
    masked: Array | None,
    lse: Array,
    weights: Array,
    *,
    by_hidden: bool,
    loop: LoopConfig,
    precision: TilePrecision,
    interpret: bool,
) -> Array:
    own, other = (hidden, embedding) if by_hidden else (embedding, hidden)
    parts, steps = loop.split(own.shape[0], other.shape[0])
    blocks = loop.blocks(own.shape[0])
    mask = None if masked is None else masked.astype(jnp.int8)
    kernel = partial(
        _kernel,
        by_hidden=by_hidden,
        loop=loop,
        blocks=blocks,
        steps=steps,
        dot=partial(tile_dot, precision=precision, interpret=interpret),
        exp=partial(exp, interpret=interpret),
    )
    (gradients,) = triton_call(
        kernel,
        [hidden, embedding, targets, lse, weights, mask],
        # One part is the gradient itself and is rounded once; several are added up in float32 first.
        [((parts * own.shape[0], own.shape[1]), own.dtype if parts == 1 else jnp.float32)],
        grid=blocks * parts,
        num_warps=loop.num_warps,
        num_stages=loop.num_stages,
        interpret=interpret,
        name=f"softmax_cross_entropy_d_{'hidden' if by_hidden else 'embedding'}",
    )
    return gradients if parts == 1 else jnp.sum(gradients.reshape(parts, *own.shape), axis=0)


d_hidden_pass = partial(_gradient, by_hidden=True)
d_embedding_pass = partial(_gradient, by_hidden=False)
