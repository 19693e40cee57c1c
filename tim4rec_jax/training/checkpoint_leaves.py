"""Trees of arrays as a checkpoint keeps them: names, and NumPy arrays on the host."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

PyTree = Any


class Leaf(NamedTuple):
    """One array on the host; `key_impl` names the generator if it is the data of typed PRNG keys."""

    data: np.ndarray
    shape: tuple[int, ...]
    dtype: str
    key_impl: str | None


def _is_key(leaf: Any) -> bool:
    return hasattr(leaf, "dtype") and jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def named_leaves(tree: PyTree) -> dict[str, Any]:
    """Returns the leaves by their paths in the tree, joined by "."; of a tree that is one leaf, it is "value".

    Raises:
      ValueError: two paths give one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator=".") or "value"
        if name in named:
            raise ValueError(f"two leaves of the tree are both named {name!r}; rename one")
        named[name] = leaf
    return named


def leaves_on_host(tree: PyTree) -> dict[str, Leaf]:
    """Returns copies of the leaves in the host's memory, by name.

    Args:
      tree: arrays of any dtype, typed PRNG keys too, and Python numbers.

    Raises:
      ValueError: a leaf is neither an array nor a number.
    """
    named = named_leaves(tree)
    arrays = {name: jax.random.key_data(leaf) if _is_key(leaf) else leaf for name, leaf in named.items()}
    leaves = {}
    for name, array in jax.device_get(jax.tree.map(_parts_together, arrays)).items():
        # A view of a CPU array would keep its buffer from being donated; a NumPy leaf may be overwritten in place.
        data = np.array(array, copy=True)
        if data.dtype.hasobject or data.dtype.kind in "USMm":
            raise ValueError(f"leaf {name} of type {type(named[name]).__name__} is neither an array nor a number")
        key_impl = str(jax.random.key_impl(named[name])) if _is_key(named[name]) else None
        leaves[name] = Leaf(data, *describe(named[name]), key_impl)
    return leaves


def _parts_together(array: Any) -> Any:
    """Returns an array whose parts lie on the devices of several processes, all of them also on this one's, whole."""
    if not isinstance(array, jax.Array) or array.is_fully_addressable or array.is_fully_replicated:
        return array
    host = np.empty(array.shape, array.dtype)
    for shard in {str(shard.index): shard for shard in array.addressable_shards}.values():
        host[shard.index] = shard.data
    return host


def describe(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of a leaf, those of a typed PRNG key as JAX shows them."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return tuple(leaf.shape), str(leaf.dtype)


def as_text(shape: Sequence[int], dtype: str) -> str:
    """Returns shape and dtype as in float32[2,3]."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def placed(host: np.ndarray, like: Any, key_impl: str | None) -> Any:
    """Puts a restored array where the template's leaf lies.

    Args:
      host: the array, or the data of typed PRNG keys.
      like: the leaf: a Python number, a NumPy or JAX array, or a `jax.ShapeDtypeStruct`.
      key_impl: name of the generator, if these are keys.
    """
    if isinstance(like, bool | int | float | complex) and not isinstance(like, np.generic):
        return host.item()
    if isinstance(like, np.ndarray | np.generic):
        return host[()] if isinstance(like, np.generic) else host
    # An array that was bound to no device must stay so, or the step is compiled a second time.
    sharding = like.sharding if getattr(like, "committed", True) else None
    if key_impl is None:
        return jax.device_put(host, sharding)
    return jax.device_put(jax.random.wrap_key_data(jax.device_put(host), impl=key_impl), sharding)
