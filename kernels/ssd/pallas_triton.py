"""State space duality by hand-written GPU kernels: the forward pass, and how both passes are put together.

One program walks the chunks of one row (or of one segment of it), one head, and carries the state [p, n] in registers:
every input is read once and every output written once. Long rows with too few programs are cut into s segments, in
three phases: the state that each segment adds, the recurrence between segments, and the walk above from the states
found. The backward pass (`pallas_triton_vjp`) has the same phases in the opposite direction.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.ssd.config import MAX_WIDTH, SsdConfig
from kernels.ssd.pallas_triton_vjp import Outputs, backward
from kernels.ssd.segments import states_before, uncut_segments
from kernels.ssd.tiles import (
    Plan,
    Span,
    chunk_decays,
    edge_decays,
    load_histories,
    load_steps,
    load_tile,
    num_programs,
    place,
    reached,
    scaled,
    store_tile,
    weigh,
)
from kernels.starts import history_numbers
from kernels.triton_call import Products, triton_call, vary_together


def _update_state(plan: Plan, state: Array, to_end: Array, total: Array, delta: Array, x: Array, B: Array) -> Array:
    """state' = total state + sum_j to_end_j delta_j x_j B_j^T"""
    return weigh(plan, total, state) + plan.dot(scaled(x, to_end * delta), B, trans_a=True)


