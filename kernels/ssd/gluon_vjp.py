"""State space duality by Gluon kernels: how the backward pass is put together.

Its kernel is `gluon_vjp_mma`, or `gluon_vjp_wgmma` where that is faster. Of rows that are cut into segments a kernel of
their own first gives the gradient of the state after each segment.
"""

# Kernels are of Gluon's own language, in which constants are given as plain numbers.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportOperatorIssue=false, reportMissingImports=false
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false, reportReturnType=false

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

import kernels.gluon
from kernels.gluon import fragment, lane_at, lane_numbers, lane_sums, per_warp, product, same_in_warp, to_columns
from kernels.ssd import gluon_vjp_wgmma
from kernels.ssd.gluon_tiles import (
    GluonParams,
    edge_decays,
    lane_slots,
    load_histories,
    load_steps,
    log2_sums,
    slot_column,
    slot_head,
    tile_columns,
    tile_rows,
    tile_slots,
)
from kernels.ssd.gluon_vjp_mma import ssd_backward
from kernels.ssd.gluon_vjp_shared import check_shared_memory, shared_bytes, shared_limit, warps_joined
from kernels.ssd.gluon_vjp_tiles import apply_decay, load_maps, load_values, scaled, tile_at, zero_behind
from kernels.ssd.tiles import states_before, uncut_segments


