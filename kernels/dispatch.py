"""How public operators find what runs them: by name, in one way for all, with one message."""

import contextlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from typing import Any, TypeVarTuple, cast

import jax
from jax import Array

# Function of a backend by its name, or "module:function" of one that is imported when it is first named.
Implementations = Mapping[str, Callable[..., Any] | str]
Precision = str | jax.lax.Precision | jax.lax.DotAlgorithmPreset | None
Arrays = TypeVarTuple("Arrays")  # Each an array or None.


def default_implementation() -> str:
    """Returns what runs where nobody names anything: plain JAX, until an evaluation by kernels has ended on a GPU."""
    return "xla"


def interpreted(interpret: bool | None) -> bool:
    """Returns whether kernels run as plain JAX: as told, or wherever there is no GPU."""
    return jax.default_backend() != "gpu" if interpret is None else interpret


def find(op: str, implementations: Implementations, name: str | None) -> Callable[..., Any]:
    """Returns the implementation called `name`, or the default for None.

    Raises:
      ValueError: for an unknown name, or one whose backend cannot be imported here.
    """
    name = name or default_implementation()
    if name not in implementations:
        raise ValueError(f"implementation={name!r} of {op} must be one of {sorted(implementations)}, or None")
    found = implementations[name]
    if callable(found):
        return found
    try:
        return pkgutil.resolve_name(found)
    except ImportError as error:
        raise ValueError(f"implementation={name!r} of {op} is not available here ({error}): name another") from error


def runs_interpreted(op: str, implementations: Implementations, name: str | None) -> bool:
    """Returns whether an implementation is made of kernels that run as slow plain JAX here, for want of a GPU."""
    offered = inspect.signature(find(op, implementations, name)).parameters
    return "interpret" in offered and interpreted(None)


def run(op: str, implementations: Implementations, name: str | None, *arrays: Array | None, **options: Any) -> Any:
    """Runs an operator.

    Args:
      op: its name, for messages.
      implementations: its mapping.
      name: of the implementation, or None for the default.
      arrays: what it reads; inside `shard_map` they are made to vary over the same mesh axes.
      options: those that are None are not handed on, so that a backend declares what it offers.

    Raises:
      ValueError: for a name as in `find`, or an option that the implementation does not offer.
    """
    function = find(op, implementations, name)
    options = {key: value for key, value in options.items() if value is not None}
    offered = inspect.signature(function).parameters
    refused = options.keys() - offered.keys()
    if refused and not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in offered.values()):
        raise ValueError(f"implementation={name!r} of {op} takes no {', '.join(sorted(refused))}: leave out or None")
    return function(*pvary_together(*arrays), **options)


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