def _segment_kernel(plan: Plan, x_ref, dt_ref, A_ref, B_ref, bias_ref, lengths_ref, *rest) -> None:
    """The state that a segment adds to nothing, and its total log decay."""
    numbers_ref, added_ref, log_ref = rest if plan.packed else (None, *rest)
    row, segment, group, head, _, split = place(plan, 1, plan.config.width_splits)
    columns = plan.columns(split)
    states = plan.states
    A, bias, row_length = A_ref[head], bias_ref[head], lengths_ref[row]

    def walk(chunk: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        state, log_total = carry
        index = segment * plan.num_chunks + chunk
        positions = Span(index * plan.chunk, plan.chunk, plan.length)
        delta = load_steps(dt_ref, row, positions, head, bias, row_length).delta
        _, to_end, total = edge_decays(delta * A, load_histories(plan, numbers_ref, row, index))
        x = load_tile(x_ref, row, positions, head, columns)
        B = load_tile(B_ref, row, positions, group, states)
        return _update_state(plan, state, to_end, total, delta, x, B), log_total + jnp.sum(delta * A)

    zeros = jnp.zeros((columns.count, states.count), jnp.float32)
    state, log_total = jax.lax.fori_loop(0, plan.num_chunks, walk, (zeros, jnp.float32(0)))
    store_tile(added_ref, state, row, segment, head, columns, states)
    # Splits of a head write the same number.
    log_ref[row, segment, head] = log_total


def _forward_kernel(plan: Plan, keep_states: bool, *refs: Any) -> None:
    """Outputs, the final state and, for the gradient, the state before each chunk."""
    x_ref, dt_ref, A_ref, B_ref, C_ref, D_ref, bias_ref, lengths_ref, *rest = refs
    initial_ref = rest.pop(0) if plan.has_initial or plan.segments > 1 else None
    numbers_ref = rest.pop(0) if plan.packed else None
    y_ref, *rest = rest
    final_ref = rest.pop(0) if plan.wants_final else None
    row, segment, group, head, _, split = place(plan, 1, plan.config.width_splits)
    columns = plan.columns(split)
    states = plan.states
    A, D, bias, row_length = A_ref[head], D_ref[head], bias_ref[head], lengths_ref[row]

    def walk(chunk: Array, state: Array) -> Array:
        index = segment * plan.num_chunks + chunk
        positions = Span(index * plan.chunk, plan.chunk, plan.length)
        delta = load_steps(dt_ref, row, positions, head, bias, row_length).delta
        decays = chunk_decays(delta * A, load_histories(plan, numbers_ref, row, index))
        if keep_states:
            unless = chunk == 0 if plan.starts_from_zero else None
            store_tile(rest[0], state, row, index, head, columns, states, unless=unless)
        B, C = (load_tile(ref, row, positions, group, states) for ref in (B_ref, C_ref))
        mixed = reached(plan, plan.dot(C, B, trans_b=True) * decays.between, decays.between)
        y = weigh(plan, decays.from_start[:, None], plan.dot(C, state.astype(C.dtype), trans_b=True))
        x = load_tile(x_ref, row, positions, head, columns)
        y += plan.dot(mixed.astype(x.dtype), scaled(x, delta)) + D * x.astype(jnp.float32)
        state = _update_state(plan, state, decays.to_end, decays.total, delta, x, B)
        store_tile(y_ref, y, row, positions, head, columns)
        return state

    if initial_ref is None:
        state = jnp.zeros((columns.count, states.count), jnp.float32)
    else:
        state = load_tile(initial_ref, row, segment, head, columns, states)
    state = jax.lax.fori_loop(0, plan.num_chunks, walk, state)
    if final_ref is not None:
        store_tile(final_ref, state, row, segment, head, columns, states)


def _call(plan: Plan, kernel: Any, arguments: list[Array], out_shapes: list[Any], name: str) -> list[Array]:
    return triton_call(
        functools.partial(kernel, plan),
        arguments,
        out_shapes,
        grid=(num_programs(plan, 1, plan.config.width_splits),),
        num_warps=plan.config.forward_warps,
        num_stages=plan.config.num_stages,
        interpret=plan.interpret,
        name=name,
    )


def _forward(plan: Plan, keep_states: bool, *inputs: Array | None) -> tuple[Outputs, Array | None]:
    """Returns the outputs, and the state before each chunk [b, k, h, p, n] if it is kept."""
    x, dt, A, B, C, D, dt_bias, initial, lengths, numbers = inputs
    state_shape = (plan.heads, plan.width, plan.state_width)
    before = None if initial is None else initial[:, None]
    if plan.segments > 1:
        added, log_total = _call(
            plan,
            _segment_kernel,
            [a for a in (x, dt, A, B, dt_bias, lengths, numbers) if a is not None],
            [
                ((plan.batch, plan.segments, *state_shape), jnp.float32),
                ((plan.batch, plan.segments, plan.heads), jnp.float32),
            ],
            "ssd_segments",
        )
        before = states_before(added, log_total, initial, uncut=uncut_segments(plan, numbers))
    shapes = [(x.shape, x.dtype)]
    if plan.wants_final:
        shapes.append(((plan.batch, plan.segments, *state_shape), jnp.float32))
    if keep_states:
        shapes.append(((plan.batch, plan.all_chunks, *state_shape), jnp.float32))
    arguments = [x, dt, A, B, C, D, dt_bias, lengths, before, numbers]
    y, *rest = _call(
        plan,
        lambda plan, *refs: _forward_kernel(plan, keep_states, *refs),
        [a for a in arguments if a is not None],
        shapes,
        "ssd_forward",
    )
    final = rest.pop(0)[:, -1] if plan.wants_final else None
    return (y, final), rest[0] if keep_states else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _ssd(plan: Plan, *inputs: Array | None) -> Outputs:
    return _forward(plan, False, *inputs)[0]


def _ssd_fwd(plan: Plan, *inputs: Array | None) -> tuple[Outputs, tuple[Any, ...]]:
    outputs, states = _forward(plan, True, *inputs)
    return outputs, (*inputs, states)


def _ssd_bwd(plan: Plan, residuals: tuple[Any, ...], cotangents: Outputs) -> tuple[Array | None, ...]:
    return backward(plan, residuals, cotangents)


_ssd.defvjp(_ssd_fwd, _ssd_bwd)


def ssd_pallas_triton(
    x: Array,
    dt: Array,
    A: Array,
    B: Array,
    C: Array,
    D: Array | None,
    dt_bias: Array | None,
    initial_state: Array | None,
    lengths: Array | None,
    starts: Array | None,
    *,
    config: SsdConfig,
    products: Products,
    interpret: bool,
    return_final_state: bool,
) -> Outputs:
    """Runs the operator of `kernels.ssd.ssd`, softplus, bias and skip included.

    Args:
      x, dt, A, B, C, D, dt_bias, initial_state, lengths: as there, with B and C as [b, l, g, n] in the dtype of x.
      starts: bool [b, l] as there, false after a row's length.
      config: how the work is cut up.
      products: what becomes of float32 factors.
      interpret: run the kernels as plain JAX, on any platform.
      return_final_state: the final state is wanted; else nothing is written for it.

    Returns:
      y [b, l, h, p] in the dtype of x, and the final state [b, h, p, n] in float32, or None.

    Raises:
      ValueError: for dtypes, widths or a config that the kernels do not offer.
    """
    batch, length, heads, width = x.shape
    groups, state_width = B.shape[2:]
    if x.dtype not in (jnp.float32, jnp.bfloat16):
        raise ValueError(f"x is {x.dtype}; the Triton kernels take float32 or bfloat16: use implementation='xla'")
    for name, size in (("p", width), ("n", state_width)):
        if size > MAX_WIDTH:
            raise ValueError(f"{name}={size} is over the {MAX_WIDTH} of the Triton kernels: use implementation='xla'")
    config.check(heads_per_group=heads // groups, width=width)
    shape = (batch, length, heads, groups, width, state_width)
    plan = Plan(
        *shape, config, products, interpret, has_initial=initial_state is not None, wants_final=return_final_state,
        packed=starts is not None,
    )  # fmt: skip
    zeros = jnp.zeros(heads, jnp.float32)
    inputs = (
        x,
        dt.astype(jnp.float32),
        A.astype(jnp.float32),
        B.astype(x.dtype),
        C.astype(x.dtype),
        zeros if D is None else D.astype(jnp.float32),
        zeros if dt_bias is None else dt_bias.astype(jnp.float32),
        None if initial_state is None else initial_state.astype(jnp.float32),
        jnp.full(batch, length, jnp.int32) if lengths is None else lengths.astype(jnp.int32),
        None if starts is None else history_numbers(starts, plan.all_chunks * plan.chunk),
    )
    return _ssd(plan, *vary_together(*inputs))
