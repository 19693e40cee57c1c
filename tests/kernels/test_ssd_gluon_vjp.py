"""Gradients of SSD by Gluon kernels: their PTX, instruction by instruction, against the definition; machine code."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")

from kernels.ssd import ssd
from tests.kernels.codegen import for_gpus
from tests.kernels.gluon_ptx import interpreted, resources
from tests.kernels.op_suite import assert_near, ids_of
from tests.kernels.test_ssd_gluon import CASES, TINY, arrays_of, normal

# Of the largest number of a gradient.
LIMITS = {"float32": 3e-5, "tfloat32": 1e-2, "bfloat16": 3e-2}


def gradients(arrays, ids, **options):
    """Gradients of all arrays by a weighted sum of both outputs."""

    def value(arrays):
        y, state = ssd(**arrays, segment_ids=ids, return_final_state=True, **options)
        weights = [normal(name, *a.shape).astype(a.dtype) for name, a in (("dy", y), ("dstate", state))]
        return jnp.sum((y * weights[0]).astype(state.dtype)) + jnp.sum(state * weights[1])

    return jax.grad(value)(arrays)


def check(arrays, products="float32", *, config=None, ids=None, **options):
    """Interprets both passes, and returns what they were."""
    if products == "bfloat16":
        arrays = arrays | {key: arrays[key].astype(jnp.bfloat16) for key in "xBC"}
    ids = None if ids is None else jnp.asarray(ids)
    precision = "highest" if products == "float32" else "default"
    with interpreted(**options) as launches:
        found = gradients(arrays, ids, implementation="gluon", precision=precision, config=config)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda a: jnp.asarray(np.asarray(a, np.float64)), arrays)
        wanted = gradients(wide, ids, implementation="reference")
    for name, gradient in found.items():
        assert gradient.dtype == arrays[name].dtype
        assert_near(gradient, np.asarray(wanted[name]), LIMITS[products], name)
    return launches.seen
