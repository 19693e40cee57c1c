"""What becomes of memory that the process frees."""

import subprocess
import sys

import pytest

_FAULTS_PER_CALL = """
import resource
{imports}
import jax, jax.numpy as jnp

# The matrix of 64 MB is read twice, so nothing saves to make it.
program = jax.jit(lambda x: (jnp.sin(jnp.outer(x, x)) @ jnp.sin(jnp.outer(x, x))[:, :8]).max())
x = jnp.arange(4096.0)
for _ in range(24):  # The heap grows until there is room for all that is held at once.
    program(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(9):
    program(x).block_until_ready()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 9)
"""


def faults_per_call(imports):
    code = _FAULTS_PER_CALL.format(imports=imports)
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return int(ran.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="page faults are counted for glibc")
def test_a_compiled_program_finds_its_memory_again():
    """64 MB are 16,384 pages."""
    assert faults_per_call("import tim4rec_jax") > 10_000
    # As in a program, whose imports start threads.
    assert faults_per_call("import experiments.train") < 6_000
