"""State space duality by hand-written GPU kernels: the backward pass.

One program walks the chunks of a row (or segment) from the last to the first and carries the gradient of the state
after the chunk, [p, n] a head. With u = delta x, M = L o (C B^T), G = dy u^T and the states S before and the gradient R
of the state after a chunk,

  du = M^T dy + to_end (B R^T),    dB = (L o G)^T C + to_end (u R),    dC = (L o G) B + from_start (dy S)
  R' = total R + sum_i from_start_i dy_i C_i^T

and the gradient of a log decay is all that flows over its position: from before it to it or later.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton as pltriton

from kernels.ssd.segments import states_before
from kernels.ssd.tiles import (
    Place,
    Plan,
    Span,
    chunk_decays,
    edge_decays,
    load_steps,
    load_tile,
    lower_triangle,
    num_programs,
    place,
    store_tile,
)
from kernels.triton_call import triton_call


def _request_kernel(plan: Plan, dy_ref, dt_ref, A_ref, C_ref, bias_ref, lengths_ref, asked_ref, log_ref) -> None:
    """What a segment's outputs ask of the state before it, and the segment's total log decay."""
    row, segment, group, head, _, split = place(plan, 1, plan.config.width_splits)
    columns, states = plan.columns(split), plan.states
    A, bias, row_length = A_ref[head], bias_ref[head], lengths_ref[row]

    def walk(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        asked, log_total = carry
        chunk = (segment + 1) * plan.num_chunks - 1 - step
        positions = Span(chunk * plan.chunk, plan.chunk, plan.length)
        delta = load_steps(dt_ref, row, positions, head, bias, row_length).delta
        from_start, _, total = edge_decays(delta * A)
        dy = load_tile(dy_ref, row, positions, head, columns)
        C = load_tile(C_ref, row, positions, group, states)
        weighted = (from_start[:, None] * dy.astype(jnp.float32)).astype(dy.dtype)
        return total * asked + plan.dot(weighted, C, trans_a=True), log_total + jnp.sum(delta * A)

    zeros = jnp.zeros((columns.count, states.count), jnp.float32)
    asked, log_total = jax.lax.fori_loop(0, plan.num_chunks, walk, (zeros, jnp.float32(0)))
    store_tile(asked_ref, asked, row, segment, head, columns, states)
    log_ref[row, segment, head] = log_total


class _Refs(NamedTuple):
    """What the backward kernel reads and, from dx on, writes; `after` and `d_initial` may be missing."""

    x: Any
    dt: Any
    A: Any
    B: Any
    C: Any
    D: Any
    bias: Any
    lengths: Any
    states: Any
    dy: Any
    after: Any
    dx: Any
    ddt: Any
    dB: Any
    dC: Any
    dA: Any
    dD: Any
    d_initial: Any = None


class _Sums(NamedTuple):
    """What a program adds up over the positions of one head: gradient of the state after, of A and of D."""

    state: Array
    A: Array
    D: Array


class _Head(NamedTuple):
    """One head of a program: its index, whether it is the program's first, and its parameters."""

    index: Any
    first: Any
    A: Array
    D: Array
    bias: Array


