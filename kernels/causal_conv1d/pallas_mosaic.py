"""The causal depthwise convolution by Pallas kernels on Mosaic GPU, forward and backward.

A strip is a row, or one of the segments into which long rows are cut. A program is a strip and 128 channels, one per
thread; it goes along the positions and keeps the last K - 1 inputs in registers, so that no input is loaded twice but
the K - 1 that a segment shares with its neighbour. The backward pass goes from the end of a strip to its start. Bytes
in device memory per element of x, of w bytes each:

  forward   reads x, writes y: 2 w
  backward  reads x and dy, writes dx: 3 w, and the partial sums of the parameters' gradients, written once and read
            once: 2 * 4 (K + 1) / positions of a strip, 0.8 for rows of 50 positions and K 4

The last 128 channels overlap with others where 128 does not divide c: what is shared is read and computed twice.
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from kernels.causal_conv1d.config import MAX_TAPS
from kernels.dispatch import interpreted, pvary_together
from kernels.mosaic import (
    DTYPES,
    THREADS,
    lane_blocks,
    lanes,
    mosaic_call,
    pad_lanes,
    program_index,
    select,
    strided,
)

# Programs that fill a large GPU once: 132 multiprocessors, 16 programs of 128 threads each.
_ENOUGH_PROGRAMS = 132 * 16
# Shorter segments would read too many positions twice (K - 1 each).
_MIN_SEGMENT = 32


@dataclass(frozen=True)
class KernelParams:
    """Static numbers of a call.

    Attributes:
      length, taps: l and K.
      segments: strips of a row.
      activation: its name.
      has_bias: there is one.
      packed: rows hold several histories.
      interpret: run by the interpreter.
    """

    length: int
    taps: int
    segments: int
    activation: str
    has_bias: bool
    packed: bool
    interpret: bool

    @property
    def strip_length(self) -> int:
        """Positions of a strip; the last one of a row may have fewer."""
        return -(-self.length // self.segments)


class _Program:
    """A program's strip, channels and parameters, and what it loads."""

    def __init__(self, params: KernelParams, x_ref: Any, weight_ref: Any, *rest: Any):
        self.params, self.x_ref = params, x_ref
        bias_ref = rest[0] if params.has_bias else None
        self.depths_ref = rest[params.has_bias] if params.packed else None
        self.strip = program_index("strips")
        self.row, self.start = self.strip // params.segments, self.strip % params.segments * params.strip_length
        self.end = jnp.minimum(self.start + params.strip_length, params.length)
        self.channels = lanes(program_index("channels"), x_ref.shape[2])
        self.weight = [self._parameter(weight_ref, k) for k in range(params.taps)]
        self.bias = None if bias_ref is None else self._parameter(bias_ref, 0)

    def _parameter(self, ref: Any, k: int) -> Array:
        return ref[k, self.channels].astype(jnp.float32)

    def zeros(self) -> Array:
        return strided(jnp.zeros((THREADS,), jnp.float32), self.params.interpret)

    def load(self, ref: Any, position: Any) -> Array:
        """Loads [128] at a position of the row in float32; outside the row there is what lies at its nearest end."""
        at = jnp.clip(position, 0, self.params.length - 1)
        return ref[self.row, at, self.channels].astype(jnp.float32)

    def x(self, position: Any) -> Array:
        """Loads x [128]; before the row there is 0."""
        return select(position >= 0, self.load(self.x_ref, position))

    def depth(self, position: Any) -> Array | None:
        """How many of the K - 1 positions before it are of a position's history; None in rows of one history."""
        if self.depths_ref is None:
            return None
        return self.depths_ref[self.row, jnp.clip(position, 0, self.params.length - 1)]

    def before_activation(self, window: Sequence[Array]) -> Array:
        return _weighted(self.weight, window, self.bias)


def _weighted(weight: Sequence[Array], window: Sequence[Array], total: Array | None = None) -> Array:
    for tap, values in zip(weight, window, strict=True):
        total = tap * values if total is None else total + tap * values
    assert total is not None
    return total


