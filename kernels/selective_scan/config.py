"""How the GPU kernels of the selective scan divide their work."""

from dataclasses import dataclass

from kernels.tiling import power_of_two

DEFAULT_CHUNK_SIZE = 16
MAX_STATE_WIDTH = 128


@dataclass(frozen=True)
class SelectiveScanConfig:
    """How the GPU kernels divide their work.

    Attributes:
      chunk: positions between two states that the forward kernel keeps for the backward one; it has no loop over
        them. Kept states are 4 n / chunk bytes per channel and position.
      group: positions that the backward kernel holds in registers at once, a divisor of the chunk.
      forward_channels: channels of a program, a power of two.
      backward_channels: likewise; gradients of B and C are written once for each such block of channels.
      num_warps: warps of a program. With one, sums over states and channels need no barrier.
      num_stages: depth of software pipelining; the kernels load ahead themselves.

    Raises:
      ValueError: for a number that is out of range.
    """

    chunk: int
    group: int
    forward_channels: int
    backward_channels: int
    num_warps: int = 1
    num_stages: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.group <= self.chunk or self.chunk % self.group:
            raise ValueError(f"group={self.group} must divide chunk={self.chunk}")
        for name in ("forward_channels", "backward_channels", "num_warps"):
            value = getattr(self, name)
            if value < 1 or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two")


def default_config(state_width: int) -> SelectiveScanConfig:
    """Returns the largest tiles that spill no registers: 32 states a thread forward, 16 backward.

    Args:
      state_width: n, at most 128.
    """
    width = power_of_two(state_width)
    return SelectiveScanConfig(
        chunk=6, group=3, forward_channels=min(32, 1024 // width), backward_channels=min(32, 512 // width)
    )
