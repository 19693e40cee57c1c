"""Arrays in a folder, by Orbax; what was written is looked up before a caller hears that it was.

Orbax looks its own files up by a pattern over the whole path and takes a backslash for a slash, so in a folder that is
called `lr[0.1]` it finds none of them, and calls the rest complete. It is shown other paths.
"""

import contextlib
import itertools
import json
import logging
import os
import pathlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

if TYPE_CHECKING:
    import orbax.checkpoint as ocp

_ARRAYS = "arrays"
# Behind an array's name, the file that says its shape (zarr, version 2).
_ABOUT = "/.zarray"


def describe(leaf: Any) -> tuple[tuple[int, ...], str]:
    """Returns shape and dtype of a leaf, those of a typed PRNG key as JAX shows them."""
    leaf = leaf if hasattr(leaf, "dtype") else np.asarray(leaf)
    return tuple(leaf.shape), str(leaf.dtype)


def as_text(shape: Sequence[int], dtype: str) -> str:
    """Returns shape and dtype as in float32[2,3]."""
    return f"{dtype}[{','.join(map(str, shape))}]"


def write_arrays(folder: pathlib.Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays of at least one element each into a folder.

    Args:
      folder: folder that is there.
      arrays: at least one, by name.

    Raises:
      OSError: they could not be written, or are not all there afterwards.
    """
    import orbax.checkpoint as ocp  # Here and below: programs that only print their options start sooner.

    with _errors_not_logged(), _plain_path(folder) as plain, _orbax() as orbax:
        orbax.save(plain / _ARRAYS, args=ocp.args.StandardSave(dict(arrays)))
        _require_all(_index(plain / _ARRAYS), arrays)


def read_arrays(folder: pathlib.Path, wanted: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Returns the arrays of a folder.

    Args:
      folder: what `write_arrays` was given.
      wanted: arrays of their shapes and dtypes, by name; what they hold is not read.

    Raises:
      OSError: one of them cannot be read.
    """
    import orbax.checkpoint as ocp

    with _plain_path(folder) as plain, _orbax() as orbax:
        return orbax.restore(plain / _ARRAYS, args=ocp.args.StandardRestore(dict(wanted)))


@contextlib.contextmanager
def _plain_path(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Yields a path of a folder in which no character has a meaning, where the system has one for an open folder.

    Raises:
      OSError: what the body raises, said of the folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    plain = pathlib.Path(f"/proc/self/fd/{descriptor}")
    try:
        yield plain if plain.exists() else folder
    except MemoryError:
        raise
    except Exception as error:
        if number := re.search(r"os_error_code='(\d+)'", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        raise OSError(str(error).partition("\n")[0].replace(str(plain), str(folder))) from error
    finally:
        os.close(descriptor)


def _index(folder: pathlib.Path) -> dict[str, str]:
    """Returns shape and dtype of every array that is whole, as the files themselves say.

    Orbax would tell them too, but keeps objects of every folder that it is asked about.
    """
    import tensorstore as ts

    base = {"driver": "file", "path": f"{folder}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    keys = {key.decode() for key in store.list().result()}
    found = {}
    for key in keys:
        if (name := key.removesuffix(_ABOUT)) == key:
            continue
        about = json.loads(store.read(key).result().value)
        grid = (range(-(-size // chunk)) for size, chunk in zip(about["shape"], about["chunks"], strict=True))
        chunks = (about.get("dimension_separator", ".").join(map(str, place)) for place in itertools.product(*grid))
        if all(f"{name}/{chunk or '0'}" in keys for chunk in chunks):
            found[name] = as_text(tuple(about["shape"]), jnp.dtype(about["dtype"]).name)
    return found


def _require_all(found: Mapping[str, str], arrays: Mapping[str, np.ndarray]) -> None:
    """Raises OSError unless an index has every array, of the right shape and dtype."""
    wanted = {name: as_text(*describe(array)) for name, array in arrays.items()}
    if missing := [name for name in wanted if found.get(name) != wanted[name]]:
        raise OSError(f"{len(missing)} of {len(wanted)} arrays are not in what was written, {missing[0]} first")


def _orbax() -> "ocp.Checkpointer":
    """Returns Orbax's writer and reader for this process alone: it would wait for all others otherwise."""
    import orbax.checkpoint as ocp

    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=process, active_processes={process})
    return ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)


@contextlib.contextmanager
def _errors_not_logged() -> Iterator[None]:
    """Keeps Orbax from printing the tracebacks of its threads: the same error is raised to us.

    After an error TensorStore says of every write beside the failed one, then and later, that nobody waits for it.
    """

    def keep(record: logging.LogRecord) -> bool:
        return "_SignalingThread" not in record.getMessage()

    def hook(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            print_others(unraisable)

    logger = logging.getLogger("absl")
    print_others, sys.unraisablehook = sys.unraisablehook, hook
    logger.addFilter(keep)
    try:
        yield
        sys.unraisablehook = print_others
    finally:
        logger.removeFilter(keep)
