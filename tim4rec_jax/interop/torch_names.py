"""Building blocks for naming a parameter in our tree and in a PyTorch state dict."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

_IDENTITY: Callable[[np.ndarray], np.ndarray] = lambda a: a  # noqa: E731


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter under both names; `convert` is its own inverse (a transpose, or nothing)."""

    path: tuple[str, ...]
    torch_name: str
    convert: Callable[[np.ndarray], np.ndarray] = _IDENTITY


def _transpose(a: np.ndarray) -> np.ndarray:
    return a.T


def _convolution(a: np.ndarray) -> np.ndarray:
    """[c, 1, K] <-> [K, c]: PyTorch's depthwise weight has an axis of one input channel."""
    return a[:, 0].T if a.ndim == 3 else a.T[:, None]


def linear(path: tuple[str, ...], torch_name: str, *, bias: bool = True) -> Iterator[Entry]:
    """Names an affine map: [in, out] here, [out, in] there."""
    yield Entry((*path, "kernel"), f"{torch_name}.weight", _transpose)
    if bias:
        yield Entry((*path, "bias"), f"{torch_name}.bias")


def norm(path: tuple[str, ...], torch_name: str) -> Iterator[Entry]:
    """Names a layer norm."""
    yield Entry((*path, "scale"), f"{torch_name}.weight")
    yield Entry((*path, "bias"), f"{torch_name}.bias")


def conv(path: tuple[str, ...], torch_name: str) -> Iterator[Entry]:
    """Names a causal depthwise convolution: [K, c] here, [c, 1, K] there."""
    yield Entry((*path, "kernel"), f"{torch_name}.weight", _convolution)
    yield Entry((*path, "bias"), f"{torch_name}.bias")
