"""Parameters of the original PyTorch programs, to and from ours."""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from tim4rec_jax.checks import listed
from tim4rec_jax.interop.attention_names import sasrec_names, tisasrec_names
from tim4rec_jax.interop.mamba_names import ECHOMAMBA4REC_UNUSED, echomamba4rec_names, mamba4rec_names
from tim4rec_jax.interop.tim4rec_names import ssd4rec_names, tim4rec_names
from tim4rec_jax.interop.torch_names import Entry
from tim4rec_jax.model_config import ModelConfig
from tim4rec_jax.models import build_model, init_params

_NAMES: dict[str, Callable[[Any], Iterator[Entry]]] = {
    "echomamba4rec": echomamba4rec_names,
    "mamba4rec": mamba4rec_names,
    "sasrec": sasrec_names,
    "ssd4rec": ssd4rec_names,
    "tim4rec": tim4rec_names,
    "tisasrec": tisasrec_names,
}
# What the original constructs and never calls: passed over when read, and not written.
_UNUSED: dict[str, re.Pattern[str]] = {"echomamba4rec": ECHOMAMBA4REC_UNUSED}
_ITEMS = ("item_embedding", "embedding")


def _entries(config: ModelConfig) -> list[Entry]:
    if config.name not in _NAMES:
        raise ValueError(f"model {config.name!r} has no PyTorch form here; known: {sorted(_NAMES)}")
    return list(_NAMES[config.name](config))


def _expected_shapes(config: ModelConfig) -> dict[tuple[str, ...], tuple[int, ...]]:
    shapes = jax.eval_shape(functools.partial(init_params, build_model(config)), jax.random.key(0))
    return {path: leaf.shape for path, leaf in flatten_dict(shapes).items()}  # pyright: ignore[reportAttributeAccessIssue]


def _difference(missing: set[str], unexpected: set[str]) -> list[str]:
    named = {"missing": sorted(missing), "unexpected": sorted(unexpected)}
    return [f"{kind}: {listed(names, 75, ', ')}" for kind, names in named.items() if names]


def params_from_torch(config: ModelConfig, state_dict: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns the parameter tree that equals a PyTorch state dict.

    Args:
      config: settings, for instance from `config_from_upstream`; a vocab_size of 0 is taken from the embedding.
      state_dict: arrays (or CPU tensors) by their PyTorch names.

    Returns:
      The `params` of `tim4rec_jax.build_model(config)`, in the dtype of the state dict.

    Raises:
      ValueError: naming missing names, unexpected names and wrong shapes at once, as many as fit into a line.
    """
    entries = _entries(config)
    unused = _UNUSED.get(config.name)
    arrays = {name: np.asarray(value) for name, value in state_dict.items() if not (unused and unused.match(name))}
    if config.vocab_size == 0:
        # Without a table of two rows any size serves to list what is wrong.
        rows = arrays["item_embedding.weight"].shape[:1] if "item_embedding.weight" in arrays else ()
        config = dataclasses.replace(config, vocab_size=max(2, *rows, 0))
    names = {entry.torch_name for entry in entries}
    problems = _difference(names - set(arrays), set(arrays) - names)
    shapes = _expected_shapes(config)
    tree = {}
    for entry in entries:
        if entry.torch_name not in arrays:
            continue
        given = arrays[entry.torch_name]
        # A view of one number: settings that do not fit may ask for any size.
        wanted = entry.convert(np.broadcast_to(np.float32(0), shapes[entry.path])).shape
        if given.shape != wanted:
            problems.append(f"shape of {entry.torch_name}: {given.shape}, expected {wanted}")
            continue
        tree[entry.path] = jnp.array(entry.convert(given))
    if problems:
        raise ValueError(f"the state dict does not fit {config.name}: {listed(problems)}")
    return unflatten_dict(tree)


def params_to_torch(config: ModelConfig, params: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Returns the PyTorch state dict (as NumPy arrays) that equals a parameter tree; inverse of `params_from_torch`.

    Rows of the item embedding beyond the catalogue (`config.vocab_multiple`), which nothing reads, are left out.

    Raises:
      ValueError: listing every parameter that is missing or unexpected.
    """
    entries = _entries(config)
    flat = flatten_dict(params)
    paths = {entry.path for entry in entries}
    problems = _difference({"/".join(path) for path in paths - set(flat)}, {"/".join(p) for p in set(flat) - paths})
    if problems:
        raise ValueError(f"the parameters do not fit {config.name}: {listed(problems)}")
    flat[_ITEMS] = flat[_ITEMS][: config.vocab_size]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    # Copies in C order, for PyTorch warns of arrays that cannot be written to.
    return {e.torch_name: np.array(e.convert(np.asarray(flat[e.path])), order="C") for e in entries}