def _walk(plan: Plan, refs: _Refs, at: Place, head: _Head, step: Array, sums: _Sums) -> _Sums:
    """Handles one chunk of one head.

    Tiles are loaded again after each store: a program's registers hold few at once, and its cache all of them.
    """
    chunk = (at.segment + 1) * plan.num_chunks - 1 - step
    positions = Span(chunk * plan.chunk, plan.chunk, plan.length)
    columns, states = plan.columns(at.split), plan.states

    def values(ref: Any) -> Array:
        return load_tile(ref, at.row, positions, head.index, columns)

    def maps(ref: Any) -> Array:
        return load_tile(ref, at.row, positions, at.group, states)

    def add_to(ref: Any, tile: Array) -> None:
        """The heads of a program add up in memory; nobody else writes there."""
        before = load_tile(ref, at.part, at.row, positions, at.group, states).astype(jnp.float32)
        tile += jnp.where(head.first, 0.0, before)
        store_tile(ref, tile, at.part, at.row, positions, at.group, states)

    delta, slope = load_steps(refs.dt, at.row, positions, head.index, head.bias, refs.lengths[at.row])
    decays = chunk_decays(delta * head.A)
    narrow = refs.x.dtype

    # Inside the chunk.
    dy, x, B, C = values(refs.dy), values(refs.x), maps(refs.B), maps(refs.C)
    scores = plan.dot(C, B, trans_b=True)
    d_mixed = plan.dot(dy, _scaled(x, delta), trans_b=True) * decays.between
    flows = jnp.where(lower_triangle(plan.chunk, strict=True), d_mixed * scores, 0.0)
    inside = jnp.sum(flows, axis=0) - jnp.sum(flows, axis=1)
    du = plan.dot((scores * decays.between).astype(narrow), dy, trans_a=True)
    d_scores = d_mixed.astype(narrow)

    # From the state before it to the outputs.
    unless = chunk == 0 if plan.starts_from_zero else None
    before = load_tile(refs.states, at.row, chunk, head.index, columns, states, unless=unless)
    dC = plan.dot(_scaled(dy, decays.from_start), before.astype(narrow))
    arriving = jnp.sum(dC * C.astype(jnp.float32), axis=1)
    through = decays.total * jnp.sum(sums.state * before)
    add_to(refs.dC, dC + plan.dot(d_scores, B))

    # From the inputs to the state after it.
    after, x, B = sums.state.astype(narrow), values(refs.x), maps(refs.B)
    dB = plan.dot(_scaled(x, decays.to_end * delta), after)
    leaving = inside + jnp.sum(dB * B.astype(jnp.float32), axis=1)
    add_to(refs.dB, dB + plan.dot(d_scores, maps(refs.C), trans_a=True))

    # Over position k flows what arrives at it or later from before the chunk, what leaves the chunk from earlier
    # positions, what goes from earlier positions to it or later, and what passes through the whole chunk.
    later = lower_triangle(plan.chunk)
    d_log_decay = jnp.sum(jnp.where(later, arriving[:, None], leaving[:, None]), axis=0) + through

    x, dy = values(refs.x), values(refs.dy)
    du += plan.dot(_scaled(maps(refs.B), decays.to_end), after, trans_b=True)
    x_wide, dy_wide = x.astype(jnp.float32), dy.astype(jnp.float32)
    store_tile(refs.dx, delta[:, None] * du + head.D * dy_wide, at.row, positions, head.index, columns)
    d_delta = head.A * d_log_decay + jnp.sum(x_wide * du, axis=1)
    store_tile(refs.ddt, d_delta * slope, at.split, at.row, positions, head.index)

    asked = plan.dot(_scaled(values(refs.dy), decays.from_start), maps(refs.C), trans_a=True)
    return _Sums(
        decays.total * sums.state + asked,
        sums.A + jnp.sum(d_log_decay * delta),
        sums.D + jnp.sum(dy_wide * x_wide),
    )


def _scaled(tile: Array, factors: Array) -> Array:
    """Rows of a tile times factors, in the tile's dtype."""
    return (factors[:, None] * tile.astype(jnp.float32)).astype(tile.dtype)


def _backward_kernel(plan: Plan, *all_refs: Any) -> None:
    """All gradients; the heads of a program take turns and add their gradients of B and C."""
    has_after = plan.wants_final or plan.segments > 1
    refs = _Refs(*(all_refs if has_after else (*all_refs[:10], None, *all_refs[10:])))
    count, splits = plan.config.heads_per_program, plan.config.width_splits
    at = place(plan, count, splits)
    columns, states = plan.columns(at.split), plan.states

    def one_head(number: Array, nothing: None) -> None:
        if count > 1 and not plan.interpret:
            # What another thread of the program stored for the head before is visible from here on.
            pltriton.debug_barrier()
        index = at.head + number
        head = _Head(index, number == 0, refs.A[index], refs.D[index], refs.bias[index])
        after = jnp.zeros((columns.count, states.count), jnp.float32)
        if refs.after is not None:
            after = load_tile(refs.after, at.row, at.segment, index, columns, states)
        sums = _Sums(after, jnp.float32(0), jnp.float32(0))
        sums = jax.lax.fori_loop(0, plan.num_chunks, functools.partial(_walk, plan, refs, at, head), sums)
        refs.dA[at.split, at.row, at.segment, index] = sums.A
        refs.dD[at.split, at.row, at.segment, index] = sums.D
        if refs.d_initial is not None:
            store_tile(refs.d_initial, sums.state, at.row, at.segment, index, columns, states)

    if count == 1:
        one_head(0, None)
    else:
        jax.lax.fori_loop(0, count, one_head, None)


