"""How public operators find what runs them: by name, or what was fastest on a GPU where nobody names anything.

`kernels.measured` has the times. An operator that is called without a name on a GPU of compute capability 8.0 or newer
takes what was fastest, value and gradients, at the nearest shape there; what cannot run here, or does not offer what is
asked for, is passed over. Away from all that was measured, and on every other device, plain JAX runs.
"""

import contextlib
import contextvars
import importlib.util
import inspect
import math
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVarTuple, cast

import jax
from jax import Array

from kernels.measured import ROWS

# Function of a backend by its name, or "module:function" of one that is imported when it is first named.
Implementations = Mapping[str, Callable[..., Any] | str]
Precision = str | jax.lax.Precision | jax.lax.DotAlgorithmPreset | None
Arrays = TypeVarTuple("Arrays")  # Each an array or None.


PLAIN = "xla"
# How far from what was measured a size may be, and how few rows there may be in comparison, for its times to count.
_SAME_SHAPE, _ENOUGH_ROWS = 4, 1 / 4
_ROWS = ("b", "t")
_WHOLE_PRODUCTS = ("highest", "float32", "F32_F32_F32", "TF32_TF32_F32_X3")


@dataclass(frozen=True)
class Needs:
    """What a backend needs to run.

    Attributes:
      capability: least compute capability of a GPU, as (major, minor).
      python: least version of Python.
      packages: what must be installed beside JAX.
    """

    capability: tuple[int, int]
    python: tuple[int, int] = (3, 11)
    packages: tuple[str, ...] = ()


@dataclass(frozen=True)
class Measured:
    """What an operator took on a GPU at one shape.

    Attributes:
      op: the operator.
      arithmetic: what it computed with, see `arithmetic`.
      sizes: lengths of its axes.
      microseconds: of value and gradients together, by implementation; medians.
      record: file in experiments/results, which has the device, the commit and the command.
    """

    op: str
    arithmetic: str
    sizes: Mapping[str, int]
    microseconds: Mapping[str, int]
    record: str


MEASURED = tuple(Measured(*row) for row in ROWS)
# Backends from outside need nothing that is known here.
NEEDS = {
    "pallas_triton": Needs((8, 0)),
    "pallas_mosaic": Needs((9, 0)),
    "gluon": Needs((8, 0), (3, 12), ("jax_triton", "triton")),
}
_recorded: contextvars.ContextVar[dict[str, set[str]] | None] = contextvars.ContextVar("recorded", default=None)


def gpu_capability() -> tuple[int, int] | None:
    """Returns the compute capability of the first GPU, or None where JAX computes on something else."""
    if jax.default_backend() != "gpu":
        return None
    found = str(getattr(jax.devices()[0], "compute_capability", ""))
    major, _, minor = found.partition(".")
    return (int(major), int(minor or 0)) if major.isdigit() else None


def missing(name: str) -> str | None:
    """Says what a backend lacks to run on this machine's device; None for nothing."""
    needs, capability = NEEDS.get(name), gpu_capability()
    if needs is None:
        return None
    least = ".".join(map(str, needs.capability))
    if sys.version_info[:2] < needs.python:
        return f"it needs Python {'.'.join(map(str, needs.python))} or newer, this is {sys.version.split()[0]}"
    for package in needs.packages:
        if importlib.util.find_spec(package) is None:
            return f"it needs the package {package.replace('_', '-')}, which is not installed"
    if capability is None:
        here = jax.default_backend()
        return f"it needs an NVIDIA GPU of compute capability {least} or newer, and JAX computes on {here}"
    if capability < needs.capability:
        return f"it needs a GPU of compute capability {least} or newer, this one has {'.'.join(map(str, capability))}"
    return None


def interpreted(interpret: bool | None) -> bool:
    """Returns whether kernels run as plain JAX: as told, or wherever there is no GPU."""
    return jax.default_backend() != "gpu" if interpret is None else interpret


