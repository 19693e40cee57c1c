"""How the GPU kernels of the causal convolution divide their work."""

from dataclasses import dataclass

from kernels.tiling import power_of_two

MAX_TAPS = 8
_MAX_CHANNELS = 64
_MAX_TILE = 512
_MAX_UNROLL = 16
# Channels times strips that fill a large GPU once: 132 multiprocessors, 24 warps each (the backward kernel has 80
# registers per thread), two channels a thread, and a little less.
_ENOUGH_LANES = 3 * 2**16
# Shorter segments would read too many positions twice (K - 1 each).
_MIN_SEGMENT = 32


@dataclass(frozen=True)
class CausalConv1dConfig:
    """How the Triton kernels divide the work of a convolution.

    Attributes:
      channels: neighbouring channels that a program handles; a power of two up to 1024.
      strips: rows, or segments of rows, that it handles side by side; a power of two up to 1024. More of them make
        fewer partial sums of the parameters' gradients.
      segments: parts of a row that are handled side by side, where there are few rows.
      forward_unroll, backward_unroll: positions that are loaded at once, while as many are worked on.
      forward_warps, backward_warps: warps of 32 threads a program.
    """

    channels: int
    strips: int
    segments: int
    forward_unroll: int
    backward_unroll: int
    forward_warps: int
    backward_warps: int

    def check(self) -> None:
        """Refuses what the kernels cannot do.

        Raises:
          ValueError: naming the field, its value and its limit.
        """
        for name, value, high in [
            ("channels", self.channels, 1024),
            ("strips", self.strips, 1024),
            ("forward_warps", self.forward_warps, 16),
            ("backward_warps", self.backward_warps, 16),
        ]:
            if not 1 <= value <= high or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from 1 to {high}")
        for name, value in [("forward_unroll", self.forward_unroll), ("backward_unroll", self.backward_unroll)]:
            if not 1 <= value <= _MAX_UNROLL:
                raise ValueError(f"{name}={value} must be from 1 to {_MAX_UNROLL}")
        if self.segments < 1:
            raise ValueError(f"segments={self.segments} must be at least 1")


def default_config(*, batch: int, length: int, channels: int) -> CausalConv1dConfig:
    """Picks block sizes for a shape by register counts of compiled kernels; no other sizes have been timed.

    Args:
      batch, length, channels: b, l and c.
    """
    block = min(_MAX_CHANNELS, power_of_two(channels, least=1))
    segments = max(1, min(-(-_ENOUGH_LANES // (batch * channels)), length // _MIN_SEGMENT))
    strips = min(_MAX_TILE // block, power_of_two(batch * segments, least=1))
    # Two channels a thread.
    warps = max(1, strips * block // 64)
    return CausalConv1dConfig(
        channels=block,
        strips=strips,
        segments=segments,
        forward_unroll=4,
        # 80 registers per thread at most, so that three programs of 8 warps share a multiprocessor; 4 take up to 100.
        backward_unroll=3,
        forward_warps=warps,
        backward_warps=warps,
    )