def _call(plan: Plan, kernel: Any, arguments: list[Array], shapes: list[Any], heads: int, name: str) -> list[Array]:
    return triton_call(
        functools.partial(kernel, plan),
        arguments,
        shapes,
        grid=(num_programs(plan, heads, plan.config.width_splits),),
        num_warps=plan.config.backward_warps,
        num_stages=plan.config.num_stages,
        interpret=plan.interpret,
        name=name,
    )


def _states_after(plan: Plan, residuals: tuple[Any, ...], dy: Array, d_final: Array | None) -> Array | None:
    """Gradient of the state after each segment, [b, s, h, p, n], or None for zeros."""
    _, dt, A, _, C, _, dt_bias, _, lengths, _ = residuals
    if plan.segments == 1:
        return None if d_final is None else d_final[:, None]
    asked, log_total = _call(
        plan,
        _request_kernel,
        [dy, dt, A, C, dt_bias, lengths],
        [
            ((plan.batch, plan.segments, plan.heads, plan.width, plan.state_width), jnp.float32),
            ((plan.batch, plan.segments, plan.heads), jnp.float32),
        ],
        1,
        "ssd_requests",
    )
    return states_before(asked, log_total, d_final, reverse=True)


def backward(
    plan: Plan, residuals: tuple[Any, ...], cotangents: tuple[Array, Array | None]
) -> tuple[Array | None, ...]:
    """Pulls the gradients of y and of the final state back to every input.

    Args:
      plan: static numbers of the call.
      residuals: the inputs (x, dt, A, B, C, D, dt_bias, initial state or None, lengths), and the states before each
        chunk.
      cotangents: dy [b, l, h, p] and d_final [b, h, p, n], or None where the final state is no output.

    Returns:
      One gradient for each input; None for lengths and for an initial state that is not there.
    """
    x, dt, A, B, C, D, dt_bias, initial, lengths, states = residuals
    dy, d_final = cotangents
    count, splits = plan.config.heads_per_program, plan.config.width_splits
    parts = plan.heads // plan.groups // count * splits
    after = _states_after(plan, residuals, dy, d_final)
    # Heads and parts add up in float32.
    map_dtype = B.dtype if parts == count == 1 else jnp.float32
    map_shape = ((parts, *B.shape), map_dtype)
    per_head = ((splits, plan.batch, plan.segments, plan.heads), jnp.float32)
    shapes = [(x.shape, x.dtype), ((splits, *dt.shape), jnp.float32), map_shape, map_shape, per_head, per_head]
    if initial is not None:
        shapes.append(((plan.batch, plan.segments, plan.heads, plan.width, plan.state_width), jnp.float32))
    dx, ddt, dB, dC, dA, dD, *d_initial = _call(
        plan,
        _backward_kernel,
        [x, dt, A, B, C, D, dt_bias, lengths, states, dy.astype(x.dtype)] + ([] if after is None else [after]),
        shapes,
        count,
        "ssd_backward",
    )
    ddt = _add_parts(ddt)
    return (
        dx,
        ddt,
        jnp.sum(dA, axis=(0, 1, 2)),
        _add_parts(dB).astype(B.dtype),
        _add_parts(dC).astype(C.dtype),
        jnp.sum(dD, axis=(0, 1, 2)),
        jnp.sum(ddt, axis=(0, 1)),
        d_initial[0][:, 0] if d_initial else None,
        None,
    )


def _add_parts(parts: Array) -> Array:
    """Adds up the first axis; alone it is taken off without a copy."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)
