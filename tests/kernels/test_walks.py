"""The walks in NumPy, gradients by hand, against PyTorch's automatic ones."""

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from experiments.benchmarks.torch_models.selective_scan import selective_scan_sequential
from experiments.benchmarks.torch_models.ssd import ssd_sequential
from tests.kernels.walks import ACTIVATIONS, convolution, recurrence

BATCH, LENGTH, HEADS, WIDTH, STATE = 3, 9, 4, 5, 3
LENGTHS = [9, 0, 4]


def by_pytorch(walk, arrays, dy, dstate):
    leaves = {name: torch.from_numpy(a).requires_grad_() for name, a in arrays.items()}
    delta = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    real = torch.arange(LENGTH) < torch.tensor(LENGTHS)[:, None]
    B, C = leaves["B"], leaves["C"]
    if walk is ssd_sequential and B.ndim == 3:
        B, C = B[:, :, None], C[:, :, None]
    options = {"D": leaves["D"], "initial_state": leaves.get("initial_state")}
    y, final = walk(leaves["x"], delta * real[..., None], leaves["A"], B, C, **options)
    total = (y * torch.from_numpy(dy)).sum() + (final * torch.from_numpy(dstate)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return [a.detach().numpy() for a in (y, final, *gradients)]


@pytest.mark.parametrize("initial", [True, False])
@pytest.mark.parametrize("op", ["ssd", "ssd, groups", "scan"])
def test_recurrences(op, initial):
    rng = np.random.default_rng(0)
    width = () if op == "scan" else (WIDTH,)
    x, dt, state = (BATCH, LENGTH, HEADS, *width), (BATCH, LENGTH, HEADS), (BATCH, HEADS, *width, STATE)
    maps = (BATCH, LENGTH, *((2,) if "groups" in op else ()), STATE)
    shapes = {"x": x, "dt": dt, "B": maps, "C": maps, "D": (HEADS,), "dt_bias": (HEADS,)}
    shapes |= {"initial_state": state} if initial else {}
    arrays = {name: rng.normal(size=shape) for name, shape in shapes.items()}
    arrays["A"] = -rng.random((HEADS, STATE) if op == "scan" else HEADS)
    dy, dstate = rng.normal(size=x), rng.normal(size=state)
    walk = selective_scan_sequential if op == "scan" else ssd_sequential
    y, final, gradients = recurrence(arrays, LENGTHS, dy, dstate)
    assert list(gradients) == list(arrays)
    for ours, theirs in zip([y, final, *gradients.values()], by_pytorch(walk, arrays, dy, dstate), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_convolution(activation, bias):
    rng = np.random.default_rng(1)
    x, weight, dy = 3 * rng.normal(size=(2, 9, 3)), rng.normal(size=(4, 3)), rng.normal(size=(2, 9, 3))
    given = [x, weight, *([rng.normal(size=3)] if bias else [])]
    leaves = [torch.from_numpy(a).requires_grad_() for a in given]
    padded = torch.nn.functional.pad(leaves[0].transpose(1, 2), (3, 0))
    y = torch.nn.functional.conv1d(padded, leaves[1].T[:, None], *leaves[2:], groups=3).transpose(1, 2)
    functions = {"none": lambda y: y, "silu": torch.nn.functional.silu, "hard_swish": torch.nn.functional.hardswish}
    y = functions[activation](y)
    theirs = [y, *torch.autograd.grad((y * torch.from_numpy(dy)).sum(), leaves)]
    for ours, other in zip(convolution(activation, *given[:2], given[2] if bias else None, dy), theirs, strict=True):
        np.testing.assert_allclose(ours, other.detach().numpy(), rtol=1e-10, atol=1e-12)
