"""Inputs of the SSD operator and what comes out of them, by a float64 walk along the sequence in PyTorch."""

import functools
from dataclasses import dataclass

import numpy as np
import torch

from experiments.benchmarks.torch_models.ssd import ssd_sequential

BATCH, HEADS, WIDTH, STATE = 3, 4, 8, 5


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
      length: l.
      groups: g, or None for B and C as [b, l, n].
      lengths: real positions of the rows, or None for all.
      initial: there is an initial state.
      step_scale: standard deviation of the raw steps.
    """

    length: int
    groups: int | None
    lengths: tuple[int, ...] | None = None
    initial: bool = False
    step_scale: float = 1.0


@functools.cache
def inputs(case: Case) -> dict[str, np.ndarray]:
    """Float64 arrays whose values are float32 numbers, so that both precisions see the same."""
    rng = np.random.default_rng([case.length, case.groups or 0])

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape)

    maps = (BATCH, case.length, STATE) if case.groups is None else (BATCH, case.length, case.groups, STATE)
    arrays = {
        "x": normal(BATCH, case.length, HEADS, WIDTH),
        "dt": case.step_scale * normal(BATCH, case.length, HEADS),
        "A": -np.geomspace(1, 16, HEADS),
        "B": normal(*maps),
        "C": normal(*maps),
        "D": normal(HEADS),
        "dt_bias": normal(HEADS),
    }
    if case.initial:
        arrays["initial_state"] = normal(BATCH, HEADS, WIDTH, STATE)
    return {name: a.astype(np.float32).astype(np.float64) for name, a in arrays.items()}


@functools.cache
def cotangents(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Weights of y and of the final state in the number that is differentiated."""
    rng = np.random.default_rng(case.length + 1)
    shapes = (BATCH, case.length, HEADS, WIDTH), (BATCH, HEADS, WIDTH, STATE)
    dy, dstate = (rng.normal(size=shape).astype(np.float32).astype(np.float64) for shape in shapes)
    return dy, dstate


def sequential(arrays, lengths, dy, dstate):
    """Returns y, the final state, and the gradient by every input, in float64."""
    leaves = {name: torch.from_numpy(np.asarray(a, np.float64)).requires_grad_() for name, a in arrays.items()}
    B, C = (leaves[m] if leaves[m].ndim == 4 else leaves[m][:, :, None] for m in "BC")
    delta = torch.nn.functional.softplus(leaves["dt"] + leaves["dt_bias"])
    if lengths is not None:
        delta = delta * (torch.arange(delta.shape[1]) < torch.tensor(lengths)[:, None])[..., None]
    state = leaves.get("initial_state")
    y, final = ssd_sequential(leaves["x"], delta, leaves["A"], B, C, D=leaves["D"], initial_state=state)
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
