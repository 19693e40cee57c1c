"""Operators as loops over positions in NumPy, in float64 with gradients by hand: what implementations must equal."""

from collections.abc import Mapping
from typing import Any

import numpy as np

Gradients = dict[str, np.ndarray]


def recurrence(
    arrays: Mapping[str, np.ndarray], lengths: Any, dy: np.ndarray, dstate: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Gradients]:
    """Walks the SSD (x [b, l, h, p]) or the selective scan (x [b, l, e]) there and back.

    Args:
      arrays: x, dt, A, B, C, D, dt_bias and perhaps initial_state, as the operators take them.
      lengths: [b] real positions of each row; behind them the state stays as it is.
      dy, dstate: gradients of y and of the final state.

    Returns:
      y, the final state, and the gradient by every array.
    """
    given = {name: np.asarray(a, np.float64) for name, a in arrays.items()}
    dy, dstate = np.asarray(dy, np.float64), np.asarray(dstate, np.float64)
    if given["x"].ndim == 4:
        return _walk(given, lengths, dy, dstate)
    # A channel of the scan is a head of width 1 whose state's entries decay each at a rate of their own.
    wide = given | {"x": given["x"][..., None]}
    if "initial_state" in given:
        wide["initial_state"] = given["initial_state"][:, :, None]
    y, state, gradients = _walk(wide, lengths, dy[..., None], dstate[:, :, None])
    gradients["x"] = gradients["x"][..., 0]
    if "initial_state" in gradients:
        gradients["initial_state"] = gradients["initial_state"][:, :, 0]
    return y[..., 0], state[:, :, 0], gradients


def _walk(
    given: Mapping[str, np.ndarray], lengths: Any, dy: np.ndarray, dstate: np.ndarray
) -> tuple[np.ndarray, np.ndarray, Gradients]:
    x, D = given["x"], given["D"][:, None]
    b, length, h, p = x.shape
    real = np.arange(length) < np.asarray(lengths)[:, None]
    raw = given["dt"] + given["dt_bias"]
    delta = np.logaddexp(0, raw) * real[..., None]
    # [b, l, h, n] maps of every head, and rates [h, 1] or [h, n].
    B, C = (m if m.ndim == 4 else m[:, :, None] for m in (given["B"], given["C"]))
    groups = B.shape[2]
    B, C = (np.repeat(m, h // groups, axis=2) for m in (B, C))
    rates = given["A"].reshape(h, -1)
    decay = np.exp(delta[..., None] * rates)[:, :, :, None]  # [b, l, h, 1, 1 or n]

    states = [given.get("initial_state", np.zeros((b, h, p, B.shape[-1])))]
    for t in range(length):
        added = np.einsum("bhp,bhn->bhpn", delta[:, t, :, None] * x[:, t], B[:, t])
        states.append(decay[:, t] * states[-1] + added)
    y = np.stack([np.einsum("bhpn,bhn->bhp", states[t + 1], C[:, t]) for t in range(length)], axis=1) + D * x

    found = {name: np.zeros_like(a) for name, a in {"x": x, "delta": delta, "B": B, "C": C, "A": rates}.items()}
    back = dstate  # Gradient of the state after position t.
    for t in reversed(range(length)):
        back = back + np.einsum("bhp,bhn->bhpn", dy[:, t], C[:, t])
        found["C"][:, t] = np.einsum("bhp,bhpn->bhn", dy[:, t], states[t + 1])
        fed = np.einsum("bhpn,bhn->bhp", back, B[:, t])
        found["x"][:, t] = delta[:, t, :, None] * fed + D * dy[:, t]
        found["B"][:, t] = np.einsum("bhpn,bhp->bhn", back, delta[:, t, :, None] * x[:, t])
        log_decay = (back * states[t] * decay[:, t]).sum(2)  # [b, h, n]
        if rates.shape[1] == 1:
            log_decay = log_decay.sum(-1, keepdims=True)
        found["A"] += (log_decay * delta[:, t, :, None]).sum(0)
        found["delta"][:, t] = (log_decay * rates).sum(-1) + (fed * x[:, t]).sum(-1)
        back = back * decay[:, t]

    slope = found.pop("delta") * np.exp(-np.logaddexp(0, -raw)) * real[..., None]
    found |= {"dt": slope, "dt_bias": slope.sum((0, 1)), "D": (dy * x).sum((0, 1, 3))}
    found["A"] = found["A"].reshape(given["A"].shape)
    for name in "BC":
        summed = found[name].reshape(b, length, groups, h // groups, -1).sum(3)
        found[name] = summed.reshape(given[name].shape)
    if "initial_state" in given:
        found["initial_state"] = back
    return y, states[-1], {name: found[name] for name in given}


# An activation and its slope.
_SIGMOID = lambda y: np.exp(-np.logaddexp(0, -y))  # noqa: E731
ACTIVATIONS = {
    "none": (lambda y: y, np.ones_like),
    "silu": (lambda y: y * _SIGMOID(y), lambda y: _SIGMOID(y) * (1 + y * (1 - _SIGMOID(y)))),
    "hard_swish": (
        lambda y: y * np.clip(y + 3, 0, 6) / 6,
        lambda y: np.where(np.abs(y) < 3, (2 * y + 3) / 6, (y >= 3).astype(y.dtype)),
    ),
}


def convolution(
    activation: str, x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None, dy: np.ndarray
) -> list[np.ndarray]:
    """Convolves x [b, l, c] with taps weight [K, c]; returns y and the gradients by x, weight and, if given, bias."""
    x, weight, dy = (np.asarray(a, np.float64) for a in (x, weight, dy))
    length, taps = x.shape[1], weight.shape[0]
    padded = np.pad(x, ((0, 0), (taps - 1, 0), (0, 0)))
    seen = [padded[:, k : k + length] for k in range(taps)]
    before = sum(weight[k] * seen[k] for k in range(taps)) + (0 if bias is None else np.asarray(bias, np.float64))
    function, slope = ACTIVATIONS[activation]
    back = dy * slope(before)
    dx = np.zeros_like(padded)
    for k in range(taps):
        dx[:, k : k + length] += weight[k] * back
    dweight = np.stack([(back * seen[k]).sum((0, 1)) for k in range(taps)])
    gradients = [dx[:, taps - 1 :], dweight, *([] if bias is None else [back.sum((0, 1))])]
    return [function(before), *gradients]
