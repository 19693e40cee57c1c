"""Operands of instructions: registers, numbers, addresses."""

import re
from collections.abc import Callable

import numpy as np

from tests.kernels.ptx.arithmetic import UNSIGNED
from tests.kernels.ptx.memory import Fault
from tests.kernels.ptx.warp import LANES, SHARED_BASE, Warp

# Does an instruction for a warp, in some lanes or (None) in all.
Action = Callable[[Warp, np.ndarray | None], None]


def active_lanes(active: np.ndarray | None) -> np.ndarray:
    """Numbers of the lanes."""
    return LANES if active is None else np.flatnonzero(active)


def names_of(operand: str) -> list[str]:
    """The registers of {a, b}, or the one that stands alone."""
    return [name.strip() for name in operand.strip("{} ").split(",")]


def _immediate(text: str, dtype: np.dtype) -> np.ndarray:
    try:
        number = int(text[2:], 16) if text[:2] in ("0f", "0d") else int(text.rstrip("U"), 0)
    except ValueError:
        raise Fault(f"operand {text!r} is unknown") from None
    if dtype.kind == "b":
        return np.full(32, number != 0)
    size = dtype.itemsize
    return np.full(32, number % (1 << 8 * size), UNSIGNED[size]).view(dtype)


def source_of(operand: str, dtype: np.dtype, *, low: bool = False) -> Callable[[Warp], np.ndarray]:
    """What a register, number or symbol is as [32] of a type; with `low`, registers may be wider."""
    if operand.startswith("%"):
        return lambda warp: warp.read(operand, dtype, low=low)
    if operand == "global_smem":
        operand = str(SHARED_BASE)
    value = _immediate(operand, dtype)
    return lambda warp: value


def address_of(operand: str) -> Callable[[Warp], np.ndarray]:
    """[register], [register + number] or [symbol + number], as int64 [32]; in 32 bits the sum has no carry."""
    match = re.fullmatch(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\w+)\s*)?\]", operand)
    if match is None:
        raise Fault(f"address {operand!r} is unknown")
    name, offset = match[1], int(match[2] or "0", 0)
    if not name.startswith("%"):
        base = source_of(name, np.dtype(np.int64))
        return lambda warp: base(warp) + offset

    def address(warp: Warp) -> np.ndarray:
        bits = warp.bits(name)
        total = bits.astype(np.int64) + offset
        return total & 0xFFFFFFFF if bits.dtype.itemsize == 4 else total

    return address
