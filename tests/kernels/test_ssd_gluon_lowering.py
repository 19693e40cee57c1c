"""What jax-triton makes of the gradient of SSD by Gluon kernels."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec

pytest.importorskip("triton.experimental.gluon", reason="Gluon comes with the triton package")
pytest.importorskip("jax_triton", reason="jax-triton is for Python 3.12 and newer")

from jaxlib import gpu_triton

from kernels.ssd import ssd
from tests.kernels.codegen import some_gpu
from tests.kernels.test_ssd_gluon import arrays_of

pytestmark = pytest.mark.usefixtures("any_machine")

RUN = functools.partial(ssd, implementation="gluon")


@pytest.mark.skipif(not hasattr(gpu_triton, "TritonKernel"), reason="JAX's plugin for CUDA is not installed")
def test_both_passes_lower_for_a_gpu():
    with some_gpu():
        step = jax.jit(jax.value_and_grad(lambda arrays: jnp.sum(RUN(**arrays))))
        program = step.trace(arrays_of(20)).lower(lowering_platforms=("cuda",)).as_text()
    assert program.count("@triton_kernel_call") == 2


def test_rows_over_the_devices_of_a_mesh():
    """The gradient of what rows share is summed over the mesh."""
    arrays, rows = arrays_of(20), PartitionSpec("rows")
    specs = {name: rows if name in ("x", "dt", "B", "C") else PartitionSpec() for name in arrays}
    mesh = Mesh(np.array(jax.devices()[:1]), ("rows",))
    sharded = jax.shard_map(lambda arrays: RUN(**arrays), mesh=mesh, in_specs=(specs,), out_specs=rows)
    program = str(jax.make_jaxpr(jax.grad(lambda arrays: jnp.sum(sharded(arrays))))(arrays))
    assert all(name in program for name in ("ssd_forward", "ssd_backward", "psum"))
