"""The training step on one device, or on many: by global arrays over a mesh, or by `jax.pmap`.

Every batch is cut into one piece of consecutive rows per device; the state lies whole on each of them, or with
`parallel.catalogue_shards` all of it but the item embedding.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from tim4rec_jax.config import ParallelConfig
from tim4rec_jax.parallel.item_table import DATA_AXIS, MODEL_AXIS, ROW_AXES, num_shards, shardings
from tim4rec_jax.parallel.processes import broadcast

PyTree = Any


@dataclass(frozen=True)
class Layout:
    """The devices that train together.

    Attributes:
      strategy: how the step is wrapped.
      mesh: [devices / shards, shards] with axes "data" and "model", the devices of a process side by side; None for
        "single".
    """

    strategy: Literal["single", "sharded", "pmap"]
    mesh: Mesh | None

    @property
    def num_devices(self) -> int:
        return 1 if self.mesh is None else self.mesh.size

    @property
    def catalogue_shards(self) -> int:
        """Devices that a copy of the item embedding is spread over."""
        return num_shards(self.mesh)

    def rows_per_device(self, batch_size: int) -> int:
        """Returns the rows of a batch on each device; what is over on the last ones is filled with weight 0."""
        return -(-batch_size // self.num_devices)

    def batch_indices(self, batch_size: int) -> range:
        """Returns the indices in the filled batch of the rows on this process's devices."""
        if self.mesh is None:
            return range(batch_size)
        rows = self.rows_per_device(batch_size) * len(self.mesh.local_devices)
        return range(jax.process_index() * rows, (jax.process_index() + 1) * rows)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts the arrays of a tree, equal in every process, on all devices."""
        if self.mesh is None:
            return jax.device_put(tree)
        everywhere = NamedSharding(self.mesh, P())
        return _put(tree, jax.tree.map(lambda _: everywhere, tree))

    def shard(self, state: PyTree) -> PyTree:
        """Puts a state or parameters, whole on the host, where training wants them; no device gets more than its part.

        Args:
          state: arrays, equal in every process.
        """
        if self.mesh is None or self.catalogue_shards == 1:
            return self.replicate(state)
        return _put(state, shardings(self.mesh, state))

    def init_sharded(self, make: Callable[[], PyTree]) -> PyTree:
        """Makes a state where training wants it, the same in every process.

        Args:
          make: () -> state, traceable.
        """
        if self.mesh is None or self.catalogue_shards == 1:
            return self.replicate(broadcast(make()))
        # All processes run one program, and no device ever holds all of the embedding.
        return jax.jit(make, out_shardings=shardings(self.mesh, jax.eval_shape(make)))()

    def shard_batch(self, payload: PyTree) -> PyTree:
        """Puts a loader's batch, the rows of `batch_indices`, on this process's devices."""
        if self.mesh is None:
            return payload
        if self.strategy == "pmap":
            return jax.tree.map(lambda a: a.reshape(self.num_devices, -1, *a.shape[1:]), payload)
        sharding = NamedSharding(self.mesh, P(ROW_AXES))
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), payload)

    def compile_step(self, step: Callable[..., tuple[PyTree, PyTree]]) -> Any:
        """Returns the jitted step over all devices; it donates the state.

        Args:
          step: (state, device_data, payloads, mesh=, axis=) -> (state, losses): given a mesh the work of all its
            devices, given the name of an axis that of one device of `jax.pmap`. `payloads` is any tree of them.
        """
        if self.mesh is not None and self.strategy == "pmap":
            return jax.pmap(
                functools.partial(step, axis=DATA_AXIS),
                axis_name=DATA_AXIS,
                in_axes=(None, None, 0),
                out_axes=None,
                donate_argnums=0,
                devices=list(self.mesh.devices.flat),
            )
        return jax.jit(functools.partial(step, mesh=self.mesh), donate_argnums=0)


def _put(tree: PyTree, placement: PyTree) -> PyTree:
    """Puts the arrays of a tree, equal in every process, where the tree of shardings says."""
    if jax.process_count() == 1:
        return jax.device_put(tree, placement)

    def put(leaf: Any, sharding: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])

    return jax.tree.map(put, tree, placement)


def make_layout(config: ParallelConfig) -> Layout:
    """Returns the devices that the settings ask for.

    Raises:
      ValueError: several processes with a strategy for one, or processes with different numbers of devices; parts of a
        catalogue that do not divide the devices, or those of a process.
    """
    devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    strategy, shards = config.strategy, config.catalogue_shards
    if len(devices) % shards:
        raise ValueError(
            f"parallel.catalogue_shards={shards} must divide the number of devices, which is {len(devices)}; "
            "choose a divisor, or 1"
        )
    if strategy == "auto":
        strategy = "sharded" if len(devices) > 1 else "single"
    if strategy != "sharded" and jax.process_count() > 1:
        raise ValueError(
            f"parallel.strategy={strategy!r} works in one process and there are {jax.process_count()}; use 'sharded' "
            "(or 'auto')"
        )
    if strategy == "single":
        return Layout(strategy, None)
    counts = np.bincount([device.process_index for device in devices], minlength=jax.process_count())
    if counts.min() != counts.max():
        raise ValueError(f"the processes have {counts.tolist()} devices; give each the same number of them")
    if counts[0] % shards:
        raise ValueError(
            f"parallel.catalogue_shards={shards} must divide the {counts[0]} devices of each of the {len(counts)} "
            "processes, for a copy of the item embedding lies in one process; choose a divisor, or 1"
        )
    shape, automatic = (len(devices) // shards, shards), (AxisType.Auto, AxisType.Auto)
    return Layout(strategy, Mesh(np.array(devices).reshape(shape), (DATA_AXIS, MODEL_AXIS), axis_types=automatic))
