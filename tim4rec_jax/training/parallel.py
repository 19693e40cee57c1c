"""The training step on one device, or on many: by `jax.shard_map` over a mesh, or by `jax.pmap`.

Every batch is cut into one piece of consecutive rows a device; the state lies whole on each of them, or with
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
from tim4rec_jax.models.catalogue_shards import DATA_AXIS, MODEL_AXIS, ROW_AXES, num_shards, partition_specs, shardings
from tim4rec_jax.training.processes import broadcast

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

    def places(self, batch_size: int) -> range:
        """Returns the places of the filled batch that lie on this process's devices."""
        if self.mesh is None:
            return range(batch_size)
        rows = self.rows_per_device(batch_size) * len(self.mesh.local_devices)
        return range(jax.process_index() * rows, (jax.process_index() + 1) * rows)

    def replicate(self, tree: PyTree) -> PyTree:
        """Puts the arrays of a tree, equal in every process, on all devices."""
        if self.mesh is None:
            return jax.device_put(tree)
        return _put(tree, jax.tree.map(lambda _: NamedSharding(self.mesh, P()), tree))

    def place(self, state: PyTree) -> PyTree:
        """Puts a state or parameters, whole on the host, where training wants them; no device gets more than its part.

        Args:
          state: arrays, equal in every process.
        """
        if self.catalogue_shards == 1:
            return self.replicate(state)
        return _put(state, shardings(self.mesh, state))

    def create(self, make: Callable[[], PyTree]) -> PyTree:
        """Makes a state where training wants it, the same in every process.

        Args:
          make: () -> state, traceable.
        """
        if self.catalogue_shards == 1:
            return self.replicate(broadcast(make()))
        # All processes run one program, and no device ever holds all of the embedding.
        return jax.jit(make, out_shardings=shardings(self.mesh, jax.eval_shape(make)))()

    def split(self, payload: PyTree) -> PyTree:
        """Puts a loader's payload, the rows of `places`, on this process's devices."""
        if self.strategy == "single":
            return payload
        if self.strategy == "pmap":
            return jax.tree.map(lambda a: a.reshape(self.num_devices, -1, *a.shape[1:]), payload)
        sharding = NamedSharding(self.mesh, P(ROW_AXES))
        return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, a), payload)

    def wrap(self, step: Callable[..., tuple[PyTree, PyTree]]) -> Any:
        """Returns the jitted step over all devices; it donates the state.

        Args:
          step: (state, resident, payload, axis=) -> (state, loss), the work of one device; it names the axis over which
            it sums, unless the embedding is in parts, where that is known.
        """
        if self.mesh is None:
            return jax.jit(step, donate_argnums=0)
        if self.catalogue_shards > 1:
            return jax.jit(functools.partial(self._on_parts, step), donate_argnums=0)
        step = functools.partial(step, axis=DATA_AXIS)
        if self.strategy == "pmap":
            return jax.pmap(
                step, axis_name=DATA_AXIS, in_axes=(None, None, 0), out_axes=None, donate_argnums=0,
                devices=list(self.mesh.devices.flat),
            )  # fmt: skip
        # JAX's check of what varies over the mesh would turn away interpreted kernels. A test makes it for the others.
        return jax.jit(
            jax.shard_map(
                step, mesh=self.mesh, in_specs=(P(), P(), P(DATA_AXIS)), out_specs=P(), check_vma=False
            ),
            donate_argnums=0,
        )  # fmt: skip

    def _on_parts(
        self, step: Callable[..., tuple[PyTree, PyTree]], state: PyTree, resident: PyTree, payload: PyTree
    ) -> tuple[PyTree, PyTree]:
        specs = partition_specs(state)
        return jax.shard_map(
            step, mesh=self.mesh, in_specs=(specs, P(), P(ROW_AXES)), out_specs=(specs, P()), check_vma=False
        )(state, resident, payload)  # fmt: skip


def _put(tree: PyTree, places: PyTree) -> PyTree:
    """Puts the arrays of a tree, equal in every process, where the tree of shardings says."""
    if jax.process_count() == 1:
        return jax.device_put(tree, places)

    def put(leaf: Any, place: NamedSharding) -> jax.Array:
        host = np.asarray(leaf)
        return jax.make_array_from_callback(host.shape, place, lambda index: host[index])

    return jax.tree.map(put, tree, places)


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
