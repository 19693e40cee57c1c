"""The causal depthwise convolution by hand-written GPU kernels, forward and backward.

A strip is a row, or one of the segments into which long rows are cut. A program goes along the positions of a tile
[s, c] of s strips and c channels and keeps the last K - 1 inputs in registers, so that no input is loaded twice but
the K - 1 that a segment shares with its neighbour. Bytes in device memory per element of x, of w bytes each:

  forward   reads x, writes y: 2 w
  backward  reads x and dy, writes dx: 3 w, and the partial sums of the parameters' gradients, written once and read
            once: 2 * 4 (K + 1) / (strips * positions of a strip), 0.1 for 8 rows of 50 positions and K 4

The backward pass needs nothing but x from the forward one: it computes the values before the activation again.

Where a row holds several histories, both passes also read one byte a position: its depth, how many of the K - 1
positions before it are of its history. That says which inputs it sees, and to which its gradient flows.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton

from kernels.causal_conv1d.config import MAX_TAPS, CausalConv1dConfig, default_config
from kernels.dispatch import interpreted, pvary_together
from kernels.triton import DTYPES, triton_call

# Powers of 2 take one instruction where exp takes eight; in bfloat16, instructions are about as scarce as bytes.
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class KernelParams:
    """Static numbers of a call.

    Attributes:
      batch, length, channels, taps: b, l, c and K.
      activation: its name.
      config: how the work is divided.
      interpret: run as plain JAX.
      packed: rows hold several histories.
    """

    batch: int
    length: int
    channels: int
    taps: int
    activation: str
    config: CausalConv1dConfig
    interpret: bool
    packed: bool = False

    @cached_property
    def strip_length(self) -> int:
        """Positions of a strip; the last one of a row may have fewer."""
        return -(-self.length // self.config.segments)

    @cached_property
    def segments(self) -> int:
        """Strips of a row, so many that each has a real position."""
        return -(-self.length // self.strip_length)

    @cached_property
    def strip_blocks(self) -> int:
        """Programs side by side over strips."""
        return -(-self.batch * self.segments // self.config.strips)

    @cached_property
    def channel_blocks(self) -> int:
        """Programs side by side over channels."""
        return -(-self.channels // self.config.channels)


class ProgramIndex(NamedTuple):
    """Where a program works.

    Attributes:
      strip_block: scalar, its block of strips.
      row, start: int32 [s, 1], the row and first position of each strip.
      end: int32 [s, 1], positions that are read from the strip's start on; 0 for strips that do not exist.
      channel: int32 [1, c].
    """

    strip_block: Array
    row: Array
    start: Array
    end: Array
    channel: Array


def _program_index(params: KernelParams, num_steps: int) -> ProgramIndex:
    strip_block, channel_block = pl.program_id(0) // params.channel_blocks, pl.program_id(0) % params.channel_blocks
    config = params.config
    strip = strip_block * config.strips + jnp.arange(config.strips, dtype=jnp.int32)[:, None]
    start = strip % params.segments * params.strip_length
    end = jnp.where(strip < params.batch * params.segments, jnp.minimum(params.length - start, num_steps), 0)
    channel = channel_block * config.channels + jnp.arange(config.channels, dtype=jnp.int32)[None, :]
    return ProgramIndex(strip_block, strip // params.segments, start, end, channel)


def _mask(params: KernelParams, at: ProgramIndex, real: Array) -> Array:
    """[s, c], true for the real channels of strips [s, 1]."""
    if params.channels % params.config.channels:
        return real & (at.channel < params.channels)
    return jnp.broadcast_to(real, (params.config.strips, params.config.channels))


def _load(params: KernelParams, at: ProgramIndex, ref: Any, step: Any) -> Array:
    """Loads [s, c] at `step` positions after each strip's start; outside a row there is 0."""
    before_strip = isinstance(step, int) and step < 0
    # Strips that do not exist have end 0 and nothing before them either.
    real = (at.start + step >= 0) & (at.end > 0) if before_strip else step < at.end
    # Here and below an index is made of arrays alone: interpreted kernels do not mix them with slices.
    source = ref.at[at.row, at.start + step, at.channel]
    tile = pltriton.load(source, mask=_mask(params, at, real), other=jnp.zeros((), ref.dtype))
    return tile.astype(jnp.float32)


