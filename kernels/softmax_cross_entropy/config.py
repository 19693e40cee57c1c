"""How implementations of the softmax cross-entropy divide their work."""

from dataclasses import dataclass, replace

import jax

from kernels.tiling import power_of_two

# Scores of a tile in the plain-JAX form. On a CPU they should stay in its caches: with 2,048 targets, 12,102 items and
# d 64 on two cores, tiles of 256 rows trained fastest of 128 to 1,024, in 0.87 of the time of all scores at once.
# Elsewhere a tile should fill the device and the loop be short: 64 MB of float32, by thought and not by measurement.
_CPU_TILE_SCORES = 1 << 19
_TILE_SCORES = 1 << 24
_LEAST_TILE, _LARGEST_TILE = 128, 8192

_MULTIPROCESSORS = 132  # Of an H100.


@dataclass(frozen=True)
class XlaConfig:
    """How the plain-JAX form divides its work.

    Attributes:
      tile_size: embedding rows whose scores exist at once, [t, tile_size]; 1 at least.
    """

    tile_size: int

    def __post_init__(self):
        if self.tile_size < 1:
            raise ValueError(f"tile_size={self.tile_size} must be at least 1")


@dataclass(frozen=True)
class LoopConfig:
    """How a kernel divides its work: a program owns some rows of one side and loops over the other side.

    Attributes:
      own: rows that a program owns; a power of two, 16 at least.
      other: rows of the other side that it handles at once; a power of two, 16 at least.
      columns: of both sides that it multiplies at once; a power of two, 16 at least.
      num_warps: warps of 32 threads a program.
      num_stages: depth of software pipelining.
      programs: that run at once, by default two on each of an H100's 132 multiprocessors, as their registers allow;
        where there are fewer blocks of own rows, each loop is split among several programs, whose partial results are
        merged afterwards.
    """

    own: int
    other: int
    columns: int
    num_warps: int
    num_stages: int
    programs: int = 2 * _MULTIPROCESSORS

    def __post_init__(self):
        for name in ("own", "other", "columns"):
            rows = getattr(self, name)
            if rows != power_of_two(rows):
                raise ValueError(f"{name}={rows} must be a power of two, 16 at least")

    def blocks(self, own_rows: int) -> int:
        """Returns the number of blocks that own all rows."""
        return -(-own_rows // self.own)

    def split(self, own_rows: int, other_rows: int) -> tuple[int, int]:
        """Returns the number of programs that share a loop, and the steps of each.

        All programs run in waves of `programs`, each as long as the steps of one of them: a few programs too many cost
        a whole wave. Of the splits that make one wave and a bit the one with the fewest steps one after the other is
        taken, and among equals the one with fewer parts to merge.
        """
        steps, blocks = -(-other_rows // self.other), self.blocks(own_rows)

        def steps_in_turn(parts: int) -> int:
            return -(-blocks * parts // self.programs) * -(-steps // parts)

        parts = min(range(1, min(steps, -(-self.programs // blocks)) + 1), key=steps_in_turn)
        steps_each = -(-steps // parts)
        return -(-steps // steps_each), steps_each


@dataclass(frozen=True)
class TritonConfig:
    """How the kernels divide their work.

    Attributes:
      forward: owns targets and loops over the catalogue.
      d_hidden: likewise.
      d_embedding: owns embedding rows and loops over targets.
    """

    forward: LoopConfig
    d_hidden: LoopConfig
    d_embedding: LoopConfig


def xla_config(targets: int) -> XlaConfig:
    """Returns the tile for a number of targets."""
    scores = _CPU_TILE_SCORES if jax.default_backend() == "cpu" else _TILE_SCORES
    return XlaConfig(min(max(_LEAST_TILE, power_of_two(scores // targets)), _LARGEST_TILE))


def triton_config(width: int, itemsize: int, precision: str) -> TritonConfig:
    """Returns the division for a width d: the largest tried that keep to registers and to 75 KB of shared memory.

    Args:
      width: d.
      itemsize: bytes of a number in hidden.
      precision: how float32 is multiplied; "float32" takes three products and the registers for their factors.
    """
    columns = power_of_two(width)
    row_bytes = itemsize * columns
    alone = {"programs": _MULTIPROCESSORS}  # Eight warps of more than 128 registers leave no room for eight others.
    if precision == "float32" and itemsize == 4:
        if columns <= 64:
            forward = gradient = LoopConfig(64, 32, 32, num_warps=4, num_stages=2)
        elif columns == 128:
            forward = gradient = LoopConfig(32, 32, 64, num_warps=8, num_stages=1, **alone)
        else:
            forward = gradient = LoopConfig(32, 16, 64, num_warps=8, num_stages=2, **alone)
    elif row_bytes <= 256:
        forward = gradient = LoopConfig(128, 32, columns, num_warps=8, num_stages=2)
    elif row_bytes == 512:
        forward = LoopConfig(64, 32, columns, num_warps=8, num_stages=2)
        gradient = replace(forward, **alone)
    else:
        forward = gradient = LoopConfig(32, 32, 64, num_warps=4, num_stages=1)
    return TritonConfig(forward, gradient, gradient)
