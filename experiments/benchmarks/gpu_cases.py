"""The operators, sizes and inputs that are checked and timed on a GPU."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels.causal_conv1d import causal_conv1d
from kernels.gated_rms_norm import gated_rms_norm, project_normed
from kernels.selective_scan import selective_scan
from kernels.softmax_cross_entropy import softmax_cross_entropy
from kernels.ssd import ssd, ssd_gated

Sizes = dict[str, int]
Arrays = dict[str, Any]
TAPS = 4
_NORM_EPS = 1e-5
# How float32 numbers are multiplied, or bfloat16 storage with float32 sums.
PRECISIONS = ("tfloat32", "bfloat16", "float32")


@dataclass(frozen=True)
class Case:
    """An operator at a size.

    Attributes:
      op: its name.
      sizes: by axis letter.
      ragged: rows of many lengths, or targets of which some are missing.
    """

    op: str
    sizes: Sizes
    ragged: bool = False

    @property
    def label(self) -> str:
        """As in "ssd b2048 l50 h4 p32 n32"."""
        sizes = " ".join(f"{axis}{size}" for axis, size in self.sizes.items())
        return f"{self.op} {sizes}{' ragged' if self.ragged else ''}"


@dataclass(frozen=True)
class Values:
    """What an operator is called with.

    Attributes:
      inputs: arrays that have gradients.
      fixed: integer arrays.
      dy: gradient of the output.
    """

    inputs: Arrays
    fixed: Arrays
    dy: Any


@dataclass(frozen=True)
class Operator:
    """How an operator is called.

    Attributes:
      function: the public one.
      draw: sizes, generator and whether ragged -> values in float32.
      stored: inputs that are bfloat16 where storage is; the rest stays float32.
      parameters: inputs without rows, whose gradients are sums over rows.
      has_products: it multiplies matrices, so that TF32 is another thing than float32.
      options: further arguments.
    """

    function: Callable[..., jax.Array]
    draw: Callable[[Sizes, np.random.Generator, bool], Values]
    stored: tuple[str, ...]
    parameters: tuple[str, ...]
    has_products: bool
    options: dict[str, Any] = field(default_factory=dict)


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape, dtype=np.float32)


def _row_lengths(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Arrays:
    return {"lengths": rng.integers(1, sizes["l"] + 1, sizes["b"]).astype(np.int32)} if ragged else {}


def _draw_ssd(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, h, p, n = (sizes[axis] for axis in "blhpn")  # noqa: E741
    inputs = {
        "x": _normal(rng, b, l, h, p),
        "dt": _normal(rng, b, l, h) - 3,
        "A": -np.linspace(1, 16, h, dtype=np.float32),
        "B": _normal(rng, b, l, n),
        "C": _normal(rng, b, l, n),
        "D": 1 + _normal(rng, h),
        "dt_bias": _normal(rng, h),
    }
    return Values(inputs, _row_lengths(sizes, rng, ragged), _normal(rng, b, l, h, p))


def _draw_mixer_end(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, h, p, d = (sizes[axis] for axis in "blhpd")  # noqa: E741
    values = _draw_ssd(sizes, rng, ragged)
    inputs = {"z": _normal(rng, b, l, h, p), "scale": 1 + _normal(rng, h * p)}
    inputs["weight"] = (h * p) ** -0.5 * _normal(rng, h * p, d)
    return Values(values.inputs | inputs, values.fixed, _normal(rng, b, l, d))


def mixer_end(
    *, x: jax.Array, z: jax.Array, scale: jax.Array, weight: jax.Array, implementation: str, apart: bool = False,
    **options: Any,
) -> jax.Array:  # fmt: skip
    """Runs a Mamba-2 mixer from its SSD on: gate, norm and projection, at once by the kernels or one by one.

    Args:
      x, options: as in `kernels.ssd.ssd`.
      z: [b, l, h, p] gate.
      scale: [e] gain of the norm, e = h p.
      weight: [e, d] of the projection.
      implementation: as in `kernels.ssd.ssd`; other than kernels go one by one.
      apart: kernels do so too.
    """
    options |= {"implementation": implementation}
    flat = (*x.shape[:2], -1)
    if apart or not implementation.startswith("pallas_triton"):
        y = gated_rms_norm(ssd(x, **options).reshape(flat), z.reshape(flat), scale, eps=_NORM_EPS)
        return y @ weight.astype(y.dtype)
    u, squares = ssd_gated(x, z=z, **options)
    norm = {"sum_squares": jnp.sum(squares, axis=-1), "scale": scale, "eps": _NORM_EPS}
    return project_normed(u.reshape(flat), weight.astype(u.dtype), **norm)


def _draw_scan(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, e, n = (sizes[axis] for axis in "blen")  # noqa: E741
    inputs = {
        "x": _normal(rng, b, l, e),
        "dt": _normal(rng, b, l, e) - 3,
        "A": -np.tile(np.arange(1, n + 1, dtype=np.float32), (e, 1)),
        "B": _normal(rng, b, l, n),
        "C": _normal(rng, b, l, n),
        "D": 1 + _normal(rng, e),
        "dt_bias": _normal(rng, e),
    }
    return Values(inputs, _row_lengths(sizes, rng, ragged), _normal(rng, b, l, e))


def _draw_conv(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    b, l, c = (sizes[axis] for axis in "blc")  # noqa: E741
    inputs = {"x": _normal(rng, b, l, c), "weight": _normal(rng, TAPS, c) / 2, "bias": _normal(rng, c)}
    return Values(inputs, {}, _normal(rng, b, l, c))


def _draw_loss(sizes: Sizes, rng: np.random.Generator, ragged: bool) -> Values:
    t, v, d = (sizes[axis] for axis in "tvd")
    targets = rng.integers(0, v, t).astype(np.int32)
    if ragged:
        targets[rng.random(t) < 0.2] = -1
    # Scores of standard deviation 2.
    inputs = {"hidden": 2 * d**-0.5 * _normal(rng, t, d), "embedding": _normal(rng, v, d)}
    return Values(inputs, {"targets": targets}, _normal(rng, t))


OPERATORS = {
    "ssd": Operator(ssd, _draw_ssd, ("x", "B", "C"), ("A", "D", "dt_bias"), True),
    "mixer_end": Operator(
        mixer_end, _draw_mixer_end, ("x", "B", "C", "z"), ("A", "D", "dt_bias", "scale", "weight"), True
    ),
    "causal_conv1d": Operator(
        causal_conv1d, _draw_conv, ("x",), ("weight", "bias"), False, {"activation": "silu"}
    ),
    "selective_scan": Operator(
        selective_scan, _draw_scan, ("x", "dt", "B", "C"), ("A", "D", "dt_bias"), False
    ),
    "softmax_cross_entropy": Operator(
        softmax_cross_entropy, _draw_loss, ("hidden", "embedding"), ("embedding",), True
    ),
}  # fmt: skip

_SSD, _SSD_WIDE = {"h": 4, "p": 32, "n": 32}, {"h": 4, "p": 128, "n": 64}
_SCAN, _CHANNELS = {"e": 128, "n": 32}, {"c": 192}
# Rows and positions of the recommenders' batches.
_BEAUTY, _ML_1M = {"b": 2048, "l": 50}, {"b": 1024, "l": 200}
PAPER_CASES = (
    Case("ssd", _BEAUTY | _SSD),
    Case("ssd", _ML_1M | _SSD),
    Case("ssd", {"b": 256, "l": 200} | _SSD_WIDE),
    Case("mixer_end", _BEAUTY | _SSD | {"d": 64}),
    Case("mixer_end", _ML_1M | _SSD | {"d": 64}),
    Case("mixer_end", {"b": 256, "l": 200} | _SSD_WIDE | {"d": 256}),
    Case("causal_conv1d", _BEAUTY | _CHANNELS),
    Case("causal_conv1d", _ML_1M | _CHANNELS),
    Case("selective_scan", {"b": 512, "l": 200} | _SCAN),
    Case("softmax_cross_entropy", {"t": 2048, "v": 12_102, "d": 64}),
)
# As many tokens as the batches above, in ever fewer rows.
_LONG = ({"b": 50, "l": 2048}, {"b": 6, "l": 16_384}, {"b": 1, "l": 65_536})
LONG_CASES = tuple(
    Case(op, rows | widths)
    for rows in _LONG
    for op, widths in [("ssd", _SSD), ("causal_conv1d", _CHANNELS), ("selective_scan", _SCAN)]
)
LARGE_CATALOGUE = Case("softmax_cross_entropy", {"t": 4096, "v": 1_000_000, "d": 64})
ODD_CASES = (
    Case("ssd", _BEAUTY | _SSD, ragged=True),
    Case("ssd", {"b": 64, "l": 1} | _SSD),
    Case("ssd", {"b": 64, "l": 17} | _SSD, ragged=True),
    Case("ssd", {"b": 64, "l": 33} | _SSD_WIDE, ragged=True),
    # Few long rows are cut into segments.
    Case("ssd", {"b": 2, "l": 4099} | _SSD, ragged=True),
    Case("mixer_end", {"b": 64, "l": 17} | _SSD | {"d": 64}, ragged=True),
    Case("mixer_end", {"b": 2, "l": 4099} | _SSD | {"d": 64}, ragged=True),
    Case("causal_conv1d", {"b": 64, "l": 1} | _CHANNELS),
    Case("causal_conv1d", {"b": 33, "l": 17, "c": 100}),
    Case("causal_conv1d", {"b": 2, "l": 4099} | _CHANNELS),
    Case("selective_scan", {"b": 64, "l": 1} | _SCAN),
    Case("selective_scan", {"b": 33, "l": 17, "e": 100, "n": 20}, ragged=True),
    Case("selective_scan", {"b": 64, "l": 33} | _SCAN, ragged=True),
    Case("softmax_cross_entropy", {"t": 33, "v": 1001, "d": 64}, ragged=True),
)
TINY_CASES = (
    Case("ssd", {"b": 2, "l": 17, "h": 2, "p": 16, "n": 16}, ragged=True),
    Case("causal_conv1d", {"b": 2, "l": 5, "c": 16}),
    Case("mixer_end", {"b": 2, "l": 17, "h": 2, "p": 16, "n": 16, "d": 16}),
    Case("selective_scan", {"b": 2, "l": 4, "e": 8, "n": 4}),
    Case("softmax_cross_entropy", {"t": 16, "v": 40, "d": 16}, ragged=True),
)


def draw(case: Case, rng: np.random.Generator) -> Values:
    """Draws float32 values of a case; those of one that is not ragged have no fixed lengths."""
    return OPERATORS[case.op].draw(case.sizes, rng, case.ragged)


def stored(case: Case, values: Values, precision: str) -> Values:
    """Returns the values on the device, in the storage of a precision."""
    narrow = OPERATORS[case.op].stored if precision == "bfloat16" else ()
    inputs = {name: jnp.asarray(a, jnp.bfloat16 if name in narrow else a.dtype) for name, a in values.inputs.items()}
    # A loss is float32 or wider; other outputs have the dtype of x.
    dy_dtype = jnp.bfloat16 if "x" in narrow else values.dy.dtype
    return Values(inputs, jax.tree.map(jnp.asarray, values.fixed), jnp.asarray(values.dy, dy_dtype))


def precisions(case: Case, wanted: tuple[str, ...]) -> list[str]:
    """Returns the precisions that differ for a case; without products TF32 is float32."""
    if OPERATORS[case.op].has_products:
        return list(wanted)
    return list(dict.fromkeys("float32" if name == "tfloat32" else name for name in wanted))


def matmul_precision(precision: str) -> Any:
    """Returns the context in which plain JAX multiplies so; "default" is TF32 on GPUs."""
    return jax.default_matmul_precision("highest" if precision == "float32" else "default")


def forward(case: Case, implementation: str, precision: str, **options: Any) -> Callable[..., jax.Array]:
    """Returns (inputs, fixed) -> y by an implementation of the operator."""
    operator = OPERATORS[case.op]
    arguments = operator.options | options | {"implementation": implementation}
    if operator.has_products and implementation.startswith("pallas_triton"):
        arguments["products"] = "float32" if precision == "float32" else "tfloat32"

    def apply(inputs: Arrays, fixed: Arrays) -> jax.Array:
        with matmul_precision(precision):
            return operator.function(**arguments, **inputs, **fixed)

    return apply


def both(apply: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, Arrays]]:
    """Returns (inputs, fixed, dy) -> y and the gradients of all inputs."""

    def run(inputs: Arrays, fixed: Arrays, dy: jax.Array) -> tuple[jax.Array, Arrays]:
        y, pull = jax.vjp(lambda inputs: apply(inputs, fixed), inputs)
        return y, pull(dy.astype(y.dtype))[0]

    return run