@gluon.jit
def ssd_requests(
    dy, dt, A, C, bias, lengths, numbers, asked, logs,
    LENGTH: gl.constexpr, HEADS: gl.constexpr, GROUPS: gl.constexpr, WIDTH: gl.constexpr, STATE_WIDTH: gl.constexpr,
    COLUMNS: gl.constexpr, STATES: gl.constexpr, W: gl.constexpr, SEGMENTS: gl.constexpr, SEGMENT_CHUNKS: gl.constexpr,
    EXACT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """What a segment's outputs ask of the state before it, and the segment's total log decay."""
    parts: gl.constexpr = HEADS * ((WIDTH + COLUMNS - 1) // COLUMNS) // W
    program = gl.program_id(0)
    first_slot = program % parts * W
    segment = program // parts % SEGMENTS
    row = program // (parts * SEGMENTS)
    wide_row = row.to(gl.int64)
    dy_row = dy + wide_row * (LENGTH * HEADS * WIDTH)
    dt_row = dt + wide_row * (LENGTH * HEADS)
    C_row = C + wide_row * (LENGTH * GROUPS * STATE_WIDTH)
    numbers_row = numbers + wide_row * (SEGMENTS * SEGMENT_CHUNKS * 16 + 1)
    slot = tile_slots(first_slot, W)
    head = slot_head(slot, WIDTH, COLUMNS)
    lane_head = slot_head(lane_slots(first_slot, W), WIDTH, COLUMNS) + lane_numbers(W) * 0
    decay_rate = gl.load(A + lane_head)
    lane_bias = gl.load(bias + lane_head)
    row_length = gl.minimum(gl.load(lengths + row), LENGTH)
    column = slot_column(slot, WIDTH, COLUMNS)
    p = column + tile_rows(COLUMNS, W)
    n = tile_columns(STATES, W)
    size: gl.constexpr = HEADS * WIDTH * STATE_WIDTH

    R = gl.zeros([W, COLUMNS, STATES], gl.float32, fragment(W))
    log_total = gl.zeros_like(decay_rate)
    begin = segment * SEGMENT_CHUNKS
    end = gl.minimum(begin + SEGMENT_CHUNKS, (LENGTH + 15) // 16)
    for back in range(0, end - begin):
        first = (end - 1 - back) * 16
        across = tile_at(first, True, W, LENGTH)
        delta, _ = load_steps(
            dt_row, lane_bias, row_length, first, first_slot, LENGTH, HEADS, WIDTH, COLUMNS, W, LENGTH % 16 != 0
        )
        number, first_number, last_number = load_histories(numbers_row, first, W, PACKED)
        coarse, fine = log2_sums(delta * decay_rate, number, EXACT, PACKED)
        from_start, _, total = edge_decays(coarse, fine, number, first_number, last_number, EXACT, PACKED)
        from_start = to_columns(zero_behind(from_start, first, LENGTH))[:, None, :]
        dy_turned = load_values(dy_row, across, head, column, tile_rows(COLUMNS, W), HEADS, WIDTH, COLUMNS)
        C_turned = load_maps(
            C_row, across, tile_rows(STATES, W), head // (HEADS // GROUPS), GROUPS, STATE_WIDTH, STATES
        )
        R = product(
            dy_turned, scaled(C_turned, from_start), apply_decay(same_in_warp(total)[:, None, None], R, PACKED), EXACT
        )
        log_total += delta * decay_rate
    state_at = (head * WIDTH + p) * STATE_WIDTH + n
    inside = (p < WIDTH) & (n < STATE_WIDTH)
    gl.store(asked + (wide_row * SEGMENTS + segment) * size + state_at, R, mask=inside)
    # Warps that share a head write the same number.
    warp_head = slot_head(first_slot + gl.arange(0, W, per_warp(W)), WIDTH, COLUMNS)
    total = same_in_warp(lane_at(lane_sums(log_total, lane_head, False), 15))
    gl.store(logs + (wide_row * SEGMENTS + segment) * HEADS + warp_head, total)


def narrowed(params: GluonParams) -> GluonParams:
    """Returns the same call with as many columns per warp as the registers of a thread hold."""
    config = params.config
    most = 16 if params.states > 32 or params.exact else 32
    columns = min(config.columns, most)
    # The warps of a row become more by a whole factor only where the columns divide the width.
    slots = params.heads * -(-params.width // columns)
    warps = math.gcd(config.warps, slots)
    return dataclasses.replace(params, config=dataclasses.replace(config, columns=columns, warps=warps))


def wgmma_lack(params: GluonParams, dtype: Any) -> str | None:
    """Says why a call's gradient is not to be had by `wgmma` on the GPU at hand, or Hopper where there is none."""
    capability, _ = shared_limit()
    sizes = {"p": params.width, "n": params.state_width, "block": params.config.block}
    wanted = (gluon_vjp_wgmma.WIDTH, gluon_vjp_wgmma.STATE_WIDTH, gluon_vjp_wgmma.BLOCK)
    for (name, size), value in zip(sizes.items(), wanted, strict=True):
        if size != value:
            return f"{name}={size} is not {value}"
    if dtype != jnp.float32 or params.exact:
        return "products are not of TF32 factors"
    return None if capability[0] == 9 else f"this GPU has compute capability {capability[0]}.{capability[1]}, not 9.0"


def check_wgmma(params: GluonParams, dtype: Any) -> None:
    """Refuses wgmma=True where it is not offered.

    Raises:
      ValueError: naming it and the reason.
    """
    if params.config.wgmma and (lack := wgmma_lack(params, dtype)):
        raise ValueError(f"wgmma=True in a GluonConfig: {lack}; leave it out")


def that_fits(params: GluonParams, dtype: Any) -> GluonParams:
    """Returns params whose gradient the GPU at hand can hold: of shorter blocks, then of fewer warps, if need be.

    Args:
      params: of a division that nobody asked for; `wgmma` is taken where it is offered.
      dtype: of x.
    """
    if wgmma_lack(params, dtype) is None:
        return dataclasses.replace(params, config=dataclasses.replace(params.config, wgmma=True))
    itemsize = jnp.dtype(dtype).itemsize
    _, limit = shared_limit()
    while shared_bytes(narrowed(params), itemsize) > limit and (params.config.block > 16 or params.config.warps > 1):
        config = params.config
        change = {"block": config.block // 32 * 16} if config.block > 16 else {"warps": config.warps // 2}
        params = dataclasses.replace(params, config=dataclasses.replace(config, **change))
    return params


def _states_after(params: GluonParams, residuals: tuple[Any, ...], dy: Array, d_final: Array | None) -> Array | None:
    """Gradient of the state after each segment, [b, s, h, p, n], or None for zeros."""
    _, dt, A, _, C, _, dt_bias, _, lengths, numbers, _ = residuals
    if params.segments == 1:
        return None if d_final is None else d_final[:, None]
    by_segment = (params.batch, params.segments, params.heads)
    asked, log_total = kernels.gluon.launch(
        ssd_requests,
        [dy, dt, A, C, dt_bias, lengths, numbers],
        [((*by_segment, params.width, params.state_width), jnp.float32), (by_segment, jnp.float32)],
        grid=params.grid,
        num_warps=params.config.warps,
        constants=params.constants,
        maxnreg=params.config.forward_registers,
        name="ssd_requests",
    )
    return states_before(asked, log_total, d_final, uncut=uncut_segments(params, numbers), reverse=True)


def backward(
    params: GluonParams, residuals: tuple[Any, ...], cotangents: tuple[Array, Array | None]
) -> tuple[Array | None, ...]:
    """Pulls the gradients of the outputs back to every input.

    Args:
      params: static numbers of the call.
      residuals: the inputs (x, dt, A, B, C, D, dt_bias, initial state or None, lengths, numbers of the histories or
        None), and the states before each block, or None where there is one block that begins with zeros.
      cotangents: gradients by the outputs; None where there is no such output.

    Returns:
      One gradient for each input; None for integers and for what is not there.

    Raises:
      ValueError: a program would need more shared memory than the GPU has.
    """
    x, dt, A, B, C, D, dt_bias, initial, lengths, numbers, states = residuals
    dy, d_final = cotangents
    dy = dy.astype(x.dtype)
    after = _states_after(narrowed(params), residuals, dy, d_final)
    flags = {
        "BATCH": params.batch,
        "HAS_STATES": states is not None,
        "HAS_BEFORE": not params.starts_from_zero,
        "HAS_AFTER": after is not None,
        "WANTS_INITIAL": initial is not None,
    }
    launch = _launch_wgmma if params.config.wgmma else _launch_mma
    arguments = [x, dt, A, B, C, D, dt_bias, lengths, states, dy, after, numbers]
    dx, ddt, dB, dC, dA, dD, d_initial = launch(params, arguments, flags)
    ddt = _add_parts(ddt)
    return (
        dx,
        ddt,
        jnp.sum(dA, axis=(0, 1, 2)),
        _add_parts(dB).astype(B.dtype),
        _add_parts(dC).astype(C.dtype),
        jnp.sum(dD, axis=(0, 1, 2)),
        jnp.sum(ddt, axis=(0, 1)),
        None if d_initial is None else d_initial[:, 0],
        None,
        None,
    )


def _launch_mma(params: GluonParams, arguments: list[Any], flags: dict[str, Any]) -> list[Any]:
    params = narrowed(params)
    check_shared_memory(params, arguments[0].dtype.itemsize)
    join = warps_joined(params)
    # Warps of one group are added up in the kernel, and in `backward` what programs leave.
    parts = params.heads // params.groups * params.splits // join
    return kernels.gluon.launch(
        ssd_backward,
        arguments,
        _gradients(params, arguments, flags, splits=params.splits, parts=parts),
        grid=params.grid,
        num_warps=params.config.warps,
        constants=params.constants | {"BLOCK": params.config.block, "JOIN": join} | flags,
        maxnreg=params.config.backward_registers,
        name="ssd_backward",
    )


def _launch_wgmma(params: GluonParams, arguments: list[Any], flags: dict[str, Any]) -> list[Any]:
    constants = {
        "LENGTH": params.length,
        "HEADS": params.heads,
        "GROUPS": params.groups,
        "SEGMENTS": params.segments,
        "SEGMENT_BLOCKS": params.segment_blocks,
        "PACKED": params.packed,
    }
    return kernels.gluon.launch(
        gluon_vjp_wgmma.ssd_backward_wgmma,
        arguments,
        _gradients(params, arguments, flags, splits=1, parts=params.heads // params.groups),
        grid=params.batch * params.segments * params.heads,
        num_warps=gluon_vjp_wgmma.WARPS,
        constants=constants | flags,
        maxnreg=params.config.backward_registers,
        name="ssd_backward_wgmma",
    )


def _gradients(
    params: GluonParams, arguments: list[Any], flags: dict[str, Any], *, splits: int, parts: int
) -> list[tuple[tuple[int, ...], Any] | None]:
    """Shapes of what a kernel leaves: of steps, A and D a part for each split of a head, of B and C so many parts."""
    x, dt, _, B, *_ = arguments
    maps = ((parts, *B.shape), B.dtype if parts == 1 else jnp.float32)
    per_head = ((splits, params.batch, params.segments, params.heads), jnp.float32)
    state_shape = (params.batch, params.segments, params.heads, params.width, params.state_width)
    return [
        (x.shape, x.dtype),
        ((splits, *dt.shape), jnp.float32),
        maps,
        maps,
        per_head,
        per_head,
        (state_shape, jnp.float32) if flags["WANTS_INITIAL"] else None,
    ]


def _add_parts(parts: Array) -> Array:
    """Adds up the first axis; alone it is taken off without a copy."""
    return parts[0] if parts.shape[0] == 1 else jnp.sum(parts, axis=0)
