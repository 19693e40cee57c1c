"""Settings of the devices and processes that train together; a part of `config.ExperimentConfig`."""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from tim4rec_jax.checks import require

Strategy = Literal["auto", "single", "sharded", "pmap"]


@dataclass(frozen=True)
class ParallelConfig:
    """Which devices and processes train together; batches and losses do not depend on it, but for rounding.

    Attributes:
      strategy: "single" trains on one device; "sharded" spreads every batch over all devices, as global arrays; "pmap"
        does so by `jax.pmap`, in one process only; "auto" is "sharded" where there are several devices, else "single".
      catalogue_shards: devices that a copy of the item embedding is spread over, which no device then ever holds whole;
        must divide the number of devices of a process. 1 keeps it whole on each of them.
      distributed: "auto" lets JAX find the other processes (SLURM, Open MPI, Kubernetes); "off" has none, unless
        `coordinator` names them.
      coordinator: host:port at which process 0 can be reached by all others.
      num_processes: processes that train together; each has the same number of devices.
      process_id: which of them this one is, from 0.
      heartbeat_seconds: a process that is silent for so long is taken for lost, and the others end.
    """

    strategy: Strategy = "auto"
    catalogue_shards: int = 1
    distributed: Literal["off", "auto"] = "off"
    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    heartbeat_seconds: int = 30

    def __post_init__(self) -> None:
        require(
            self.strategy in get_args(Strategy),
            f"parallel.strategy={self.strategy!r} must be one of {get_args(Strategy)}",
        )
        shards = self.catalogue_shards
        require(shards >= 1, f"parallel.catalogue_shards={shards} must be at least 1")
        require(
            shards == 1 or self.strategy in ("auto", "sharded"),
            f"parallel.catalogue_shards={shards} needs parallel.strategy='sharded' (or 'auto'), not {self.strategy!r}",
        )
        require(
            self.distributed in ("off", "auto"), f"parallel.distributed={self.distributed!r} must be 'off' or 'auto'"
        )
        count, number = self.num_processes, self.process_id
        require(count is None or count >= 1, f"parallel.num_processes={count} must be at least 1")
        require(number is None or number >= 0, f"parallel.process_id={number} must be at least 0")
        require(
            count is None or number is None or number < count,
            f"parallel.process_id={number} must be under parallel.num_processes={count}: processes count from 0",
        )
        require(self.heartbeat_seconds >= 1, f"parallel.heartbeat_seconds={self.heartbeat_seconds} must be at least 1")
        if self.coordinator is not None:
            host, colon, port = self.coordinator.rpartition(":")
            require(
                bool(host and colon) and port.isdecimal() and 1 <= int(port) <= 65535,
                f"parallel.coordinator={self.coordinator!r} must be host:port with a port from 1 to 65535, as in "
                "10.0.0.1:8476",
            )
        if self.distributed == "off":
            self._require_all_or_none()
        require(
            self.strategy not in ("single", "pmap") or not self.several_processes,
            f"parallel.strategy={self.strategy!r} works in one process; use 'sharded' (or 'auto') for several",
        )

    def _require_all_or_none(self) -> None:
        names = ("coordinator", "num_processes", "process_id")
        given = [name for name in names if getattr(self, name) is not None]
        missing = [name for name in names if name not in given]
        require(
            not given or not missing,
            f"parallel.{given[0] if given else ''} needs {' and '.join(f'parallel.{name}' for name in missing)} too; "
            "or let JAX find out with parallel.distributed='auto'",
        )

    @cached_property
    def several_processes(self) -> bool:
        """JAX's distributed runtime has to be started."""
        return self.distributed == "auto" or self.coordinator is not None
