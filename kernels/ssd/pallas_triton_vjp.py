"""State space duality by hand-written GPU kernels: the backward pass.

One program goes through the chunks of a row (or segment) from the last to the first and carries the gradient of the
state after the chunk, [p, n] per head. With u = delta x, M = L o (C B^T), G = dy u^T and the states S before and the
gradient R of the state after a chunk,

  du = M^T dy + to_end (B R^T),    dB = (L o G)^T C + to_end (u R),    dC = (L o G) B + from_start (dy S)
  R' = total R + sum_i from_start_i dy_i C_i^T

and the gradient of a log decay is all that flows over its position: from before it to it or later.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from kernels.ssd.tiles import (
    KernelParams,
    ProgramIndex,
    apply_decay,
    chunk_decays,
    edge_decays,
    grid_size,
    load_histories,
    load_steps,
    lower_triangle,
    mask_tile,
    program_index,
    scaled,
    states_before,
    uncut_segments,
)
from kernels.triton import Span, load_tile, store_tile, triton_call

# y [b, l, h, p] and the final state [b, h, p, n], None where it is no output; or gradients by them.
Outputs = tuple[Array, Array | None]


def _request_kernel(params: KernelParams, dy_ref, dt_ref, A_ref, C_ref, bias_ref, lengths_ref, *rest) -> None:
    """What a segment's outputs ask of the state before it, and the segment's total log decay."""
    numbers_ref, state_cotangent_ref, log_ref = rest if params.packed else (None, *rest)
    row, segment, group, head, _, split = program_index(params, 1, params.config.width_splits)
    columns, states = params.columns(split), params.states
    A, bias, row_length = A_ref[head], bias_ref[head], lengths_ref[row]

    def body(step: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state_cotangent, log_total = carry
        chunk = (segment + 1) * params.num_chunks - 1 - step
        positions = Span(chunk * params.chunk, params.chunk, params.length)
        delta = load_steps(dt_ref, row, positions, head, bias, row_length).delta
        from_start, _, total = edge_decays(params, delta * A, load_histories(params, numbers_ref, row, chunk))
        dy = load_tile(dy_ref, row, positions, head, columns)
        C = load_tile(C_ref, row, positions, group, states)
        weighted = (from_start[:, None] * dy.astype(jnp.float32)).astype(dy.dtype)
        return apply_decay(params, total, state_cotangent) + params.dot(weighted, C, trans_a=True), log_total + jnp.sum(
            delta * A
        )

    zeros = jnp.zeros((columns.count, states.count), jnp.float32)
    state_cotangent, log_total = jax.lax.fori_loop(0, params.num_chunks, body, (zeros, jnp.float32(0)))
    store_tile(state_cotangent_ref, state_cotangent, row, segment, head, columns, states)
    log_ref[row, segment, head] = log_total


class _Refs(NamedTuple):
    """What the backward kernel reads and writes; those from `after` on may be missing."""

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
    dx: Any
    ddt: Any
    dB: Any
    dC: Any
    dA: Any
    dD: Any
    after: Any = None
    numbers: Any = None
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


def _state_before(params: KernelParams, refs: _Refs, at: ProgramIndex, head: _Head, chunk: Array) -> Array:
    when = chunk != 0 if params.starts_from_zero else None
    return load_tile(refs.states, at.row, chunk, head.index, params.columns(at.split), params.states, when=when)


def _onward(flows: Array) -> Array:
    """Sums flows [c, c], 0 above the diagonal, that leave each position or an earlier one (column) for a later one.

    All of them have passed the decay after the position: what arrives less what leaves, summed up, would be less work
    but round what passes elsewhere into a position that nothing passes.
    """
    from_earlier = jnp.cumsum(flows, axis=1)
    return jnp.sum(jnp.where(lower_triangle(flows.shape[0], strict=True), from_earlier, 0.0), axis=0)


def _over(flows: Array, passed: Array) -> Array:
    """Sums flows [c] over each position [c] that they pass, as [c, c] bool tells of a flow (row) and a position."""
    return jnp.sum(jnp.where(passed, flows[:, None], 0.0), axis=0)


def _one_chunk(params: KernelParams, refs: _Refs, at: ProgramIndex, head: _Head, step: Array, sums: _Sums) -> _Sums:
    """Handles one chunk of one head.

    Tiles are loaded again after each store: a program's registers hold few at once, and its cache all of them.
    """
    chunk = (at.segment + 1) * params.num_chunks - 1 - step
    positions = Span(chunk * params.chunk, params.chunk, params.length)
    columns, states = params.columns(at.split), params.states

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
    decays = chunk_decays(params, delta * head.A, load_histories(params, refs.numbers, at.row, chunk))
    compute_dtype = refs.x.dtype
    here, until = jnp.arange(params.chunk), lower_triangle(params.chunk)

    # Inside the chunk.
    dy, x, B, C = values(refs.dy), values(refs.x), maps(refs.B), maps(refs.C)
    scores = params.dot(C, B, trans_b=True)
    d_mixed = mask_tile(params, params.dot(dy, scaled(x, delta), trans_b=True) * decays.between, decays.between)
    flows = mask_tile(
        params, jnp.where(lower_triangle(params.chunk, strict=True), d_mixed * scores, 0.0), decays.between
    )
    # What flows over each position is added up at once, to keep one vector. Flows from one history to another are 0.
    d_log_decay = _over(_onward(flows), here[:, None] + 1 == here[None, :])
    mixed = mask_tile(params, scores * decays.between, decays.between)
    du = params.dot(mixed.astype(compute_dtype), dy, trans_a=True)
    d_scores = d_mixed.astype(compute_dtype)

    # From the state before it to the outputs.
    before = _state_before(params, refs, at, head, chunk)
    dC = mask_tile(
        params, params.dot(scaled(dy, decays.from_start), before.astype(compute_dtype)), decays.from_start[:, None]
    )
    d_log_decay += _over(jnp.sum(dC * C.astype(jnp.float32), axis=1), until)
    d_log_decay += apply_decay(params, decays.total, jnp.sum(sums.state * before))
    add_to(refs.dC, dC + params.dot(d_scores, B))

    # From the inputs to the state after it.
    after, x, B = sums.state.astype(compute_dtype), values(refs.x), maps(refs.B)
    dB = mask_tile(params, params.dot(scaled(x, decays.to_end * delta), after), decays.to_end[:, None])
    d_log_decay += _over(jnp.sum(dB * B.astype(jnp.float32), axis=1), jnp.logical_not(until))
    add_to(refs.dB, dB + params.dot(d_scores, maps(refs.C), trans_a=True))

    x, dy = values(refs.x), values(refs.dy)
    from_after = params.dot(scaled(maps(refs.B), decays.to_end), after, trans_b=True)
    du += mask_tile(params, from_after, decays.to_end[:, None])
    x_wide, dy_wide = x.astype(jnp.float32), dy.astype(jnp.float32)
    store_tile(refs.dx, delta[:, None] * du + head.D * dy_wide, at.row, positions, head.index, columns)
    d_delta = head.A * d_log_decay + jnp.sum(x_wide * du, axis=1)
    store_tile(refs.ddt, d_delta * slope, at.split, at.row, positions, head.index)
    after = apply_decay(params, decays.total, sums.state)
    after += params.dot(scaled(values(refs.dy), decays.from_start), maps(refs.C), trans_a=True)
    return _Sums(after, sums.A + jnp.sum(d_log_decay * delta), sums.D + jnp.sum(dy_wide * x_wide))


def _backward_kernel(names: tuple[str, ...], params: KernelParams, *all_refs: Any) -> None:
    """All gradients; the heads of a program take turns and add their gradients of B and C."""
    refs = _Refs(**dict(zip(names, all_refs, strict=True)))
    count, splits = params.config.heads_per_program, params.config.width_splits
    at = program_index(params, count, splits)
    columns, states = params.columns(at.split), params.states

    def one_head(number: Array | int, nothing: None) -> None:
        if count > 1:
            # What another thread of the program stored for the head before is visible from here on.
            params.barrier()
        index = at.head + number
        head = _Head(index, number == 0, refs.A[index], refs.D[index], refs.bias[index])
        after = jnp.zeros((columns.count, states.count), jnp.float32)
        if refs.after is not None:
            after = load_tile(refs.after, at.row, at.segment, index, columns, states)
        sums = _Sums(after, jnp.float32(0), jnp.float32(0))
        sums = jax.lax.fori_loop(0, params.num_chunks, functools.partial(_one_chunk, params, refs, at, head), sums)
        refs.dA[at.split, at.row, at.segment, index] = sums.A
        refs.dD[at.split, at.row, at.segment, index] = sums.D
        if refs.d_initial is not None:
            store_tile(refs.d_initial, sums.state, at.row, at.segment, index, columns, states)

    if count == 1:
        one_head(0, None)
    else:
        jax.lax.fori_loop(0, count, one_head, None)


def _call(
    params: KernelParams, kernel: Any, arguments: list[Array | None], shapes: list[Any], heads: int, name: str
) -> list[Array]:
    return triton_call(
        functools.partial(kernel, params),
        arguments,
        shapes,
        grid=grid_size(params, heads, params.config.width_splits),
        num_warps=params.config.backward_warps,
        num_stages=params.config.num_stages,
        interpret=params.interpret,
        name=name,
    )


def _states_after(params: KernelParams, residuals: tuple[Any, ...], dy: Array, d_final: Array | None) -> Array | None:
    """Gradient of the state after each segment, [b, s, h, p, n], or None for zeros."""
    _, dt, A, _, C, _, dt_bias, _, lengths, numbers, _ = residuals
    if params.segments == 1:
        return None if d_final is None else d_final[:, None]
    state_cotangent, log_total = _call(
        params,
        _request_kernel,
        [dy, dt, A, C, dt_bias, lengths, numbers],
        [
            ((params.batch, params.segments, params.heads, params.width, params.state_width), jnp.float32),
            ((params.batch, params.segments, params.heads), jnp.float32),
        ],
        1,
        "ssd_requests",
    )
    return states_before(state_cotangent, log_total, d_final, uncut=uncut_segments(params, numbers), reverse=True)


def backward(params: KernelParams, residuals: tuple[Any, ...], cotangents: Outputs) -> tuple[Array | None, ...]:
    """Pulls the gradients of the outputs back to every input.

    Args:
      params: static numbers of the call.
      residuals: the inputs (x, dt, A, B, C, D, dt_bias, initial state or None, lengths, numbers of the histories or
        None), and the states before each chunk.
      cotangents: gradients by the outputs; None where there is no such output.

    Returns:
      One gradient for each input; None for integers and for what is not there.
    """
    x, dt, A, B, C, D, dt_bias, initial, lengths, numbers, states = residuals
    dy, d_final = cotangents
    count, splits = params.config.heads_per_program, params.config.width_splits
    parts = params.heads // params.groups // count * splits
    after = _states_after(params, residuals, dy, d_final)
    # Heads and parts add up in float32.
    map_dtype = B.dtype if parts == count == 1 else jnp.float32
    map_shape = ((parts, *B.shape), map_dtype)
    per_head = ((splits, params.batch, params.segments, params.heads), jnp.float32)
    read = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "bias": dt_bias, "lengths": lengths, "states": states}
    read |= {"dy": dy.astype(x.dtype), "after": after, "numbers": numbers}
    read = {name: a for name, a in read.items() if a is not None}
    written = {"dx": (x.shape, x.dtype), "ddt": ((splits, *dt.shape), jnp.float32)}
    written |= {"dB": map_shape, "dC": map_shape, "dA": per_head, "dD": per_head}
    if initial is not None:
        state_shape = (params.batch, params.segments, params.heads, params.width, params.state_width)
        written["d_initial"] = (state_shape, jnp.float32)
    outputs = _call(
        params,
        functools.partial(_backward_kernel, (*read, *written)),
        list(read.values()),
        list(written.values()),
        count,
        "ssd_backward",
    )
    gradients = dict(zip(written, outputs, strict=True))
    ddt = _add_parts(gradients["ddt"])
    return (
        gradients["dx"],
        ddt,
        jnp.sum(gradients["dA"], axis=(0, 1, 2)),
        _add_parts(gradients["dB"]).astype(B.dtype),
        _add_parts(gradients["dC"]).astype(C.dtype),
        jnp.sum(gradients["dD"], axis=(0, 1, 2)),
        jnp.sum(ddt, axis=(0, 1)),
        gradients["d_initial"][:, 0] if initial is not None else None,
        None,
        None,
    )


def _add_parts(parts: Array) -> Array:
    """Adds up the first axis; alone it is taken off without a copy."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)