def _seen(tiles: Sequence[Array], back: Sequence[int], depths: Sequence[Array | None]) -> list[Array]:
    """Sets tiles to 0 where a position of some depth does not see the one that is so far back."""
    return [
        tile if depth is None or distance == 0 else select(depth >= distance, tile)
        for tile, distance, depth in zip(tiles, back, depths, strict=True)
    ]


def _value_and_slope(activation: str, pre: Array) -> tuple[Array, Array]:
    if activation == "silu":
        gate = 1.0 / (1.0 + jnp.exp(-pre))
        value = pre * gate
        return value, gate + value * (1.0 - gate)
    if activation == "hard_swish":
        value = pre * (jnp.minimum(jnp.maximum(pre + 3.0, 0.0), 6.0) * (1.0 / 6.0))
        one, between = jnp.ones_like(pre), pre * (1.0 / 3.0) + 0.5
        return value, jnp.where(pre >= 3.0, one, jnp.where(pre > -3.0, between, jnp.zeros_like(pre)))
    return pre, jnp.ones_like(pre)


def _forward_kernel(params: KernelParams, *refs: Any) -> None:
    *given, y_ref = refs
    at, taps = _Program(params, *given), params.taps
    back = range(taps - 1, -1, -1)

    def step(t: Array, before: tuple[Array, ...]) -> tuple[Array, ...]:
        window = (*before, at.x(t))
        pre = at.before_activation(_seen(window, back, [at.depth(t)] * taps))
        y_ref[at.row, t, at.channels] = _value_and_slope(params.activation, pre)[0].astype(y_ref.dtype)
        return window[1:]

    jax.lax.fori_loop(at.start, at.end, step, tuple(at.x(at.start - k) for k in back[:-1]))


