"""The causal depthwise convolution by hand-written GPU kernels, forward and backward.

A strip is a row, or one of the segments into which long rows are cut. A program walks along the positions of a tile
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
from kernels.starts import positions_before
from kernels.triton_call import triton_call, vary_together

# Powers of 2 take one instruction where exp takes eight; in bfloat16, instructions are about as scarce as bytes.
_LOG2_E = math.log2(math.e)


@dataclass(frozen=True)
class Plan:
    """Static numbers of a call.

    Attributes:
      batch, length, channels, taps: b, l, c and K.
      activation: its name.
      config: how the work is cut up.
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


class Place(NamedTuple):
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


def _place(plan: Plan, num_steps: int) -> Place:
    strip_block, channel_block = pl.program_id(0) // plan.channel_blocks, pl.program_id(0) % plan.channel_blocks
    config = plan.config
    strip = strip_block * config.strips + jnp.arange(config.strips, dtype=jnp.int32)[:, None]
    start = strip % plan.segments * plan.strip_length
    end = jnp.where(strip < plan.batch * plan.segments, jnp.minimum(plan.length - start, num_steps), 0)
    channel = channel_block * config.channels + jnp.arange(config.channels, dtype=jnp.int32)[None, :]
    return Place(strip_block, strip // plan.segments, start, end, channel)


def _mask(plan: Plan, place: Place, real: Array) -> Array:
    """[s, c], true for the real channels of strips [s, 1]."""
    if plan.channels % plan.config.channels:
        return real & (place.channel < plan.channels)
    return jnp.broadcast_to(real, (plan.config.strips, plan.config.channels))


def _load(plan: Plan, place: Place, ref: Any, step: Any) -> Array:
    """Loads [s, c] at `step` positions after each strip's start; outside a row there is 0."""
    before_strip = isinstance(step, int) and step < 0
    # Strips that do not exist have end 0 and nothing before them either.
    real = (place.start + step >= 0) & (place.end > 0) if before_strip else step < place.end
    # Here and below an index is made of arrays alone: interpreted kernels do not mix them with slices.
    at = ref.at[place.row, place.start + step, place.channel]
    tile = pltriton.load(at, mask=_mask(plan, place, real), other=jnp.zeros((), ref.dtype))
    return tile.astype(jnp.float32)


def _store(plan: Plan, place: Place, ref: Any, step: Any, tile: Array) -> None:
    """Stores [s, c] at `step` positions after each strip's start, where that belongs to the strip."""
    mask = _mask(plan, place, (step >= 0) & (step < jnp.minimum(place.end, plan.strip_length)))
    pltriton.store(ref.at[place.row, place.start + step, place.channel], tile.astype(ref.dtype), mask=mask)


def _load_parameters(plan: Plan, place: Place, weight_ref: Any, *bias_ref: Any) -> tuple[list[Array], Any]:
    """Loads the taps' weights, [1, c] each, and the bias [1, c] or 0."""

    def load(ref: Any, k: int) -> Array:
        at = ref.at[jnp.full((1, 1), k, jnp.int32), place.channel]
        mask = place.channel < plan.channels
        return pltriton.load(at, mask=mask, other=jnp.zeros((), ref.dtype)).astype(jnp.float32)

    bias = load(bias_ref[0], 0) if bias_ref else 0.0
    return [load(weight_ref, k) for k in range(plan.taps)], bias


def _store_sum(plan: Plan, place: Place, ref: Any, index: int, tile: Array) -> None:
    """Stores the sum over strips of [s, c] as the program's part of one parameter's gradient."""
    at = ref.at[place.strip_block[None, None], jnp.full((1, 1), index, jnp.int32), place.channel]
    pltriton.store(at, jnp.sum(tile, axis=0)[None, :], mask=place.channel < plan.channels)


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


def _load_run(plan: Plan, place: Place, ref: Any, step: Any, count: int) -> tuple[Array, ...]:
    """Loads [s, c] at `count` positions."""
    return tuple(_load(plan, place, ref, step + u) for u in range(count))


def _load_depths(plan: Plan, place: Place, ref: Any, step: Any, count: int) -> tuple[Array | None, ...]:
    """Loads int32 [s, 1] at `count` positions; outside a row there is 0. Rows of one history have None."""

    def load(step: Any) -> Array:
        at = ref.at[place.row, place.start + step]
        return pltriton.load(at, mask=step < place.end, other=jnp.zeros((), ref.dtype)).astype(jnp.int32)

    return tuple(load(step + u) if plan.packed else None for u in range(count))


def _seen(tiles: Sequence[Array], back: Sequence[int], depths: Sequence[Array | None]) -> list[Array]:
    """Sets tiles [s, c] to 0 where a position of some depth does not see the one that is so far back."""
    return [
        tile if depth is None or distance == 0 else jnp.where(depth >= distance, tile, 0.0)
        for tile, distance, depth in zip(tiles, back, depths, strict=True)
    ]


def _forward_kernel(plan: Plan, x_ref: Any, weight_ref: Any, *rest: Any) -> None:
    *given, y_ref = rest
    *bias_ref, depths_ref = given if plan.packed else (*given, None)
    unroll, taps = plan.config.forward_unroll, plan.taps
    back = range(taps - 1, -1, -1)
    place = _place(plan, plan.strip_length)
    weight, bias = _load_parameters(plan, place, weight_ref, *bias_ref)

    def walk(block: Array, carry: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
        x, depths = carry
        step = block * unroll
        # Memory answers while the present positions are worked on.
        following = _load_run(plan, place, x_ref, step + unroll, unroll)
        following_depths = _load_depths(plan, place, depths_ref, step + unroll, unroll)
        for u in range(unroll):
            window = _seen(x[u : u + taps], back, [depths[u]] * taps)
            value, _ = _value_and_slope(plan.activation, _weighted(weight, window, bias))
            _store(plan, place, y_ref, step + u, value)
        return (*x[unroll:], *following), following_depths

    before = _load_run(plan, place, x_ref, 1 - taps, taps - 1)
    x = (*before, *_load_run(plan, place, x_ref, 0, unroll))
    depths = _load_depths(plan, place, depths_ref, 0, unroll)
    jax.lax.fori_loop(0, -(-plan.strip_length // unroll), walk, (x, depths))


def _backward_kernel(plan: Plan, x_ref: Any, weight_ref: Any, *rest: Any) -> None:
    """Gradients of x, written K - 1 positions behind the walk, and the strips' share of those of the parameters."""
    *given, dy_ref, dx_ref, partial_ref = rest
    *bias_ref, depths_ref = given if plan.packed else (*given, None)
    unroll, taps = plan.config.backward_unroll, plan.taps
    back = range(taps)
    num_steps = plan.strip_length + taps - 1
    place = _place(plan, num_steps)
    weight, bias = _load_parameters(plan, place, weight_ref, *bias_ref)

    def walk(block: Array, carry: tuple[tuple[Array, ...], ...]) -> tuple[tuple[Array, ...], ...]:
        x, dy, dpre, sums, depths = carry
        step = block * unroll
        following = [_load_run(plan, place, ref, step + unroll, unroll) for ref in (x_ref, dy_ref)]
        following_depths = _load_depths(plan, place, depths_ref, step + unroll, unroll)
        for u in range(unroll):
            window = _seen(x[u : u + taps], back[::-1], [depths[u + taps - 1]] * taps)
            _, slope = _value_and_slope(plan.activation, _weighted(weight, window, bias))
            dpre = (*dpre, dy[u] * slope)
            # The next segment counts what lies in it.
            mine = dpre[-1] if plan.segments == 1 else jnp.where(step + u < plan.strip_length, dpre[-1], 0.0)
            shares = [mine * values for values in window] + [mine] * len(bias_ref)
            sums = tuple(total + share for total, share in zip(sums, shares, strict=True))
            dx = _weighted(weight[::-1], _seen(dpre[-taps:], back, depths[u : u + taps]))
            _store(plan, place, dx_ref, step + u - (taps - 1), dx)
        depths = (*depths[unroll:], *following_depths)
        return (*x[unroll:], *following[0]), following[1], dpre[unroll:], sums, depths

    before = _load_run(plan, place, x_ref, 1 - taps, taps - 1)
    x, dy = (_load_run(plan, place, ref, 0, unroll) for ref in (x_ref, dy_ref))
    zeros = jnp.zeros((plan.config.strips, plan.config.channels), jnp.float32)
    # Before a strip no gradient is kept, whatever the depths there.
    outside = (jnp.zeros((plan.config.strips, 1), jnp.int32) if plan.packed else None,) * (taps - 1)
    depths = (*outside, *_load_depths(plan, place, depths_ref, 0, unroll))
    carry = (*before, *x), dy, (zeros,) * (taps - 1), (zeros,) * (taps + len(bias_ref)), depths
    *_, sums, _ = jax.lax.fori_loop(0, -(-num_steps // unroll), walk, carry)
    for index, total in enumerate(sums):
        _store_sum(plan, place, partial_ref, index, total)


def _call(plan: Plan, kernel: Any, num_warps: int, arguments: list[Array], out_shapes: list[Any], name: str) -> list:
    return triton_call(
        functools.partial(kernel, plan),
        arguments,
        out_shapes,
        # Neighbours share strips: a position's channels are read at about the same time.
        grid=(plan.strip_blocks * plan.channel_blocks,),
        num_warps=num_warps,
        num_stages=1,
        interpret=plan.interpret,
        name=name,
    )


def _given(x: Array, weight: Array, bias: Array | None, depths: Array | None) -> list[Array]:
    return [a for a in (x, weight, None if bias is None else bias[None, :], depths) if a is not None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv1d(plan: Plan, x: Array, weight: Array, bias: Array | None, depths: Array | None) -> Array:
    arguments = _given(x, weight, bias, depths)
    warps = plan.config.forward_warps
    return _call(plan, _forward_kernel, warps, arguments, [(x.shape, x.dtype)], "causal_conv1d_forward")[0]


def _vjp_forward(plan: Plan, *inputs: Array | None) -> tuple[Array, tuple[Array | None, ...]]:
    return _causal_conv1d(plan, *inputs), inputs


def _vjp_backward(plan: Plan, inputs: tuple[Array | None, ...], dy: Array) -> tuple[Array | None, ...]:
    x, weight, bias, depths = inputs
    arguments = [*_given(x, weight, bias, depths), dy]
    partial_shape = (plan.strip_blocks, plan.taps + (bias is not None), plan.channels)
    shapes = [(x.shape, x.dtype), (partial_shape, jnp.float32)]
    warps = plan.config.backward_warps
    dx, partial = _call(plan, _backward_kernel, warps, arguments, shapes, "causal_conv1d_backward")
    sums = jnp.sum(partial, axis=0)
    dbias = None if bias is None else sums[-1].astype(bias.dtype)
    return dx, sums[: plan.taps].astype(weight.dtype), dbias, None


_causal_conv1d.defvjp(_vjp_forward, _vjp_backward)


def causal_conv1d_pallas_triton(
    x: Array,
    weight: Array,
    bias: Array | None,
    starts: Array | None,
    *,
    activation: str,
    config: CausalConv1dConfig | None,
    interpret: bool,
) -> Array:
    """Runs the kernels; arguments and result as in `kernels.causal_conv1d.causal_conv1d`.

    Sums and the activation are float32, whatever the dtype of x and of the parameters.

    Raises:
      ValueError: for dtypes, numbers of taps, empty arrays or a config that the kernels do not offer.
    """
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        if array is not None and array.dtype not in (jnp.float32, jnp.bfloat16):
            raise ValueError(f"{name} is {array.dtype}: the GPU kernels of causal_conv1d take float32 or bfloat16")
    taps = weight.shape[0]
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(f"weight has K={taps} taps: the GPU kernels of causal_conv1d offer 1 to {MAX_TAPS}")
    if 0 in x.shape:
        raise ValueError(f"x {x.shape} is empty: the GPU kernels of causal_conv1d want every size at least 1")
    config = config or default_config(batch=x.shape[0], length=x.shape[1], channels=x.shape[2])
    config.check()
    packed = starts is not None
    plan = Plan(*x.shape, taps=taps, activation=activation, config=config, interpret=interpret, packed=packed)
    depths = positions_before(starts, taps - 1) if packed else None
    return _causal_conv1d(plan, *vary_together(x, weight, bias, depths))
