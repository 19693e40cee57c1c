"""`jax.jit` for tests: a program that runs once or twice should be compiled quickly, not well."""

import functools
from collections.abc import Callable
from typing import Any

import jax

_OPTIONS = {
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_cpu_use_fusion_emitters": False,
}


@functools.cache
def known_options() -> dict[str, Any]:
    """The options that this compiler knows; they come and go between its releases."""
    known = {}
    for name, value in _OPTIONS.items():
        try:
            jax.jit(lambda: 0).lower().compile(compiler_options={name: value})
        except jax.errors.JaxRuntimeError:
            continue
        known[name] = value
    return known


def quick_jit(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    """Returns `jax.jit(function, **kwargs)` that compiles several times faster to slower code."""
    return jax.jit(function, compiler_options=known_options(), **kwargs)
