"""Several processes that train together, by JAX's distributed runtime: their start, and what they have to agree on.

Process 0 alone reads and writes the run folder and prints; the others hear from it what they need to know.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from tim4rec_jax.config import ExperimentConfig, ParallelConfig

PyTree = Any
Result = TypeVar("Result")
Restored = tuple[int, PyTree, dict[str, Any]]


class ProcessError(RuntimeError):
    """Another process of the run was lost, failed, or could not be reached."""


def initialize(config: ParallelConfig) -> None:
    """Joins the processes that the settings speak of; call it before anything else of JAX. Without any it does nothing.

    Raises:
      ValueError: JAX finds no cluster although `distributed="auto"` says that there is one.
      ProcessError: the processes do not come together.
    """
    if not config.several_processes:
        return
    try:
        jax.distributed.initialize(
            config.coordinator,
            config.num_processes,
            config.process_id,
            heartbeat_timeout_seconds=config.heartbeat_seconds,
            # A process that fails alone waits for the others only so long before it ends, which then ends them too.
            shutdown_timeout_seconds=config.heartbeat_seconds,
        )
    except ValueError as error:
        raise ValueError(
            f"parallel.distributed={config.distributed!r} found no processes to join ({error}); start under SLURM, "
            "Open MPI or Kubernetes, or give parallel.coordinator, parallel.num_processes and parallel.process_id"
        ) from error
    except RuntimeError as error:
        raise ProcessError(
            f"the processes did not come together ({_first_line(error)}); every parallel.process_id from 0 to "
            "parallel.num_processes - 1 must be started once, and parallel.coordinator be an address of process 0 "
            "that all can reach"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def is_main() -> bool:
    """Tells whether this is process 0, which writes and prints."""
    return jax.process_index() == 0


@contextlib.contextmanager
def quiet_unless_main() -> Iterator[None]:
    """Swallows what the other processes print; errors go to standard error everywhere."""
    with contextlib.nullcontext() if is_main() else contextlib.redirect_stdout(io.StringIO()):
        yield


@contextlib.contextmanager
def lost_processes_named() -> Iterator[None]:
    """Turns the runtime's error about a process that is gone into a ProcessError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        raise ProcessError(
            f"process {jax.process_index()} of {jax.process_count()} cannot go on ({_first_line(error)}); if another "
            "process ended or its machine is unreachable, start all of them again with --resume"
        ) from error


def broadcast(tree: PyTree) -> PyTree:
    """Returns the arrays of process 0, bit for bit, as NumPy arrays where there are several processes.

    Args:
      tree: arrays; of the other processes only the shapes and dtypes are read.
    """
    if jax.process_count() == 1:
        return tree

    def one(leaf: Any) -> np.ndarray:
        host = np.ascontiguousarray(leaf)
        # As bytes: a sum with zeros would turn -0.0 into 0.0.
        received = multihost_utils.broadcast_one_to_all(host.reshape(-1).view(np.uint8))
        return np.asarray(received, np.uint8).view(host.dtype).reshape(np.shape(leaf))

    return jax.tree.map(one, tree)


def _broadcast_text(text: str) -> str:
    content = np.frombuffer(text.encode(), np.uint8)
    size = int(broadcast(np.array([len(content)], np.int32))[0])
    return broadcast(content if is_main() else np.zeros(size, np.uint8)).tobytes().decode()


def on_main(call: Callable[[], Result]) -> Result | None:
    """Calls a function in process 0 alone, where its result is returned; the others wait and get None.

    Raises:
      ProcessError: in the other processes, if it raised in process 0.
    """
    if jax.process_count() == 1:
        return call()
    result, error, text = None, None, ""
    if is_main():
        try:
            result = call()
        except Exception as caught:
            error, text = caught, f"{type(caught).__name__}: {caught}"
    text = _broadcast_text(text)
    if error is not None:
        raise error
    if text:
        raise ProcessError(f"process 0 stopped with {text}")
    return result


def restored_everywhere(restore: Callable[[PyTree], Restored | None], template: PyTree) -> Restored | None:
    """Restores a checkpoint in process 0 and gives every process what it holds, as NumPy arrays.

    Args:
      restore: template -> (step, tree, what was saved with it) or None.
      template: tree of arrays; gives shapes and dtypes.

    Raises:
      ProcessError: in the other processes, if restoring raised in process 0.
    """
    template = jax.tree.map(lambda leaf: np.empty(leaf.shape, leaf.dtype), template)
    found = on_main(lambda: restore(template))
    if jax.process_count() == 1:
        return found
    said = json.loads(_broadcast_text(json.dumps(found and [found[0], found[2]])))
    if said is None:
        return None
    return said[0], broadcast(found[1] if found else template), said[1]


def require_same_start(config: ExperimentConfig, fingerprint: str) -> None:
    """Refuses processes that were started with other settings, or that read another log.

    Args:
      config: settings of this process; what may differ is its number and where the log lies.
      fingerprint: of the log.

    Raises:
      ValueError: in every process, if there is a difference.
    """
    if jax.process_count() == 1:
        return
    # Where the log lies may differ from machine to machine; its fingerprint speaks for it.
    data = dataclasses.replace(config.data, path=None, item_path=None, cache_dir="")
    own = config.parallel
    parallel = ParallelConfig(strategy=own.strategy, catalogue_shards=own.catalogue_shards)
    shared = dataclasses.replace(config, data=data, parallel=parallel)
    texts = {"settings": json.dumps(shared.to_dict(), sort_keys=True), "log": fingerprint}
    for what, text in texts.items():
        digest = np.frombuffer(hashlib.sha256(text.encode()).digest()[:4], np.uint32)
        digests = np.ravel(multihost_utils.process_allgather(digest))
        if len(set(digests.tolist())) > 1:
            shown = ", ".join(f"{number}: {digest:08x}" for number, digest in enumerate(digests.tolist()))
            raise ValueError(
                f"the processes do not have the same {what} (digest by process: {shown}); start all with the same "
                "options and data"
            )