def _backward_kernel(params: KernelParams, *refs: Any) -> None:
    """Gradient of x, and the strip's share of those of the parameters."""
    *given, dy_ref, dx_ref, partial_ref = refs
    at, taps = _Program(params, *given), params.taps
    back = range(taps)

    def step(t: Any, after: tuple[Any, ...]) -> tuple[list[Array], Array, tuple[Any, ...]]:
        """Gradient before the activation at t, and x and gradients around t, given those of the position after it."""
        x, dpre, depths = after
        x, depths = (at.x(t - taps + 1), *x), (at.depth(t), *depths)
        window = _seen(x, back[::-1], [depths[0]] * taps)
        _, slope = _value_and_slope(params.activation, at.before_activation(window))
        return window, at.load(dy_ref, t) * slope, (x, dpre, depths)

    def walk(i: Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        sums, after = carry
        t = at.end - 1 - i
        window, own, (x, dpre, depths) = step(t, after)
        dpre = (own, *dpre)
        dx = _weighted(at.weight[::-1], _seen(dpre, back, depths))
        dx_ref[at.row, t, at.channels] = dx.astype(dx_ref.dtype)
        shares = [own * values for values in window] + [own] * params.has_bias
        sums = tuple(total + share for total, share in zip(sums, shares, strict=True))
        return sums, (x[:-1], dpre[:-1], depths[:-1])

    zeros, no_depth = at.zeros(), None if at.depths_ref is None else jnp.int32(0)
    after = (), (zeros,) * (taps - 1), (no_depth,) * (taps - 1)
    if params.segments == 1:
        after = tuple(at.x(at.end - k) for k in back[:0:-1]), *after[1:]
    else:
        # The gradients of the K - 1 positions behind the strip, those furthest behind first; behind the row there is 0.
        after = tuple(at.x(at.end + taps - 1 - k) for k in back[:0:-1]), *after[1:]
        for t in (at.end + k for k in back[-2::-1]):
            _, own, (x, dpre, depths) = step(t, after)
            after = x[:-1], (select(t < params.length, own), *dpre[:-1]), depths[:-1]
    carry = (zeros,) * (taps + params.has_bias), after
    sums, _ = jax.lax.fori_loop(0, at.end - at.start, walk, carry)
    for index, total in enumerate(sums):
        partial_ref[at.strip, index, at.channels] = total


def _call(params: KernelParams, kernel: Any, arguments: list[Array | None], out_shapes: list[Any], name: str) -> Any:
    batch, _, channels = out_shapes[0][0]
    return mosaic_call(
        functools.partial(kernel, params),
        arguments,
        out_shapes,
        grid={"strips": batch * params.segments, "channels": lane_blocks(channels)},
        interpret=params.interpret,
        name=name,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _causal_conv1d(params: KernelParams, x: Array, weight: Array, bias: Array | None, depths: Array | None) -> Array:
    shapes = [(x.shape, x.dtype)]
    return _call(params, _forward_kernel, [x, weight, bias, depths], shapes, "causal_conv1d_forward")[0]


def _vjp_forward(params: KernelParams, *inputs: Any) -> tuple[Array, tuple[Any, ...]]:
    return _causal_conv1d(params, *inputs), inputs


def _vjp_backward(params: KernelParams, inputs: tuple[Any, ...], dy: Array) -> tuple[Array | None, ...]:
    x, weight, bias, _ = inputs
    partial_shape = (x.shape[0] * params.segments, params.taps + params.has_bias, x.shape[2])
    shapes = [(x.shape, x.dtype), (partial_shape, jnp.float32)]
    dx, partial = _call(params, _backward_kernel, [*inputs, dy], shapes, "causal_conv1d_backward")
    sums = jnp.sum(partial, axis=0)
    dbias = None if bias is None else sums[-1:].astype(bias.dtype)
    return dx, sums[: params.taps].astype(weight.dtype), dbias, None


_causal_conv1d.defvjp(_vjp_forward, _vjp_backward)


def _depths(segment_ids: Array, most: int) -> Array:
    """Counts the earlier positions in the row and history of each position, up to `most`, int32 [b, l]."""
    before = jnp.pad(segment_ids, ((0, 0), (most, 0)), constant_values=-1)
    same = [before[:, k : k + segment_ids.shape[1]] == segment_ids for k in range(most)]
    return sum((s.astype(jnp.int32) for s in same), jnp.zeros(segment_ids.shape, jnp.int32))


def default_segments(batch: int, length: int, channels: int) -> int:
    """Returns into how many strips a row is cut, each with a real position, so that there are enough programs."""
    wanted = -(-_ENOUGH_PROGRAMS // (batch * lane_blocks(channels)))
    strip_length = -(-length // max(1, min(wanted, length // _MIN_SEGMENT)))
    return -(-length // strip_length)


def causal_conv1d_pallas_mosaic(
    x: Array,
    weight: Array,
    bias: Array | None,
    initial: Array | None,
    segment_ids: Array | None,
    *,
    activation: str,
    interpret: bool | None = None,
) -> Array:
    """Runs the kernels; arguments and result as in `kernels.causal_conv1d.causal_conv1d`.

    Sums and the activation are float32, whatever the dtype of x and of the parameters.

    Raises:
      ValueError: for an `initial`, dtypes, numbers of taps or empty arrays that the kernels do not offer.
    """
    if initial is not None:
        raise ValueError("implementation='pallas_mosaic' offers no initial: use implementation='xla'")
    for name, array in (("x", x), ("weight", weight), ("bias", bias)):
        if array is not None and array.dtype not in DTYPES:
            raise ValueError(f"{name} is {array.dtype}: the GPU kernels of causal_conv1d take float32 or bfloat16")
    taps = weight.shape[0]
    if not 1 <= taps <= MAX_TAPS:
        raise ValueError(f"weight has K={taps} taps: the GPU kernels of causal_conv1d offer 1 to {MAX_TAPS}")
    if 0 in x.shape:
        raise ValueError(f"x {x.shape} is empty: the GPU kernels of causal_conv1d want every size at least 1")
    batch, length, channels = x.shape
    params = KernelParams(
        length=length,
        taps=taps,
        segments=default_segments(batch, length, channels),
        activation=activation,
        has_bias=bias is not None,
        packed=segment_ids is not None,
        interpret=interpreted(interpret),
    )
    depths = None if segment_ids is None else _depths(segment_ids, taps - 1)
    padded = [pad_lanes(a) for a in (x, weight, None if bias is None else bias[None, :])]
    y: Array = _causal_conv1d(params, *pvary_together(*padded, depths))
    return y[..., :channels]