def find(op: str, implementations: Implementations, name: str) -> Callable[..., Any]:
    """Returns the implementation called `name`.

    Raises:
      ValueError: for an unknown name, or one whose backend cannot run here, not even interpreted.
    """
    if name not in implementations:
        raise ValueError(f"implementation={name!r} of {op} must be one of {sorted(implementations)}, or None")
    found = implementations[name]
    # Kernels of Pallas are interpreted without a GPU; those with packages of their own are not.
    if name in NEEDS and (NEEDS[name].packages or gpu_capability() is not None) and (lack := missing(name)):
        raise ValueError(f"implementation={name!r} of {op} cannot run here: {lack}; name another, or None")
    if callable(found):
        return found
    try:
        return pkgutil.resolve_name(found)
    except ImportError as error:
        raise ValueError(f"implementation={name!r} of {op} is not available here ({error}): name another") from error


def arithmetic(values: Array, precision: Precision) -> str:
    """Returns what products of matrices compute with: "bfloat16", "tfloat32", "float32" or "float64".

    Args:
      values: whose dtype counts.
      precision: of float32 products, as in JAX; None follows `jax_default_matmul_precision`.
    """
    if values.dtype != "float32":
        return str(values.dtype)
    configured = jax.config.jax_default_matmul_precision  # pyright: ignore[reportAttributeAccessIssue]
    return "float32" if (precision_name(precision) or configured) in _WHOLE_PRODUCTS else "tfloat32"


def _distance(measured: Measured, op: str, sizes: Mapping[str, int], computes_with: str) -> float:
    """How far apart in shape a measurement is, infinite for one that says nothing of these sizes."""
    if (measured.op, measured.arithmetic) != (op, computes_with) or measured.sizes.keys() != sizes.keys():
        return math.inf
    total = 0.0
    for axis, size in sizes.items():
        ratio = size / measured.sizes[axis]
        if axis in _ROWS:
            if ratio < _ENOUGH_ROWS:
                return math.inf
        elif not 1 / _SAME_SHAPE <= ratio <= _SAME_SHAPE:
            return math.inf
        else:
            total += abs(math.log2(ratio))
    return total


def candidates(
    op: str, implementations: Implementations, sizes: Mapping[str, int], computes_with: str
) -> Sequence[str]:
    """Returns what may run an operator that nobody named a backend for, best first; plain JAX ends it.

    Args:
      op: the operator's name.
      implementations: its mapping.
      sizes: lengths of its axes, as `kernels.measured` names them.
      computes_with: dtype of its values, or what `arithmetic` says where it multiplies matrices.
    """
    if gpu_capability() is None:
        return (PLAIN,)
    nearest = min(MEASURED, key=lambda one: _distance(one, op, sizes, computes_with), default=None)
    if nearest is None or math.isinf(_distance(nearest, op, sizes, computes_with)):
        return (PLAIN,)
    ranked = sorted(nearest.microseconds, key=lambda name: nearest.microseconds[name])
    known = [name for name in ranked if name in implementations and missing(name) is None]
    return (*known[: known.index(PLAIN)], PLAIN) if PLAIN in known else (*known, PLAIN)


@contextlib.contextmanager
def recording() -> Iterator[dict[str, set[str]]]:
    """Collects, while it is open, the names of the implementations that operators ran with, by operator."""
    names: dict[str, set[str]] = {}
    token = _recorded.set(names)
    try:
        yield names
    finally:
        _recorded.reset(token)


def runs_interpreted(op: str, implementations: Implementations, name: str) -> bool:
    """Returns whether an implementation is made of kernels that run as slow plain JAX here, for want of a GPU."""
    offered = inspect.signature(find(op, implementations, name)).parameters
    return "interpret" in offered and interpreted(None)