def _store(params: KernelParams, at: ProgramIndex, ref: Any, step: Any, tile: Array) -> None:
    """Stores [s, c] at `step` positions after each strip's start, where that belongs to the strip."""
    mask = _mask(params, at, (step >= 0) & (step < jnp.minimum(at.end, params.strip_length)))
    pltriton.store(ref.at[at.row, at.start + step, at.channel], tile.astype(ref.dtype), mask=mask)


def _load_parameters(
    params: KernelParams, at: ProgramIndex, weight_ref: Any, *bias_ref: Any
) -> tuple[list[Array], Any]:
    """Loads the taps' weights, [1, c] each, and the bias [1, c] or 0."""

    def load(ref: Any, k: int) -> Array:
        source = ref.at[jnp.full((1, 1), k, jnp.int32), at.channel]
        mask = at.channel < params.channels
        return pltriton.load(source, mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

    bias = load(bias_ref[0], 0) if bias_ref else 0.0
    return [load(weight_ref, k) for k in range(params.taps)], bias


def _store_sum(params: KernelParams, at: ProgramIndex, ref: Any, index: int, tile: Array) -> None:
    """Stores the sum over strips of [s, c] as the program's part of one parameter's gradient."""
    target = ref.at[at.strip_block[None, None], jnp.full((1, 1), index, jnp.int32), at.channel]
    pltriton.store(target, jnp.sum(tile, axis=0)[None, :], mask=at.channel < params.channels)


def _weighted(weight: Sequence[Array], window: Sequence[Array], total: Any = 0.0) -> Array:
    for tap, values in zip(weight, window, strict=True):
        total = total + tap * values
    return total


def _value_and_slope(activation: str, pre: Array) -> tuple[Array, Any]:
    if activation == "silu":
        gate = 1.0 / (1.0 + jnp.exp2(pre * -_LOG2_E))
        value = pre * gate
        return value, gate + value * (1.0 - gate)
    if activation == "hard_swish":
        value = pre * (jnp.clip(pre + 3.0, 0.0, 6.0) * (1.0 / 6.0))
        between = pre * (1.0 / 3.0) + 0.5
        return value, jnp.where(pre >= 3.0, 1.0, jnp.where(pre > -3.0, between, 0.0))
    return pre, 1.0


def _load_run(params: KernelParams, at: ProgramIndex, ref: Any, step: Any, count: int) -> tuple[Array, ...]:
    """Loads [s, c] at `count` positions."""
    return tuple(_load(params, at, ref, step + u) for u in range(count))


def _load_depths(params: KernelParams, at: ProgramIndex, ref: Any, step: Any, count: int) -> tuple[Array | None, ...]:
    """Loads int32 [s, 1] at `count` positions; outside a row there is 0. Rows of one history have None."""

    def load(step: Any) -> Array:
        source = ref.at[at.row, at.start + step]
        return pltriton.load(source, mask=step < at.end, other=jnp.zeros((), ref.dtype)).astype(jnp.int32)

    return tuple(load(step + u) if params.packed else None for u in range(count))


def _seen(tiles: Sequence[Array], back: Sequence[int], depths: Sequence[Array | None]) -> list[Array]:
    """Sets tiles [s, c] to 0 where a position of some depth does not see the one that is so far back."""
    return [
        tile if depth is None or distance == 0 else jnp.where(depth >= distance, tile, 0.0)
        for tile, distance, depth in zip(tiles, back, depths, strict=True)
    ]


def _forward_kernel(params: KernelParams, x_ref: Any, weight_ref: Any, *rest: Any) -> None:
    *given, y_ref = rest
    *bias_ref, depths_ref = given if params.packed else (*given, None)
    unroll, taps = params.config.forward_unroll, params.taps
    back = range(taps - 1, -1, -1)
    at = _program_index(params, params.strip_length)
    weight, bias = _load_parameters(params, at, weight_ref, *bias_ref)

    def body(block: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, depths = carry
        step = block * unroll
        # Memory answers while the present positions are worked on.
        following = _load_run(params, at, x_ref, step + unroll, unroll)
        following_depths = _load_depths(params, at, depths_ref, step + unroll, unroll)
        for u in range(unroll):
            window = _seen(x[u : u + taps], back, [depths[u]] * taps)
            value, _ = _value_and_slope(params.activation, _weighted(weight, window, bias))
            _store(params, at, y_ref, step + u, value)
        return (*x[unroll:], *following), following_depths

    before = _load_run(params, at, x_ref, 1 - taps, taps - 1)
    x = (*before, *_load_run(params, at, x_ref, 0, unroll))
    depths = _load_depths(params, at, depths_ref, 0, unroll)
    jax.lax.fori_loop(0, -(-params.strip_length // unroll), body, (x, depths))


def _backward_kernel(params: KernelParams, x_ref: Any, weight_ref: Any, *rest: Any) -> None:
    """Gradients of x, written K - 1 positions behind the loop, and the strips' share of those of the parameters."""
    *given, dy_ref, dx_ref, partial_ref = rest
    *bias_ref, depths_ref = given if params.packed else (*given, None)
    unroll, taps = params.config.backward_unroll, params.taps
    back = range(taps)
    num_steps = params.strip_length + taps - 1
    at = _program_index(params, num_steps)
    weight, bias = _load_parameters(params, at, weight_ref, *bias_ref)

    def body(block: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        x, dy, dpre, sums, depths = carry
        step = block * unroll
        following = [_load_run(params, at, ref, step + unroll, unroll) for ref in (x_ref, dy_ref)]
        following_depths = _load_depths(params, at, depths_ref, step + unroll, unroll)
        for u in range(unroll):
            window = _seen(x[u : u + taps], back[::-1], [depths[u + taps - 1]] * taps)
            _, slope = _value_and_slope(params.activation, _weighted(weight, window, bias))
            dpre = (*dpre, dy[u] * slope)
            # The next segment counts what lies in it.
            mine = dpre[-1] if params.segments == 1 else jnp.where(step + u < params.strip_length, dpre[-1], 0.0)
            shares = [mine * values for values in window] + [mine] * len(bias_ref)
            sums = tuple(total + share for total, share in zip(sums, shares, strict=True))
            dx = _weighted(weight[::-1], _seen(dpre[-taps:], back, depths[u : u + taps]))
            _store(params, at, dx_ref, step + u - (taps - 1), dx)
        depths = (*depths[unroll:], *following_depths)
        return (*x[unroll:], *following[0]), following[1], dpre[unroll:], sums, depths

    before = _load_run(params, at, x_ref, 1 - taps, taps - 1)
    x, dy = (_load_run(params, at, ref, 0, unroll) for ref in (x_ref, dy_ref))
    zeros = jnp.zeros((params.config.strips, params.config.channels), jnp.float32)
    # Before a strip no gradient is kept, whatever the depths there.
    outside = (jnp.zeros((params.config.strips, 1), jnp.int32) if params.packed else None,) * (taps - 1)
    depths = (*outside, *_load_depths(params, at, depths_ref, 0, unroll))
    carry = (*before, *x), dy, (zeros,) * (taps - 1), (zeros,) * (taps + len(bias_ref)), depths
    *_, sums, _ = jax.lax.fori_loop(0, -(-num_steps // unroll), body, carry)
    for index, total in enumerate(sums):
        _store_sum(params, at, partial_ref, index, total)


def _call(
    params: KernelParams, kernel: Any, num_warps: int, arguments: list[Array | None], out_shapes: list[Any], name: str
) -> list:
    return triton_call(
        functools.partial(kernel, params),
        arguments,
        out_shapes,
        # Neighbours share strips: a position's channels are read at about the same time.
        grid=params.strip_blocks * params.channel_blocks,
        num_warps=num_warps,
        interpret=params.interpret,
        name=name,
    )


def _arguments(x: Array, weight: Array, bias: Array | None, depths: Array | None) -> list[Array | None]:
    return [x, weight, None if bias is None else bias[None, :], depths]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv1d(params: KernelParams, x: Array, weight: Array, bias: Array | None, depths: Array | None) -> Array:
    arguments = _arguments(x, weight, bias, depths)
    warps = params.config.forward_warps
    return _call(params, _forward_kernel, warps, arguments, [(x.shape, x.dtype)], "causal_conv1d_forward")[0]


def _vjp_forward(params: KernelParams, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    return _causal_conv1d(params, *inputs), inputs


def _vjp_backward(params: KernelParams, inputs: tuple[Any, ...], dy: Array) -> tuple[Array | None, ...]:
    x, weight, bias, depths = inputs
    arguments = [*_arguments(x, weight, bias, depths), dy]
    partial_shape = (params.strip_blocks, params.taps + (bias is not None), params.channels)
    shapes = [(x.shape, x.dtype), (partial_shape, jnp.float32)]
    warps = params.config.backward_warps
    dx, partial = _call(params, _backward_kernel, warps, arguments, shapes, "causal_conv1d_backward")
    sums = jnp.sum(partial, axis=0)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx, sums[: params.taps].astype(weight.dtype), dbias, None


_causal_conv1d.defvjp(_vjp_forward, _vjp_backward)


def _depths(segment_ids: Array, most: int) -> Array:
    """Counts the earlier positions in the row and history of each position, up to `most`, int8 [b, l]."""
    before = jnp.pad(segment_ids, ((0, 0), (most, 0)), constant_values=-1)
    same = [before[:, k : k + segment_ids.shape[1]] == segment_ids for k in range(most)]
    return sum((s.astype(jnp.int8) for s in same), jnp.zeros(segment_ids.shape, jnp.int8))


def causal_conv1d_pallas_triton(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial: Array | None,
    segment_ids: Array | None,
    *,
    activation: str,
    interpret: bool | None = None,
    config: CausalConv1dConfig | None = None,
) -> Array:
    """Runs the kernels; arguments and result as in `kernels.causal_conv1d.causal_conv1d`.

    Sums and the activation are float32, whatever the dtype of x and of the parameters.

    Raises:
      ValueError: for an `initial`, dtypes, numbers of taps, empty arrays or a config that the kernels do not offer.
    """
    if initial is not None:
        raise ValueError("implementation='pallas_triton' offers no initial: use implementation='xla'")
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        if array is not None and array.dtype not in DTYPES:
            raise ValueError(f"{name} is {array.dtype}: the GPU kernels of causal_conv1d take float32 or bfloat16")
    taps = weight.shape[0]
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(f"weight has K={taps} taps: the GPU kernels of causal_conv1d offer 1 to {MAX_TAPS}")
    if 0 in x.shape:
        raise ValueError(f"x {x.shape} is empty: the GPU kernels of causal_conv1d want every size at least 1")
    batch, length, channels = x.shape
    config = config or default_config(batch=batch, length=length, channels=channels)
    config.check()
    packed = segment_ids is not None
    params = KernelParams(batch, length, channels, taps, activation, config, interpreted(interpret), packed)
    depths = None if segment_ids is None else _depths(segment_ids, taps - 1)
    return _causal_conv1d(params, *pvary_together(x, weight, bias, depths))
