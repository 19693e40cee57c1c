"""Parameters of the original PyTorch programs, to and from ours."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tim4rec_jax.config import ModelConfig
from tim4rec_jax.models import build_model, init_params

_IDENTITY: Callable[[np.ndarray], np.ndarray] = lambda a: a  # noqa: E731


@dataclasses.dataclass(frozen=True)
class _Entry:
    """One parameter under both names; `convert` is its own inverse (a transpose, or nothing)."""

    path: tuple[str, ...]
    torch_name: str
    convert: Callable[[np.ndarray], np.ndarray] = _IDENTITY


def _transpose(a: np.ndarray) -> np.ndarray:
    return a.T


def _convolution(a: np.ndarray) -> np.ndarray:
    """[c, 1, K] <-> [K, c]: PyTorch's depthwise weight has an axis of one input channel."""
    return a[:, 0].T if a.ndim == 3 else a.T[:, None]


def _linear(path: tuple[str, ...], torch_name: str) -> Iterator[_Entry]:
    yield _Entry((*path, "kernel"), f"{torch_name}.weight", _transpose)
    yield _Entry((*path, "bias"), f"{torch_name}.bias")


def _norm(path: tuple[str, ...], torch_name: str) -> Iterator[_Entry]:
    yield _Entry((*path, "scale"), f"{torch_name}.weight")
    yield _Entry((*path, "bias"), f"{torch_name}.bias")


def _conv(path: tuple[str, ...], torch_name: str) -> Iterator[_Entry]:
    yield _Entry((*path, "kernel"), f"{torch_name}.weight", _convolution)
    yield _Entry((*path, "bias"), f"{torch_name}.bias")


def _tim4rec_layer(config: ModelConfig, index: int) -> Iterator[_Entry]:
    ours, theirs = f"layers_{index}", f"ssd_layers.{index}"
    mixer, ssd = (ours, "mixer"), f"{theirs}.ssd"
    for name in ("dt_bias", "A_log", "D"):
        yield _Entry((*mixer, name), f"{ssd}.{name}")
    yield _Entry((*mixer, "norm_scale"), f"{ssd}.norm.weight")
    yield from _linear((*mixer, "in_proj"), f"{ssd}.in_proj")
    yield from _linear((*mixer, "out_proj"), f"{ssd}.out_proj")
    yield from _conv((*mixer, "conv"), f"{ssd}.conv1d")
    if config.use_time:
        time = (*mixer, "time")
        yield from _conv((*time, "conv_1"), f"{ssd}.conv1d4time_1")
        yield from _conv((*time, "conv_2"), f"{ssd}.conv1d4time_2")
        yield from _linear((*time, "scale_in"), f"{ssd}.mlp4time_scale.1")
        yield from _linear((*time, "scale_out"), f"{ssd}.mlp4time_scale.3")
        yield from _linear((*time, "residual_gate"), f"{ssd}.time_gate_residual.1")
        yield from _norm((*time, "norm"), f"{ssd}.time_layer_norm")
    yield from _norm((ours, "norm"), f"{theirs}.layer_norm")
    if config.use_ffn:
        yield from _linear((ours, "ffn", "fc1"), f"{theirs}.ffn.fc1")
        yield from _linear((ours, "ffn", "fc2"), f"{theirs}.ffn.fc2")
        yield from _norm((ours, "ffn", "norm"), f"{theirs}.ffn.layer_norm")


def _tim4rec_entries(config: ModelConfig) -> Iterator[_Entry]:
    yield _Entry(("item_embedding", "embedding"), "item_embedding.weight")
    yield from _norm(("embedding_norm",), "in_layer_norm")
    if config.use_time:
        yield from _norm(("time_norm",), "layer_norm_time")
    for index in range(config.num_layers):
        yield from _tim4rec_layer(config, index)


_ENTRIES: dict[str, Callable[[ModelConfig], Iterator[_Entry]]] = {"tim4rec": _tim4rec_entries}


def _entries(config: ModelConfig) -> list[_Entry]:
    if config.name not in _ENTRIES:
        raise ValueError(f"model {config.name!r} has no PyTorch form here; known: {sorted(_ENTRIES)}")
    return list(_ENTRIES[config.name](config))


def _expected_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    shapes = jax.eval_shape(functools.partial(init_params, build_model(config)), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}


def params_from_torch(config: ModelConfig, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parameter tree that equals a PyTorch state dict.

    Args:
      config: settings, for instance from `config_from_upstream`; a vocab_size of 0 is taken from the embedding.
      state_dict: arrays (or CPU tensors) by their PyTorch names.

    Returns:
      The `params` of `tim4rec_jax.build_model(config)`, in the dtype of the state dict.

    Raises:
      ValueError: listing every missing name, unexpected name and wrong shape at once.
    """
    entries = _entries(config)
    arrays = {name: np.asarray(value) for name, value in state_dict.items()}
    if config.vocab_size == 0:
        # Without a table of two rows any size serves to list what is wrong.
        rows = arrays["item_embedding.weight"].shape[:1] if "item_embedding.weight" in arrays else ()
        config = dataclasses.replace(config, vocab_size=max(2, *rows, 0))
    names = {entry.torch_name for entry in entries}
    problems = [f"missing: {name}" for name in sorted(names - set(arrays))]
    problems += [f"unexpected: {name}" for name in sorted(set(arrays) - names)]
    shapes = _expected_shapes(config)
    tree = {}
    for entry in entries:
        if entry.torch_name not in arrays:
            continue
        given = arrays[entry.torch_name]
        wanted = entry.convert(np.empty(shapes[entry.path])).shape
        if given.shape != wanted:
            problems.append(f"shape of {entry.torch_name}: {given.shape}, expected {wanted}")
            continue
        tree[entry.path] = jnp.array(entry.convert(given))
    if problems:
        raise ValueError(f"the state dict does not fit {config.name}:\n  " + "\n  ".join(problems))
    return unflatten_dict(tree)


def params_to_torch(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict (as NumPy arrays) that equals a parameter tree; inverse of `params_from_torch`.

    Raises:
      ValueError: listing every parameter that is missing or unexpected.
    """
    entries = _entries(config)
    flat = flatten_dict(params)
    paths = {entry.path for entry in entries}
    problems = [f"missing: {'/'.join(path)}" for path in sorted(paths - set(flat))]
    problems += [f"unexpected: {'/'.join(path)}" for path in sorted(set(flat) - paths)]
    if problems:
        raise ValueError(f"the parameters do not fit {config.name}:\n  " + "\n  ".join(problems))
    # Copies in C order, for PyTorch warns of arrays that cannot be written to.
    return {e.torch_name: np.array(e.convert(np.asarray(flat[e.path])), order="C") for e in entries}