def _call(
    op: str, implementations: Implementations, name: str, arrays: Sequence[Array | None], options: Mapping[str, Any]
) -> Any:
    function = find(op, implementations, name)
    offered = inspect.signature(function).parameters
    refused = options.keys() - offered.keys()
    if refused and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in offered.values()):
        raise ValueError(f"implementation={name!r} of {op} takes no {', '.join(sorted(refused))}: leave out or None")
    result = function(*pvary_together(*arrays), **options)
    if (recorded := _recorded.get()) is not None:
        recorded.setdefault(op, set()).add(name)
    return result


def run(
    op: str,
    implementations: Implementations,
    name: str | None,
    *arrays: Array | None,
    sizes: Mapping[str, int],
    computes_with: str | None = None,
    **options: Any,
) -> Any:
    """Runs an operator.

    Args:
      op: its name, for messages and in `kernels.measured`.
      implementations: its mapping.
      name: of the implementation, or None for the fastest known one that offers what is asked for.
      arrays: what it reads, its values first; inside `shard_map` they are made to vary over the same mesh axes.
      sizes: lengths of its axes, as `kernels.measured` names them.
      computes_with: what `arithmetic` says of an operator that multiplies matrices; else the dtype of its values.
      options: those that are None are not handed on, so that a backend declares what it offers.

    Raises:
      ValueError: for a name as in `find`, or an option that the implementation does not offer.
    """
    options = {key: value for key, value in options.items() if value is not None}
    if name is not None:
        return _call(op, implementations, name, arrays, options)
    computes_with = computes_with or str(cast(Array, arrays[0]).dtype)
    *better, plain = candidates(op, implementations, sizes, computes_with)
    for one in better:
        # What a backend does not offer it refuses by a ValueError; with nothing named, the next one is asked.
        with contextlib.suppress(ValueError):
            return _call(op, implementations, one, arrays, options)
    return _call(op, implementations, plain, arrays, options)


def pvary_together(*arrays: *Arrays) -> tuple[*Arrays]:
    """Marks arrays as varying over the same mesh axes of shard_map, as a custom gradient wants its arguments.

    Outside shard_map this does nothing. Its transpose sums the gradient of what was the same everywhere.
    """
    given = cast(tuple[Array | None, ...], arrays)
    axes = varying_axes(*given)

    def mark(a: Array) -> Array:
        missing = axes - varying_axes(a)
        return jax.lax.pcast(a, tuple(sorted(missing)), to="varying") if missing else a

    return cast(tuple[*Arrays], tuple(None if a is None else mark(a) for a in given))


def varying_axes(*arrays: Array | None) -> frozenset[str]:
    """Returns the mesh axes of shard_map over which any of the arrays varies."""
    return frozenset().union(*(jax.typeof(a).manual_axis_type.varying for a in arrays if a is not None))


def precision_name(precision: Precision) -> str | None:
    """Returns a precision of matrix products as the string that JAX has for it, or None.

    Raises:
      ValueError: for what JAX does not know.
    """
    if precision is None:
        return None
    if isinstance(precision, jax.lax.Precision):
        return precision.name.lower()
    name = precision if isinstance(precision, str) else precision.name
    try:
        with jax.default_matmul_precision(name):
            return name
    except ValueError:
        known = "'default', 'high', 'highest', a jax.lax.Precision or a jax.lax.DotAlgorithmPreset"
        raise ValueError(f"precision={precision!r} must be one of {known}, or None") from None


def matmul_precision(name: str | None) -> contextlib.AbstractContextManager[Any]:
    """Returns the context in which plain JAX multiplies matrices so; None changes nothing.

    A custom gradient enters it again: its backward pass is traced after the context of the forward one has ended.
    """
    return contextlib.nullcontext() if name is None else jax.default_matmul_precision(name)


def check_shape(name: str, array: Array | None, expected: tuple[int, ...]) -> None:
    """Raises a ValueError for an array of another shape."""
    if array is not None and array.shape != expected:
        raise ValueError(f"{name} has shape {array.shape}, expected {expected}")
