"""Inputs of the selective scan and what comes out of them, by a float64 walk along the sequence in PyTorch."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from experiments.benchmarks.torch_models.selective_scan import selective_scan_sequential

BATCH, WIDTH, STATE = 3, 10, 5


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
      length: l.
      lengths: real positions of the rows, or None for all.
      initial: there is an initial state.
      step_scale: standard deviation of the raw steps.
      width: e.
      state: n.
    """

    length: int
    lengths: tuple[int, ...] | None = None
    initial: bool = False
    step_scale: float = 1.0
    width: int = WIDTH
    state: int = STATE


@functools.cache
def inputs(case: Case) -> dict[str, np.ndarray]:
    """Float64 arrays whose values are float32 numbers, so that both precisions see the same."""
    rng = np.random.default_rng([case.length, case.width, case.state])

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    arrays = {
        "x": normal(BATCH, case.length, case.width),
        "dt": case.step_scale * normal(BATCH, case.length, case.width),
        "A": -np.geomspace(1, 16, case.state) * np.exp(0.1 * normal(case.width, case.state)),
        "B": normal(BATCH, case.length, case.state),
        "C": normal(BATCH, case.length, case.state),
        "D": normal(case.width),
        "dt_bias": normal(case.width),
    }
    if case.initial:
        arrays["initial_state"] = normal(BATCH, case.width, case.state)
    return {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}


@functools.cache
def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Weights of y and of the final state in the number that is differentiated."""
    rng = np.random.default_rng(case.length + 1)
    shapes = (BATCH, case.length, case.width), (BATCH, case.width, case.state)
    dy, dstate = (rng.normal(size=shape).astype(np.float32).astype(np.float64) for shape in shapes)
    return dy, dstate


def sequential(arrays, lengths, dy, dstate):
    """Returns y, the final state, and the gradient by every input, in float64."""
    leaves = {name: torch.from_numpy(np.array(a, np.float64)).requires_grad_() for name, a in arrays.items()}
    delta = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    if lengths is not None:
        delta = delta * (torch.arange(delta.shape[1]) < torch.tensor(lengths)[:, None])[..., None]
    x, A, B, C = (leaves[name] for name in ("x", "A", "B", "C"))
    state = leaves.get("initial_state")
    y, final = selective_scan_sequential(x, delta, A, B, C, D=leaves["D"], initial_state=state)
    total = (y * torch.from_numpy(dy)).sum() + (final * torch.from_numpy(dstate)).sum()
    gradients = torch.autograd.grad(total, list(leaves.values()))
    return y.detach().numpy(), final.detach().numpy(), dict(zip(leaves, (g.numpy() for g in gradients), strict=True))


@functools.cache
def truth(case: Case):
    """`sequential` of a case."""
    return sequential(inputs(case), case.lengths, *cotangents(case))


def assert_near(actual, expected, fraction, name):
    """Every value is within a fraction of the expected array's largest magnitude."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    assert actual.shape == expected.shape, name
    limit = fraction * np.abs(expected).max()
    worst = np.abs(actual - expected).max()
    assert worst <= limit, f"{name}: off by {worst:.2e}, allowed {limit:.2e}"
