"""How the GPU kernels of state space duality divide their work."""

import dataclasses
from dataclasses import dataclass

from kernels.tiling import power_of_two

DEFAULT_CHUNK_SIZE = 64
MAX_WIDTH = 128
# Fewer programs than this leave a large GPU partly idle, so that rows are cut into segments.
_ENOUGH_PROGRAMS = 1024
_MAX_SEGMENTS = 256
# Likewise for the Gluon kernels, whose programs have several warps.
_ENOUGH_WARPS = 2048


@dataclass(frozen=True)
class SsdConfig:
    """How the Triton kernels divide the work of an SSD.

    Attributes:
      chunk_size: c, positions handled densely at once; a power of two from 16 to 128.
      segments: programs that share one row. 1 is the strategy "sequence": every input is read once. More
        is the strategy "chunked" for few long rows: the states between segments come first, in a pass of their own.
      heads_per_program: heads of one group that a backward program handles in turn; they add up their gradients of B
        and C in its cache, and one sum reaches the memory.
      width_splits: programs that share the width p of a head, where its state is too large for one.
      forward_warps, backward_warps: warps of 32 threads a program.
      num_stages: depth of software pipelining.
      value_chunk_size: c of a forward pass whose gradient nobody asks for, or None for the same; it need not agree with
        a backward pass, which has more to hold in registers.
    """

    chunk_size: int
    segments: int
    heads_per_program: int
    width_splits: int
    forward_warps: int
    backward_warps: int
    num_stages: int = 1
    value_chunk_size: int | None = None

    @property
    def without_gradient(self) -> "SsdConfig":
        """The division of a forward pass whose gradient nobody asks for."""
        return dataclasses.replace(self, chunk_size=self.value_chunk_size or self.chunk_size, value_chunk_size=None)

    def check(self, *, heads_per_group: int, width: int) -> None:
        """Refuses what the kernels cannot do for these shapes.

        Raises:
          ValueError: naming the field, its value and its limit.
        """
        for name, value, low, high in [
            ("chunk_size", self.chunk_size, 16, 128),
            ("value_chunk_size", self.without_gradient.chunk_size, 16, 128),
            ("width_splits", self.width_splits, 1, max(1, power_of_two(width) // 16)),
            ("forward_warps", self.forward_warps, 1, 16),
            ("backward_warps", self.backward_warps, 1, 16),
        ]:
            if not low <= value <= high or value & (value - 1):
                raise ValueError(f"{name}={value} must be a power of two from {low} to {high}")
        if self.segments < 1 or self.num_stages < 1:
            raise ValueError(f"segments={self.segments} and num_stages={self.num_stages} must be at least 1")
        if self.heads_per_program < 1 or heads_per_group % self.heads_per_program:
            raise ValueError(
                f"heads_per_program={self.heads_per_program} must divide the {heads_per_group} heads of a group"
            )


def default_config(
    *,
    batch: int,
    length: int,
    heads: int,
    groups: int,
    width: int,
    state_width: int,
    chunk_size: int,
    exact_products: bool = False,
    itemsize: int = 4,
) -> SsdConfig:
    """Picks block sizes for a shape: of those tried at p = n = 32 on an H100 the fastest, else by register counts.

    Args:
      batch, length, heads, groups, width, state_width: b, l, h, g, p and n.
      chunk_size: the largest c to use.
      exact_products: float32 products, which take about twice the registers of TF32 and bfloat16 ones.
      itemsize: bytes of a number of x.
    """
    columns, states = power_of_two(width), power_of_two(state_width)
    largest = 1 << (max(16, chunk_size).bit_length() - 1)
    # Timed with TF32: forward and backward in one warp took 0.76 to 0.91 of the time of chunks of 32 in two warps,
    # though the backward kernel spills more. In bfloat16 0.83 and 0.86 are predicted (tests/kernels/issue_model.py).
    small = columns <= 32 and states <= 32 and not exact_products
    chunk = min(16 if small or exact_products else 32, largest, power_of_two(length))
    # Timed as well: the forward pass alone took 0.75 and 0.81 of its time with chunks of 32, still in one warp.
    value_chunk = min(32, largest, power_of_two(length)) if small else None
    # What a program can hold of a head's state without spilling, and with room for the tiles of a chunk.
    slice_width = max(16, min(columns, 32, (512 if exact_products else 2048) // states))
    splits = columns // slice_width
    segments = 1
    if batch * heads < _ENOUGH_PROGRAMS:
        wanted = -(-_ENOUGH_PROGRAMS // (batch * heads))
        # A segment is worth its extra pass from a few chunks on.
        segments = max(1, min(wanted, _MAX_SEGMENTS, length // (128 if exact_products else 256)))
    # Heads one after the other read B and C once, but small ones are faster side by side all the same.
    alone = batch * segments * groups * splits >= _ENOUGH_PROGRAMS and not small
    # More warps than tiles have 16-row blocks would repeat each other's products, unless states are wide.
    warps = 1 if small else 2 if states <= 32 else (4 if states <= 64 else 8)
    return SsdConfig(
        chunk_size=chunk,
        segments=segments,
        heads_per_program=heads // groups if alone else 1,
        width_splits=splits,
        forward_warps=warps,
        backward_warps=warps,
        value_chunk_size=value_chunk,
    )


@dataclass(frozen=True)
class GluonConfig:
    """How the Gluon kernels divide the work of an SSD.

    Attributes:
      warps: of a program; each has a head of its own, or `columns` of the width of one.
      columns: of a head's width p that a warp handles; 16, 32 or 64.
      segments: programs that share one row, for few long rows.
      block: positions between the states that are kept for the gradient; a multiple of 16. Those before each 16
        positions of a block lie in shared memory.
      forward_registers, backward_registers: of a thread at most, or None for the compiler's choice.
      wgmma: the gradient by `wgmma`, for TF32 factors, p = 128, n = 64 and blocks of 64 on compute capability 9.0.
    """

    warps: int
    columns: int
    segments: int = 1
    block: int = 64
    forward_registers: int | None = None
    backward_registers: int | None = None
    wgmma: bool = False

    def check(self, *, heads: int, width: int) -> None:
        """Refuses what the kernels cannot do for these shapes.

        Raises:
          ValueError: naming the field, its value and its limit.
        """
        if self.columns not in (16, 32, 64):
            raise ValueError(f"columns={self.columns} must be 16, 32 or 64")
        slots = heads * -(-width // self.columns)
        if self.warps not in (1, 2, 4, 8) or slots % self.warps:
            raise ValueError(f"warps={self.warps} must be 1, 2, 4 or 8 and divide the {slots} warps of a row")
        if self.segments < 1:
            raise ValueError(f"segments={self.segments} must be at least 1")
        if self.block < 16 or self.block % 16:
            raise ValueError(f"block={self.block} must be a multiple of 16")
        for name in ("forward_registers", "backward_registers"):
            value = getattr(self, name)
            if value is not None and not 24 <= value <= 255:
                raise ValueError(f"{name}={value} must be from 24 to 255, or None")


def default_gluon_config(
    *, batch: int, length: int, heads: int, width: int, state_width: int, exact_products: bool = False
) -> GluonConfig:
    """Picks the division for a shape: what the registers of a thread hold without spilling.

    Args:
      batch, length, heads, width, state_width: b, l, h, p and n.
      exact_products: float32 products, which need more registers.
    """
    # A warp holds columns x states numbers of its state, 32 of them per thread where there are 1024.
    most = 16 if state_width > (32 if exact_products else 64) else 32
    columns = min(most, max(16, power_of_two(width)))
    slots = heads * -(-width // columns)
    warps = next(w for w in (4, 2, 1) if slots % w == 0)
    segments = 1
    if batch * slots < _ENOUGH_WARPS:
        segments = max(1, min(-(-_ENOUGH_WARPS // (batch * slots)), _MAX_SEGMENTS, length // 256))
    # Of wide states half as many fit. The compiler for 8.0 otherwise leaves their gradient 32 registers.
    block = 32 if state_width > 64 else 64
    return GluonConfig(warps=warps, columns=columns, segments=segments, block=block, backward_registers=255)
